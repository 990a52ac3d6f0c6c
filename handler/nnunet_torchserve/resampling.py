"""An image onto the network's grid, as nnU-Net's default function does it, in a fraction of its time and memory.

``resample_data_or_seg_to_shape`` calls ``skimage.transform.resize(mode="edge", anti_aliasing=False)``, which filters
and samples a spline in float64, one thread, several float64 copies of the volume. The spline is linear in the image
and separable, so along one axis it is a matrix. The matrices are made by skimage itself, from unit vectors, and applied
by BLAS in float64: what differs from stock is the last bits of float64 sums, which few voxels show after rounding to
float32 (docs/parity.md). The work goes slab by slab.

Any other function, another order along z, an order above 3, values that are not finite (stock spreads them over the
volume) and very long axes are left to the plan's function as it is.

Threads: torch's, as many as ``torch.set_num_threads`` allows. No locks; the cache of matrices may be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet, resample_torch_simple
from skimage.transform import resize

from .taps import nearest_slices

Image = npt.NDArray[np.float32]
ResamplingFunction = Callable[[Any, Sequence[int], Sequence[float], Sequence[float]], Any]
"""A plan's ``resampling_fn_data``: image (C, z, y, x), new shape, current spacing and new spacing in mm."""

_MAX_ORDER = 3

LONGEST_BY_MATRIX = 2048
"""Voxels. The matrix of a longer axis costs its size squared, in time and memory; stock's function is better there."""

_NEGLIGIBLE = 1e-20
"""Weights below this are dropped: what they add is far below float64's rounding."""

_NEGLIGIBLE_AMONG_ZEROS = 1e-50
"""The same where the image has a region of zeros. A spline's tails never end, and inside of that region they are all
there is; what smaller weights make of an image vanishes in float32, whose least number is 1.4e-45."""

_DEEP = 34
"""Fewer zeros than that can't hold a voxel from where the next other value is so far that its weight is negligible:
the spline's tail shrinks by 2 - sqrt(3) a voxel."""

_FLOAT64 = 8

_BLOCK = 64
"""Rows of a matrix that are applied at once: few, so that most of its zeros are left out; enough for BLAS."""

_SLAB_BYTES = 4 * 1024**2
"""float64 bytes of the image that are worked on at once (at least one plane): about what a core's cache holds."""

_CACHE_LINE_VOXELS = 16
"""float32 voxels that memory hands out together; fewer planes at once would read each of them several times."""

_CACHED_OPERATORS = 24
"""Matrices that are kept; one of 512 x 512 takes up to 1 MB."""


class Target(Enum):
    """The grid that a plan's resampling function leads to."""

    NEW_SHAPE = auto()
    """The one that it was asked for."""

    UNCHANGED = auto()
    """The one that it got."""

    UNKNOWN = auto()
    """The function says it when it has run; what is computed on paper is a guess."""


_TARGETS: Mapping[Any, Target] = {
    resample_data_or_seg_to_shape: Target.NEW_SHAPE,
    resample_torch_simple: Target.NEW_SHAPE,
    resample_torch_fornnunet: Target.NEW_SHAPE,
    no_resampling_hack: Target.UNCHANGED,
}


@dataclass(frozen=True, slots=True)
class SplineArguments:
    """The arguments of ``resample_data_or_seg_to_shape`` that a plan may set, with that function's defaults."""

    is_seg: bool = False
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = False
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD

    @property
    def are_separable(self) -> bool:
        """Whether this module computes what they ask for."""
        return not self.is_seg and self.order in range(_MAX_ORDER + 1) and self.order_z == 0


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a matrix: ``output[rows] = weights @ input[columns]``; weights outside of ``columns`` are zero."""

    rows: slice
    columns: slice
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Operator:
    """Resampling along one axis: a matrix (after, before), in blocks of rows, float64."""

    before: int
    after: int
    blocks: tuple[Block, ...]

    @property
    def growth(self) -> float:
        """Voxels after for each voxel before."""
        return self.after / self.before


def resample_image(
    data: Image,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    function: ResamplingFunction,
) -> Image:
    """What ``function`` gives for these arguments; it runs itself where it isn't stock's (see the module).

    Args:
        data: float32 (C, z, y, x) in any memory order, in the plan's axis order; left as it is.
        new_shape: voxels (z, y, x).
        current_spacing: mm (z, y, x).
        new_spacing: mm (z, y, x).
        function: the plan's ``resampling_fn_data``.

    Returns:
        float32 (C, *new_shape); ``data`` itself if it has that shape.
    """
    arguments = spline_arguments(function)
    shape = tuple(int(n) for n in new_shape)
    sizes = (*data.shape[1:], *shape)
    if arguments is None or data.dtype != np.float32 or not 1 <= min(sizes) <= max(sizes) <= LONGEST_BY_MATRIX:
        return _as_it_is(function, data, new_shape, current_spacing, new_spacing)
    if data.shape[1:] == shape:
        return data
    separate, axis = determine_do_sep_z_and_axis(
        arguments.force_separate_z, current_spacing, new_spacing, arguments.separate_z_anisotropy_threshold
    )
    image = torch.from_numpy(data)
    ranges = [torch.aminmax(channel) for channel in image]
    if not all(bool(bound.isfinite()) for value_range in ranges for bound in value_range):
        return _as_it_is(function, data, new_shape, current_spacing, new_spacing)
    out = torch.empty((len(data), *shape))
    for channel, target, (low, high) in zip(image, out, ranges, strict=True):
        negligible = _NEGLIGIBLE
        if low <= 0 <= high and channel.numel() - int(channel.count_nonzero()) >= _DEEP:
            negligible = _NEGLIGIBLE_AMONG_ZEROS
        if separate:
            _resample_slices(channel, target, int(axis), arguments.order, negligible)
        else:
            _resample_volume(channel, target, arguments.order, negligible, low, high)
    return out.numpy()


def target_of(function: ResamplingFunction) -> Target:
    """Where a plan's function leads."""
    return _TARGETS.get(function.func if isinstance(function, partial) else function, Target.UNKNOWN)


def is_somebodys_own(function: ResamplingFunction) -> bool:
    """Whether a plan's function is none of those that nnU-Net comes with, wherever it was put.

    It may do anything, to all classes together for instance.
    """
    return (function.func if isinstance(function, partial) else function) not in _TARGETS


def spline_arguments(function: ResamplingFunction) -> SplineArguments | None:
    """The arguments of a plan's function, or ``None`` if this module doesn't compute what it does."""
    arguments = default_arguments(function)
    return arguments if arguments is not None and arguments.are_separable else None


def default_arguments(function: ResamplingFunction) -> SplineArguments | None:
    """The arguments of a plan's function, or ``None`` if that is not nnU-Net's default one."""
    known = {field.name for field in fields(SplineArguments)}
    if (
        not isinstance(function, partial)
        or function.func is not resample_data_or_seg_to_shape
        or function.args
        or not known.issuperset(function.keywords)
    ):
        return None
    return SplineArguments(**function.keywords)


@lru_cache(maxsize=_CACHED_OPERATORS)
def spline_operator(before: int, after: int, order: int, negligible: float) -> Operator:
    """The matrix that resamples an axis of ``before`` voxels to ``after``: column k is what skimage makes of voxel k.

    Args:
        before: voxels.
        after: voxels.
        order: of the spline.
        negligible: weights below this are left out.
    """
    matrix = np.empty((after, before))
    unit = np.zeros(before)
    for k in range(before):
        unit[k] = 1
        matrix[:, k] = resize(  # type: ignore[no-untyped-call]
            unit, (after,), order, mode="edge", anti_aliasing=False, clip=False
        )
        unit[k] = 0
    matrix[np.abs(matrix) < negligible] = 0
    blocks = []
    for start in range(0, after, _BLOCK):
        rows = slice(start, min(start + _BLOCK, after))
        used = np.flatnonzero(matrix[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append(Block(rows, columns, torch.from_numpy(matrix[rows, columns].copy())))
    return Operator(before, after, tuple(blocks))


def _as_it_is(function: ResamplingFunction, *arguments: Any) -> Image:
    resampled: Image = function(*arguments)
    return resampled


def _resample_volume(
    image: torch.Tensor, out: torch.Tensor, order: int, negligible: float, low: torch.Tensor, high: torch.Tensor
) -> None:
    """``resize`` of one channel (z, y, x), clipped to its range ``low`` to ``high``, into ``out``."""
    axes = _axes_by_cost(image, out)
    image, out = image.permute(axes), out.permute(axes)
    first, middle, last = _operators(image, out, order, negligible)
    if first is None:
        for planes, slab in _slabs(image):
            out[planes] = _in_plane(slab, middle, last).clamp_(low, high)
        return
    partly = torch.empty((image.shape[0], *out.shape[1:]), dtype=torch.float64)
    for planes, slab in _slabs(image):
        partly[planes] = _in_plane(slab, middle, last)
    _, height, width = partly.shape
    step = max(1, _SLAB_BYTES // (_FLOAT64 * len(partly) * width))
    for start in range(0, height, step):
        lines = slice(start, min(start + step, height))
        columns = partly.view(len(partly), -1)[:, lines.start * width : lines.stop * width]
        for block in first.blocks:
            values = torch.mm(block.weights, columns[block.columns])
            out[block.rows, lines] = values.clamp_(low, high).view(len(values), -1, width)


def _axes_by_cost(image: torch.Tensor, out: torch.Tensor) -> tuple[int, int, int]:
    """(first, middle, last): planes across the first axis are resampled one by one, then the first axis itself.

    The last is the one that lies together in memory; of the others the one that need not be resampled is the first, or
    that which grows more, so that the intermediate result is small.
    """
    last = min(range(3), key=lambda axis: (image.stride(axis), -axis))
    growth = {axis: out.shape[axis] / image.shape[axis] for axis in range(3) if axis != last}
    first = max(growth, key=lambda axis: (growth[axis] == 1, growth[axis]))
    return first, 3 - first - last, last


def _resample_slices(image: torch.Tensor, out: torch.Tensor, across: int, order: int, negligible: float) -> None:
    """``resize`` of each slice across an axis, clipped to its own range; along that axis the nearest slice."""
    image, out = image.movedim(across, 0), out.movedim(across, 0)
    if image.stride(1) < image.stride(2):
        image, out = image.mT, out.mT
    nearest = torch.from_numpy(nearest_slices(image.shape[0], out.shape[0]))
    used, places = torch.unique_consecutive(nearest, return_inverse=True)
    _, middle, last = _operators(image, out, order, negligible)
    for planes, slab in _slabs(image, used):
        low, high = slab.amin((1, 2), keepdim=True), slab.amax((1, 2), keepdim=True)
        values = _in_plane(slab, middle, last).clamp_(low, high)
        start, stop = (int(place) for place in torch.searchsorted(places, torch.tensor([planes.start, planes.stop])))
        out[start:stop] = values[places[start:stop] - planes.start]


def _operators(
    image: torch.Tensor, out: torch.Tensor, order: int, negligible: float
) -> tuple[Operator | None, Operator | None, Operator | None]:
    """For each axis what resamples it, ``None`` for one that stays."""
    first, middle, last = (
        None if before == after else spline_operator(before, after, order, negligible)
        for before, after in zip(image.shape, out.shape, strict=True)
    )
    return first, middle, last


def _slabs(image: torch.Tensor, wanted: torch.Tensor | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """The planes across the first axis, some at a time, or only those with the numbers ``wanted``.

    Yields:
        where in the sequence of planes these are, and a float64 copy (planes, middle, last), the middle axis outermost
        in memory.
    """
    count = len(image) if wanted is None else len(wanted)
    step = max(1, _SLAB_BYTES // (_FLOAT64 * image.shape[1] * image.shape[2]))
    if image.stride(0) < image.stride(2):
        step = max(step, _CACHE_LINE_VOXELS)
    for start in range(0, count, step):
        planes = slice(start, min(start + step, count))
        chosen = image[planes] if wanted is None else image[wanted[planes]]
        slab = chosen.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
        yield planes, slab.transpose(0, 1)


def _in_plane(slab: torch.Tensor, middle: Operator | None, last: Operator | None) -> torch.Tensor:
    """Both axes of the planes of a slab, in its own memory layout; first the one that shrinks more."""
    values = slab.transpose(0, 1)
    if middle is not None and last is not None and last.growth < middle.growth:
        values = _along_first(_along_last(values, last), middle)
    else:
        values = _along_last(_along_first(values, middle), last)
    return values.transpose(0, 1)


def _along_first(values: torch.Tensor, operator: Operator | None) -> torch.Tensor:
    if operator is None:
        return values
    result = torch.empty((operator.after, *values.shape[1:]), dtype=torch.float64)
    for block in operator.blocks:
        columns, rows = values[block.columns], result[block.rows]
        torch.mm(block.weights, columns.view(len(columns), -1), out=rows.view(len(rows), -1))
    return result


def _along_last(values: torch.Tensor, operator: Operator | None) -> torch.Tensor:
    if operator is None:
        return values
    result = torch.empty((*values.shape[:-1], operator.after), dtype=torch.float64)
    lines, resampled = values.view(-1, operator.before), result.view(-1, operator.after)
    for block in operator.blocks:
        torch.mm(lines[:, block.columns], block.weights.T, out=resampled[:, block.rows])
    return result
