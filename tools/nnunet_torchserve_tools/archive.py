"""A trained nnU-Net folder becomes TorchServe model archives (.mar).

An archive holds the serving core, nnU-Net's plans and dataset description, each fold's weights as safetensors, a
golden patch and a description with checksums. The same folder gives the same bytes on the same machine.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

import nnunet_handler
import nnunet_torchserve
from nnunet_torchserve.backend import NEEDS_REPORT, Backend
from nnunet_torchserve.bundle import SCHEMA_VERSION, BundleDescription
from nnunet_torchserve.label_manager import painting_of
from nnunet_torchserve.member import REORIENTING_READERS
from nnunet_torchserve.orientation import is_orientation
from nnunet_torchserve.own_code import CODE_FOLDER, CodeDescription
from nnunet_torchserve.postprocessing import Postprocessing
from nnunet_torchserve.recipe import Cascade, Single
from nnunet_torchserve.segments import SEGMENTS_FILE
from nnunet_torchserve_client.choosing import archive_name

from .accuracy_gate import unseen
from .archive_request import ArchiveRequest
from .compiler import why_not_compiled
from .composition import Composition, compose
from .errors import ModelWarning, ToolError, UsageError
from .golden_patches import NO_NETWORK, add_golden_patches
from .graphs import stored_backend
from .mar import MANIFEST_FILE, MODEL_NAME, VERSION, manifest, write_zip
from .postprocessing_choice import PostprocessingChoice
from .segments import checked_segments, structures_of
from .serving_settings import MODEL_CONFIG_FILE, check_device_ids
from .trained import TrainedModel, read_trained_model
from .trainer_files import TrainerFiles, read_trainer_files, say_aloud
from .validate import add_accuracy
from .validation_cases import Validation

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
        tell: hears lines for people: of each archive that has a postprocessing, and of what was measured.

    Returns:
        The written files: the one with all chosen folds first.

    Raises:
        UsageError: a folder, a name or a fold does not exist or cannot be meant.
        ToolError: a checkpoint or plans.json is damaged, disagrees with another, or names what it must not; or the
            backend was not measured, or loses too much.

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
    _check_backend(request)  # before anything that takes long
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
        return [_make_archive(request, each, content, steps, brought, tell) for each, content, steps in contents]
    except (ToolError, Warning):
        raise
    except (OSError, SafetensorError) as error:  # a full disk, mostly
        reason = getattr(error, "strerror", None) or error
        msg = f"the archive cannot be written into {request.output}, by way of {tempfile.gettempdir()}: {reason}"
        raise ToolError(msg) from error
    except Exception as error:
        if code is None and not isinstance(error, NO_NETWORK):
            raise
        msg = f"plans.json, dataset.json and the checkpoints make no network: {type(error).__name__} {error}"
        raise ToolError(msg) from error


def _check_backend(request: ArchiveRequest) -> None:
    """Refuse a backend that this machine cannot make, or that nobody is to measure though somebody must."""
    backend, validation = request.backend, request.validation
    if bool(request.calibration) != (backend is Backend.OPENVINO_INT8):
        msg = (
            f"--backend {backend} needs --calibrate: images that it is calibrated on"
            if backend is Backend.OPENVINO_INT8
            else f"--calibrate is for --backend {Backend.OPENVINO_INT8}, the only one that is calibrated"
        )
        raise UsageError(msg)
    Validation(request.calibration).check()
    if backend is Backend.EAGER:
        if validation is not None:
            msg = "--validate compares another backend with eager; name it with --backend"
            raise UsageError(msg)
        return
    if validation is None and backend in NEEDS_REPORT:
        msg = f"--backend {backend} needs --validate: its answers must be measured before it may serve"
        raise UsageError(msg)
    if validation is not None:
        validation.check()
    stored_backend(backend)
    if backend is Backend.COMPILED and (reason := why_not_compiled()) is not None:
        msg = f"--backend {backend}: {reason}"
        raise ToolError(msg)


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
    tell: Callable[[str], None],
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
        calibrated_on = add_golden_patches(stage, bundle, request.serving.handler, request.calibration, tell)
        if request.validation is not None:
            _validate(stage, request, request.validation, calibrated_on, tell)
        (stage / MODEL_CONFIG_FILE).write_text(request.serving.to_yaml())
        (stage / MANIFEST_FILE).parent.mkdir()
        (stage / MANIFEST_FILE).write_text(manifest(name, request.version, Path(nnunet_handler.__file__).name))
        target = request.output / f"{name}.mar"
        write_zip(stage, target)
    return target


def _validate(
    stage: Path,
    request: ArchiveRequest,
    validation: Validation,
    calibrated_on: tuple[str, ...] | None,
    tell: Callable[[str], None],
) -> None:
    """Measure the archive's backend, and keep what was found with the archive."""
    report = add_accuracy(stage, request.serving.handler, validation, tell, calibrated_on)
    if missing := unseen(report):
        msg = f"{', '.join(missing)}: no answer to these images has any of it, so nothing is known of its accuracy"
        warnings.warn(msg, ModelWarning, stacklevel=3)


def serving_core_files() -> dict[str, Path]:
    """Archive name -> file, of the entry file and the serving core, from where they are installed."""
    handler = Path(nnunet_handler.__file__)
    core = Path(nnunet_torchserve.__file__).parent
    files = {handler.name: handler}
    files |= {f"{core.name}/{file.relative_to(core).as_posix()}": file for file in sorted(core.rglob("*.py"))}
    return files


def _read_codes(file: Path | None, model: TrainedModel) -> bytes | None:
    if file is None:
        return None
    content, missing = checked_segments(file, structures_of(model.dataset))
    if missing:
        msg = f"without codes: {', '.join(missing)}; in a DICOM segmentation each of these is tissue, with its name"
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
