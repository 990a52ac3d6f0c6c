"""Which regions a voxel is in, as one number for each voxel, and back.

A region of nnU-Net is a set of label values, so a label map says already which regions a voxel is in. Stock makes a
channel of each region in the data loader (``ConvertSegmentationToRegionsTransform``), resamples and ships all of them.
Here a voxel has one small number until the targets are on the device: its label (:class:`LabelCode`), or a bit for each
region (:class:`BitmaskCode`). Both are lossless for any label values, also for those that are in no region.

Encoding runs in the loader's processes, decoding on the device; nothing here has state or a lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

Region = tuple[int, ...]

MOST_IN_INT32, MOST_IN_INT64 = 31, 63
"""Bits of torch's integers without the sign."""


class RegionCode(Protocol):
    """A way to write down the regions of each voxel.

    Attributes:
        dtype: of an encoded voxel.
    """

    @property
    def dtype(self) -> torch.dtype:
        """See the class."""
        ...

    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels, whole numbers of any shape and type on the CPU, as codes of that shape."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, 1, *spatial) as regions (B, R, *spatial), bool and contiguous, on the same device."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same, whose tables lie where codes are decoded."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LabelCode:
    """A voxel's code is its label, counted from the least label that is in a region.

    Attributes:
        first: the label of code 0. It, and that of the last code, are in no region: all labels outside of the regions'
            range become one of them.
        table: which codes are in which region, (R, codes), bool.
        dtype: the smallest type that holds all codes.
    """

    first: int
    table: torch.Tensor
    dtype: torch.dtype

    @property
    def last(self) -> int:
        """The label of the last code."""
        return self.first + self.table.shape[1] - 1

    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        """See :class:`RegionCode`."""
        if not _holds(labels.dtype, self.first, self.last):
            labels = labels.to(torch.int32)
        return labels.clamp(self.first, self.last).sub_(self.first).to(self.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See :class:`RegionCode`."""
        index = codes.flatten().to(torch.int32)
        shape = (len(codes), *codes.shape[2:])
        regions = _empty_regions(codes, len(self.table))
        for number, is_in in enumerate(self.table):
            regions[:, number] = is_in.index_select(0, index).view(shape)
        return regions

    def to(self, device: torch.device) -> Self:
        """See :class:`RegionCode`."""
        return replace(self, table=self.table.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class BitmaskCode:
    """Bit *k* of a voxel's code says whether it is in region *k*.

    Attributes:
        labels: which label is in which region.
        masks: the bits of each code of ``labels``, int32 or int64.
    """

    labels: LabelCode
    masks: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`RegionCode`."""
        return self.masks.dtype

    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        """See :class:`RegionCode`."""
        index = self.labels.encode(labels).to(torch.int32)
        return self.masks.index_select(0, index.flatten()).view(labels.shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See :class:`RegionCode`."""
        regions = _empty_regions(codes, len(self.labels.table))
        for number in range(regions.shape[1]):
            torch.ne(codes & (1 << number), 0, out=regions[:, number : number + 1])
        return regions

    def to(self, device: torch.device) -> Self:  # noqa: ARG002 (bits need no table)
        """See :class:`RegionCode`."""
        return self


def label_code(regions: Iterable[Region]) -> LabelCode:
    """The code that ships labels: a byte a voxel, if the regions' labels span no more than 254 values."""
    regions = tuple(regions)
    labels = {label for region in regions for label in region}
    first, last = min(labels, default=0) - 1, max(labels, default=0) + 1
    table = torch.zeros((len(regions), last - first + 1), dtype=torch.bool)
    for is_in, region in zip(table, regions, strict=True):
        is_in[[label - first for label in region]] = True
    types = (torch.uint8, torch.int16, torch.int32)
    return LabelCode(first, table, next(each for each in types if _holds(each, 0, last - first)))


def bitmask_code(regions: Iterable[Region]) -> BitmaskCode | None:
    """The code of a bit for each region: int32 for up to 31 of them, int64 for up to 63; ``None`` beyond."""
    labels = label_code(regions)
    count = len(labels.table)
    if count > MOST_IN_INT64:
        return None
    dtype = torch.int32 if count <= MOST_IN_INT32 else torch.int64
    bits = (torch.ones(count, dtype=dtype) << torch.arange(count, dtype=dtype))[:, None]
    return BitmaskCode(labels, (labels.table * bits).sum(0, dtype=dtype))


def _holds(dtype: torch.dtype, *values: int) -> bool:
    """Whether a type of whole numbers has all of these values, and the difference of any two."""
    if dtype.is_floating_point or dtype == torch.bool:
        return False
    limits = torch.iinfo(dtype)
    return limits.min <= min(values) and max(values) <= limits.max and max(values) - min(values) <= limits.max


def _empty_regions(codes: torch.Tensor, count: int) -> torch.Tensor:
    return torch.empty((len(codes), count, *codes.shape[2:]), dtype=torch.bool, device=codes.device)
