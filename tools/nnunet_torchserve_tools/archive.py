"""A trained nnU-Net folder becomes TorchServe model archives (.mar).

An archive holds the serving core, nnU-Net's plans and dataset description, each fold's weights as safetensors, a
golden patch and a description with checksums. The same folder gives the same bytes on the same machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors.torch import save_file

import nnunet_handler
import nnunet_torchserve
from nnunet_torchserve.bundle import BUNDLE_FILE, SCHEMA_VERSION, BundleDescription, ModelBundle
from nnunet_torchserve.engine.golden import golden_tensors
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import FoldNetworks
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import (
    ALIASES_KEY,
    DATASET_FILE,
    GOLDEN_FILE,
    PLANS_FILE,
    REORIENTING_READERS,
    FoldDescription,
    MemberDescription,
)
from nnunet_torchserve.options import FoldName
from nnunet_torchserve.orientation import is_orientation
from nnunet_torchserve.painting import read_painting
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.recipe import Single
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve_client.choosing import archive_name

from .checkpoint import Checkpoint, without_aliases
from .errors import ModelWarning, ToolError, UsageError
from .folds import numbered_folds, read_checkpoints
from .mar import MANIFEST_FILE, MODEL_NAME, VERSION, manifest, write_zip
from .plans_check import check_mirroring, check_plans, network_builder
from .serving_settings import MODEL_CONFIG_FILE, ServingSettings, check_device_ids

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

_DRY_RUN_LIMIT_S = 600.0
_CPU = torch.device("cpu")


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
    folds = request.folds or numbered_folds(folder, request.checkpoint)
    checkpoints = read_checkpoints(folder, folds, request.checkpoint, trust=request.trust_checkpoint)
    first = checkpoints[folds[0]]
    network_class = check_plans(plans, first.configuration)
    patch = PlansManager(plans).get_configuration(first.configuration).patch_size
    for checkpoint in checkpoints.values():
        check_mirroring(checkpoint.mirroring_axes, len(patch))
    name = request.name or archive_name(str(plans["dataset_name"]), first.configuration)
    if not MODEL_NAME.fullmatch(name):
        msg = f"the model name {name!r} may hold only letters, digits, '_' and '-'; choose one with --name"
        raise UsageError(msg)
    if not VERSION.fullmatch(request.version):
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
        member = MemberDescription(
            name=first.configuration,
            dataset=str(plans["dataset_name"]),
            trainer=first.trainer,
            plans=str(plans["plans_name"]),
            configuration=first.configuration,
            network_builder=builder,
            folds=tuple(
                FoldDescription(fold=fold, mirroring_axes=c.mirroring_axes, checkpoint_sha256=c.sha256)
                for fold, c in checkpoints.items()
            ),
            source={"folder": "/".join(request.model_folder.resolve().parts[-2:]), "checkpoint": request.checkpoint},
            input_orientation=request.input_orientation,
            network_class=network_class,
            network_trainer=network_trainer,
        )
        _write_member(stage / member.folder, member, plans, dataset, checkpoints)
        bundle = BundleDescription(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=request.version,
            members=(member,),
            recipe=Single(member=member.name),
            requires=REQUIRES,
            built_with=_installed_versions(),
            files={},
        )
        _add_golden_patches(stage, bundle, request.serving.handler)
        (stage / MODEL_CONFIG_FILE).write_text(request.serving.to_yaml())
        (stage / MANIFEST_FILE).parent.mkdir()
        (stage / MANIFEST_FILE).write_text(manifest(name, request.version, Path(nnunet_handler.__file__).name))
        target = request.output / f"{name}.mar"
        write_zip(stage, target)
    return target


def serving_core_files() -> dict[str, Path]:
    """Archive name -> file, of the entry file and the serving core, from where they are installed."""
    handler = Path(nnunet_handler.__file__)
    core = Path(nnunet_torchserve.__file__).parent
    files = {handler.name: handler}
    files |= {f"{core.name}/{file.relative_to(core).as_posix()}": file for file in sorted(core.rglob("*.py"))}
    return files


def _write_member(
    folder: Path,
    description: MemberDescription,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    checkpoints: Mapping[FoldName, Checkpoint],
) -> None:
    folder.mkdir(parents=True)
    (folder / PLANS_FILE).write_text(json.dumps(plans, indent=1))
    # nnU-Net numbers its classes in the order of this file's labels: keep it
    (folder / DATASET_FILE).write_text(json.dumps(dataset, indent=1))
    for fold in description.folds:
        tensors, aliases = without_aliases(checkpoints[fold.fold].weights)
        metadata = {ALIASES_KEY: json.dumps(aliases, sort_keys=True)}
        save_file(tensors, folder / fold.weights_file, metadata=metadata)


def _add_golden_patches(stage: Path, description: BundleDescription, settings: HandlerSettings) -> None:
    """Run the stored weights once on one thread and write ``bundle.json``, complete.

    Then load what was written as a worker does, with the archive's own settings: it must give the same again, and
    answer one small case.
    """
    _write_bundle(stage, description)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for member in ModelBundle(stage).members.values():
            networks = FoldNetworks(member, _CPU)
            save_file(golden_tensors(networks, member.folds), member.folder / GOLDEN_FILE)
        _write_bundle(stage, description)
        complete = ModelBundle(stage)
        limits = Limits.from_settings(settings.limits, {}).for_model(complete.lead.channels)
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
