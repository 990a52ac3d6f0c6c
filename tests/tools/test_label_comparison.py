"""Two label maps compared: against distances that follow from geometry, and against all pairs of surface voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from scipy.spatial.distance import cdist

from nnunet_torchserve_tools.label_comparison import Mask, counts, mask_of, surface_distance_95

SPACING = (3.0, 1.0, 0.5)


def box(first: tuple[int, int, int], last: tuple[int, int, int], shape: tuple[int, int, int] = (20, 24, 28)) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = True
    return mask


def rough(seed: int, shape: tuple[int, ...] = (9, 12, 14)) -> Mask:
    return np.random.default_rng(seed).random(shape) > 0.7


def surface_voxels(mask: Mask) -> npt.NDArray[Any]:
    """ITK's surface: inner voxels with a face on the outside."""
    padded = np.pad(mask, [(1 if size > 1 else 0,) * 2 for size in mask.shape]).squeeze()
    contour: Any = SimpleITK.BinaryContour(SimpleITK.GetImageFromArray(padded.astype(np.uint8)), fullyConnected=False)
    return np.argwhere(SimpleITK.GetArrayFromImage(contour))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(9, 12, 14), (1, 30, 40)], ids=["volume", "slice"])
def test_the_distance_is_that_of_all_pairs_of_surface_voxels(seed: int, shape: tuple[int, int, int]) -> None:
    first, second = rough(seed, shape), rough(seed + 100, shape)
    first[:, :3], second[:, -3:] = False, False
    spacing = SPACING if shape[0] > 1 else SPACING[1:]
    pairs = cdist(surface_voxels(first) * spacing, surface_voxels(second) * spacing)
    expected = max(np.percentile(pairs.min(axis=axis), 95) for axis in (0, 1))
    assert surface_distance_95(first, second, SPACING) == pytest.approx(expected)


@pytest.mark.parametrize("axis", range(3))
def test_a_box_that_is_moved_by_a_voxel_is_a_voxel_away(axis: int) -> None:
    first = box((5, 5, 5), (15, 15, 15))
    moved = np.roll(first, 1, axis=axis)
    assert surface_distance_95(first, moved, SPACING) == pytest.approx(SPACING[axis])


def test_equal_ones_are_at_no_distance_and_empty_ones_at_none() -> None:
    mask, nothing = box((1, 1, 1), (4, 4, 4)), box((0, 0, 0), (0, 0, 0))
    assert surface_distance_95(mask, mask.copy(), SPACING) == 0
    assert surface_distance_95(mask, nothing, SPACING) is None
    assert surface_distance_95(nothing, nothing, SPACING) is None


def test_a_single_voxel_far_away_among_many_is_not_the_95th_percentile() -> None:
    first = box((2, 2, 2), (12, 20, 20))
    second = first.copy()
    second[19, 23, 27] = True
    assert surface_distance_95(first, second, SPACING) == 0


def test_voxels_are_counted_of_all_values_that_a_structure_has() -> None:
    labels = np.array([[[0, 1, 2], [3, 3, 300]]], dtype=np.uint16)
    assert mask_of(labels, (2, 300)).sum() == 2
    assert mask_of(labels, ()).sum() == 0
    assert counts(mask_of(labels, (1, 2, 3)), mask_of(labels, (3, 300))) == (4, 3, 2)
