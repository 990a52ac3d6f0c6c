"""What is removed from a label map is what nnU-Net's own functions remove from it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)
from pydantic import ValidationError

from nnunet_torchserve.errors import Deadline
from nnunet_torchserve.export.postprocessing import postprocess
from nnunet_torchserve.postprocessing import KeepLargest, Postprocessing
from support.examples import examples

Labels = npt.NDArray[Any]


def keep(*labels: int, background: int = 0) -> KeepLargest:
    return KeepLargest(labels=labels, background=background)


def by_stock(labels: Labels, *steps: KeepLargest) -> Labels:
    """On float32, as nnU-Net's readers give a segmentation."""
    functions = [remove_all_but_largest_component_from_segmentation] * len(steps)
    arguments = [{"labels_or_regions": list(each.labels), "background_label": each.background} for each in steps]
    done: Labels = apply_postprocessing(labels.astype(np.float32), functions, arguments)
    return done


def check_as_stock(labels: Labels, *steps: KeepLargest) -> Labels:
    expected = by_stock(labels, *steps)
    done = postprocess(Postprocessing(steps=steps), labels.copy())
    np.testing.assert_array_equal(done, expected)
    assert done.dtype == (np.uint16 if expected.max(initial=0) >= 255 else np.uint8)
    return done


SHAPES = st.one_of(arrays.array_shapes(min_dims=2, max_dims=3, max_side=9), st.just((3, 20, 20)))
SOME = st.integers(0, 4)
STEPS = st.lists(
    st.builds(
        KeepLargest,
        labels=st.lists(SOME, max_size=4).map(tuple),
        background=st.sampled_from([0, 0, 0, 1, 4, 7]),
    ),
    max_size=6,
)


@examples(300)
@given(
    labels=st.one_of(
        arrays.arrays(np.uint8, SHAPES, elements=SOME, fill=st.just(0)),
        arrays.arrays(np.uint8, SHAPES, elements=SOME),
    ),
    steps=STEPS,
)
def test_any_steps_give_what_stock_gives(labels: Labels, steps: list[KeepLargest]) -> None:
    check_as_stock(labels, *steps)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.95])
def test_noise_larger_than_a_block_is_as_stock_has_it(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_torchserve.export.postprocessing._BLOCK_VOXELS", 3 * 40 * 41)
    generator = np.random.default_rng(20261201)
    labels = generator.integers(1, 9, (23, 40, 41), dtype=np.uint8)
    labels[generator.random(labels.shape) > density] = 0
    everything = keep(*range(1, 9))
    done = check_as_stock(labels, everything, *(keep(label) for label in range(1, 9)), keep(2, 5), keep(5))
    assert 0 < np.count_nonzero(done) < np.count_nonzero(labels)


def test_all_components_of_the_largest_size_are_kept() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[0, :3] = labels[4, :3] = labels[8, :2] = 1
    done = check_as_stock(labels, keep(1))
    assert done[0, :3].all()
    assert done[4, :3].all()
    assert not done[8].any()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_touches_by_a_corner_is_one_component(dimensions: int) -> None:
    labels = np.zeros((6,) * dimensions, np.uint8)
    for place in (0, 1, 2):
        labels[(place,) * dimensions] = 1
    labels[(4,) * dimensions] = 1
    labels[(5,) * dimensions] = 1
    assert np.count_nonzero(check_as_stock(labels, keep(1))) == 3


def test_a_list_of_labels_is_one_structure() -> None:
    labels = np.array([[1, 2, 0, 1, 1, 1, 0, 2]], np.uint8)
    np.testing.assert_array_equal(check_as_stock(labels, keep(1, 2)), [[0, 0, 0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(check_as_stock(labels, keep(1), keep(2)), [[0, 2, 0, 1, 1, 1, 0, 2]])


def test_a_step_sees_what_the_one_before_it_left() -> None:
    """The second region is cut in two by the removal of label 1, which joined its parts."""
    labels = np.array([[2, 2, 1, 2, 2, 2, 0, 1, 1]], np.uint8)
    np.testing.assert_array_equal(check_as_stock(labels, keep(1), keep(1, 2)), [[0, 0, 0, 2, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(check_as_stock(labels, keep(1, 2), keep(1)), [[2, 2, 1, 2, 2, 2, 0, 0, 0]])


def test_what_is_removed_may_become_a_label_of_a_later_step() -> None:
    labels = np.array([[1, 1, 0, 1, 0, 3, 3]], np.uint8)
    np.testing.assert_array_equal(check_as_stock(labels, keep(1, background=3), keep(3)), [[1, 1, 0, 0, 0, 3, 3]])


def test_background_can_be_what_is_looked_through() -> None:
    check_as_stock(np.array([[0, 1, 0, 0, 1, 0]], np.uint8), keep(0, background=2), keep(2))


def test_a_picture_and_its_single_slice_are_the_same() -> None:
    picture = np.random.default_rng(20261202).integers(0, 3, (30, 31), dtype=np.uint8)
    steps = (keep(1, 2), keep(1), keep(2))
    np.testing.assert_array_equal(check_as_stock(picture[None].copy(), *steps)[0], check_as_stock(picture, *steps))


def test_labels_of_16_bits_become_8_where_none_is_left_that_needs_more() -> None:
    labels = np.array([[300, 300, 0, 300, 0, 254, 0, 254, 254]], np.uint16)
    assert check_as_stock(labels, keep(300), keep(254)).dtype == np.uint16
    labels[labels == 300] = 0
    assert check_as_stock(labels, keep(254)).dtype == np.uint8
    assert check_as_stock(np.array([[1, 0, 1, 1]], np.uint8), keep(1, background=300)).dtype == np.uint16


def test_more_than_255_steps_are_done_at_once() -> None:
    labels = np.random.default_rng(20261203).integers(0, 400, (5, 60, 60), dtype=np.uint16)
    check_as_stock(labels, *(keep(label) for label in range(1, 400)))


@pytest.mark.parametrize("steps", [(), (keep(),), (keep(5),), (keep(5, 6), keep(4464))])
def test_steps_without_anything_to_do_leave_the_array_itself(steps: tuple[KeepLargest, ...]) -> None:
    labels = np.array([[1, 0, 1, 1]], np.uint8)
    assert postprocess(Postprocessing(steps=steps), labels) is labels
    np.testing.assert_array_equal(labels, [[1, 0, 1, 1]])


def test_it_is_given_up_at_the_deadline() -> None:
    with pytest.raises(Deadline):
        postprocess(Postprocessing(steps=(keep(1),)), np.ones((2, 2), np.uint8), time.monotonic())


def test_it_comes_back_from_json_as_it_was() -> None:
    postprocessing = Postprocessing(steps=(keep(1, 2), keep(65535, background=3), keep()))
    assert Postprocessing.model_validate_json(postprocessing.model_dump_json()) == postprocessing
    with pytest.raises(ValidationError):
        postprocessing.steps = ()


@pytest.mark.parametrize(
    "text",
    [
        '{"steps": [{"labels": ["1"]}]}', '{"steps": [{"labels": [1.0]}]}', '{"steps": [{"labels": [true]}]}',
        '{"steps": [{"labels": [-1]}]}', '{"steps": [{"labels": [65536]}]}', '{"steps": [{"labels": 1}]}',
        '{"steps": [{"labels": [1], "background": -1}]}', '{"steps": [{}]}', '{"steps": [{"labels": [1], "more": 1}]}',
        '{"steps": [{"labels": [1], "function": "os.system"}]}', '{"more": 1}',
    ],
)  # fmt: skip
def test_what_is_no_step_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Postprocessing.model_validate_json(text)
