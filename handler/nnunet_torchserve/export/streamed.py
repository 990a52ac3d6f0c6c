"""Labels by a resampling function that only nnU-Net knows: a few classes at a time, and the best so far.

Exact for every function that treats each class by itself. It also serves ``export: linear``, which is float32
interpolation by torch instead of the plan's function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .canvas import Canvas
from .grid import Array, Resampling
from .rules import ArgMax, Codes, Regions, check_finite

_WHOLE = (slice(None),) * 3


def export(logits: torch.Tensor, resampling: Resampling, rule: ArgMax | Regions, canvas: Canvas) -> None:
    """Paint the labels that the plan's function leads to.

    Args:
        logits: (C, z, y, x) on the network's grid.
        resampling: how they reach the image's.
        rule: the model's.
        canvas: what to paint on.

    Raises:
        NonFiniteLogits: a logit is NaN or infinite.
    """
    check_finite(logits)
    codes: Codes = np.empty(0)
    best: Array = np.empty(0)
    for channel, values in resampled(logits, resampling.function, resampling.together):
        if not channel:
            codes, best = np.zeros(values.shape, rule.dtype), np.full(values.shape, -np.inf, values.dtype)
        rule.add(channel, values, best, codes)
    # a function that resamples nothing may leave more than the image has, which nnU-Net cuts off
    canvas.paint(_WHOLE, codes[tuple(slice(0, size) for size in resampling.shape)])


def linear(resampling: Resampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear interpolation in float32 by torch, with the nearest slice where the plan takes that."""
    axis, shape = resampling.nearest_axis, resampling.shape

    def interpolate(logits: torch.Tensor) -> torch.Tensor:
        values = logits.float()
        if axis is None:
            return functional.interpolate(values[None], shape, mode="trilinear")[0]
        in_plane = [size for each, size in enumerate(shape) if each != axis]
        slices = functional.interpolate(values.movedim(axis + 1, 1), in_plane, mode="bilinear").movedim(1, axis + 1)
        return functional.interpolate(slices[None], shape, mode="nearest-exact")[0]

    return interpolate


def resampled(
    logits: torch.Tensor, function: Callable[[torch.Tensor], Any], together: int
) -> Iterator[tuple[int, Array]]:
    """The number of each class, and its logits on the image's grid, float32 unless the function gives another dtype.

    Args:
        logits: (C, z, y, x), on any device.
        function: (k, z, y, x) -> (k, Z, Y, X).
        together: classes that ``function`` gets at least, if there are so many.
    """
    starts = list(range(0, max(1, len(logits) - together + 1), together))
    for start, end in zip(starts, [*starts[1:], len(logits)], strict=True):
        values = torch.as_tensor(function(logits[start:end].cpu()))
        for channel in range(start, end):
            # comparing in float32 what is float16 changes nothing
            values_here = values[channel - start]
            yield channel, (values_here.float() if values_here.dtype == torch.half else values_here).numpy()
