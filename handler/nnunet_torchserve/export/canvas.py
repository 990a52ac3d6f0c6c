"""The label map that the export paints: uncropped, in the image's own axis order, from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..volume import LabelArray
from .grid import TrainedModel
from .rules import ArgMax, Codes, Regions

_UINT8_CLASSES = 255
"""``convert_predicted_logits_to_segmentation_with_correct_shape`` has uint16 from so many foreground labels on."""

_UINT8_LABELS = 255
"""``SimpleITKIO.write_seg`` writes uint8 while the largest label is below this."""


class Canvas:
    """A label map on the image's grid, background where nothing is painted.

    Blocks are painted in the plan's axis order, within the crop; different blocks may be painted by different threads.

    Attributes:
        crop: view of the cropped part, (z, y, x) in the plan's axis order.
    """

    def __init__(self, model: TrainedModel, rule: ArgMax | Regions, properties: Mapping[str, Any]) -> None:
        wide = len(model.labels.foreground_labels) >= _UINT8_CLASSES
        plans = model.plans
        before = properties["shape_before_cropping"]
        self._labels: npt.NDArray[Any] = np.zeros(
            [int(before[axis]) for axis in plans.transpose_backward], dtype=np.uint16 if wide else np.uint8
        )
        self._may_exceed_uint8 = rule.largest_label >= _UINT8_LABELS
        labels = rule.labels
        renames = labels is not None and not np.array_equal(labels, np.arange(len(labels)))
        self._table = labels.astype(self._labels.dtype) if labels is not None and renames else None
        self.crop: npt.NDArray[Any] = self._labels.transpose(plans.transpose_forward)[crop_box(properties)]

    def paint(self, where: Sequence[slice], codes: Codes) -> None:
        """Labels of one block; codes are those of the rule."""
        self.crop[tuple(where)] = codes if self._table is None else np.take(self._table, codes)

    def finish(self) -> LabelArray:
        """The label map (Z, Y, X), in the dtype that stock would write."""
        if self._may_exceed_uint8:
            return written(self._labels)
        return cast("LabelArray", self._labels.astype(np.uint8, copy=False))


def written(labels: npt.NDArray[Any]) -> LabelArray:
    """Labels in the dtype that stock writes them in."""
    wide = labels.size > 0 and int(labels.max()) >= _UINT8_LABELS
    return cast("LabelArray", np.ascontiguousarray(labels, np.uint16 if wide else np.uint8))


def crop_box(properties: Mapping[str, Any]) -> tuple[slice, ...]:
    """Where the cropped image lies in the whole, in the plan's axis order."""
    return tuple(slice(int(start), int(end)) for start, end in properties["bbox_used_for_cropping"])


def to_image(array: npt.NDArray[Any], model: TrainedModel) -> npt.NDArray[Any]:
    """(C, z, y, x) in the plan's axis order as (C, Z, Y, X) in the image's; a view."""
    return array.transpose(0, *(axis + 1 for axis in model.plans.transpose_backward))
