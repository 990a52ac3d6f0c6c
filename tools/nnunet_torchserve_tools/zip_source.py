"""The zip of ``nnUNetv2_export_model_to_zip`` as a source of models.

nnU-Net installs it by unpacking everything into its results folder. Here the list of entries is checked first, and
only what an archive is made of is unpacked, into a private directory that is removed as soon as it is not needed. A zip
cannot bring code: no trainer file is among what is read.
"""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunet_torchserve.options import FoldName

from .errors import ToolError, UsageError
from .harmless import printable
from .model_folders import NO_ZIP

MOST_BYTES = 2**36
"""64 GiB that are unpacked at most: four configurations of five folds have 3 GB for each checkpoint then."""

_MOST_ENTRIES = 100_000
"""The zip may hold all predictions of a cross-validation."""

_MOST_SMALL_BYTES = 2**26
"""Of a file that is no checkpoint."""

_MOST_EXPANSION, _SMALL_BYTES = 10, 2**30
"""Weights hardly get shorter by packing: what expands to more than a GiB and ten times its length is a trap."""

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Others may take gigabytes to unpack anything."""

_ENCRYPTED = 1
"""A bit of an entry's flags."""

_CHUNK_BYTES = 2**20
_CHECKPOINT = ".pth"
_DATASET = r"(?P<dataset>Dataset\d{3,}_[^/]+)"
_MODEL = r"(?P<model>[^/]+?__[^/]+?__[^/]+)"
_OF_DATASETS = re.compile(
    rf"{_DATASET}/(?:inference_information\.json|ensembles/ensemble___[^/]+/postprocessing\.(?:json|pkl))"
)
_OF_MODELS = re.compile(
    rf"{_DATASET}/{_MODEL}/(?:plans\.json|dataset\.json|fold_(?P<fold>\d+|all)/(?P<checkpoint>[^/]+\.pth)"
    r"|crossval_results_folds_[\d_]+/postprocessing\.(?:json|pkl))"
)
_EXPECTED = "the zip of nnUNetv2_export_model_to_zip holds DATASET/TRAINER__PLANS__CONFIGURATION/plans.json and more"


@dataclass(frozen=True, slots=True)
class ZippedModel:
    """One model that a zip holds.

    Attributes:
        dataset: its name, as in ``Dataset004_Hippocampus``.
        folder_name: ``TRAINER__PLANS__CONFIGURATION``.
        bytes: of its files, unpacked.
    """

    dataset: str
    folder_name: str
    bytes: int

    @property
    def configuration(self) -> str:
        """Its configuration's name."""
        return self.folder_name.split("__", 2)[2]

    @property
    def path(self) -> str:
        """Where nnU-Net's results folder has it, and the zip: DATASET/TRAINER__PLANS__CONFIGURATION."""
        return f"{self.dataset}/{self.folder_name}"


@dataclass(frozen=True, slots=True)
class WantedWeights:
    """Which checkpoints are unpacked.

    In place of each other one there is an empty file: what a message says of a folder holds for its zip.

    Attributes:
        folds: ``None`` takes every numbered one, as an archive does.
        checkpoint: file name within each fold's folder.
    """

    folds: tuple[FoldName, ...] | None
    checkpoint: str

    def has(self, fold: str, checkpoint: str) -> bool:
        """Whether that of this fold is one of them."""
        wanted = fold != "all" if self.folds is None else fold in map(str, self.folds)
        return wanted and checkpoint == self.checkpoint


@dataclass(frozen=True, slots=True)
class UnzippedModels:
    """What was unpacked, for as long as the ``with`` block lasts.

    Attributes:
        results: laid out as nnU-Net's results folder: DATASET/TRAINER__PLANS__CONFIGURATION; beside the models
            ``inference_information.json`` and ``ensembles``, where the zip has them.
        models: the models that were asked for.
        folders: their folders below ``results``, in the same order.
    """

    results: Path
    models: tuple[ZippedModel, ...]
    folders: tuple[Path, ...]


def is_zip(file: Path) -> bool:
    """Whether a file begins as a zip does."""
    try:
        with file.open("rb") as stream:
            return stream.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def models_in(file: Path) -> tuple[ZippedModel, ...]:
    """The models that a zip holds, by their names; nothing is unpacked.

    Raises:
        ToolError: it is no zip, a damaged one, none of nnU-Net's, or one that tries to write elsewhere.
    """
    with _opened(file) as archive:
        return _models(file, _wanted(file, archive))


@contextmanager
def unzipped(
    file: Path,
    names: Sequence[str] | None = None,
    *,
    weights: WantedWeights | bool = True,
    most_bytes: int = MOST_BYTES,
) -> Iterator[UnzippedModels]:
    """Unpack what archives are made of into a private directory, which is removed in the end.

    Args:
        file: the zip.
        names: which models are unpacked, in this order, as :func:`chosen` takes them; ``None`` takes all, by their
            names.
        weights: which checkpoints too, all or none of them; without them all that is said of the models is there.
        most_bytes: what may be unpacked in all.

    Raises:
        UsageError: the zip lacks a configuration, or has it for several trainers or plans.
        ToolError: as :func:`models_in`; it is too large, there is no room for it, or it does not hold what its list
            says.
    """
    with _opened(file) as archive:
        wanted = _wanted(file, archive)
        models = chosen(file, _models(file, wanted), names)
        of_models = [entry for entry in wanted if _is_of(entry, models)]
        kept = [entry for entry in of_models if _is_kept(entry, weights)]
        named = [] if weights is False else [entry for entry in of_models if not _is_kept(entry, weights)]
        _check_sizes(file, kept, most_bytes)
        with _private_folder(file, sum(entry.file_size for entry in kept)) as results:
            for entry in kept:
                _unpack(file, archive, entry, results / entry.filename)
            for entry in named:
                _stand_in(file, entry, results / entry.filename)
            yield UnzippedModels(results, models, tuple(results / each.path for each in models))


def chosen(file: Path, models: Sequence[ZippedModel], names: Sequence[str] | None) -> tuple[ZippedModel, ...]:
    """Some of a zip's models.

    Args:
        file: the zip.
        models: all of them.
        names: of configurations; where a zip has one for several trainers or plans, TRAINER__PLANS__CONFIGURATION, or
            that below its DATASET. ``None`` takes all.

    Raises:
        UsageError: there is no such model, or more than one.
    """
    if names is None:
        return tuple(models)
    found = []
    for name in dict.fromkeys(names):
        fitting = [model for model in models if name in {model.configuration, model.folder_name, model.path}]
        if not fitting:
            there = ", ".join(dict.fromkeys(model.configuration for model in models))
            msg = f"{file} has no configuration {name}; it has {printable(there)}"
            raise UsageError(msg)
        if len(fitting) > 1:
            paths = " or ".join(printable(model.path) for model in fitting)
            msg = f"{file} has the configuration {name} several times; name one whole: --configuration {paths}"
            raise UsageError(msg)
        found += fitting
    return tuple(dict.fromkeys(found))


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    if not file.is_file():
        msg = f"{file} {NO_ZIP}"
        raise UsageError(msg)
    try:
        archive = zipfile.ZipFile(file)
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise ToolError(msg) from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError) as error:
        msg = f"{file} is no zip, or a damaged one"
        raise ToolError(msg) from error
    with archive:
        yield archive


def _wanted(file: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries that archives are made of; all of the zip's are checked."""
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        msg = f"{file} has {len(entries)} entries, at most {_MOST_ENTRIES} are read; export it without predictions"
        raise ToolError(msg)
    seen: set[str] = set()
    for entry in entries:
        name = printable(entry.orig_filename)
        if reason := _unsafe(entry):
            msg = f"{file} has an entry {name} that {reason}; nnU-Net does not write such files"
            raise ToolError(msg)
        if (plain := entry.filename.rstrip("/")) in seen:
            msg = f"{file} has the entry {name} twice; which one is meant cannot be told"
            raise ToolError(msg)
        seen.add(plain)
    return [
        entry for entry in entries if _OF_DATASETS.fullmatch(entry.filename) or _OF_MODELS.fullmatch(entry.filename)
    ]


def _unsafe(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry is not to be unpacked."""
    name = entry.filename
    path = name.removesuffix("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    reasons = {
        "has a name that systems read differently": (
            entry.orig_filename != name or "\\" in name or not name.isprintable()
        ),
        "has an absolute path": path.startswith("/") or re.match("[A-Za-z]:", path) is not None,
        "leads out of its folder or has an empty name": any(part in {"", ".", ".."} for part in path.split("/")),
        "is a link or a device": kind not in {0, stat.S_IFREG, stat.S_IFDIR},
        "is encrypted": bool(entry.flag_bits & _ENCRYPTED),
        "is packed in another way than zips usually are": entry.compress_type not in _METHODS,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _models(file: Path, wanted: Sequence[zipfile.ZipInfo]) -> tuple[ZippedModel, ...]:
    bytes_of: dict[tuple[str, str], int] = {}
    described = set()
    for entry in wanted:
        if found := _OF_MODELS.fullmatch(entry.filename):
            key = (found["dataset"], found["model"])
            bytes_of[key] = bytes_of.get(key, 0) + entry.file_size
            if entry.filename.endswith(f"{found['model']}/plans.json"):
                described.add(key)
    if not described:
        msg = f"{file} holds no trained nnU-Net model: {_EXPECTED}"
        raise ToolError(msg)
    return tuple(ZippedModel(*key, bytes_of[key]) for key in sorted(described))


def _is_of(entry: zipfile.ZipInfo, models: Sequence[ZippedModel]) -> bool:
    if found := _OF_MODELS.fullmatch(entry.filename):
        return any((found["dataset"], found["model"]) == (model.dataset, model.folder_name) for model in models)
    return any(entry.filename.startswith(f"{model.dataset}/") for model in models)


def _is_kept(entry: zipfile.ZipInfo, weights: WantedWeights | bool) -> bool:
    found = _OF_MODELS.fullmatch(entry.filename)
    if found is None or found["checkpoint"] is None:
        return True
    return weights if isinstance(weights, bool) else weights.has(found["fold"], found["checkpoint"])


def _check_sizes(file: Path, entries: Sequence[zipfile.ZipInfo], most_bytes: int) -> None:
    total = sum(entry.file_size for entry in entries)
    if total > most_bytes:
        msg = (
            f"{file} would expand to {total} bytes, at most {most_bytes} are unpacked; choose with --configuration "
            "or --folds"
        )
        raise ToolError(msg)
    if total > max(_SMALL_BYTES, _MOST_EXPANSION * file.stat().st_size):
        msg = f"{file} has {file.stat().st_size} bytes and would expand to {total}: no weights get so much shorter"
        raise ToolError(msg)
    for entry in entries:
        if not entry.filename.endswith(_CHECKPOINT) and entry.file_size > _MOST_SMALL_BYTES:
            msg = f"{file}: {printable(entry.filename)} has {entry.file_size} bytes; nnU-Net does not write such files"
            raise ToolError(msg)


@contextmanager
def _private_folder(file: Path, size: int) -> Iterator[Path]:
    """A new directory of ours alone, with room for so many bytes."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="nnunet-torchserve-zip-")
    except OSError as error:
        msg = f"there is no directory for temporary files ({error.strerror}); name a writable one in TMPDIR"
        raise ToolError(msg) from error
    with folder as name:
        if (free := shutil.disk_usage(name).free) < size:
            msg = f"{file} needs {size} bytes for a while, {free} are free for temporary files; name a place in TMPDIR"
            raise ToolError(msg)
        yield Path(name)


def _stand_in(file: Path, entry: zipfile.ZipInfo, target: Path) -> None:
    """An empty file in place of one that is not needed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(exist_ok=False)
    except OSError as error:
        msg = f"cannot unpack {printable(entry.filename)} of {file}: {error.strerror or error}"
        raise ToolError(msg) from error


def _unpack(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """One file, which must have the bytes and the checksum that the list says; ``zipfile`` reads no byte more."""
    name = printable(entry.filename)
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as sink, archive.open(entry) as source:
            while chunk := source.read(_CHUNK_BYTES):
                written += len(chunk)
                sink.write(chunk)
    except OSError as error:
        msg = f"cannot unpack {name} of {file}: {error.strerror or error}"
        raise ToolError(msg) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        msg = f"{file} is damaged: {name} is not what the list of its entries says"
        raise ToolError(msg) from error
    if written != entry.file_size:
        msg = f"{file} is damaged: {name} has not the {entry.file_size} bytes that the list of its entries says"
        raise ToolError(msg)
