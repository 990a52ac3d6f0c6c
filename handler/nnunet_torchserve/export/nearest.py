"""``export: nearest``: labels on the network's grid, then the nearest of them for each voxel of the image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .canvas import Canvas
from .grid import Resampling
from .rules import ArgMax, Regions
from .sparse import IMAGE_BLOCK, boxes, encode
from .threads import in_threads


def export(
    logits: torch.Tensor,
    resampling: Resampling,
    rule: ArgMax | Regions,
    canvas: Canvas,
    deadline: float | None = None,
) -> None:
    """Paint the label of the nearest voxel of the network's grid (torch's ``nearest-exact``).

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU.
        resampling: only its shape matters.
        rule: the model's.
        canvas: what to paint on.
        deadline: ``time.monotonic()`` after which it is given up.

    Raises:
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    codes, _ = encode(logits, rule, certify=False, deadline=deadline)
    chosen = [_nearest(inputs, outputs) for inputs, outputs in zip(codes.shape, resampling.shape, strict=True)]

    def paint(box: tuple[slice, slice, slice]) -> None:
        z, y, x = (indices[part] for indices, part in zip(chosen, box, strict=True))
        canvas.paint(box, codes[z][:, y][:, :, x])

    in_threads(paint, boxes(resampling.shape, IMAGE_BLOCK), deadline)


def _nearest(inputs: int, outputs: int) -> npt.NDArray[np.int64]:
    positions = torch.arange(inputs, dtype=torch.float32)[None, None]
    nearest = functional.interpolate(positions, outputs, mode="nearest-exact")[0, 0]
    chosen: npt.NDArray[np.int64] = nearest.long().numpy()
    return chosen
