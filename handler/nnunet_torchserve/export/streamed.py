"""Labels by a resampling function that only nnU-Net knows: a few classes at a time, and the best so far.

Exact for every function that treats each class by itself. It also serves ``export: linear``, which is float32
interpolation by torch instead of the plan's function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from ..errors import NonFiniteLogits
from .canvas import Canvas
from .grid import Array, Resampling
from .rules import ArgMax, Codes, Regions, check_finite
from .sparse import IMAGE_BLOCK, boxes
from .threads import check


def export(
    logits: torch.Tensor,
    resampling: Resampling,
    rule: ArgMax | Regions,
    canvas: Canvas,
    deadline: float | None = None,
) -> None:
    """Paint the labels that the plan's function leads to.

    Args:
        logits: (C, z, y, x) on the network's grid.
        resampling: how they reach the image's.
        rule: the model's.
        canvas: what to paint on.
        deadline: ``time.monotonic()`` after which it is given up.

    Raises:
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite, before or after the resampling.
    """
    check_finite(logits)
    codes: Codes = np.empty(0)
    best: Array = np.empty(0)
    for channel, values in resampled(logits, resampling):
        check(deadline)
        if not channel:
            codes, best = np.zeros(values.shape, rule.dtype), values.copy()
        rule.add(channel, values, best, codes)
    for box in boxes(resampling.shape, IMAGE_BLOCK):
        canvas.paint(box, codes[box])


def linear(resampling: Resampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear interpolation in float32 by torch, with the nearest slice where the plan takes that."""
    axis, shape = resampling.nearest_axis, resampling.shape

    def interpolate(logits: torch.Tensor) -> torch.Tensor:
        values = logits.float()
        if axis is None:
            return functional.interpolate(values[None], shape, mode="trilinear")[0]
        in_plane = [size for other, size in enumerate(shape) if other != axis]
        slices = functional.interpolate(values.movedim(axis + 1, 1), in_plane, mode="bilinear").movedim(1, axis + 1)
        return functional.interpolate(slices[None], shape, mode="nearest-exact")[0]

    return interpolate


def resampled(logits: torch.Tensor, resampling: Resampling) -> Iterator[tuple[int, Array]]:
    """The number of each class, and its logits on the image's grid, float32 instead of float16.

    Raises:
        NonFiniteLogits: the function made a value that is NaN or infinite.
    """
    together = resampling.together
    starts = list(range(0, max(1, len(logits) - together + 1), together))
    for start, end in zip(starts, [*starts[1:], len(logits)], strict=True):
        group = torch.as_tensor(resampling.function(logits[start:end].cpu()))
        # a function that resamples nothing may leave more than the image has, which nnU-Net cuts off
        group = group[:, *(slice(0, size) for size in resampling.shape)]
        for channel, values in enumerate(group, start):
            if not bool(torch.isfinite(values).all()):
                raise NonFiniteLogits
            yield channel, (values.float() if values.dtype == torch.half else values).numpy()
