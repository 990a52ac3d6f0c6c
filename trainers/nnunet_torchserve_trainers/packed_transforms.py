"""What replaces the end of nnU-Net's augmentation: voxels keep one number instead of a channel for each region.

Stock ends with ``ConvertSegmentationToRegionsTransform`` and, with deep supervision, ``DownsampleSegForDSTransform``,
which takes the nearest voxel. Which regions a voxel is in depends on its label only, so that both orders give the same:
the number is resampled once for each scale, and becomes channels on the device. What comes before stays as it is, and
so do random numbers: none of these four transforms draws any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch.nn.functional import interpolate

from nnunet_torchserve_trainers.region_codes import Region, RegionCode

Scale = float | Sequence[float]
"""Of each spatial axis, or of all of them."""


class EncodeRegionsTransform(SegOnlyTransform):  # type: ignore[misc]
    """Labels become a :class:`~nnunet_torchserve_trainers.region_codes.RegionCode`'s numbers, in one channel."""

    def __init__(self, code: RegionCode, channel_in_seg: int = 0) -> None:
        super().__init__()
        self.code = code
        self.channel_in_seg = channel_in_seg

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.code.encode(segmentation[self.channel_in_seg :][:1])


class DownsampleCodesTransform(SegOnlyTransform):  # type: ignore[misc]
    """The targets of deep supervision as ``DownsampleSegForDSTransform`` makes them, exact for any whole numbers.

    Stock's goes through float32, which rounds what takes more than 24 bits.
    """

    def __init__(self, ds_scales: Sequence[Scale]) -> None:
        super().__init__()
        self.ds_scales = ds_scales

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        return [_nearest(segmentation, scale) for scale in self.ds_scales]


def _nearest(segmentation: torch.Tensor, scale: Scale) -> torch.Tensor:
    """(C, *spatial) -> (C, *smaller), each voxel that of ``nearest-exact``."""
    scales = scale if isinstance(scale, Sequence) else [scale] * (segmentation.ndim - 1)
    for axis, factor in enumerate(scales, start=1):
        size = segmentation.shape[axis]
        taken = _taken(size, round(size * factor))
        if taken is not None:
            segmentation = segmentation.index_select(axis, taken)
    return segmentation


@lru_cache(maxsize=64)
def _taken(size: int, smaller: int) -> torch.Tensor | None:
    """Which of ``size`` voxels in a row torch takes; ``None`` if that is all of them.

    Asked in float32, as stock asks: torch places voxels in the precision of what they hold, and where one lies in the
    middle between two others, float64 may take the other neighbour. Every index is exact in it.
    """
    if size == smaller:
        return None
    row = torch.arange(size, dtype=torch.float32)[None, None]
    return interpolate(row, smaller, mode="nearest-exact")[0, 0].to(torch.int32)


def packed(pipeline: BasicTransform, regions: tuple[Region, ...], code: RegionCode) -> BasicTransform | None:
    """The same pipeline, whose targets are codes.

    Args:
        pipeline: as nnU-Net's ``get_training_transforms`` or ``get_validation_transforms`` composes it.
        regions: that its targets must be of.
        code: of these regions.

    Returns:
        A copy, or ``None`` if ``pipeline`` makes regions in another way than stock: of other labels, more than once, or
        with anything but deep supervision after it. Then nobody knows whether a transform wants to see the channels.
    """
    steps = list(getattr(pipeline, "transforms", ()))
    match [number for number, step in enumerate(steps) if type(step) is ConvertSegmentationToRegionsTransform]:
        case [number]:
            before, convert, after = steps[:number], steps[number], steps[number + 1 :]
        case _:
            return None
    if tuple(tuple(map(int, region)) for region in convert.regions) != regions:
        return None
    if any(type(step) is not DownsampleSegForDSTransform for step in after) or len(after) > 1:
        return None
    copied = copy.copy(pipeline)
    downsampled = [DownsampleCodesTransform(step.ds_scales) for step in after]
    copied.transforms = [*before, EncodeRegionsTransform(code, convert.channel_in_seg), *downsampled]
    return copied
