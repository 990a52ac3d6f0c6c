"""The archives of a model store, and what a server must know of each before it starts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nnunet_torchserve.accuracy import ACCURACY_FILE
from nnunet_torchserve.backend import AUTO, Backend, Choice, StoredBackend, wanted_backend, why_not_served
from nnunet_torchserve.bundle import BUNDLE_FILE, check_requirements
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.served import ServedModel, served_model
from nnunet_torchserve.settings import HandlerSettings

from .compiler import why_not_compiled
from .errors import UsageError
from .mar import MANIFEST_FILE, MODEL_NAME
from .server import DEFAULT_RESPONSE_TIMEOUT_S
from .serving_settings import MODEL_CONFIG_FILE, check_device_ids, read_model_config

WORKERS_ON_CPU, WORKERS_PER_GPU = 4, 8
"""A worker is one case in flight: the engine chooses among as many."""

_UNSPEAKABLE = (",", "\\", "..", "\n", "\r")
"""What TorchServe takes for something else in a list of models."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What the launcher needs of a .mar file.

    Attributes:
        name, version: TorchServe's.
        file: in the model store.
        model: what it says of itself.
        workers: in all; ``None`` if it does not say.
        device_ids: the GPUs that serve it; empty for all.
        response_timeout_s: what a request may take.
        code: files of somebody's own that it brings along.
        backend: that it holds something for, beside eager.
        wanted_backend: that its model-config.yaml names.
        measured: that it has a report of that backend's accuracy.
    """

    name: str
    version: str
    file: str
    model: ServedModel
    workers: int | None
    device_ids: tuple[int, ...] = ()
    response_timeout_s: float = DEFAULT_RESPONSE_TIMEOUT_S
    code: tuple[str, ...] = ()
    backend: StoredBackend | None = field(default=None, hash=False)
    wanted_backend: Choice | None = None
    measured: bool = False

    def gpus_of(self, gpus: int) -> int:
        """How many of so many GPUs serve it."""
        return min(gpus, len(self.device_ids) or gpus)

    def workers_on(self, gpus: int, asked: int | None) -> int:
        """TorchServe workers on that many GPUs, or on the CPU."""
        gpus = self.gpus_of(gpus)
        if asked is not None:
            return asked * max(1, gpus)
        if self.workers is not None:
            return max(self.workers, gpus)
        return WORKERS_PER_GPU * gpus or WORKERS_ON_CPU

    def workers_on_one(self, gpus: int, asked: int | None) -> int:
        """The workers that share an engine, at most."""
        return -(-self.workers_on(gpus, asked) // max(1, self.gpus_of(gpus)))


def find_archives(model_store: Path, models: Sequence[str]) -> list[Archive]:
    """The archives to serve.

    Raises:
        UsageError: no such folder or file, or a file that 'nnunet-torchserve archive' did not make.
    """
    if not model_store.is_dir():
        msg = f"the model store {model_store.resolve()} does not exist; first: nnunet-torchserve archive MODEL_FOLDER"
        raise UsageError(msg)
    if list(models) == ["all"]:
        wanted: list[tuple[str | None, str]] = [(None, file.name) for file in sorted(model_store.glob("*.mar"))]
        if not wanted:
            msg = f"{model_store.resolve()} has no archive (*.mar); first: nnunet-torchserve archive MODEL_FOLDER"
            raise UsageError(msg)
    else:
        wanted = [(name or None, file) for name, _, file in (model.rpartition("=") for model in models)]
    archives = [_read_archive(model_store, name, file) for name, file in wanted]
    for number, archive in enumerate(archives):
        for other in archives[:number]:
            if (other.name, other.version) == (archive.name, archive.version):
                msg = f"{other.file} and {archive.file} are both {archive.name} {archive.version}; serve one of them"
                raise UsageError(msg)
    return archives


def _read_archive(model_store: Path, name: str | None, file: str) -> Archive:
    if name is not None and not MODEL_NAME.fullmatch(name):
        msg = f"{name!r} is no model name; use --models NAME=FILE.mar, once for each model"
        raise UsageError(msg)
    if any(part in file for part in _UNSPEAKABLE):
        msg = f"{file!r} cannot be told to TorchServe: rename it, without comma, backslash and two dots in a row"
        raise UsageError(msg)
    if "/" in file or not (model_store / file).is_file():
        found = ", ".join(sorted(f.name for f in model_store.glob("*.mar"))) or "none"
        msg = f"the model store {model_store.resolve()} has no archive {file}; it has: {found}"
        raise UsageError(msg)
    try:
        with zipfile.ZipFile(model_store / file) as archive:
            bundle = archive.read(BUNDLE_FILE)
            model = json.loads(archive.read(MANIFEST_FILE))["model"]
            config = read_model_config(archive.read(MODEL_CONFIG_FILE))
        handler = HandlerSettings.read(config.get("handler"))
        workers = config.get("minWorkers")
        if workers is not None and (type(workers) is not int or workers < 1):
            msg = f"minWorkers: {workers!r} should be a number from 1"
            raise UsageError(msg)
        ids = check_device_ids(config.get("deviceIds"))
        timeout_s = float(config.get("responseTimeout") or DEFAULT_RESPONSE_TIMEOUT_S)
        name, version = name or model["modelName"], model["modelVersion"]
        described = json.loads(bundle)
        model_of, code, stored = (
            served_model(name, version, bundle),
            described.get("code") or {},
            _backend_of(described),
        )
        own, measured = tuple(map(str, code.get("files") or ())), ACCURACY_FILE in (described.get("files") or ())
        return Archive(name, version, file, model_of, workers, ids, timeout_s, own, stored, handler.backend, measured)
    except (UsageError, BundleError) as error:
        msg = f"{file}: {error}"
        raise UsageError(msg) from error
    except (zipfile.BadZipFile, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        msg = f"{file} is damaged or was not made by 'nnunet-torchserve archive'"
        raise UsageError(msg) from error


def _backend_of(described: dict[str, Any]) -> StoredBackend | None:
    """What an archive holds for another backend than eager; an archive of another core may speak of it otherwise."""
    try:
        return StoredBackend.model_validate(described["backend"])
    except (KeyError, ValidationError):
        return None


def missed_backend(archive: Archive, asked: Choice | None, gpus: int) -> str | None:
    """Why an archive will be served by eager although another backend is asked for, as far as it can be told here.

    Args:
        archive: to be served.
        asked: by ``serve --backend``.
        gpus: to be used.
    """
    stored = archive.backend
    wanted = wanted_backend(stored, archive.wanted_backend, {}) if asked is None else asked
    if wanted == AUTO:
        return None  # eager may be the fastest
    reason = why_not_served(wanted, stored, "cuda" if gpus else "cpu", measured=archive.measured)
    if reason is None and stored is not None:
        try:
            check_requirements(stored.requires if wanted is stored.backend else {}, f"backend {wanted}")
        except BundleError as error:
            reason = str(error)
    if reason is None and wanted is Backend.COMPILED:
        reason = why_not_compiled()
    return reason and f"{archive.file} is served by {Backend.EAGER} and not by {wanted}: {reason}"


def check_gpus(archives: Sequence[Archive], gpus: int) -> None:
    """Refuse what TorchServe would serve on every GPU; on a CPU there is nothing to choose from."""
    for archive in archives:
        if gpus and max(archive.device_ids, default=0) >= gpus:
            wanted = ", ".join(map(str, archive.device_ids))
            msg = f"{archive.file} is for the GPUs {wanted} (deviceIds), and there are {gpus}, numbered from 0"
            raise UsageError(msg)
