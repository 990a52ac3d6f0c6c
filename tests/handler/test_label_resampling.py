"""Labels of a first stage on the next one's grid: nnU-Net's function and ours, voxel for voxel."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from nnunet_torchserve import label_resampling
from nnunet_torchserve.label_resampling import Labels, resample_labels
from nnunet_torchserve.resampling import ResamplingFunction

DEFAULT = partial(resample_data_or_seg_to_shape, is_seg=True, order=1, order_z=0, force_separate_z=None)
ISOTROPIC, THICK, THICK_MIDDLE, THICK_LAST = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 5.0)


def labels_of(shape: tuple[int, ...], values: list[int], seed: int, grain: int) -> Labels:
    """Random labels in blocks of ``grain`` voxels."""
    coarse = np.random.default_rng(seed).choice(values, [-(-n // grain) for n in shape])
    fine = coarse.repeat(grain, 0).repeat(grain, 1).repeat(grain, 2)[tuple(slice(n) for n in shape)]
    return np.ascontiguousarray(fine[None], np.float32)


sizes = st.tuples(*[st.integers(1, 9)] * 3)


@given(
    before=sizes,
    after=sizes,
    spacings=st.permutations([ISOTROPIC, THICK, THICK_MIDDLE, THICK_LAST]),
    separate=st.sampled_from([None, True, False]),
    values=st.sampled_from([[0, 1], [-1, 0, 1, 2, 3], [0, 7, 300, 65535], [5]]),
    seed=st.integers(0, 99),
    grain=st.integers(1, 3),
)
def test_every_voxel_has_the_label_that_nnunet_gives_it(
    before: tuple[int, ...],
    after: tuple[int, ...],
    spacings: list[tuple[float, ...]],
    separate: bool | None,
    values: list[int],
    seed: int,
    grain: int,
) -> None:
    labels, (have, want, *_) = labels_of(before, values, seed, grain), spacings
    function = partial(DEFAULT.func, **DEFAULT.keywords | {"force_separate_z": separate})
    expected = function(labels.copy(), after, have, want)
    found = resample_labels(labels, after, have, want, function)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("factor", [2, 3, 1.5, 0.5, 2 / 3])
def test_ties_at_every_boundary_are_settled_as_nnunet_settles_them(factor: float) -> None:
    """Even factors put voxels just between two labels."""
    labels = labels_of((12, 10, 8), [0, 1, 2, 3], seed=1, grain=1)
    after = tuple(round(factor * n) for n in labels.shape[1:])
    expected = DEFAULT(labels.copy(), after, ISOTROPIC, ISOTROPIC)
    np.testing.assert_array_equal(resample_labels(labels, after, ISOTROPIC, ISOTROPIC, DEFAULT), expected)


@pytest.mark.parametrize(
    "function",
    [
        partial(resample_data_or_seg_to_shape, is_seg=True, order=0, order_z=0, force_separate_z=None),
        partial(resample_data_or_seg_to_shape, is_seg=True, order=1, order_z=1, force_separate_z=True),
        partial(resample_data_or_seg_to_shape, is_seg=True),
        partial(resample_torch_fornnunet, is_seg=True, num_threads=1, force_separate_z=False),
    ],
    ids=["nearest", "another order across slices", "cubic", "by torch"],
)
def test_another_function_runs_itself(function: ResamplingFunction) -> None:
    labels = labels_of((9, 8, 7), [-1, 0, 1, 2], seed=2, grain=2)
    after = (5, 9, 11)
    expected = function(labels.copy(), after, THICK, ISOTROPIC)
    np.testing.assert_array_equal(resample_labels(labels, after, THICK, ISOTROPIC, function), expected)
    assert not label_resampling.resamples_boundaries(function)
    assert label_resampling.resamples_boundaries(DEFAULT)
