"""Which engine each worker of a server uses: workers write it down, and who looks after the server reads it.

The name of an engine's directory is a sum of all that decides what it computes, which only its workers know. Each
writes it to ``engines/<pid>`` in the server's private directory when it has loaded, and nobody takes it away: whoever
reads it knows which workers there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ENGINES = "engines"


@dataclass(frozen=True, slots=True)
class Used:
    """The engine of a worker.

    Attributes:
        folder: its own directory.
        device: such as ``cpu`` or ``cuda:0``.
    """

    folder: str
    device: str


def note_engine(control: Path | None, used: Used) -> None:
    """Write down which engine this worker uses; a bare TorchServe has no place for it.

    Raises:
        OSError: it cannot be written.
    """
    if control is None:
        return
    file = control / ENGINES / str(os.getpid())
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(json.dumps(asdict(used)))
    unfinished.replace(file)


def engines_of(control: Path, workers: Iterable[int]) -> dict[int, Used]:
    """The engine of each of these workers that has written it down, by process id."""
    found = {}
    for pid in workers:
        try:
            found[pid] = Used(**json.loads((control / ENGINES / str(pid)).read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return found
