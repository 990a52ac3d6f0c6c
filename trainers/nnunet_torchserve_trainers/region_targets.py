"""Region-based training whose loader ships one number a voxel instead of a channel for each region.

The more regions there are, the longer it takes to make, resample and copy a channel of each, and the GPU waits. Here
the loader's processes leave the targets packed (:mod:`~.packed_transforms`), and they become channels on the device, at
the beginning of ``train_step`` and ``validation_step``. Loss, network, optimizer and log see what stock's see, bit by
bit.

The mixins go before a trainer in the list of base classes. Without regions, and where a trainer of one's own makes them
in a way of its own, they change nothing but the name in the checkpoint (:mod:`~.stock_name`).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import cached_property
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_torchserve_trainers.packed_transforms import packed
from nnunet_torchserve_trainers.region_codes import Region, RegionCode, bitmask_code, label_code
from nnunet_torchserve_trainers.stock_name import StockNameMixin

Batch = dict[str, Any]
"""Of nnU-Net's loader: ``data`` (B, C, *spatial), ``target`` (B, R, *spatial) or one for each scale, ``keys``."""


class Stage(StrEnum):
    """Of an epoch: each has transforms of its own."""

    TRAINING = "training"
    VALIDATION = "validation"


class PackedRegionsMixin(StockNameMixin):
    """What both ways have in common; a subclass chooses the code."""

    @staticmethod
    def region_code(regions: tuple[Region, ...]) -> RegionCode | None:
        """How targets of these regions are packed; ``None`` leaves them to stock."""
        raise NotImplementedError

    @cached_property
    def target_regions(self) -> tuple[Region, ...]:
        """The channels of stock's targets: the regions, then the ignore label if there is one; none without regions."""
        if not self.label_manager.has_regions:
            return ()
        channels = list(self.label_manager.foreground_regions)
        if self.label_manager.has_ignore_label:
            channels.append(self.label_manager.ignore_label)
        return tuple(_as_region(channel) for channel in channels)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """As the trainer's that is inherited from, with packed targets."""
        return self._packed(Stage.TRAINING, super().get_training_transforms(*args, **kwargs))

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """As the trainer's that is inherited from, with packed targets."""
        return self._packed(Stage.VALIDATION, super().get_validation_transforms(*args, **kwargs))

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """As stock, of a batch whose targets may be packed."""
        step: dict[str, Any] = super().train_step(self._unpacked(Stage.TRAINING, batch))
        return step

    def validation_step(self, batch: Batch) -> dict[str, Any]:
        """As stock, of a batch whose targets may be packed."""
        step: dict[str, Any] = super().validation_step(self._unpacked(Stage.VALIDATION, batch))
        return step

    @cached_property
    def _code(self) -> RegionCode | None:
        return self.region_code(self.target_regions) if self.target_regions else None

    @cached_property
    def _code_on_device(self) -> RegionCode | None:
        return None if self._code is None else self._code.to(self.device)

    @cached_property
    def _packed_stages(self) -> set[Stage]:
        """Those whose loader packs. A trainer of one's own may ship whole numbers too, which are no codes."""
        return set()

    def _packed(self, stage: Stage, pipeline: BasicTransform) -> BasicTransform:
        self._packed_stages.discard(stage)
        if not self.target_regions:
            return pipeline
        found = None if self._code is None else packed(pipeline, self.target_regions, self._code)
        how = f"{stage}: {len(self.target_regions)} region channels"
        if self._code is None:
            self.print_to_log_file(f"{how} are too many to be packed; the loader makes them, as stock")
        elif found is None:
            self.print_to_log_file(f"{how} are not packed, for this trainer makes them in a way of its own")
        else:
            self.print_to_log_file(f"{how} leave the loader as one, of {self._code.dtype}")
        if found is None:
            return pipeline
        self._packed_stages.add(stage)
        return found

    def _unpacked(self, stage: Stage, batch: Batch) -> Batch:
        """Targets that are codes become regions on the device; others stay, also those that somebody has unpacked."""
        code, target = self._code_on_device, batch["target"]
        scales = target if isinstance(target, list) else [target]
        if code is None or stage not in self._packed_stages or any(each.dtype != code.dtype for each in scales):
            return batch
        regions = [code.decode(each.to(self.device, non_blocking=True)) for each in scales]
        return batch | {"target": regions if isinstance(target, list) else regions[0]}


class RegionLabelmapMixin(PackedRegionsMixin):
    """Ships the label map: a byte a voxel, any number of regions."""

    @staticmethod
    def region_code(regions: Iterable[Region]) -> RegionCode | None:
        """See :class:`PackedRegionsMixin`."""
        return label_code(regions)


class RegionBitmaskMixin(PackedRegionsMixin):
    """Ships a bit for each region: int32 for up to 31 channels, int64 for up to 63; stock's targets beyond.

    The ignore label is a channel too.
    """

    @staticmethod
    def region_code(regions: Iterable[Region]) -> RegionCode | None:
        """See :class:`PackedRegionsMixin`."""
        return bitmask_code(regions)


def _as_region(channel: int | Iterable[int]) -> Region:
    return (channel,) if isinstance(channel, int) else tuple(channel)
