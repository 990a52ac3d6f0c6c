"""What a network's channels mean: as nnU-Net's label manager has it, or one that an archive brings along.

Such a one may decide and paint as it likes. So it is asked, and compared with nnU-Net's, before anything is said of its
labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .painting import Painting, integers, read_painting, unknown_painting

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager


def output_names(dataset: Mapping[str, Any], labels: LabelManager) -> list[str]:
    """The name of each of a network's output channels.

    Args:
        dataset: nnU-Net's dataset.json.
        labels: its label manager; one whose channels are not labels or regions of that file has numbers for names.
    """
    declared = {name: label for name, label in dataset["labels"].items() if name != "ignore"}
    if labels.has_regions:
        names = [name for name, label in declared.items() if labels.filter_background([label])]
    else:
        named = {name: integers(label) for name, label in declared.items()}
        names = [" / ".join(name for name, values in named.items() if value in values) for value in labels.all_labels]
    count = int(labels.num_segmentation_heads)
    return names if len(names) == count else [f"channel {number}" for number in range(count)]


def painting_of(dataset: Mapping[str, Any], labels: LabelManager) -> Painting:
    """What the values of a segmentation mean.

    Args:
        dataset: nnU-Net's dataset.json.
        labels: its label manager.
    """
    if not paints_as_default(labels):
        return unknown_painting(dataset["labels"], type(labels).__name__)
    return read_painting(dataset["labels"], dataset.get("regions_class_order"), has_regions=labels.has_regions)


def paints_as_default(labels: LabelManager) -> bool:
    """Whether the values of a segmentation mean what they mean to nnU-Net's default label manager.

    Another nonlinearity changes nothing of that.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    kind = type(labels)
    if kind is LabelManager:
        return True
    paint = ("convert_probabilities_to_segmentation", "convert_logits_to_segmentation")
    if any(getattr(kind, name, None) is not getattr(LabelManager, name) for name in paint):
        return False
    try:
        default = LabelManager(labels.label_dict, labels.regions_class_order)
    except AssertionError:  # labels that it does not take
        return False
    says = ("has_regions", "all_regions", "all_labels", "num_segmentation_heads", "regions_class_order")
    return all(getattr(labels, name) == getattr(default, name) for name in says)


def decides_as_default(labels: LabelManager) -> bool:
    """Whether nnU-Net's default label manager decides, with its default nonlinearity."""
    import torch
    from nnunetv2.utilities.helpers import softmax_helper_dim0
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    nonlinearity = torch.sigmoid if labels.has_regions else softmax_helper_dim0
    return type(labels) is LabelManager and labels.inference_nonlin is nonlinearity
