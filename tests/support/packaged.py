"""A trained folder, archived by the tool and unpacked as TorchServe does it: the pipeline that a worker has."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest


def pipeline_of(model: Path, folder: Path, **fields: Any) -> Pipeline:
    """Serve the archive of ``model``, which is made in ``folder``; ``fields`` are those of :class:`ArchiveRequest`."""
    [archive] = make_archives(ArchiveRequest(model, folder / "store", name="m", **fields))
    zipfile.ZipFile(archive).extractall(folder / "unpacked")
    bundle = ModelBundle(folder / "unpacked")
    return Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)
