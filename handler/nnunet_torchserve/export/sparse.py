"""Exact labels without all classes at full resolution: only what the corners of a cell leave open is interpolated.

A *cell* is the box between neighbouring voxels of the network's grid. If all its corners have one and the same certain
code (:mod:`.rules`), every voxel of the image in it has that code: no interpolation is needed. The others, *mixed*, are
interpolated in float32, all classes of a voxel by one weighted gather, and the few of those that float32 cannot tell
apart are settled in stock's own arithmetic. In blocks of the image, each on one thread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from . import stock_arithmetic
from .canvas import Canvas
from .grid import Array, Taps
from .rules import MIXED, ArgMax, Codes, Precision, Regions
from .threads import each

GRID_BLOCK = 2**16
"""Voxels of the network's grid that are encoded at a time: a few arrays of them, float32, fit a core's cache."""

IMAGE_BLOCK = 2**16
"""Voxels of the image that are painted at a time."""

SAME_GRID_BLOCK = 2**17
"""The same, where nothing is resampled and a voxel costs little."""

_ELEMENTS = 2**20
"""Values that are interpolated at a time; 4 MiB."""

Box = tuple[slice, slice, slice]


def export(logits: torch.Tensor, taps: Sequence[Taps], rule: ArgMax | Regions, canvas: Canvas) -> None:
    """Paint the labels that stock would give.

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU, any strides.
        taps: of each axis.
        rule: the model's.
        canvas: what to paint on.

    Raises:
        NonFiniteLogits: a logit is NaN or infinite.
    """
    shape = [len(each_taps) for each_taps in taps]
    if all(each_taps.is_identity for each_taps in taps):

        def paint(box: Box) -> None:
            canvas.paint(box, rule.encode(logits[:, *box], certify=False)[0])

        each(paint, list(boxes(shape, SAME_GRID_BLOCK)))
        return
    codes, largest = encode(logits, rule)
    painter = _Painter(logits, codes, taps, rule, Precision.of(logits.dtype, largest), canvas)
    each(painter.paint, list(boxes(shape, IMAGE_BLOCK)))


def encode(logits: torch.Tensor, rule: ArgMax | Regions, *, certify: bool = True) -> tuple[Codes, float]:
    """Codes of every voxel of the network's grid, and the largest magnitude of their logits."""
    shape = logits.shape[1:]
    codes: Codes = np.empty(shape, rule.dtype)

    def encode_box(box: Box) -> float:
        codes[box], largest = rule.encode(logits[:, *box], certify=certify)
        return largest

    return codes, max(each(encode_box, list(boxes(shape, GRID_BLOCK))))


def cells(codes: Codes, axes: Sequence[int]) -> Codes:
    """The codes of the cells that start at each voxel, or :data:`~.rules.MIXED`.

    Args:
        codes: of voxels.
        axes: along which a cell reaches to the next voxel; the last one's cell ends with it.
    """
    for axis in axes:
        before, after = _without(codes, axis, last=True), _without(codes, axis, last=False)
        merged = codes.copy()
        # all ones where they differ; -1 has all bits set
        differ = np.negative(np.not_equal(before, after).astype(codes.dtype))
        np.bitwise_or(before, differ, out=_without(merged, axis, last=True))
        codes = merged
    return codes


def boxes(shape: Sequence[int], voxels: int) -> Iterator[Box]:
    """Boxes of about so many voxels that cover a grid: whole planes, or rows of one."""
    depth, height, width = shape
    planes = max(1, voxels // (height * width))
    rows = height if planes > 1 else min(height, max(1, voxels // width))
    for start, row in itertools.product(range(0, depth, planes), range(0, height, rows)):
        yield slice(start, min(depth, start + planes)), slice(row, min(height, row + rows)), slice(0, width)


def mixed_share(logits: torch.Tensor, taps: Sequence[Taps], rule: ArgMax | Regions) -> float:
    """The share of cells whose corners leave their label open."""
    axes = _interpolated(taps)
    codes = cells(encode(logits, rule)[0], axes)
    for axis in axes:
        codes = _without(codes, axis, last=True) if codes.shape[axis] > 1 else codes
    return float(np.mean(codes == _mixed(codes)))


@dataclass(frozen=True, slots=True)
class _Painter:
    logits: torch.Tensor
    codes: Codes
    taps: Sequence[Taps]
    rule: ArgMax | Regions
    precision: Precision
    canvas: Canvas

    def paint(self, box: Box) -> None:
        taps = [each_taps[part] for each_taps, part in zip(self.taps, box, strict=True)]
        low = [int(each_taps.lower.min()) for each_taps in taps]
        region = tuple(slice(start, int(each_taps.upper.max()) + 1) for start, each_taps in zip(low, taps, strict=True))
        taps = [each_taps.shifted(start) for each_taps, start in zip(taps, low, strict=True)]
        axes = _interpolated(taps)
        known = cells(self.codes[region], axes)
        painted = known
        for axis, each_taps in enumerate(taps):
            painted = np.take(painted, each_taps.lower, axis=axis)
        open_voxels = np.flatnonzero(painted == _mixed(painted))
        if open_voxels.size:
            needed = known == _mixed(known)
            for axis in axes:  # the far corners of mixed cells too
                near = needed.copy()
                _without(needed, axis, last=False)[...] |= _without(near, axis, last=True)
            corners = _Corners.gather(self.logits, region, needed)
            step = max(1, _ELEMENTS // self.rule.classes)
            flat = painted.reshape(-1)
            for start in range(0, open_voxels.size, step):
                chosen = open_voxels[start : start + step]
                flat[chosen] = self._decide(corners, taps, axes, np.unravel_index(chosen, painted.shape))
        self.canvas.paint(box, painted)

    def _decide(
        self,
        corners: _Corners,
        taps: Sequence[Taps],
        axes: Sequence[int],
        voxels: Sequence[npt.NDArray[np.intp]],
    ) -> npt.NDArray[np.int64]:
        """Codes of some voxels of the block, given by their positions along each axis."""
        indices = corners.around(taps, axes, voxels)
        sides = [
            [torch.from_numpy(side.astype(np.float32)[voxels[axis]]) for side in taps[axis].weights] for axis in axes
        ]
        ones = torch.ones(len(indices))  # a block without an interpolated axis has one corner
        weights = torch.stack([math.prod(corner, start=ones) for corner in itertools.product(*sides)], 1)
        values = functional.embedding_bag(
            torch.from_numpy(indices), corners.table, mode="sum", per_sample_weights=weights
        )
        codes, near = self.rule.decide(values, self.precision)
        decided: npt.NDArray[np.int64] = codes.numpy()
        if (close := np.flatnonzero(near.numpy())).size:
            exact = [[side[voxels[axis][close]] for side in taps[axis].weights] for axis in axes]
            decided[close] = self.rule.settle(stock_arithmetic.at_points(corners.logits, indices[close], exact))
        return decided


@dataclass(frozen=True, slots=True)
class _Corners:
    """Logits of the voxels of a region that are needed, and no others.

    Attributes:
        number: int32, flat position in the region -> row of ``table``, where the voxel is needed.
        shape: (z, y, x) of the region.
        logits: (C, u), as they came.
        table: float32 (u, C), the same.
    """

    number: npt.NDArray[np.int32]
    shape: tuple[int, ...]
    logits: Array
    table: torch.Tensor

    @classmethod
    def gather(cls, logits: torch.Tensor, region: Sequence[slice], needed: npt.NDArray[np.bool_]) -> _Corners:
        classes = len(logits)
        part = logits[:, *region]
        memory = part.numpy()
        strides = [stride // memory.itemsize for stride in memory.strides[1:]]
        reach = 1 + sum((n - 1) * stride for n, stride in zip(part.shape[1:], strides, strict=True))
        lines = part.as_strided((classes, reach), (part.stride(0), 1)).numpy()
        offsets = np.zeros(np.count_nonzero(needed), np.intp)
        for index, stride in zip(needed.nonzero(), strides, strict=True):
            offsets += index * stride
        found = np.empty((classes, len(offsets)), memory.dtype)
        for line, out in zip(lines, found, strict=True):
            np.take(line, offsets, out=out, mode="clip")  # "raise" would copy `out`
        number = np.cumsum(needed, dtype=np.int32) - 1
        table = torch.empty(found.shape[::-1]).copy_(torch.from_numpy(found).t())
        return cls(number, needed.shape, found, table)

    def around(
        self, taps: Sequence[Taps], axes: Sequence[int], voxels: Sequence[npt.NDArray[np.intp]]
    ) -> npt.NDArray[np.int32]:
        """Rows of the table at the corners of the voxels' cells, (n, corners), the last axis fastest."""
        steps = (self.shape[1] * self.shape[2], self.shape[2], 1)
        sides = []
        for axis, (each_taps, step) in enumerate(zip(taps, steps, strict=True)):
            lower = (each_taps.lower * step)[voxels[axis]]
            sides.append((lower, (each_taps.upper * step)[voxels[axis]]) if axis in axes else (lower,))
        return np.stack([self.number[z + y + x] for z, y, x in itertools.product(*sides)], 1)


def _interpolated(taps: Sequence[Taps]) -> list[int]:
    return [axis for axis, each_taps in enumerate(taps) if each_taps.interpolates]


def _mixed(codes: Codes) -> int:
    return MIXED[codes.dtype.type]


def _without(array: Array, axis: int, *, last: bool) -> Array:
    """A view without the last, or the first, along an axis."""
    return array[(slice(None),) * axis + (slice(None, -1) if last else slice(1, None),)]
