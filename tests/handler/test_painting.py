"""What the values of a label map mean, against nnU-Net's own painter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_torchserve.painting import Painting, read_painting

NESTED = {"background": 0, "whole": [1, 2, 3, 4], "core": [1, 2, 3], "et": [1]}


def painting(labels: dict[str, Any], order: list[Any] | None = None) -> Painting:
    return read_painting(labels, order, has_regions=LabelManager(labels, order).has_regions)


def test_a_region_is_its_own_value_and_those_painted_over_it_that_lie_within_it() -> None:
    read = painting(NESTED, [1, 2, 3])
    assert read.structures == {"whole": (1, 2, 3), "core": (2, 3), "et": (3,)}
    [remark] = read.remarks
    assert "not dataset.json's label numbers" in remark
    assert "3 is et" in remark


@pytest.mark.parametrize(
    ("labels", "order", "structures"),
    [
        (  # BraTS
            {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
            [1, 2, 3],
            {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)},
        ),
        (  # KiTS
            {"background": 0, "kidney": [1, 2, 3], "mass": [2, 3], "tumour": 2},
            [1, 3, 2],
            {"kidney": (1, 2, 3), "mass": (2, 3), "tumour": (2,)},
        ),
        ({"background": "0", "tumour": "1"}, None, {"tumour": (1,)}),
        ({"background": 0, "b": 2.0, "a": [1], "ignore": 3}, None, {"b": (2,), "a": (1,)}),
        ({"background": 0, "all": ["1", "2"], "core": "2"}, ["1", "2"], {"all": (1, 2), "core": (2,)}),
    ],
)
def test_usual_models_are_read_as_dataset_json_numbers_them(
    labels: dict[str, Any], order: list[int] | None, structures: dict[str, tuple[int, ...]]
) -> None:
    assert painting(labels, order) == Painting(structures)


@pytest.mark.parametrize("value", [-1, 70000])
def test_values_that_nnunet_cannot_paint_are_refused(value: int) -> None:
    labels = {"background": 0, "a": [1, 2], "b": [2]}
    with pytest.raises((OverflowError, RuntimeError, TypeError)):
        LabelManager(labels, [value, 2]).convert_probabilities_to_segmentation(np.ones((2, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match=f"regions_class_order holds {value}"):
        painting(labels, [value, 2])


def test_labels_of_any_number_of_values_and_background_that_is_not_the_first() -> None:
    assert painting({"background": 0, "a": 1, "unused": []}).structures == {"a": (1,), "unused": ()}
    read = painting({"background": 0, "a": -1, "b": 2})
    assert read.structures == {"a": (0,), "b": (2,)}
    assert "0 is a" in read.remarks[0]


def test_labels_with_gaps_are_numbered_by_their_channels() -> None:
    read = painting({"background": 0, "a": 2, "b": 7})
    assert read.structures == {"a": (1,), "b": (2,)}
    assert "1 is a, 2 is b" in read.remarks[0]


@pytest.mark.parametrize(
    ("labels", "order", "structures", "said"),
    [
        ({"a": [1, 2], "b": [2, 3]}, [1, 3], {"a": (1,), "b": (3,)}, "a is painted over by b (3)"),
        ({"inner": [1], "outer": [1, 2]}, [1, 2], {"inner": (1,), "outer": (2,)}, "inner is painted over by outer (2)"),
        ({"a": [1, 2], "b": [3]}, [1, 1], {"a": None, "b": None}, "a has the value 1 in common with b"),
        ({"a": [1, 2], "b": [3]}, [1, 0], {"a": (1,), "b": None}, "b is painted with 0"),
        ({"a": [1, 2], "b": [2]}, [1, 0], {"a": (1,), "b": None}, "a is painted over by b (0)"),
        (
            {"a": [1, 2], "b": [2]},
            [300, 2],
            {"a": (2, 44), "b": (2,)},
            "Label maps of fewer than 255 labels have 8 bits",
        ),
    ],
)
def test_what_the_label_map_does_not_say_is_said(
    labels: dict[str, Any], order: list[int], structures: dict[str, tuple[int, ...]], said: str
) -> None:
    read = painting({"background": 0} | labels, order)
    assert read.structures == structures
    assert any(remark.startswith(said) for remark in read.remarks), read.remarks


regions = st.lists(st.sets(st.integers(1, 5), min_size=1), min_size=1, max_size=5).filter(
    lambda sets: any(len(each) > 1 for each in sets)
)


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """Regions and the values that paint them, each with a value of its own that is not background's."""
    sets = draw(regions)
    order = draw(st.permutations(range(1, len(sets) + 3)))[: len(sets)]
    return {"background": 0} | {f"r{k}": sorted(each) for k, each in enumerate(sets)}, order


@given(model=models(), seed=st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_the_voxels_of_a_region_are_those_that_the_painter_left_of_it(
    model: tuple[dict[str, Any], list[int]], seed: int
) -> None:
    """Of a sound network: each voxel has some of dataset.json's labels, or none, so that nested regions are nested."""
    labels, order = model
    manager, names = LabelManager(labels, order), [name for name in labels if name != "background"]
    truth = np.random.default_rng(seed).integers(0, 7, (4, 5, 6))  # 6 is a label of no region
    channels = np.stack([np.isin(truth, labels[name]) for name in names])
    segmentation = np.asarray(manager.convert_probabilities_to_segmentation(channels.astype(np.float32)))

    read = painting(labels, order)
    for name, channel in zip(names, channels, strict=True):
        counted = np.isin(segmentation, read.structures[name] or ())
        assert not (counted & ~channel).any()
        if not any(remark.startswith(f"{name} is painted over") for remark in read.remarks):
            assert (counted == channel).all()


@given(model=models(), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_whatever_the_network_says_no_voxel_is_counted_that_is_in_no_nested_region(
    model: tuple[dict[str, Any], list[int]], seed: int
) -> None:
    labels, order = model
    names = [name for name in labels if name != "background"]
    channels = np.random.default_rng(seed).random((len(names), 4, 5, 6)).astype(np.float32)
    segmentation = np.asarray(LabelManager(labels, order).convert_probabilities_to_segmentation(channels))
    read = painting(labels, order)
    for k, name in enumerate(names):
        within = [other for other in range(k, len(names)) if set(labels[names[other]]) <= set(labels[name])]
        own = np.isin(segmentation, read.structures[name] or ())
        assert not (own & ~(channels[within] > 0.5).any(0)).any()
        assert (segmentation[own] != 0).all()
        last = (channels[k] > 0.5) & ~(channels[k + 1 :] > 0.5).any(0)
        assert own[last].all()
