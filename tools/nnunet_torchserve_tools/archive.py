"""A trained nnU-Net folder becomes TorchServe model archives (.mar).

An archive holds the serving core, nnU-Net's plans and dataset description, each fold's weights as safetensors, a
golden patch and a description with checksums. The same folder gives the same bytes on the same machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from model_archiver.manifest_components.manifest import RuntimeType
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors.torch import save_file

import nnunet_handler
import nnunet_torchserve
from nnunet_torchserve.bundle import (
    ALIASES_KEY,
    BUNDLE_FILE,
    DATASET_FILE,
    GOLDEN_FILE,
    PLANS_FILE,
    REORIENTING_READERS,
    SCHEMA_VERSION,
    BundleDescription,
    FoldDescription,
    ModelBundle,
)
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import FoldNetworks, golden_tensors
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import FoldName
from nnunet_torchserve.orientation import is_orientation
from nnunet_torchserve.painting import read_painting
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.settings import HandlerSettings

from .checkpoint import Checkpoint, read_checkpoint, without_aliases
from .errors import ModelWarning, ToolError, UsageError
from .plans_check import check_mirroring, check_plans, network_builder

MODEL_CONFIG_FILE = "model-config.yaml"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"

REQUIRES = {
    "nnunetv2": ">=2.8,<3",
    "torch": ">=2.4",
    "numpy": ">=1.26",
    "scipy": ">=1.11",
    "scikit-image": ">=0.22",
    "nibabel": ">=5.2",
    "SimpleITK": ">=2.3",
    "connected-components-3d": ">=3.12",
    "imageio": ">=2.33",
    "pillow": ">=10.1",
    "tifffile": ">=2024.1",
    "safetensors": ">=0.4",
    "pydantic": ">=2.7",
    "isal": ">=1.6",
}
_BUILT_WITH = (*REQUIRES, "dynamic-network-architectures", "acvl-utils", "nnunet-torchserve")

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")
_FOLD_FOLDER = re.compile(r"fold_(\d+)")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_COPY_BYTES = 1024**2
_DRY_RUN_LIMIT_S = 600.0
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """What goes to model-config.yaml.

    Attributes:
        workers: TorchServe workers in all; ``None`` leaves it to ``serve``, or to ``default_workers_per_model`` of a
            bare TorchServe.
        response_timeout_s: seconds before TorchServe kills a worker that has not answered.
        startup_timeout_s: seconds that a worker may take to load.
        max_patch_batch: passes in a batch; ``auto`` is 1 on a CPU and probed on a GPU.
        policy: which case goes first, of :class:`nnunet_torchserve.engine.scheduler.Policy`.
        limits: overrides of :class:`nnunet_torchserve.limits.Limits`.
        golden_interval_s: seconds between two checks of the golden patch in a running engine; ``None``: at its start.
        cache_bytes: preprocessed volumes that an engine keeps for later requests with the same image.
        single_flight: equal requests at the same time are computed once.
        unload_after_s: seconds without a request after which an engine unloads its networks; ``None``: never.
        device_ids: GPUs that serve the model, in TorchServe's numbers; ``None``: all. Without meaning on a CPU.
    """

    workers: int | None = None
    response_timeout_s: int = 1200
    startup_timeout_s: int = 600
    max_patch_batch: int | Literal["auto"] = "auto"
    policy: str = "shortest_remaining"
    limits: Mapping[str, int] = field(default_factory=dict)
    golden_interval_s: float | None = None
    cache_bytes: int = 0
    single_flight: bool = False
    unload_after_s: float | None = None
    device_ids: tuple[int, ...] | None = None

    @property
    def handler(self) -> HandlerSettings:
        """What a worker will read of it.

        Raises:
            UsageError: a value that a worker would refuse.
        """
        try:
            return HandlerSettings.read(self._handler_section())
        except BundleError as error:
            raise UsageError(str(error)) from error

    def _handler_section(self) -> dict[str, Any]:
        return {
            "max_patch_batch": self.max_patch_batch,
            "policy": str(self.policy),
            "limits": dict(self.limits),
            "golden_interval_s": self.golden_interval_s,
            "cache_bytes": self.cache_bytes,
            "single_flight": self.single_flight,
            "unload_after_s": self.unload_after_s,
        }

    def to_yaml(self) -> str:
        """The file's text. ``batchSize`` is 1: patches are batched by the engine, not requests by TorchServe."""
        workers = {} if self.workers is None else {"minWorkers": self.workers, "maxWorkers": self.workers}
        devices = {} if self.device_ids is None else {"deviceIds": list(self.device_ids)}
        document = (workers | devices) | {
            "batchSize": 1,
            "maxBatchDelay": 1,
            "responseTimeout": self.response_timeout_s,
            "startupTimeout": self.startup_timeout_s,
            "handler": self._handler_section(),
        }
        return yaml.safe_dump(document, sort_keys=False)


@dataclass(frozen=True, slots=True)
class ArchiveRequest:
    """What to package.

    Attributes:
        model_folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.
        output: where the archives go.
        folds: ``None`` takes every numbered fold.
        per_fold: also make one archive for each fold.
        name: ``None`` makes one of dataset and configuration.
        version: TorchServe model version.
        checkpoint: file name within each fold's folder.
        trust_checkpoint: open checkpoints as ordinary pickles.
        input_orientation: nibabel's letters of the orientation that the model was trained in, every image is brought
            into it; ``None``: images are taken as they are sent, as nnU-Net takes them.
        serving: what goes to model-config.yaml.
    """

    model_folder: Path
    output: Path
    folds: tuple[FoldName, ...] | None = None
    per_fold: bool = False
    name: str | None = None
    version: str = "1.0"
    checkpoint: str = "checkpoint_final.pth"
    trust_checkpoint: bool = False
    input_orientation: str | None = None
    serving: ServingSettings = field(default_factory=ServingSettings)


def make_archives(request: ArchiveRequest) -> list[Path]:
    """Make the archives.

    Returns:
        The written files: the one with all chosen folds first.

    Raises:
        UsageError: the folder, a name or a fold does not exist or cannot be meant.
        ToolError: a checkpoint or plans.json is damaged, disagrees with another, or names what it must not.

    Warns:
        ModelWarning: the values of its label maps are not those that dataset.json suggests, or do not say everything;
            or its trial did not prove that it answers.
    """
    folder = request.model_folder
    if not folder.is_dir():
        msg = f"{folder} does not exist or is no folder; name nnU-Net's TRAINER__PLANS__CONFIGURATION folder"
        raise UsageError(msg)
    plans, dataset = _read_json(folder / PLANS_FILE), _read_json(folder / DATASET_FILE)
    folds = request.folds or _numbered_folds(folder, request.checkpoint)
    checkpoints = _read_checkpoints(folder, folds, request)
    first = checkpoints[folds[0]]
    network_class = check_plans(plans, first.configuration)
    patch = PlansManager(plans).get_configuration(first.configuration).patch_size
    for checkpoint in checkpoints.values():
        check_mirroring(checkpoint.mirroring_axes, len(patch))
    name = request.name or _default_name(plans, first.configuration)
    if not MODEL_NAME.fullmatch(name):
        msg = f"the model name {name!r} may hold only letters, digits, '_' and '-'; choose one with --name"
        raise UsageError(msg)
    if not _VERSION.fullmatch(request.version):
        msg = f"the version {request.version!r} must be numbers and dots, as in 1.0"
        raise UsageError(msg)
    _check_orientation(request.input_orientation, str(plans["image_reader_writer"]))
    check_device_ids(request.serving.device_ids)
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the output folder {request.output}: {error.strerror}"
        raise UsageError(msg) from error
    contents: list[tuple[str, tuple[FoldName, ...]]] = [(name, folds)]
    if request.per_fold:
        contents += [(f"{name}_fold_{fold}", (fold,)) for fold in folds]
    try:
        _warn_of_values(plans, dataset)
        return [
            _make_archive(
                request, archive_name, plans, dataset, {fold: checkpoints[fold] for fold in chosen}, network_class
            )
            for archive_name, chosen in contents
        ]
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        msg = f"plans.json, dataset.json and the checkpoints make no network: {type(error).__name__} {error}"
        raise ToolError(msg) from error


def _make_archive(
    request: ArchiveRequest,
    name: str,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    checkpoints: Mapping[FoldName, Checkpoint],
    network_class: str | None,
) -> Path:
    first = next(iter(checkpoints.values()))
    builder, network_trainer = network_builder(first.trainer)
    with tempfile.TemporaryDirectory(prefix="nnunet-torchserve-archive-") as scratch:
        stage = Path(scratch)
        for file, source in serving_core_files().items():
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).write_bytes(source.read_bytes())
        (stage / PLANS_FILE).write_text(json.dumps(plans, indent=1))
        # nnU-Net numbers its classes in the order of this file's labels: keep it
        (stage / DATASET_FILE).write_text(json.dumps(dataset, indent=1))
        folds = tuple(
            FoldDescription(fold=fold, mirroring_axes=c.mirroring_axes, checkpoint_sha256=c.sha256)
            for fold, c in checkpoints.items()
        )
        for description in folds:
            tensors, aliases = without_aliases(checkpoints[description.fold].weights)
            metadata = {ALIASES_KEY: json.dumps(aliases, sort_keys=True)}
            save_file(tensors, stage / description.weights_file, metadata=metadata)
        bundle = BundleDescription(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=request.version,
            dataset=str(plans["dataset_name"]),
            trainer=first.trainer,
            plans=str(plans["plans_name"]),
            configuration=first.configuration,
            network_builder=builder,
            folds=folds,
            requires=REQUIRES,
            built_with=_installed_versions(),
            source={"folder": "/".join(request.model_folder.resolve().parts[-2:]), "checkpoint": request.checkpoint},
            files={},
            input_orientation=request.input_orientation,
            network_class=network_class,
            network_trainer=network_trainer,
        )
        _add_golden_patch(stage, bundle, request.serving.handler)
        (stage / MODEL_CONFIG_FILE).write_text(request.serving.to_yaml())
        (stage / MANIFEST_FILE).parent.mkdir()
        (stage / MANIFEST_FILE).write_text(_manifest(name, request.version))
        target = request.output / f"{name}.mar"
        _write_zip(stage, target)
    return target


def serving_core_files() -> dict[str, Path]:
    """Archive name -> file, of the entry file and the serving core, from where they are installed."""
    handler = Path(nnunet_handler.__file__)
    core = Path(nnunet_torchserve.__file__).parent
    files = {handler.name: handler}
    files |= {f"{core.name}/{file.relative_to(core).as_posix()}": file for file in sorted(core.rglob("*.py"))}
    return files


def _add_golden_patch(stage: Path, description: BundleDescription, settings: HandlerSettings) -> None:
    """Run the stored weights once on one thread and write ``bundle.json``, complete.

    Then load what was written as a worker does, with the archive's own settings: it must give the same again, and
    answer one small case.
    """
    _write_bundle(stage, description)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bundle = ModelBundle(stage)
        networks = FoldNetworks(bundle, _CPU)
        save_file(golden_tensors(networks, bundle.folds), stage / GOLDEN_FILE)
        _write_bundle(stage, description)
        complete = ModelBundle(stage)
        limits = Limits.from_settings(settings.limits, {}).for_model(complete.channels)
        batch = 1 if settings.max_patch_batch == "auto" else settings.max_patch_batch
        engine = LocalEngine(complete, _CPU, batch, settings.policy, limits)
        if (warning := Pipeline(complete, engine, limits, _DRY_RUN_LIMIT_S, settings=settings).dry_run()) is not None:
            warnings.warn(warning, ModelWarning, stacklevel=4)
    except BundleError as error:
        raise ToolError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def _write_bundle(stage: Path, description: BundleDescription) -> None:
    """Write ``bundle.json`` for the files that are there."""
    files = {
        file.relative_to(stage).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(stage.rglob("*"))
        if file.is_file() and file.name != BUNDLE_FILE
    }
    complete = description.model_copy(update={"files": files})
    (stage / BUNDLE_FILE).write_text(complete.model_dump_json(indent=1))


def _write_zip(stage: Path, target: Path) -> None:
    """Stored, sorted, with fixed times and modes; put in place in one step."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as unfinished:
        try:
            with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for file in sorted(f for f in stage.rglob("*") if f.is_file()):
                    entry = zipfile.ZipInfo(file.relative_to(stage).as_posix(), date_time=_ZIP_TIME)
                    entry.create_system, entry.external_attr = 3, 0o644 << 16
                    entry.file_size = file.stat().st_size
                    with file.open("rb") as source, archive.open(entry, "w") as sink:
                        while chunk := source.read(_COPY_BYTES):
                            sink.write(chunk)
            unfinished.close()
            Path(unfinished.name).chmod(0o644)
            Path(unfinished.name).replace(target)
        except BaseException:
            Path(unfinished.name).unlink(missing_ok=True)
            raise


def _manifest(name: str, version: str) -> str:
    config = ModelArchiverConfig(
        model_name=name,
        handler=Path(nnunet_handler.__file__).name,
        version=version,
        runtime=RuntimeType.PYTHON.value,
        config_file=MODEL_CONFIG_FILE,
    )
    manifest = json.loads(ModelExportUtils.generate_manifest_json(config))
    del manifest["createdOn"]
    return json.dumps(manifest, indent=2, sort_keys=True)


def _read_checkpoints(folder: Path, folds: Sequence[FoldName], request: ArchiveRequest) -> dict[FoldName, Checkpoint]:
    checkpoints: dict[FoldName, Checkpoint] = {}
    for fold in folds:
        file = folder / f"fold_{fold}" / request.checkpoint
        if not file.is_file():
            files = _files_of_folds(folder)
            there = [name for name in files if request.checkpoint in files[name]]
            msg = f"fold {fold} has no {request.checkpoint} in {folder}, which has it for {_spoken(there)}"
            if other := _other_checkpoint(files, [fold], request.checkpoint):
                msg += f"; --checkpoint {other} takes what fold {fold} has"
            raise UsageError(msg)
        checkpoints[fold] = read_checkpoint(file, trust=request.trust_checkpoint)
    first_fold, first = next(iter(checkpoints.items()))
    for fold, checkpoint in checkpoints.items():
        for what in ("trainer", "configuration"):
            if (other := getattr(checkpoint, what)) != (expected := getattr(first, what)):
                msg = f"fold {fold} has the {what} {other}, fold {first_fold} has {expected}: they are no ensemble"
                raise ToolError(msg)
    return checkpoints


def _numbered_folds(folder: Path, checkpoint: str) -> tuple[FoldName, ...]:
    """Every numbered fold.

    Raises:
        UsageError: there is none with the checkpoint, or there are some without it: whoever forgot that a fold is still
            being trained would never see that the ensemble lacks it.
    """
    files = _files_of_folds(folder)
    numbered = [fold for fold in files if fold != "all"]
    found = tuple(fold for fold in numbered if checkpoint in files[fold])
    lacking = [fold for fold in numbered if checkpoint not in files[fold]]
    if found and not lacking:
        return found
    if found:
        verb, them = ("has", "it") if len(lacking) == 1 else ("have", "them")
        msg = (
            f"{_spoken(lacking)} of {folder} {verb} no {checkpoint}; "
            f"--folds {','.join(map(str, found))} makes an archive without {them}"
        )
        if other := _other_checkpoint(files, numbered, checkpoint):
            msg += f", --checkpoint {other} takes a file that all of them have"
    elif checkpoint in files.get("all", ()):
        msg = f"{folder} has no numbered fold with a {checkpoint}, but fold_all has it: take that with --folds all"
    else:
        msg = f"{folder} has no fold with a {checkpoint}; " + _other_way(files, numbered, checkpoint)
    raise UsageError(msg)


def _other_way(files: Mapping[FoldName, Sequence[str]], numbered: Sequence[FoldName], checkpoint: str) -> str:
    """Which flags take what is there, where no fold has the checkpoint."""
    having = [fold for fold in numbered if _other_checkpoint(files, [fold], checkpoint)]
    if having and (other := _other_checkpoint(files, having, checkpoint)):
        folds = "" if len(having) == len(numbered) else f"--folds {','.join(map(str, having))} "
        have = "has" if len(having) == 1 else "have"
        return f"{_spoken(having)} {have} {other}: take it with {folds}--checkpoint {other}"
    if having:
        return "their checkpoints have different names: choose with --folds and --checkpoint"
    if "all" in files and (other := _other_checkpoint(files, ["all"], checkpoint)):
        return f"fold_all has {other}: take it with --folds all --checkpoint {other}"
    return "was the training ended? Name the folder that has fold_0, fold_1, … with checkpoints in them"


def _other_checkpoint(
    files: Mapping[FoldName, Sequence[str]], folds: Sequence[FoldName], checkpoint: str
) -> str | None:
    """A checkpoint that all of these folds have: best before latest."""
    common = set.intersection(*(set(files.get(fold, ())) for fold in folds)) if folds else set()
    return min((name for name in common if name.endswith(".pth") and name != checkpoint), default=None)


def _files_of_folds(folder: Path) -> dict[FoldName, list[str]]:
    """The names of the files in each fold's folder; numbers in order, then ``all``."""
    folders = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()}
    numbers = sorted(int(found[1]) for found in map(_FOLD_FOLDER.fullmatch, folders) if found)
    folds: list[FoldName] = [*numbers, "all"]
    return {
        fold: [file.name for file in folders[f"fold_{fold}"].iterdir() if file.is_file()]
        for fold in folds
        if f"fold_{fold}" in folders
    }


def _spoken(folds: Sequence[FoldName]) -> str:
    """As in "fold_0, fold_2"."""
    return ", ".join(f"fold_{fold}" for fold in folds) or "no fold"


def _warn_of_values(plans: dict[str, Any], dataset: Mapping[str, Any]) -> None:
    has_regions = PlansManager(plans).get_label_manager(dataset).has_regions
    try:
        painting = read_painting(dataset["labels"], dataset.get("regions_class_order"), has_regions=has_regions)
    except (LookupError, TypeError, ValueError) as error:
        msg = f"dataset.json: labels and regions_class_order cannot be read: {error}"
        raise ToolError(msg) from error
    for remark in painting.remarks:
        warnings.warn(f"{remark} The report of a segmentation says so too.", ModelWarning, stacklevel=3)


def _check_orientation(letters: str | None, reader: str) -> None:
    if letters is None:
        return
    if not is_orientation(letters):
        msg = f"--input-orientation {letters}: three letters were expected, one each of L/R, A/P and S/I, as in RAS"
        raise UsageError(msg)
    if (own := REORIENTING_READERS.get(reader, letters)) != letters:
        msg = f"--input-orientation {letters}: the plan's reader {reader} brings every image into {own} itself"
        raise UsageError(msg)


def check_device_ids(ids: object) -> tuple[int, ...]:
    """GPU numbers as TorchServe takes them, which drops the whole list and says so in its log only; empty for none.

    Raises:
        UsageError: they are no list of different numbers from 0.
    """
    numbers = ids if isinstance(ids, list | tuple) else () if ids is None else (ids,)
    if any(type(each) is not int or each < 0 for each in numbers) or len(set(numbers)) != len(numbers):
        msg = f"deviceIds {ids}: different numbers from 0, separated by commas, were expected"
        raise UsageError(msg)
    return tuple(numbers)


def _default_name(plans: Mapping[str, Any], configuration: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{plans['dataset_name']}_{configuration}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{file.parent} is no trained nnU-Net folder (TRAINER__PLANS__CONFIGURATION): it has no {file.name}"
        raise UsageError(msg) from error
    except ValueError as error:
        msg = f"{file} is no valid JSON"
        raise ToolError(msg) from error
    if not isinstance(content, dict):
        msg = f"{file} holds no JSON object"
        raise ToolError(msg)
    return content


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _BUILT_WITH:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
