"""Where the sliding window stops, and how its patches are weighted: nnU-Net's functions, named and cached.

The numbers come from ``nnunetv2.inference.sliding_window_prediction`` itself; only the order of the windows (the
order of summation, hence the bits of the result) is restated here from
``nnUNetPredictor._internal_get_sliding_window_slicers``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

SIGMA_SCALE = 1 / 8
PEAK = 10
"""nnU-Net's Gaussian: sigma is an eighth of the patch, the peak is 10 (``value_scaling_factor``)."""

STOCK_THREADS = 8
"""``default_num_processes``: ``nnUNetPredictor`` runs the network on at most, the export on exactly as many threads,
and torch's last bits depend on it."""

Slicer = tuple[slice | int, ...]


def padded_shape(shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """``shape`` (z, y, x) padded to at least the patch; a 2-D patch pads y and x only."""
    leading = len(shape) - len(patch_size)
    return (*shape[:leading], *(max(n, p) for n, p in zip(shape[leading:], patch_size, strict=True)))


def slicers(shape: Sequence[int], patch_size: Sequence[int], step: float) -> list[Slicer]:
    """The windows of a padded volume in nnU-Net's order.

    Args:
        shape: (z, y, x), at least the patch size.
        patch_size: (z, y, x), or (y, x): then every z is cut into windows on its own.
        step: fraction of the patch between windows.

    Returns:
        One tuple for each window: a full slice for the channel, then an index (2-D) or slices.
    """
    leading = len(shape) - len(patch_size)
    steps = compute_steps_for_sliding_window(tuple(shape[leading:]), tuple(patch_size), step)
    windows = [
        tuple(slice(start, start + size) for start, size in zip(starts, patch_size, strict=True))
        for starts in itertools.product(*steps)
    ]
    slices: itertools.product[tuple[int, ...]] = itertools.product(*(range(n) for n in shape[:leading]))
    return [(slice(None), *index, *window) for index in slices for window in windows]


def count_windows(shape: Sequence[int], patch_size: Sequence[int], step: float) -> int:
    """``len(slicers(...))`` of a padded volume without making them."""
    leading = len(shape) - len(patch_size)
    per_axis = (math.ceil((n - p) / (p * step)) + 1 for n, p in zip(shape[leading:], patch_size, strict=True))
    return math.prod(shape[:leading]) * math.prod(per_axis)


@lru_cache(maxsize=64)
def gaussian(patch_size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """nnU-Net's importance map: float16, of the patch's shape, zeros replaced by the smallest weight.

    nnU-Net's own cache holds two maps, which three models on one server would thrash.
    """
    weights: torch.Tensor = compute_gaussian.__wrapped__(
        patch_size, sigma_scale=SIGMA_SCALE, value_scaling_factor=PEAK, device=device
    )
    return weights
