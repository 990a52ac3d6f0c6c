"""Training of a lighter network from another one's probabilities: knowledge distillation.

The teacher's probabilities were cached once, on the grid of the preprocessed cases (:mod:`~.soft_target_files`;
``nnunet-torchserve soft-targets`` makes them). The loader crops them with image and labels, augmentation moves them as
it moves those, and the loss of a training step has a second part (:mod:`~.distillation_loss`). Validation is stock's:
its loss is on labels alone, and which checkpoint is the best is decided by labels. A training that goes on needs
nothing but what stock's needs.

The mixin goes before a trainer in the list of base classes, and before the mixins of :mod:`~.region_targets`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_torchserve_trainers.distillation_loss import DistillationLoss, label_divergence, region_divergence
from nnunet_torchserve_trainers.region_targets import Batch, PackedRegionsMixin
from nnunet_torchserve_trainers.soft_target_cases import CasesWithSoftTargets
from nnunet_torchserve_trainers.soft_target_files import SoftTargetError, SoftTargets, channels_of
from nnunet_torchserve_trainers.soft_target_transforms import SHIPPED, with_soft_targets
from nnunet_torchserve_trainers.stock_name import StockNameMixin

_MAKE_THEM = "nnunet-torchserve soft-targets makes them"


class DistillMixin(StockNameMixin):
    """Trains on labels and on soft targets.

    Attributes:
        distillation_weight: of the divergence from the teacher, beside the loss on labels, whose weight is 1.
        distillation_temperature: that softens both; above 1, classes that the teacher holds for unlikely count more.
    """

    distillation_weight: float = 1.0
    distillation_temperature: float = 2.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of mixins in which packed regions would meet a list that has soft targets in it.

        Raises:
            TypeError: it is such an order.
        """
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if PackedRegionsMixin in order and order.index(PackedRegionsMixin) < order.index(DistillMixin):
            msg = f"{cls.__name__}: name DistillMixin before the mixin that packs regions"
            raise TypeError(msg)

    @cached_property
    def soft_targets(self) -> SoftTargets:
        """Those of the preprocessed cases that this trainer trains on."""
        return SoftTargets.beside(Path(self.preprocessed_dataset_folder))

    def _build_loss(self) -> DistillationLoss:
        divergence = region_divergence if self.label_manager.has_regions else label_divergence
        return DistillationLoss(
            super()._build_loss(), divergence, self.distillation_weight, self.distillation_temperature
        )

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """As the trainer's that is inherited from, for soft targets too."""
        pipeline = super().get_training_transforms(*args, **kwargs)
        channels = self.label_manager.num_segmentation_heads
        return with_soft_targets(pipeline, channels, has_background=not self.label_manager.has_regions)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """As the trainer's that is inherited from; the images of training bring their soft targets.

        Raises:
            SoftTargetError: some are missing, or are not of these cases and labels.
        """
        training, validation = super().get_tr_and_val_datasets()
        self._check_soft_targets(training)
        has_background = not self.label_manager.has_regions
        return CasesWithSoftTargets(training, self.soft_targets, has_background=has_background), validation

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """As the trainer's that is inherited from, while the loss sees the soft targets.

        Raises:
            TypeError: there are none in the batch, because the loader has other transforms than the mixin's.
        """
        *targets, soft = batch["target"]
        if not isinstance(batch["target"], list) or soft.dtype != SHIPPED:
            name = self.get_training_transforms.__qualname__
            msg = f"{name} hides DistillMixin's, so no soft targets come: put it into a trainer behind the mixin"
            raise TypeError(msg)
        target = targets if self.enable_deep_supervision else targets[0]
        with self.loss.taught(soft.to(self.device, non_blocking=True)):
            step: dict[str, Any] = super().train_step(batch | {"target": target})
        return step

    def _check_soft_targets(self, training: Any) -> None:
        teacher, channels = self.soft_targets.teacher(), channels_of(self.label_manager)
        if teacher is None:
            msg = f"there are no soft targets in {self.soft_targets.folder}: {_MAKE_THEM}"
            raise SoftTargetError(msg)
        if (teacher.channels, teacher.has_regions) != (channels, self.label_manager.has_regions):
            msg = f"the soft targets of {teacher} are of {teacher.channels}, the student's labels are {channels}"
            raise SoftTargetError(msg)
        missing = []
        for case in training.identifiers:
            image, *_ = training.load_case(case)
            if not self.soft_targets.has(case, (len(channels), *image.shape[1:])):
                missing.append(case)
        if missing:
            msg = f"{len(missing)} training cases have no soft targets, {missing[0]} for one: {_MAKE_THEM}"
            raise SoftTargetError(msg)
        self.print_to_log_file(
            f"soft targets of {teacher}, weight {self.distillation_weight:g}, "
            f"temperature {self.distillation_temperature:g}"
        )
        if self.fold != "all" and (others := [fold for fold in teacher.folds if fold != self.fold]):
            self.print_to_log_file(
                f"WARNING: if the teacher was trained on these cases, its folds {', '.join(map(str, others))} have "
                f"seen some that fold {self.fold} is validated on, and the student's validation Dice is too good"
            )
