"""Who teaches a student: a trained model folder on this machine, or a model on a server.

Each gives the probabilities of an image on the grid of a student's preprocessed case. What preprocessing does to an
image in space is to transpose, crop and resample it; that is repeated here, by the functions that the plans name. A
folder's logits go from its network's grid to the student's at once, as nnU-Net hands them to a cascade's next stage
(``resample_and_save``), and become probabilities there. A server gives probabilities on the image's own grid.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nnunet_torchserve_client import RemotePredictor
from nnunet_torchserve_client.errors import ClientError, WrongUse
from nnunet_torchserve_trainers.soft_target_files import Teacher, channels_of

from .errors import ToolError, UsageError
from .student import Grid, image_channels_of, reader_of

if TYPE_CHECKING:
    from nnunet_torchserve.options import FoldName

Probabilities = npt.NDArray[np.float16]

CHECKPOINT = "checkpoint_final.pth"


class Source(Protocol):
    """Gives probabilities."""

    @property
    def teacher(self) -> Teacher:
        """Who it is."""
        ...

    @property
    def image_channels(self) -> tuple[str, ...]:
        """Names of the images that it takes, in order."""
        ...

    def probabilities(self, images: Sequence[str], grid: Grid) -> Probabilities:
        """Those of an image.

        Args:
            images: its files, one for each channel.
            grid: where they are wanted.

        Returns:
            (C, *grid.shape).

        Raises:
            ToolError: the image is not the one that lies on this grid, or cannot be predicted.
        """
        ...


class ModelFolder:
    """A trained model folder: the mean of its folds, as ``nnUNetv2_predict`` has it.

    Attributes:
        teacher, image_channels: see :class:`Source`.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[FoldName] | None,
        checkpoint: str,
        device: torch.device,
        *,
        use_mirroring: bool = True,
    ) -> None:
        """Load the networks.

        Args:
            folder: ``TRAINER__PLANS__CONFIGURATION``.
            folds: ``None`` is every numbered fold that has the checkpoint.
            checkpoint: file name.
            device: that predicts.
            use_mirroring: along the axes that the checkpoint allows.

        Raises:
            UsageError: something of this is not there.
            ToolError: it needs the labels of a previous stage.
        """
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        files = [folder / "plans.json", folder / "dataset.json"]
        if missing := [file.name for file in files if not file.is_file()]:
            msg = f"{folder} has no {missing[0]}: name the folder TRAINER__PLANS__CONFIGURATION of a trained model"
            raise UsageError(msg)
        if folds is None:
            with _quiet():
                folds = list(map(int, nnUNetPredictor.auto_detect_available_folds(str(folder), checkpoint)))
        ordered = _in_order(folds)
        files += [folder / f"fold_{fold}" / checkpoint for fold in ordered]
        absent = [file for file in files if not file.is_file()]
        if absent or not ordered:
            msg = f"{absent[0]} is not there" if absent else f"no fold of {folder} has a {checkpoint}"
            raise UsageError(msg)
        with _quiet():
            self._predictor = nnUNetPredictor(
                use_mirroring=use_mirroring,
                perform_everything_on_device=device.type == "cuda",
                device=device,
                allow_tqdm=False,
            )
            try:
                self._predictor.initialize_from_trained_model_folder(str(folder), ordered, checkpoint)
            except (RuntimeError, KeyError, AttributeError) as error:  # a trainer that is not here; other weights
                msg = f"{folder} cannot be loaded: {type(error).__name__} {error}"
                raise ToolError(msg) from error
        if self._predictor.configuration_manager.previous_stage_name is not None:
            msg = f"{folder} needs the labels of a previous stage: archive both stages, serve them, and name the server"
            raise ToolError(msg)
        self.image_channels = image_channels_of(self._predictor.dataset_json)
        labels = self._predictor.label_manager
        self.teacher = Teacher(
            folder.resolve().name, _digest(folder, files), ordered, use_mirroring, labels.has_regions,
            channels_of(labels), reader_of(self._predictor.plans_manager),
        )  # fmt: skip

    def probabilities(self, images: Sequence[str], grid: Grid) -> Probabilities:
        """See :class:`Source`."""
        with _quiet():
            try:
                return self._predicted(images, grid)
            except (RuntimeError, ValueError, OSError, AssertionError) as error:
                msg = f"{Path(images[0]).name}: {type(error).__name__} {error}"
                raise ToolError(msg) from error

    def _predicted(self, images: Sequence[str], grid: Grid) -> Probabilities:
        predictor = self._predictor
        manager, settings = predictor.plans_manager, predictor.configuration_manager
        preprocessor = settings.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case(list(images), None, manager, settings, predictor.dataset_json)
        own = Grid.of(data.shape[1:], properties, manager, settings)
        axes = [own.order.index(axis) for axis in grid.order]
        _check_same_image(own, axes, grid)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
        resampled = settings.resampling_fn_probabilities(
            logits.permute(0, *(axis + 1 for axis in axes)).contiguous(),
            grid.shape,
            [own.spacing[axis] for axis in axes],
            list(grid.spacing),
        )
        return np.asarray(predictor.label_manager.apply_inference_nonlin(resampled)).astype(np.float16)


class ServedModel:
    """A model on a server, whatever its archive is made of: folds, a cascade, an ensemble.

    Attributes:
        teacher, image_channels: see :class:`Source`.
    """

    def __init__(self, predictor: RemotePredictor, resample: Any, folds: Sequence[FoldName] | None) -> None:
        """Ask the server what it serves.

        Args:
            predictor: of the model.
            resample: ``resampling_fn_probabilities`` of the student's configuration.
            folds: that the predictor asks for.

        Raises:
            ToolError: the server does not say it.
        """
        self._predictor, self._resample = predictor, resample
        try:
            description, labels = predictor.description, predictor.label_manager
        except ClientError as error:
            raise ToolError(str(error)) from error
        self.image_channels = image_channels_of(description.dataset_json)
        self.teacher = Teacher(
            description.model.made_of, description.digest, _in_order(folds or description.model.folds),
            predictor.use_mirroring, labels.has_regions, channels_of(labels),
            description.reader,
        )  # fmt: skip

    def probabilities(self, images: Sequence[str], grid: Grid) -> Probabilities:
        """See :class:`Source`."""
        try:
            answer = self._predictor.predict_from_files_sequential([list(images)], None, save_probabilities=True)
            digest = self._predictor.description.digest
        except ClientError as error:
            raise ToolError(str(error)) from error
        if digest != self.teacher.digest:
            msg = f"the server has another model now than {self.teacher}: the soft targets would be of two teachers"
            raise ToolError(msg)
        [(_, probabilities)] = answer or []
        turned = np.asarray(probabilities).transpose(0, *(axis + 1 for axis in grid.order))
        if turned.shape[1:] != grid.uncropped_shape:
            msg = _another_image(turned.shape[1:], grid)
            raise ToolError(msg)
        cropped = np.ascontiguousarray(turned[:, *(slice(*bounds) for bounds in grid.box)], dtype=np.float32)
        resampled = self._resample(cropped, grid.shape, list(grid.original_spacing), list(grid.spacing))
        return np.asarray(resampled).clip(0, 1).astype(np.float16)


def folder_teacher(
    folder: Path, folds: Sequence[FoldName] | None, checkpoint: str | None, device: str | None, *, use_mirroring: bool
) -> ModelFolder:
    """A teacher on this machine; ``None`` is nnU-Net's checkpoint, and the GPU if there is one.

    Raises:
        UsageError, ToolError: see :class:`ModelFolder`.
    """
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if (wanted := device or there) not in {"cpu", "cuda"}:
        msg = f"--device {wanted}: cuda or cpu was expected"
        raise UsageError(msg)
    if wanted == "cuda" != there:
        msg = "--device cuda: PyTorch sees no such device here"
        raise UsageError(msg)
    return ModelFolder(folder, folds, checkpoint or CHECKPOINT, torch.device(wanted), use_mirroring=use_mirroring)


@contextlib.contextmanager
def served_teacher(
    urls: Sequence[str] | None,
    model: str,
    verify: str | None,
    resample: Any,
    folds: Sequence[FoldName] | None,
    *,
    use_mirroring: bool,
) -> Iterator[ServedModel]:
    """A teacher on a server; its connections end with the context.

    Args:
        urls: of the inference port; ``None`` takes the environment's.
        model: its name there, or NAME/VERSION.
        verify: a file of authorities.
        resample: see :class:`ServedModel`.
        folds: ``None`` is all that are served.
        use_mirroring: along the axes that the checkpoints allow.

    Raises:
        UsageError: no such address, or name.
        ToolError: see :class:`ServedModel`.
    """
    name, _, version = model.partition("/")
    try:
        predictor = RemotePredictor(
            urls, name, use_mirroring=use_mirroring, allow_tqdm=False, use_folds=folds, version=version or None,
            verify=verify or True, probability_dtype="float16", priority="batch",
        )  # fmt: skip
    except WrongUse as error:
        raise UsageError(str(error)) from error
    with predictor:
        yield ServedModel(predictor, resample, folds)


def _in_order(folds: Sequence[int | str]) -> tuple[int | str, ...]:
    """Numbers first: a mean is the same whatever the order in which its folds are named."""
    return tuple(sorted(folds, key=lambda fold: (isinstance(fold, str), fold)))


def _check_same_image(own: Grid, axes: Sequence[int], grid: Grid) -> None:
    """Raise unless what was preprocessed for the teacher is the image that was preprocessed for the student."""
    shape = tuple(own.uncropped_shape[axis] for axis in axes)
    box = tuple(own.box[axis] for axis in axes)
    if (shape, box) != (grid.uncropped_shape, grid.box):
        raise ToolError(_another_image(shape, grid))


def _another_image(shape: Sequence[int], grid: Grid) -> str:
    return (
        f"the image below nnUNet_raw (shape {tuple(shape)}) is not the one that was preprocessed "
        f"({grid.uncropped_shape}): run nnUNetv2_preprocess again"
    )


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """Of all files, with their names."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(folder)} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _quiet() -> contextlib.redirect_stdout[Any]:
    """What nnU-Net prints is no answer of a command, whose stdout programs read."""
    return contextlib.redirect_stdout(sys.stderr)
