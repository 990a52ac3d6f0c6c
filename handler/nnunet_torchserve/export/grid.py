"""From the network's grid to the image's: which resampling the plan names, and what it does along each axis.

nnU-Net's default for logits is linear interpolation by ``skimage.transform.resize``, which is ``scipy.ndimage.zoom``
(or, for anisotropic images, that within slices and the nearest slice across them), described by :mod:`..taps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet, resample_torch_simple

from ..resampling import SplineArguments, Target, spline_arguments, target_of
from ..taps import Taps, linear_taps, nearest_taps

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

Shape = tuple[int, int, int]
Array = npt.NDArray[Any]

SMALL_BY_TORCH = 2**22
"""Values of so small a volume (16 MiB) that all its classes are given to torch at once: nothing is gained otherwise."""


class TrainedModel(Protocol):
    """What the export needs of a model; :class:`~..member.Member` has it."""

    @property
    def plans(self) -> PlansManager:
        """nnU-Net's plans."""

    @property
    def configuration(self) -> ConfigurationManager:
        """The one that was trained."""

    @property
    def labels(self) -> LabelManager:
        """What the network's channels mean."""


@dataclass(frozen=True, slots=True)
class Resampling:
    """How the logits of one case reach the image's grid.

    Attributes:
        shape: (z, y, x) of the cropped image, in the plan's axis order.
        taps: of each axis, or ``None`` if only the plan's own function says what it does.
        nearest_axis: the axis along which the plan takes the nearest slice instead of interpolating, if any.
        function: the plan's own: (classes, z, y, x) -> (classes, Z, Y, X).
        together: classes that ``function`` must get at once to treat them as it would treat all of them.
        known: ``function`` is nnU-Net's own and leads to the image's shape; another may leave one that is not.
    """

    shape: Shape
    taps: tuple[Taps, Taps, Taps] | None
    nearest_axis: int | None
    function: Callable[[torch.Tensor], Any]
    together: int
    known: bool


def resampling_of(model: TrainedModel, logits: torch.Tensor, properties: Mapping[str, Any]) -> Resampling:
    """What ``convert_predicted_logits_to_segmentation_with_correct_shape`` would do to logits of this case.

    Args:
        model: its plans name the function.
        logits: (classes, z, y, x) on the network's grid.
        properties: nnU-Net's, from preprocessing.
    """
    grid = tuple(logits.shape[1:])
    first, second, third = (int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    shape = (first, second, third)
    image_spacing = [properties["spacing"][axis] for axis in model.plans.transpose_forward]
    grid_spacing = list(model.configuration.spacing)
    if len(grid_spacing) < len(shape):
        grid_spacing = [image_spacing[0], *grid_spacing]
    plans_own = model.configuration.resampling_fn_probabilities
    run = partial(_call, plans_own, shape, grid_spacing, image_spacing)
    by_torch = plans_own.func in (resample_torch_fornnunet, resample_torch_simple)
    target = target_of(plans_own)
    # what resamples nothing is known where there is nothing to resample
    known = target is Target.NEW_SHAPE or (target is Target.UNCHANGED and grid == shape)
    separate, thick = determine_do_sep_z_and_axis(
        plans_own.keywords.get("force_separate_z", None if by_torch else SplineArguments().force_separate_z),
        grid_spacing,
        image_spacing,
        plans_own.keywords.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD),
    )
    nearest = int(thick) if known and separate else None
    is_seg = bool(plans_own.keywords.get("is_seg"))
    taps = None
    if known and not is_seg and grid == shape:  # they return what they got
        taps = _taps(grid, shape, None)
    elif (arguments := spline_arguments(plans_own)) is not None and arguments.order == 1:
        taps = _taps(grid, shape, nearest)
    together = _torch_classes(logits, shape, apart=not separate and not is_seg) if by_torch else 1
    return Resampling(shape, taps, nearest, run, together, known)


def _torch_classes(logits: torch.Tensor, shape: Shape, *, apart: bool) -> int:
    """Classes that torch must interpolate together to round as it does with all of them.

    Two, for volumes: a single channel has another kernel, that for channels that lie together in memory, which a grid
    one voxel wide has as well. In slices (not ``apart``), and in small volumes, the rounding depends on the number of
    channels: all of them.
    """
    small = len(logits) * shape[0] * shape[1] * shape[2] <= SMALL_BY_TORCH
    channels_last = logits[None].is_contiguous(memory_format=torch.channels_last_3d)
    return 2 if apart and not small and not channels_last and 1 not in (*logits.shape[1:], *shape) else len(logits)


def _taps(grid: Sequence[int], shape: Sequence[int], nearest_axis: int | None) -> tuple[Taps, Taps, Taps]:
    first, second, third = (
        nearest_taps(inputs, outputs) if axis == nearest_axis else linear_taps(inputs, outputs)
        for axis, (inputs, outputs) in enumerate(zip(grid, shape, strict=True))
    )
    return first, second, third


def _call(
    plans_own: Callable[..., Any],
    shape: Shape,
    grid_spacing: Sequence[float],
    image_spacing: Sequence[float],
    logits: torch.Tensor,
) -> Any:
    return plans_own(logits, shape, grid_spacing, image_spacing)
