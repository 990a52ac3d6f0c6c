"""A trained nnU-Net folder becomes TorchServe model archives (.mar).

An archive holds the serving core, nnU-Net's plans and dataset description, each fold's weights as safetensors, a
golden patch and a description with checksums. The same folder gives the same bytes on the same machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import nnunet_handler
import nnunet_torchserve
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import BUNDLE_FILE, SCHEMA_VERSION, BundleDescription, ModelBundle
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.golden import golden_tensors
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import (
    GOLDEN_FILE,
    REORIENTING_READERS,
    Member,
    painting_of,
)
from nnunet_torchserve.options import FoldName
from nnunet_torchserve.orientation import is_orientation
from nnunet_torchserve.own_code import CODE_FOLDER, CodeDescription
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.postprocessing import Postprocessing
from nnunet_torchserve.recipe import Cascade, Single
from nnunet_torchserve.segments import SEGMENTS_FILE
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve_client.choosing import archive_name

from .composition import Composition, compose
from .errors import ModelWarning, ToolError, UsageError
from .graphs import stored_backend, write_graphs
from .mar import MANIFEST_FILE, MODEL_NAME, VERSION, manifest, write_zip
from .postprocessing_choice import PostprocessingChoice
from .segments import checked_segments, structures_of
from .serving_settings import MODEL_CONFIG_FILE, ServingSettings, check_device_ids
from .trained import TrainedModel, read_trained_model
from .trainer_files import TrainerFiles, read_trainer_files, say_aloud

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

_NO_NETWORK = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What nnU-Net and PyTorch raise where plans, dataset and weights do not belong together; somebody's own code may raise
anything."""

_OF_A_GPU = re.compile(r"cuda|nvidia|triton", re.IGNORECASE)
"""What networks say that want a GPU."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ArchiveRequest:
    """What to package.

    Attributes:
        model_folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.
        output: where the archives go.
        others: more such folders, which are an ensemble with the first.
        previous_stages: the folders of the first stages of the cascades among them.
        postprocessing: nnU-Net's file, or ``"auto"`` for the one of exactly these models and folds, for each archive.
        postprocessing_folds: for which nnU-Net determined what the file says, so that archives of others do not get it;
            ``None``: every archive gets it.
        folds: ``None`` takes every numbered fold.
        per_fold: also make one archive for each fold.
        name: ``None`` makes one of dataset and configuration.
        version: TorchServe model version.
        checkpoint: file name within each fold's folder.
        trust_checkpoint: open checkpoints as ordinary pickles.
        trainer_files: somebody's own code, which the models need and every server of the archive runs.
        requires: what that needs, as ``PACKAGE==VERSION``.
        input_orientation: nibabel's letters of the orientation that the model was trained in, every image is brought
            into it; ``None``: images are taken as they are sent, as nnU-Net takes them.
        segments: JSON with what the model's structures are, in codes, see :mod:`nnunet_torchserve.segments`.
        backend: that the archive is made for beside eager, and served with unless somebody says otherwise.
        serving: what goes to model-config.yaml.
    """

    model_folder: Path
    output: Path
    others: tuple[Path, ...] = ()
    previous_stages: tuple[Path, ...] = ()
    postprocessing: Path | Literal["auto"] | None = None
    postprocessing_folds: tuple[FoldName, ...] | None = None
    folds: tuple[FoldName, ...] | None = None
    per_fold: bool = False
    name: str | None = None
    version: str = "1.0"
    checkpoint: str = "checkpoint_final.pth"
    trust_checkpoint: bool = False
    trainer_files: tuple[Path, ...] = ()
    requires: tuple[str, ...] = ()
    input_orientation: str | None = None
    segments: Path | None = None
    backend: Backend = Backend.EAGER
    serving: ServingSettings = field(default_factory=ServingSettings)


@dataclass(frozen=True, slots=True)
class Brought:
    """What an archive has of its owner beside what nnU-Net wrote.

    Attributes:
        code: what is said of somebody's own code, if there is any.
        sources: file -> that code.
        segments: what the structures are, in codes; ``None`` if nobody said it.
    """

    code: CodeDescription | None
    sources: Mapping[str, bytes]
    segments: bytes | None


def _unheard(_line: str) -> None:
    pass


def make_archives(request: ArchiveRequest, tell: Callable[[str], None] = _unheard) -> list[Path]:
    """Make the archives.

    Args:
        request: what is asked for.
        tell: hears a line for people for each archive that has a postprocessing.

    Returns:
        The written files: the one with all chosen folds first.

    Raises:
        UsageError: a folder, a name or a fold does not exist or cannot be meant.
        ToolError: a checkpoint or plans.json is damaged, disagrees with another, or names what it must not.

    Warns:
        ModelWarning: it holds somebody's own code; the values of its label maps are not those that dataset.json
            suggests, or do not say everything; its trial did not prove that it answers; each request must bring the
            first stage's labels; the models of an ensemble have different folds; or an archive of one fold lacks the
            postprocessing that was asked for.
    """
    files = read_trainer_files(request.trainer_files, request.requires)
    composition = _compose(request, files)
    code = files.described(model.names for model in composition.members.values()) if files.sources else None
    lead = composition.lead
    name = request.name or archive_name(lead.dataset_name, composition.name)
    if not MODEL_NAME.fullmatch(name):
        msg = f"the model name {name!r} may hold only letters, digits, '_' and '-'; choose one with --name"
        raise UsageError(msg)
    if not VERSION.fullmatch(request.version):
        msg = f"the version {request.version!r} must be numbers and dots, as in 1.0"
        raise UsageError(msg)
    _check_orientation(request.input_orientation, str(lead.plans["image_reader_writer"]))
    check_device_ids(request.serving.device_ids)
    if request.backend is not Backend.EAGER:
        stored_backend(request.backend)  # before anything that takes long
    contents = _contents(request, name, composition, tell)
    codes = _read_codes(request.segments, lead)
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the output folder {request.output}: {error.strerror}"
        raise UsageError(msg) from error
    try:
        if code is not None:
            say_aloud(code)
        _warn_of_values(lead)
        brought = Brought(code, files.sources, codes)
        return [_make_archive(request, each, content, steps, brought) for each, content, steps in contents]
    except (ToolError, Warning):
        raise
    except (OSError, SafetensorError) as error:  # a full disk, mostly
        reason = getattr(error, "strerror", None) or error
        msg = f"the archive cannot be written into {request.output}, by way of {tempfile.gettempdir()}: {reason}"
        raise ToolError(msg) from error
    except Exception as error:
        if code is None and not isinstance(error, _NO_NETWORK):
            raise
        msg = f"plans.json, dataset.json and the checkpoints make no network: {type(error).__name__} {error}"
        raise ToolError(msg) from error


def _compose(request: ArchiveRequest, files: TrainerFiles) -> Composition:
    """Read every folder."""
    folders = (request.model_folder, *request.others)
    are_several = len(folders) + len(request.previous_stages) > 1

    def read(folder: Path) -> TrainedModel:
        try:
            trust = request.trust_checkpoint
            return read_trained_model(folder, request.folds, request.checkpoint, trust=trust, files=files)
        except ToolError as error:
            if not are_several or str(folder) in str(error):
                raise
            msg = f"{'/'.join(folder.resolve().parts[-2:])}: {error}"
            raise type(error)(msg) from error

    models = [read(folder) for folder in folders]
    composition = compose(models, [read(folder) for folder in request.previous_stages])
    if request.per_fold and not isinstance(composition.recipe, Single):
        msg = "--per-fold: a cascade or an ensemble is one model; make an archive of some folds with --folds"
        raise UsageError(msg)
    if isinstance(composition.recipe, Cascade) and composition.recipe.first is None:
        msg = (
            f"{composition.name} is the second stage of a cascade: each request must bring the first stage's labels as "
            "previous_stage. With --previous-stage FOLDER the archive predicts them itself."
        )
        warnings.warn(msg, ModelWarning, stacklevel=3)
    return composition


def _contents(
    request: ArchiveRequest, name: str, composition: Composition, tell: Callable[[str], None]
) -> list[tuple[str, Composition, Postprocessing | None]]:
    """The name of each archive, its models and its postprocessing."""
    folders = (request.model_folder, *request.others)
    choice = PostprocessingChoice(request.postprocessing, request.postprocessing_folds, folders)
    archives, found = {name: composition}, {name: choice.of(composition)}
    if request.per_fold:
        of_folds = {f"{name}_fold_{fold}": composition.of_fold(fold) for fold in composition.lead.folds}
        archives |= of_folds
        found |= choice.of_folds(of_folds)
    contents: list[tuple[str, Composition, Postprocessing | None]] = []
    for each, content in archives.items():
        if (one := found[each]) is not None:
            tell(choice.told(each, one))
        contents.append((each, content, None if one is None else one.postprocessing))
    return contents


def _make_archive(
    request: ArchiveRequest,
    name: str,
    composition: Composition,
    postprocessing: Postprocessing | None,
    brought: Brought,
) -> Path:
    code, sources = brought.code, brought.sources
    with tempfile.TemporaryDirectory(prefix="nnunet-torchserve-archive-") as scratch:
        stage = Path(scratch)
        for file, source in serving_core_files().items():
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).write_bytes(source.read_bytes())
        if code is not None:
            (stage / CODE_FOLDER).mkdir()
        for file, content in sources.items():
            (stage / CODE_FOLDER / file).write_bytes(content)
        if brought.segments is not None:
            (stage / SEGMENTS_FILE).write_bytes(brought.segments)
        members = tuple(
            model.describe(member, request.input_orientation) for member, model in composition.members.items()
        )
        for member in members:
            composition.members[member.name].write(stage / member.folder, member)
        bundle = BundleDescription(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=request.version,
            members=members,
            recipe=composition.recipe,
            postprocessing=postprocessing,
            code=code,
            backend=None if request.backend is Backend.EAGER else stored_backend(request.backend),
            requires=REQUIRES,
            built_with=_installed_versions(code.requires if code is not None else ()),
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


def _add_golden_patches(stage: Path, description: BundleDescription, settings: HandlerSettings) -> None:
    """Run the stored weights once on one thread and write ``bundle.json``, complete.

    Then load what was written as a worker does, with the archive's own settings: it must give the same again, and
    answer one small case; with another backend, if there is one, too.
    """
    _write_bundle(stage, description)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for member in ModelBundle(stage).members.values():
            expected = (Exception,) if description.code is not None else _NO_NETWORK
            networks, golden = _golden(member, expected)
            save_file(golden, member.folder / GOLDEN_FILE)
            if description.backend is not None:
                write_graphs(member, networks)
        _write_bundle(stage, description)
        complete = ModelBundle(stage)
        limits = Limits.from_settings(settings.limits, {}).for_model(complete.lead.channels)
        batch = 1 if settings.max_patch_batch == "auto" else settings.max_patch_batch
        backends = dict.fromkeys((Backend.EAGER, description.backend.backend if description.backend else Backend.EAGER))
        for backend in backends:
            engine = LocalEngine(complete, _CPU, batch, settings.policy, limits, backend)
            pipeline = Pipeline(complete, engine, limits, _DRY_RUN_LIMIT_S, settings=settings)
            if (warning := pipeline.dry_run()) is not None:
                warnings.warn(warning, ModelWarning, stacklevel=4)
    except BundleError as error:
        raise ToolError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def _golden(member: Member, expected: tuple[type[Exception], ...]) -> tuple[EagerNetworks, dict[str, torch.Tensor]]:
    """The networks of a member, and its golden patch.

    Args:
        member: written, but for this.
        expected: what may be raised where there is no network, or one that fails.

    Raises:
        ToolError: it is so; the message says whether the network is not built or does not run.
    """
    name, stage = member.name, f"plans.json, dataset.json and the checkpoints of {member.name} make no network"
    try:
        networks = EagerNetworks(member, _CPU)
        stage = f"the network of {name} was built, and fails on a patch on the CPU"
        return networks, golden_tensors(networks, member.folds)
    except BundleError as error:
        msg = str(error) if name in str(error) else f"{name}: {error}"
        raise ToolError(msg) from error
    except expected as error:
        msg = f"{stage}: {type(error).__name__} {error}"
        if _OF_A_GPU.search(msg):
            msg += ". Archives are made and checked on a CPU: a network that runs on CUDA only cannot be served"
        raise ToolError(msg) from error


def _write_bundle(stage: Path, description: BundleDescription) -> None:
    """Write ``bundle.json`` for the files that are there."""
    files = {
        file.relative_to(stage).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(stage.rglob("*"))
        if file.is_file() and file.name != BUNDLE_FILE
    }
    complete = description.model_copy(update={"files": files})
    (stage / BUNDLE_FILE).write_text(complete.model_dump_json(indent=1))


def _read_codes(file: Path | None, model: TrainedModel) -> bytes | None:
    if file is None:
        return None
    content, missing = checked_segments(file, structures_of(model.dataset))
    if missing:
        msg = f"{', '.join(missing)} have no codes: in a DICOM segmentation they are tissue, with their names"
        warnings.warn(msg, ModelWarning, stacklevel=3)
    return content


def _warn_of_values(model: TrainedModel) -> None:
    labels = model.manager().get_label_manager(model.dataset)
    try:
        painting = painting_of(model.dataset, labels)
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


def _installed_versions(others: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in (*_BUILT_WITH, *others):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
