"""Augmentation that moves soft targets as it moves the image: batchgeneratorsv2's regression targets.

They are rotated, scaled and mirrored by the parameters that the image and its labels get, interpolated as the image is,
and untouched by what changes intensities. No transform draws other random numbers for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

SHIPPED = torch.float16
"""What soft targets are cached in; half of what nnU-Net's loader ships images in."""

_IMAGE, _TARGETS, _SOFT = "image", "segmentation", "regression_target"


class SoftTargetPipeline(ComposeTransforms):  # type: ignore[misc]
    """A trainer's transforms, for samples whose image has soft targets as its last channels.

    What comes out has a list of targets: those that the transforms give, and after them the soft targets (P, *spatial),
    float16, at the finest scale.

    Attributes:
        transforms: those of the trainer.
    """

    def __init__(self, transforms: Sequence[BasicTransform], channels: int, *, has_background: bool) -> None:
        super().__init__(list(transforms))
        self._channels, self._has_background = channels, has_background

    def apply(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Take them apart, transform them, and put the soft targets behind the others.

        Raises:
            TypeError: a transform does not say what it does to regression targets.
        """
        whole = data_dict[_IMAGE]
        data_dict |= {_IMAGE: whole[: -self._channels], _SOFT: whole[-self._channels :]}
        for transform in self.transforms:
            data_dict = transform(**data_dict)
            if data_dict.get(_SOFT) is None:
                culprit = getattr(transform, "transform", transform)  # RandomTransform wraps one
                msg = f"{type(culprit).__name__} drops regression targets, so nothing can be distilled through it"
                raise TypeError(msg)
        soft, targets = data_dict.pop(_SOFT), data_dict[_TARGETS]
        if self._has_background:
            soft = torch.cat((soft[:1] + 1, soft[1:]))
        listed = targets if isinstance(targets, list) else [targets]
        return data_dict | {_TARGETS: [*listed, soft.clamp(0, 1).to(SHIPPED)]}


def with_soft_targets(pipeline: BasicTransform, channels: int, *, has_background: bool) -> SoftTargetPipeline:
    """The same pipeline, for soft targets too.

    Args:
        pipeline: as a trainer's ``get_training_transforms`` gives it.
        channels: of the soft targets.
        has_background: whether the first of them is the background, and lacks 1.
    """
    steps = pipeline.transforms if type(pipeline) is ComposeTransforms else [pipeline]
    return SoftTargetPipeline(steps, channels, has_background=has_background)
