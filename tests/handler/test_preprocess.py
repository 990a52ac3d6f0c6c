"""Preprocessing gives stock's array: nnU-Net's ``DefaultPreprocessor.run_case_npy``, run live on the same case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization import default_normalization_schemes
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from scipy.ndimage import gaussian_filter

from nnunet_torchserve import resampling
from nnunet_torchserve.errors import TooThin
from nnunet_torchserve.options import PreprocessMethod
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.preprocess import PreprocessedCase, preprocess
from nnunet_torchserve.resampling import resample_image, spline_arguments
from support.examples import examples
from support.plans import AS_STOCK_PLANS_IT, ISOTROPIC, Array, Plan, Spacing, stock, volume_of

FLOAT64_ROUNDING = 2.0**-46
"""Of the largest value: what sums of some dozens of float64 products may differ by. Where values cancel to less than
that, as at the voxels of a region of zeros, a float32 ulp is smaller."""

ORDERS = list(permutations(range(3)))
SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)


def both(
    plan: Plan, array: Array, spacing: Spacing, method: PreprocessMethod = PreprocessMethod.EXACT
) -> tuple[PreprocessedCase, Array]:
    """Ours and stock's for a case; the properties must be the same."""
    member = plan.member
    expected, properties = stock(member, array, spacing)
    case = preprocess(member, volume_of(array, spacing), method)
    assert repr(case.properties) == repr(properties), "values and their types"
    assert case.data.dtype == torch.float32
    return case, expected


def assert_within_an_ulp(got: torch.Tensor, expected: Array, largest: float | None = None) -> None:
    """Each voxel is within one float32 ulp of stock's, or within float64's rounding of the values it came from.

    The largest of these is that of the result unless it is given.
    """
    assert tuple(got.shape) == expected.shape
    largest = float(np.abs(expected).max()) if largest is None else largest
    difference = np.abs(got.numpy().astype(np.float64) - expected)
    allowed = np.maximum(np.spacing(np.abs(expected)), FLOAT64_ROUNDING * largest)
    assert (difference <= allowed).all(), f"{(difference / allowed).max()} times what is allowed"


def equal_share(got: torch.Tensor, expected: Array) -> float:
    """The share of voxels with the same value."""
    return float(np.mean(got.numpy() == expected))


def texture(shape: Sequence[int], seed: int = 0, channels: int = 1) -> Array:
    """Smooth structure and noise, no zeros; (C, Z, Y, X)."""
    generator = np.random.default_rng(seed)
    smooth = gaussian_filter(generator.standard_normal((channels, *shape)), (0, 3, 3, 3))
    values = 300 + 800 * smooth / max(float(smooth.std()), 1e-6) + 20 * generator.standard_normal((channels, *shape))
    return np.asarray(values, np.float32)


def with_frame(array: Array, margins: Sequence[int]) -> Array:
    """The same with that many zeros before and after each axis (one more after)."""
    return np.pad(array, [(0, 0), *((n, n + (n > 0)) for n in margins)])


MILLIMETRES = st.sampled_from([0.7, 1.0, 1.0, 1.3, 2.0, 3.9, 5.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, Array, Spacing]:
    """A plan and a case for it: any shape, spacing, transpose, frame, and normalisation."""
    shape = draw(st.tuples(*[st.integers(1, 14)] * 3))
    spacing = draw(st.tuples(MILLIMETRES, MILLIMETRES, MILLIMETRES))
    target = draw(st.tuples(*[MILLIMETRES] * draw(st.sampled_from([2, 3]))))
    transpose = draw(st.permutations(range(3)))
    channels = draw(st.integers(1, 2))
    schemes = draw(st.tuples(*[st.sampled_from(SCHEMES)] * channels))
    use_mask = draw(st.tuples(*[st.booleans()] * channels))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = generator.integers(0, 256, (channels, *shape)).astype(np.float32)
    if draw(st.booleans()):
        array[:, generator.random(shape) < 0.5] = 0
    if draw(st.integers(0, 9)) == 0:
        array[:] = draw(st.sampled_from([0.0, 7.0]))
    if "RGBTo01Normalization" not in schemes:
        array = (array - np.float32(draw(st.sampled_from([0, 90])))) * np.float32(
            draw(st.sampled_from([1, 1, 1.1, 1e-20, 1e12]))
        )
    return (
        Plan(target, transpose, schemes, use_mask),
        with_frame(array, draw(st.tuples(*[st.integers(0, 3)] * 3))),
        spacing,
    )


@examples(400)
@given(cases())
@example((Plan(use_mask=(True,)), np.zeros((1, 4, 5, 6), np.float32), ISOTROPIC))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # an empty mask has no mean, in stock neither
def test_every_case_is_within_an_ulp_of_stock(case: tuple[Plan, Array, Spacing]) -> None:
    plan, array, spacing = case
    member = plan.member
    try:
        expected, properties = stock(member, array, spacing)
    except (ZeroDivisionError, ValueError, RuntimeError, IndexError):
        with pytest.raises(TooThin):
            preprocess(member, volume_of(array, spacing))
        return
    normalised, _ = stock(replace(plan, spacing=[spacing[axis] for axis in plan.transpose]).member, array, spacing)
    got = preprocess(member, volume_of(array, spacing))
    assert repr(got.properties) == repr(properties), "values and their types"
    assert_within_an_ulp(got.data, expected, largest=float(np.abs(normalised).max()))


SHAPES: dict[str, tuple[tuple[int, int, int], Spacing, Spacing]] = {
    "all axes shrink": ((70, 90, 110), ISOTROPIC, (1.4, 1.9, 1.23)),
    "all axes grow": ((40, 50, 45), ISOTROPIC, (0.6, 0.7, 0.55)),
    "mixed": ((66, 100, 80), ISOTROPIC, (0.8, 1.37, 1.1)),
    "one axis stays": ((66, 80, 72), ISOTROPIC, (1.0, 1.37, 0.9)),
    "only the first axis": ((66, 80, 72), ISOTROPIC, (1.2, 1.0, 1.0)),
    "only the last axis": ((66, 80, 72), ISOTROPIC, (1.0, 1.0, 0.8)),
    "thick slices along z, more of them": ((16, 90, 100), (5.0, 1.0, 1.0), (3.0, 1.2, 0.9)),
    "thick slices along y, fewer of them": ((90, 20, 100), (1.0, 5.0, 1.0), (1.2, 6.9, 0.9)),
    "thick slices along x, as many": ((90, 70, 16), (1.0, 1.0, 5.0), (1.3, 0.8, 5.0)),
    "thick slices only after resampling": ((60, 50, 40), ISOTROPIC, (4.1, 1.1, 0.9)),
    "thick slices, in-plane as they are": ((16, 50, 40), (5.0, 1.0, 1.0), (3.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("slab_bytes", [resampling._SLAB_BYTES, 50_000], ids=["whole", "slabs"])
@pytest.mark.parametrize("case", SHAPES)
def test_images_of_many_blocks_and_slabs_are_stocks(
    case: str, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, spacing, target = SHAPES[case]
    monkeypatch.setattr(resampling, "_SLAB_BYTES", slab_bytes)
    got, expected = both(Plan(target), texture(shape), spacing)
    assert_within_an_ulp(got.data, expected)
    assert equal_share(got.data, expected) > 0.99999


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("spacing", [ISOTROPIC, (1.0, 4.0, 1.0)], ids=["volume", "slices"])
def test_every_order_of_spline_is_stocks(order: int, spacing: Spacing) -> None:
    plan = Plan((1.3, 2.9, 0.8), resampling=AS_STOCK_PLANS_IT | {"order": order})
    got, expected = both(plan, texture((30, 34, 38)), spacing)
    assert_within_an_ulp(got.data, expected)


@pytest.mark.parametrize("target", [(1.3, 0.8, 1.1), (3.0, 1.1)], ids=["3d", "2d"])
@pytest.mark.parametrize("order", ORDERS)
def test_transposed_plans_are_stocks(order: Sequence[int], target: Sequence[float]) -> None:
    array = with_frame(texture((40, 45, 50)), (3, 0, 6))
    got, expected = both(Plan(target, order), array, ISOTROPIC)
    assert_within_an_ulp(got.data, expected)
    assert equal_share(got.data, expected) > 0.99999


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("scheme", SCHEMES[:4])
@pytest.mark.parametrize("order", ORDERS)
def test_normalisation_is_stocks_to_the_bit_in_any_layout(order: Sequence[int], scheme: str, masked: bool) -> None:
    """Nothing is resampled here. The order in which numpy adds decides the last bit of a mean."""
    plan = Plan(ISOTROPIC, order, (scheme,) * 2, (masked,) * 2)
    array = with_frame(texture((31, 42, 53), channels=2), (2, 5, 3))
    array[:, 10:14, 12:20, 20:30] = 0  # a hole
    layouts = {
        "C": array.copy(),
        "Fortran": np.asfortranarray(array),
        "reversed": array.copy()[:, ::-1, :, ::-1],
        "every second": np.repeat(array, 2, axis=3)[..., ::2],
    }
    for layout, view in layouts.items():
        got, expected = both(plan, view, ISOTROPIC)
        np.testing.assert_array_equal(got.data.numpy(), expected, strict=True, err_msg=layout)


def test_an_array_that_is_not_ours_stays_as_it_is() -> None:
    array = texture((10, 11, 12))
    before = array.copy()
    array.flags.writeable = False
    got, expected = both(Plan(), array, ISOTROPIC)
    np.testing.assert_array_equal(got.data.numpy(), expected, strict=True)
    np.testing.assert_array_equal(array, before)


def test_a_case_on_the_networks_grid_is_not_copied() -> None:
    array = texture((10, 11, 12))
    case = preprocess(Plan().member, volume_of(array, ISOTROPIC))
    assert np.shares_memory(case.data.numpy(), array)


def test_nothing_resamples_a_segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    member = Plan((1.3, 1.2, 0.7), use_mask=(True,)).member
    del member.configuration.configuration["resampling_fn_seg"]
    preprocess(member, volume_of(texture((10, 11, 12)), ISOTROPIC))


def test_deep_inside_a_region_of_zeros_the_splines_tail_is_stocks() -> None:
    array = np.zeros((1, 90, 60, 130), np.float32)
    array[:, 2:20, 3:30, 4:30] = texture((18, 27, 26))
    array[:, -1, -1, -1] = 1e-30  # else the zeros are cropped
    plan = Plan((1.17, 0.87, 1.31), schemes=("NoNormalization",))
    got, expected = both(plan, array, ISOTROPIC)
    deep = np.abs(expected) < 1e-25
    assert deep.any()
    assert equal_share(got.data, expected) > 0.9999


@pytest.mark.parametrize("value", [0.0, 1e-38, 3.0, -2e30])
@pytest.mark.parametrize("spacing", [ISOTROPIC, (1.0, 1.0, 4.0)], ids=["volume", "slices"])
def test_a_constant_volume_stays_constant(value: float, spacing: Spacing) -> None:
    array = np.full((1, 12, 13, 9), value, np.float32)
    got, expected = both(Plan((1.3, 0.8, 1.1), schemes=("NoNormalization",)), array, spacing)
    np.testing.assert_array_equal(got.data.numpy(), expected, strict=True)
    assert (expected == np.float32(value)).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_values_that_are_not_finite_spread_as_in_stock(broken: float) -> None:
    array = texture((12, 13, 9))
    array[0, 3, 4, 5] = broken
    function = partial(resample_data_or_seg_to_shape, **AS_STOCK_PLANS_IT)
    with np.errstate(invalid="ignore"):
        expected = function(array, (9, 10, 11), ISOTROPIC, (1.3, 1.3, 0.8))
        got = resample_image(array, (9, 10, 11), ISOTROPIC, (1.3, 1.3, 0.8), function)
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize("method", PreprocessMethod)
def test_a_case_that_vanishes_on_the_networks_grid_is_refused(method: PreprocessMethod) -> None:
    array = with_frame(texture((1, 20, 20)), (3, 0, 0))
    with pytest.raises(TooThin, match="no voxel left"):
        preprocess(Plan((3.0, 1.0, 1.0)).member, volume_of(array, ISOTROPIC), method)


def test_stock_is_stocks_to_the_bit() -> None:
    array = with_frame(texture((20, 21, 22)), (1, 0, 2))
    before = array.copy()
    got, expected = both(Plan((1.3, 0.8, 1.1)), array, ISOTROPIC, PreprocessMethod.STOCK)
    np.testing.assert_array_equal(got.data.numpy(), expected, strict=True)
    np.testing.assert_array_equal(array, before)


class Doubled(DefaultPreprocessor):  # type: ignore[misc]
    """A user's preprocessor."""

    def run_case_npy(self, data: Array, *arguments: Any) -> Any:
        data, seg, properties = super().run_case_npy(data, *arguments)
        return 2 * data, seg, properties


class OutsideOfMaskIsFive(ZScoreNormalization):  # type: ignore[misc]
    """A user's normalisation, which wants the mask whatever the plan says."""

    def run(self, image: Array, seg: npt.NDArray[np.int8] | None = None) -> Array:
        assert seg is not None
        return np.where(seg < 0, np.float32(5), image - image.mean())


def test_a_custom_preprocessor_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_preprocessor, "Doubled", Doubled, raising=False)
    array = texture((20, 21, 22))
    member = Plan((1.3, 0.8, 1.1), preprocessor="Doubled").member
    expected, _ = stock(member, array, ISOTROPIC)
    got = preprocess(member, volume_of(array, ISOTROPIC))
    np.testing.assert_array_equal(got.data.numpy(), 2 * expected, strict=True)


def test_a_custom_normalisation_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "OutsideOfMaskIsFive"
    monkeypatch.setattr(default_normalization_schemes, name, OutsideOfMaskIsFive, raising=False)
    array = texture((20, 21, 22))
    array[0, :5, :7, :9] = 0
    got, expected = both(Plan(schemes=(name,)), array, ISOTROPIC)
    assert (expected == 5).any()
    np.testing.assert_array_equal(got.data.numpy(), expected, strict=True)


@pytest.mark.parametrize(
    "function",
    [
        resample_data_or_seg_to_shape,
        partial(resample_torch_fornnunet, is_seg=False),
        partial(resample_data_or_seg_to_shape, **AS_STOCK_PLANS_IT | {"order": 4}),
        partial(resample_data_or_seg_to_shape, **AS_STOCK_PLANS_IT | {"order_z": 1}),
        partial(resample_data_or_seg_to_shape, **AS_STOCK_PLANS_IT | {"is_seg": True}),
    ],
    ids=["unbound", "torch", "order 4", "order_z 1", "labels"],
)
def test_another_resampling_function_runs_as_it_is(function: Callable[..., Array]) -> None:
    array = texture((14, 20, 20))
    new_shape, spacing, new_spacing = (12, 22, 18), (5.0, 1.0, 1.0), (5.5, 0.9, 1.1)
    assert spline_arguments(function) is None
    expected = function(array, new_shape, spacing, new_spacing)
    got = resample_image(array, new_shape, spacing, new_spacing, function)
    np.testing.assert_array_equal(got, expected, strict=True)


def test_a_very_long_axis_is_left_to_stock() -> None:
    array = texture((1, 3, resampling.LONGEST_BY_MATRIX + 1))
    function = partial(resample_data_or_seg_to_shape, **AS_STOCK_PLANS_IT)
    arguments = (1, 4, 2000), ISOTROPIC, (1.0, 0.75, 1.02)
    expected = function(array, *arguments)
    before = resampling.spline_operator.cache_info()
    np.testing.assert_array_equal(resample_image(array, *arguments, function), expected, strict=True)
    assert resampling.spline_operator.cache_info() == before


REAL_IMAGES = [
    ("Dataset501_BrainTissue", "3d_fullres", "images/Dataset501_BrainTissue/test_002_*.nii.gz"),
    ("Dataset501_BrainTissue", "2d", "images/Dataset501_BrainTissue/test_001_*.nii.gz"),
    ("Dataset501_BrainTissue", "3d_fullres", "images/real/itk_t1.nii.gz"),
    ("Dataset502_BrainRegions", "3d_fullres", "images/Dataset502_BrainRegions/test_001_*.nii.gz"),
]


@pytest.mark.material
@pytest.mark.parametrize(("dataset", "configuration", "files"), REAL_IMAGES)
def test_real_images_are_stocks(
    dataset: str,
    configuration: str,
    files: str,
    material: Path,
    material_pipeline: Callable[[str, str], Pipeline],
) -> None:
    member = material_pipeline(dataset, configuration).bundle.lead
    reader = member.plans.image_reader_writer_class()
    array, properties = reader.read_images([str(file) for file in sorted(material.glob(files))])
    spacing = tuple(properties["spacing"])
    expected, _ = stock(member, array, spacing)
    got = preprocess(member, volume_of(array, spacing))
    assert_within_an_ulp(got.data, expected)
    assert equal_share(got.data, expected) >= 0.999999
