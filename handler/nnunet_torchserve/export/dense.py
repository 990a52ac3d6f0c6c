"""Exact labels by interpolating every voxel, for logits on a GPU: one byte a voxel leaves it (four above 255 classes).

In slabs of the image: all classes in float32 axis by axis, the winner of each voxel, and for those that float32 cannot
tell apart the logits around them, which the CPU settles in stock's own arithmetic. Nothing here needs CUDA; on a CPU
:mod:`.sparse` is the faster one even if every cell is open (docs/adr/0004).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..taps import Taps
from . import stock_arithmetic
from .canvas import Canvas
from .rules import ArgMax, Precision, Regions, check_finite
from .sparse import boxes
from .threads import check

_ELEMENTS = 2**25
"""Values of a slab; 128 MiB, and three times that while an axis is interpolated."""

_SETTLED_ELEMENTS = 2**22
"""Values around voxels that are settled at a time."""


def export(
    logits: torch.Tensor,
    taps: Sequence[Taps],
    rule: ArgMax | Regions,
    canvas: Canvas,
    deadline: float | None = None,
) -> None:
    """As :func:`.sparse.export`, for logits on any device."""
    check_finite(logits)
    largest = max(float(channel.abs().max()) for channel in logits)
    precision = Precision.of(logits.dtype, largest)
    wire = torch.uint8 if rule.dtype().itemsize == 1 else torch.int32
    for box in boxes([len(each) for each in taps], max(1, _ELEMENTS // len(logits))):
        check(deadline)
        block = [each[part] for each, part in zip(taps, box, strict=True)]
        values = _interpolated(logits, block).flatten(1).t()
        codes, near = rule.decide(values, precision)
        del values
        for close in torch.split(near.nonzero()[:, 0], max(1, _SETTLED_ELEMENTS // (8 * len(logits)))):
            codes[close] = _settled(logits, block, rule, close)
        canvas.paint(box, codes.to(wire).reshape([len(each) for each in block]).cpu().numpy())


def _interpolated(logits: torch.Tensor, taps: Sequence[Taps]) -> torch.Tensor:
    """Float32 (C, Z, Y, X) of a slab."""
    values = logits
    for axis, each in enumerate(taps, start=1):
        lower = values.index_select(axis, _on(each.lower, logits)).float()
        if each.interpolates:
            shape = [-1 if dimension == axis else 1 for dimension in range(4)]
            lower *= _on(each.lower_weight, logits).float().view(shape)
            upper = values.index_select(axis, _on(each.upper, logits)).float()
            upper *= _on(each.upper_weight, logits).float().view(shape)
            lower += upper
        values = lower
    return values


def _settled(logits: torch.Tensor, taps: Sequence[Taps], rule: ArgMax | Regions, close: torch.Tensor) -> torch.Tensor:
    """Codes of the voxels at these flat positions of a slab."""
    voxels = torch.unravel_index(close, [len(each) for each in taps])
    sides = [[_on(end, logits)[at] for end in each.ends] for each, at in zip(taps, voxels, strict=True)]
    corners = torch.stack([logits[:, z, y, x] for z, y, x in itertools.product(*sides)], 2)
    indices = torch.arange(corners.shape[1] * corners.shape[2]).view(corners.shape[1:])
    weights = [
        [side[at.cpu().numpy()] for side in each.weights]
        for each, at in zip(taps, voxels, strict=True)
        if each.interpolates
    ]
    values = stock_arithmetic.at_points(corners.flatten(1).cpu().numpy(), indices.numpy(), weights)
    return torch.from_numpy(rule.settle(values)).to(logits.device)


def _on(array: object, logits: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(array, device=logits.device)
