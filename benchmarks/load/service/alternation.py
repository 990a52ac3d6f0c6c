"""What the stories share: sides in turns, times from an answer's own account, and an archive unpacked."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.harness.served import MODEL
from benchmarks.harness.spread import spread
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest

Side = TypeVar("Side")


def turns(sides: Sequence[Side], count: int) -> Iterator[Side]:
    """Every side ``count`` times, in turns; every other turn goes the other way round."""
    for number in range(count):
        yield from sides[:: -1 if number % 2 else 1]


def network_seconds(server_timing: str) -> float:
    """The network's stage of a Server-Timing header."""
    stages = dict(entry.split(";dur=") for entry in server_timing.split(", "))
    return float(stages["network"]) / 1000


def in_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The spread in milliseconds."""
    return spread([1000 * each for each in seconds])


def unpack(model: Path, folds: tuple[int, ...] | None, scratch: Path) -> Path:
    """The directory that TorchServe would unpack the model's archive to."""
    [archive] = make_archives(ArchiveRequest(model, scratch / "store", folds=folds, name=MODEL))
    model_dir = scratch / "model"
    zipfile.ZipFile(archive).extractall(model_dir)
    return model_dir
