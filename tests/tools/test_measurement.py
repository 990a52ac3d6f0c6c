"""What is taken for a structure, in an answer and in labels: nnU-Net paints other numbers than dataset.json has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.measurement import _structures, _to_labels


def found(bundle: ModelBundle) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {name: (each.painted, each.labelled) for name, each in _structures(bundle).items()}


def test_a_label_is_painted_with_the_number_of_its_channel_and_labelled_as_in_dataset_json(
    unpacked: Callable[[str], Path],
) -> None:
    bundle = ModelBundle(unpacked("five_folds"))
    assert found(bundle) == {name: ((number,), (number,)) for number, name in enumerate(("low", "middle", "high"), 1)}
    bundle.lead.dataset["labels"] = {"background": 0, "low": 2, "high": 9, "middle": 5}
    assert found(bundle) == {"low": ((1,), (2,)), "high": ((3,), (9,)), "middle": ((2,), (5,))}


def test_a_region_is_all_that_is_painted_within_it(unpacked: Callable[[str], Path]) -> None:
    bundle = ModelBundle(unpacked("regions"))
    every = {"all": ((1, 2, 3), (1, 2, 3)), "core": ((2, 3), (2, 3)), "centre": ((3,), (3,))}
    assert found(bundle) == every
    bundle.lead.dataset["regions_class_order"] = [7, 8, 9]
    assert found(bundle)["core"] == ((8, 9), (2, 3))


def test_regions_that_share_a_value_are_not_measured(unpacked: Callable[[str], Path]) -> None:
    bundle = ModelBundle(unpacked("regions"))
    bundle.lead.dataset["regions_class_order"] = [1, 2, 1]
    with pytest.raises(ToolError, match="cannot be told from other structures in a label map: not measured"):
        _structures(bundle)


def test_what_the_labels_ignore_counts_for_nobody() -> None:
    labels = np.array([[[0, 1, 1, 4, 4, 4]]], dtype=np.uint16)
    eager, other = labels != 0, labels == 1
    counted = _to_labels(labels, (1,), (4,), eager, other)
    assert (counted.voxels, counted.eager, counted.backend) == (2, 2, 2)
    assert counted.eager_dice == counted.backend_dice == 1
    assert _to_labels(labels, (1,), (), eager, other).eager == 5
