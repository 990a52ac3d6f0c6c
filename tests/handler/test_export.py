"""The export's label maps and probabilities are stock's: to the voxel, and to the bit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling import no_resampling
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from torch.nn import functional

from nnunet_torchserve import codecs
from nnunet_torchserve.cases import settings_for
from nnunet_torchserve.errors import Deadline, NonFiniteLogits
from nnunet_torchserve.export import (
    dense,
    label_map,
    label_map_and_probabilities,
    nearest,
    sparse,
    stock_arithmetic,
)
from nnunet_torchserve.export import grid as grid_module
from nnunet_torchserve.export import probabilities as probabilities_module
from nnunet_torchserve.export.canvas import Canvas
from nnunet_torchserve.export.grid import resampling_of
from nnunet_torchserve.export.rules import rule_of
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import ExportMethod, Options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.preprocess import preprocess
from nnunet_torchserve.taps import linear_taps
from nnunet_torchserve.volume import Volume
from support import export_cases as cases
from support.examples import examples
from support.export_cases import (
    STANDARD,
    STANDARD_TORCH,
    Case,
    Labelling,
    Pattern,
    Resampling,
    classes,
    stock_labels,
    stock_probabilities,
)
from support.logits import ExportModel

REGIONS = Labelling({"background": 0, "all": [1, 2, 3], "core": [2, 3], "centre": 3}, [1, 2, 3])
BOTH_TYPES = st.sampled_from(["float16", "float32"])


def assert_label_maps_equal(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """The same labels, in the smallest type that nnU-Net would write, in C order."""
    assert got.shape == expected.shape
    assert got.dtype == (np.uint16 if expected.max() >= 255 else np.uint8)
    assert got.flags.c_contiguous
    different = np.argwhere(got != expected)
    if len(different):
        first = tuple(different[0])
        msg = f"{len(different)} of {got.size} voxels differ; {first} is {got[first]}, in stock {expected[first]}"
        pytest.fail(msg)


def assert_stocks_labels(case: Case) -> None:
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    expected = stock_labels(model, logits, properties)
    assert_label_maps_equal(label_map(model, logits, properties, ExportMethod.EXACT), expected)


def assert_stocks_probabilities(case: Case) -> None:
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    expected_labels, expected = stock_probabilities(model, logits, properties)
    labels, probabilities = label_map_and_probabilities(model, logits, properties)
    np.testing.assert_array_equal(probabilities, expected, strict=True)
    assert_label_maps_equal(labels, expected_labels)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ labels


@given(cases.cases())
@examples(250)
def test_no_voxel_differs_from_stock(case: Case) -> None:
    assert_stocks_labels(case)


@pytest.mark.parametrize("pattern", Pattern)
@given(case=cases.cases(values=20_000))
@examples(60)
def test_no_voxel_differs_whatever_the_logits_look_like(pattern: Pattern, case: Case) -> None:
    assert_stocks_labels(replace(case, pattern=pattern))


@pytest.mark.parametrize("scale", [(1, 2), (2, 1), (1, 3), (3, 4), (4, 3), (63, 94), (94, 63)])
@pytest.mark.parametrize("pattern", [Pattern.RAMPS, Pattern.NEAR_TIES, Pattern.INTEGERS])
def test_values_half_way_between_two_halves_are_rounded_as_stock_rounds_them(
    pattern: Pattern, scale: tuple[int, int]
) -> None:
    """At these ratios many interpolated values lie exactly in the middle of two halves."""
    times = max(1, 12 // min(scale))
    (a, b), others = (times * scale[0], times * scale[1]), (3, 6) if max(scale) < 60 else (2, 3)
    for axis, seed in itertools.product(range(3), range(3)):
        grid, crop = [others[0]] * 3, [others[1]] * 3
        grid[axis], crop[axis] = a, b
        assert_stocks_labels(Case(pattern, (grid[0], grid[1], grid[2]), (crop[0], crop[1], crop[2]), classes(4), seed))


@given(cases.cases(resamplings=cases.other_plans, dtypes=BOTH_TYPES, values=8_000))
@examples(100)
def test_no_voxel_differs_with_other_orders_of_the_spline(case: Case) -> None:
    assert_stocks_labels(case)


@given(cases.cases(resamplings=cases.torch_plans, dtypes=BOTH_TYPES))
@examples(150)
def test_no_voxel_differs_with_torch_resampling_which_does_not_round_to_half(case: Case) -> None:
    assert_stocks_labels(case)


@given(cases.cases(dtypes=st.just("float32")))
@examples(120)
def test_no_voxel_differs_for_float32_logits(case: Case) -> None:
    assert_stocks_labels(case)


@given(cases.cases(resamplings=cases.identity_plans, dtypes=BOTH_TYPES, values=10_000))
@examples(15)
def test_no_voxel_differs_where_the_plan_resamples_nothing(case: Case) -> None:
    assert_stocks_labels(case)


@given(cases.cases(dtypes=BOTH_TYPES, values=10_000), st.one_of(cases.standard_plans, cases.torch_plans))
@examples(25)
def test_no_voxel_differs_where_both_grids_are_one(case: Case, resampling: Resampling) -> None:
    assert_stocks_labels(replace(case, crop=case.grid, resampling=resampling))


@given(
    cases.cases(
        patterns=st.sampled_from([Pattern.ORGANS, Pattern.NOISE, Pattern.NEAR_TIES, Pattern.INTEGERS]),
        resamplings=st.one_of(cases.standard_plans, cases.torch_plans),
        labels=st.one_of(cases.many_labels, cases.many_regions),
        values=40_000,
    )
)
@examples(25)
def test_no_voxel_differs_with_more_labels_than_a_byte_holds(case: Case) -> None:
    assert_stocks_labels(case)


@pytest.mark.parametrize(("winner", "expected"), [(253, np.uint8), (254, np.uint8), (255, np.uint16), (299, np.uint16)])
def test_label_255_and_above_make_the_map_uint16(winner: int, expected: type[np.generic]) -> None:
    case = Case(Pattern.NOISE, (2, 3, 4), (4, 5, 6), classes(300))
    model = case.model()
    logits = torch.zeros((300, 2, 3, 4), dtype=torch.float16)
    logits[winner] = 1
    labels = label_map(model, logits, case.properties(), ExportMethod.EXACT)
    assert labels.dtype == expected
    assert np.all(labels == winner)


def test_labels_are_numbered_by_channel_as_in_stock_also_where_the_dataset_leaves_gaps() -> None:
    labelling = Labelling({"background": 0, "liver": 5, "spleen": 200})
    case = Case(Pattern.NOISE, (6, 5, 4), (9, 8, 7), labelling)
    assert_stocks_labels(case)
    model = case.model()
    assert set(np.unique(label_map(model, case.logits(model), case.properties(), ExportMethod.EXACT))) == {0, 1, 2}


@pytest.mark.parametrize("grid", [(20, 45, 50), (34, 30, 28)])
@pytest.mark.parametrize("count", [3, 10])
def test_torch_resampling_a_few_classes_at_a_time_gives_the_bits_of_all_at_once(
    grid: cases.Shape, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "SMALL_BY_TORCH", 0)
    crop = (grid[0] + 11, grid[1] * 2, grid[2] - 7)
    case = Case(Pattern.ORGANS, grid, crop, classes(count), resampling=STANDARD_TORCH, target=(1.0, 1.0, 1.0))
    model = case.model()
    assert resampling_of(model, case.logits(model), case.properties()).together == 2
    assert_stocks_labels(case)
    assert_stocks_probabilities(case)


@given(st.integers(1, 60), st.integers(1, 90), st.integers(0, 2**32 - 1))
@examples(150)
def test_taps_are_what_scipy_does_along_an_axis(inputs: int, outputs: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((inputs, 2, 3))
    expected = ndimage.zoom(values, (outputs / inputs, 1, 1), order=1, mode="nearest", grid_mode=True)
    taps = linear_taps(inputs, outputs)
    lower, upper = (weight[:, None, None] for weight in (taps.lower_weight, taps.upper_weight))
    np.testing.assert_array_equal(values[taps.lower] * lower + values[taps.upper] * upper, expected)


@given(cases.cases(dtypes=BOTH_TYPES, values=20_000))
@examples(80)
def test_interpolating_every_voxel_in_torch_gives_the_same_as_the_sparse_way(case: Case) -> None:
    """The way of a GPU, on the CPU; tests/gpu runs it on CUDA."""
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    rule, taps = rule_of(model), resampling_of(model, logits, properties).taps
    assert taps is not None
    canvas = Canvas(model, rule, properties)
    dense.export(logits, taps, rule, canvas)
    assert_label_maps_equal(canvas.finish(), stock_labels(model, logits, properties))


# ----------------------------------------------------------------------------------------------------------- regions


@given(
    cases.cases(
        patterns=st.sampled_from(
            [Pattern.THRESHOLD, Pattern.SUBNORMAL, Pattern.NONE_POSITIVE, Pattern.ALL_POSITIVE, Pattern.SIGNED_ZEROS]
        ),
        resamplings=st.one_of(cases.standard_plans, cases.torch_plans),
        labels=cases.region_labels,
        dtypes=BOTH_TYPES,
    )
)
@examples(150)
def test_no_voxel_differs_where_a_region_is_at_its_threshold(case: Case) -> None:
    assert_stocks_labels(case)


@pytest.mark.parametrize("crop", [(7, 9, 11), (33, 31, 35)])
@pytest.mark.parametrize("resampled", [False, True])
def test_every_half_around_the_threshold_is_judged_as_stock_does(
    crop: cases.Shape, resampled: bool, threads: Callable[[int], None]
) -> None:
    """torch's sigmoid has one kernel for whole vectors and another for what is left over; the sizes are odd."""
    case = Case(Pattern.THRESHOLD, crop, (crop[0] * 2, *crop[1:]) if resampled else crop, REGIONS)
    model = case.model()
    for dtype, unit in [(torch.float16, 2.0**-24), (torch.float32, 2.0**-28)]:
        steps = torch.arange(3 * crop[0] * crop[1] * crop[2]).remainder(64).reshape(3, *crop)
        logits = (steps * unit).to(dtype)
        expected = stock_labels(model, logits, case.properties())
        assert len(np.unique(expected)) > 1
        for count in (1, 2, 3):
            threads(count)
            assert_label_maps_equal(label_map(model, logits, case.properties(), ExportMethod.EXACT), expected)


@given(st.permutations([1, 2, 3]), st.integers(0, 100))
@examples(6)
def test_the_last_painted_region_wins(order: Sequence[int], seed: int) -> None:
    labelling = replace(REGIONS, regions_class_order=list(order))
    case = Case(Pattern.ALL_POSITIVE, (4, 5, 6), (6, 7, 5), labelling, seed)
    assert_stocks_labels(case)
    model = case.model()
    labels = label_map(model, torch.ones((3, 4, 5, 6), dtype=torch.float16), case.properties(), ExportMethod.EXACT)
    assert np.all(labels == order[-1])


@pytest.mark.parametrize("largest", [255, 256, 300])
def test_a_region_painted_with_a_label_above_254_comes_out_as_in_stock(largest: int) -> None:
    """Stock counts labels, not their size: with few of them its map is uint8, in which 300 becomes 44."""
    labelling = Labelling({"background": 0, "all": [1, largest], "core": [largest]}, [1, largest])
    assert_stocks_labels(Case(Pattern.NOISE, (6, 5, 4), (9, 8, 7), labelling))


# ---------------------------------------------------------------------------------- plans that nobody has thought of


def _sharpen(
    data: Any, new_shape: Sequence[int], current: Sequence[float], new: Sequence[float], *, power: float = 1
) -> Any:
    """A resampling that nnU-Net does not have; it treats each channel by itself, as a resampling does.

    nnU-Net's methods give it arrays or tensors.
    """
    values = torch.as_tensor(data)[None].float()
    resized = functional.interpolate(values / 8, [int(n) for n in new_shape], mode="nearest")[0]
    return resized**power - (current[0] > new[0]) / 4


@given(cases.cases(values=8_000, dtypes=BOTH_TYPES), st.sampled_from([1, 2]))
@examples(15)
def test_a_resampling_of_ones_own_is_called_as_stock_calls_it(case: Case, power: int) -> None:
    """Users put functions into nnU-Net's package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(no_resampling, "resample_and_sharpen", _sharpen, raising=False)
        own = replace(case, resampling=Resampling("resample_and_sharpen", {"power": power}))
        assert_stocks_labels(own)
        assert_stocks_probabilities(own)


@given(
    cases.cases(
        patterns=st.sampled_from([Pattern.INTEGERS, Pattern.CHECKERBOARD, Pattern.SIGNED_ZEROS]),
        resamplings=st.sampled_from(
            [
                Resampling(cases.DEFAULT, STANDARD.arguments | {"is_seg": True}),
                Resampling(cases.DEFAULT, STANDARD.arguments | {"is_seg": True, "order": 0}),
                Resampling(cases.DEFAULT, STANDARD.arguments | {"order": 2}),
                Resampling(cases.DEFAULT, STANDARD.arguments | {"order": 5, "order_z": 3}),
            ]
        ),
        values=4_000,
    )
)
@examples(15)
def test_no_voxel_differs_with_arguments_that_no_planner_writes(case: Case) -> None:
    assert_stocks_labels(case)


class _LastWins(LabelManager):  # type: ignore[misc]
    """A label manager of one's own."""

    def convert_probabilities_to_segmentation(self, predicted_probabilities: Any) -> torch.Tensor:
        values = torch.as_tensor(predicted_probabilities)
        return len(values) - 1 - values.flip(0).argmax(0)


@given(cases.cases(labels=cases.plain_labels, values=4_000), st.sampled_from([_LastWins, LabelManager]))
@examples(12)
def test_a_label_manager_of_ones_own_is_called_as_stock_calls_it(case: Case, manager: type[LabelManager]) -> None:
    labels = manager(case.labelling.labels, None, inference_nonlin=lambda values: -torch.softmax(values, 0))
    model = replace(case.model(), labels=labels)
    logits, properties = case.logits(model), case.properties()
    expected = stock_labels(model, logits, properties)
    assert_label_maps_equal(label_map(model, logits, properties, ExportMethod.EXACT), expected)
    expected_labels, expected_values = stock_probabilities(model, logits, properties)
    got_labels, got_values = label_map_and_probabilities(model, logits, properties)
    assert_label_maps_equal(got_labels, expected_labels)
    np.testing.assert_array_equal(got_values, expected_values, strict=True)


@pytest.mark.parametrize("excess", [(1, 0, 0), (0, 2, 0), (3, 2, 1)])
def test_logits_larger_than_the_crop_are_cut_as_in_stock_where_the_plan_resamples_nothing(excess: cases.Shape) -> None:
    case = Case(Pattern.NOISE, (4, 5, 6), (4, 5, 6), classes(3), resampling=Resampling(cases.NONE, {}))
    grid = [size + more for size, more in zip(case.crop, excess, strict=True)]
    assert_stocks_labels(replace(case, grid=(grid[0], grid[1], grid[2])))


def test_resample_torch_simple_works_as_far_as_it_does_in_stock(threads: Callable[[int], None]) -> None:
    """Stock hands it the spacings as ``is_seg`` and ``num_threads``: it fails unless there is nothing to resample."""
    simple = Resampling("resample_torch_simple", {})
    assert_stocks_labels(Case(Pattern.NOISE, (4, 5, 6), (4, 5, 6), classes(3), resampling=simple))
    case = Case(Pattern.NOISE, (4, 5, 6), (5, 6, 7), classes(3), resampling=simple)
    model = case.model()
    with pytest.raises((TypeError, RuntimeError), match="set_num_threads"):
        stock_labels(model, case.logits(model), case.properties())
    threads(2)
    with pytest.raises((TypeError, RuntimeError), match="set_num_threads"):
        label_map(model, case.logits(model), case.properties(), ExportMethod.EXACT)
    assert torch.get_num_threads() == 2


# ----------------------------------------------------------------------------------------------------- probabilities


@given(
    cases.cases(
        resamplings=st.one_of(cases.standard_plans, cases.torch_plans, cases.other_plans),
        dtypes=BOTH_TYPES,
        values=60_000,
    )
)
@examples(150)
def test_no_bit_of_the_probabilities_differs_from_stock(case: Case) -> None:
    assert_stocks_probabilities(case)


@pytest.mark.parametrize("resampling", [STANDARD, STANDARD_TORCH])
@pytest.mark.parametrize("labelling", [classes(2), classes(7), classes(40), REGIONS])
@pytest.mark.parametrize("crop", [(21, 23, 25), (37, 41, 43)])
def test_no_bit_differs_where_the_softmax_is_split_among_threads(
    crop: cases.Shape, labelling: Labelling, resampling: Resampling
) -> None:
    grid = (crop[0] // 2, crop[1] // 2, crop[2] // 2)
    case = Case(Pattern.ORGANS, grid, crop, labelling, resampling=resampling, margins=((1, 2), (0, 3), (2, 0)))
    assert_stocks_probabilities(case)


@given(
    cases.cases(
        patterns=st.sampled_from([Pattern.SUBNORMAL, Pattern.THRESHOLD, Pattern.NEAR_TIES]),
        labels=cases.plain_labels,
        dtypes=BOTH_TYPES,
        values=10_000,
    )
)
@examples(30)
def test_labels_beside_probabilities_are_stocks_also_where_the_softmax_ties(case: Case) -> None:
    assert_stocks_probabilities(case)


def test_logits_that_differ_may_tie_as_probabilities_and_then_the_first_class_wins_as_in_stock() -> None:
    case = Case(Pattern.SUBNORMAL, (6, 7, 5), (9, 8, 7), classes(4))
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    beside, _ = stock_probabilities(model, logits, properties)
    assert np.any(beside != stock_labels(model, logits, properties)), "without a tie this would prove nothing"
    assert_stocks_probabilities(case)


@given(
    cases.cases(resamplings=st.one_of(cases.standard_plans, cases.torch_plans), values=10_000),
    st.data(),
    st.sampled_from([np.float32, np.float16]),
)
@examples(80)
def test_chosen_channels_are_rows_of_stocks_and_float16_is_stocks_rounded(
    case: Case, data: st.DataObject, dtype: type[np.float32 | np.float16]
) -> None:
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    channels = st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=8, unique=True)
    chosen = data.draw(st.none() | channels, label="chosen")
    expected_labels, expected = stock_probabilities(model, logits, properties)
    labels, probabilities = label_map_and_probabilities(model, logits, properties, chosen=chosen, dtype=dtype)
    rows = expected if chosen is None else expected[chosen]
    np.testing.assert_array_equal(probabilities, rows.astype(dtype), strict=True)
    assert_label_maps_equal(labels, expected_labels)


# -------------------------------------------------------------------------------------------------------- non-finite

_PLANS = {
    "default": STANDARD,
    "default, separate": Resampling(cases.DEFAULT, STANDARD.arguments | {"force_separate_z": True}),
    "nearest neighbour": Resampling(cases.DEFAULT, STANDARD.arguments | {"order": 0}),
    "cubic": Resampling(cases.DEFAULT, STANDARD.arguments | {"order": 3}),
    "torch": STANDARD_TORCH,
    "torch, separate": Resampling(cases.TORCH, STANDARD_TORCH.arguments | {"force_separate_z": True}),
    "none": Resampling(cases.NONE, {}),
}


def _refused(case: Case, bad: float, place: tuple[int, ...]) -> None:
    model = case.model()
    logits, properties = case.logits(model).clone(), case.properties()
    logits[place] = bad
    for method in ExportMethod:
        with pytest.raises(NonFiniteLogits):
            label_map(model, logits, properties, method)
    with pytest.raises(NonFiniteLogits):
        label_map_and_probabilities(model, logits, properties)
    with pytest.raises(NonFiniteLogits):
        label_map_and_probabilities(model, logits, properties, chosen=[0], dtype=np.float16)


@pytest.mark.parametrize("plan", _PLANS)
@pytest.mark.parametrize("labelling", [classes(5), REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number_is_refused_on_every_path(plan: str, labelling: Labelling, bad: float) -> None:
    """Stock would answer with background everywhere, or with a hole."""
    spacing = (5.0, 1.0, 1.0)
    case = Case(Pattern.ORGANS, (5, 6, 7), (5, 6, 7), labelling, resampling=_PLANS[plan], target=spacing)
    _refused(case, bad, (0, 0, 0, 0))
    if plan != "none":
        for dtype in ("float16", "float32"):
            _refused(replace(case, crop=(5, 9, 12), spacing=spacing, dtype=dtype), bad, (2, 4, 5, 6))


@given(
    cases.cases(resamplings=st.one_of(cases.standard_plans, cases.torch_plans), dtypes=BOTH_TYPES, values=4_000),
    st.data(),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
@examples(25)
def test_one_value_that_is_no_number_is_refused_wherever_it_is(case: Case, data: st.DataObject, bad: float) -> None:
    shape = case.logits(case.model()).shape
    _refused(case, bad, tuple(data.draw(st.integers(0, size - 1), label="place") for size in shape))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("crop", [(6, 6, 6), (9, 9, 9)])
def test_a_class_that_never_wins_is_looked_at_too(bad: float, crop: cases.Shape) -> None:
    case = Case(Pattern.CONSTANT, (6, 6, 6), crop, classes(3))
    model = case.model()
    logits = torch.zeros((3, 6, 6, 6), dtype=torch.float16)
    logits[1] = 30
    logits[2] = -30
    logits[2, 3, 3, 3] = bad
    for method in ExportMethod:
        with pytest.raises(NonFiniteLogits):
            label_map(model, logits, case.properties(), method)


# ------------------------------------------------------------------------------------------------ linear and nearest


def thick_axis(case: Case) -> int | None:
    """The axis along which nnU-Net resamples separately (``determine_do_sep_z_and_axis``), restated."""
    image = [case.spacing[axis] for axis in case.transpose]
    network = list(case.target) if len(case.target) == 3 else [image[0], *case.target]
    force = case.resampling.arguments.get("force_separate_z", False if case.resampling.name == cases.DEFAULT else None)
    limit = case.resampling.arguments.get("separate_z_anisotropy_threshold", 3)
    if force is None:
        judged = next((each for each in (network, image) if max(each) / min(each) > limit), None)
    else:
        judged = network if force else None
    if judged is None or judged.count(max(judged)) != 1:
        return None
    return judged.index(max(judged))


def interpolated(values: torch.Tensor, case: Case) -> torch.Tensor:
    """(C, z, y, x) on the crop: trilinear, or linear in the plane and nearest across thick slices."""
    axis = thick_axis(case)
    if axis is None:
        return functional.interpolate(values[None], case.crop, mode="trilinear", align_corners=False)[0]
    slices = values.movedim(axis + 1, 1)
    plane = [size for number, size in enumerate(case.crop) if number != axis]
    planes = functional.interpolate(slices, plane, mode="bilinear", align_corners=False)
    whole = functional.interpolate(planes[None], [case.crop[axis], *plane], mode="nearest-exact")[0]
    return whole.movedim(1, axis + 1)


def around(logits: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each class among a voxel and its neighbours: what rounded weights multiply."""
    return functional.max_pool3d(logits.float().abs(), 3, stride=1, padding=1)


def painted(values: torch.Tensor, model: ExportModel) -> npt.NDArray[np.int64]:
    """Labels of logits (C, ...): the largest, or regions one over the other."""
    if not model.labels.has_regions:
        winners: npt.NDArray[np.int64] = values.numpy().argmax(0)
        return winners
    labels = np.zeros(values.shape[1:], np.int64)
    for region, label in enumerate(model.labels.regions_class_order):
        labels[(torch.sigmoid(values[region].float()) > 0.5).numpy()] = label
    return labels


def on_the_image(values: npt.NDArray[Any], case: Case) -> npt.NDArray[Any]:
    """(Z, Y, X) of the file: the crop in its place, axes put back."""
    return np.pad(values, case.margins).transpose(np.argsort(case.transpose))


def undecided(values: torch.Tensor, scale: torch.Tensor, model: ExportModel) -> npt.NDArray[np.bool_]:
    """Voxels whose label hangs on the order of additions in float32."""
    error = 1e-5 * scale + torch.finfo(torch.float32).smallest_normal
    if model.labels.has_regions:
        close = (values.abs() < error).any(0)
    elif len(values) == 1:
        close = torch.zeros(values.shape[1:], dtype=torch.bool)
    else:
        first, second = values.topk(2, dim=0).values
        close = first - second < error.amax(0)
    mask: npt.NDArray[np.bool_] = close.numpy()
    return mask


linear_plans = st.one_of(
    cases.standard_plans,
    st.just(STANDARD_TORCH),
    st.sampled_from([None, True]).map(
        lambda force: Resampling(cases.TORCH, STANDARD_TORCH.arguments | {"force_separate_z": force})
    ),
)


@given(cases.cases(resamplings=linear_plans, dtypes=BOTH_TYPES))
@examples(150)
def test_linear_is_the_largest_of_the_interpolated_logits(case: Case) -> None:
    model = case.model()
    logits = case.logits(model)
    values, scale = interpolated(logits.float(), case), interpolated(around(logits), case)
    got = label_map(model, logits, case.properties(), ExportMethod.LINEAR)

    expected = on_the_image(painted(values, model), case)
    assert got.shape == expected.shape
    assert got.dtype == (np.uint16 if got.max() >= 255 else np.uint8)
    assert got.flags.c_contiguous
    decided = ~on_the_image(undecided(values, scale, model), case)
    assert np.count_nonzero((got != expected) & decided) == 0


@pytest.mark.parametrize("labelling", [classes(4), REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 1.0, 5.0)])
def test_linear_is_nearly_always_decided(labelling: Labelling, spacing: tuple[float, ...]) -> None:
    """The voxels that the test above lets off are few."""
    case = Case(Pattern.ORGANS, (11, 12, 13), (17, 9, 21), labelling, spacing=spacing)
    model = case.model()
    logits = case.logits(model)
    values, scale = interpolated(logits.float(), case), interpolated(around(logits), case)
    assert np.mean(undecided(values, scale, model)) < 1e-3
    labels = painted(values, model)
    assert len(np.unique(labels)) > 1
    assert np.any(labels != painted(interpolated(logits.float(), replace(case, spacing=(1.0, 5.0, 1.0))), model))


@given(cases.cases(resamplings=st.one_of(linear_plans, cases.other_plans, cases.identity_plans), dtypes=BOTH_TYPES))
@examples(60)
def test_nearest_is_the_label_of_the_nearest_voxel_of_the_networks_grid(case: Case) -> None:
    model = case.model()
    logits = case.logits(model)
    labels = torch.from_numpy(painted(logits, model)).float()
    nearest = functional.interpolate(labels[None, None], case.crop, mode="nearest-exact")[0, 0]
    got = label_map(model, logits, case.properties(), ExportMethod.NEAREST)
    assert_label_maps_equal(got, on_the_image(nearest.numpy(), case))


# ------------------------------------------------------------------------------------------------ bounds, and the end


@pytest.mark.parametrize(("grid", "crop"), [((60, 62, 64), (15, 16, 17)), ((40, 41, 42), (60, 61, 63))])
def test_what_is_gathered_at_a_time_is_bounded_however_coarse_the_image(
    grid: cases.Shape, crop: cases.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    gather = sparse._Corners.of

    def spy(*arguments: Any) -> Any:
        corners = gather(*arguments)
        sizes.append(corners.logits.size)
        return corners

    monkeypatch.setattr(sparse, "_ELEMENTS", 2**14)
    monkeypatch.setattr(sparse._Corners, "of", spy)
    assert_stocks_labels(Case(Pattern.NOISE, grid, crop, classes(10)))
    assert len(sizes) > 2
    assert max(sizes) <= 8 * 2**14


def test_stocks_values_are_computed_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    plane = stock_arithmetic._plane

    def spy(logits: Any, taps: Any, number: int, rows: slice) -> Any:
        values = plane(logits, taps, number, rows)
        largest.append(values.size)
        return values

    monkeypatch.setattr(stock_arithmetic, "_ELEMENTS", 2**12)
    monkeypatch.setattr(probabilities_module, "_ELEMENTS", 2**13)
    monkeypatch.setattr(stock_arithmetic, "_plane", spy)
    assert_stocks_probabilities(Case(Pattern.ORGANS, (9, 40, 30), (7, 61, 47), classes(9)))
    assert max(largest) <= 2**12


@pytest.mark.parametrize("resampling", [STANDARD, STANDARD_TORCH])
def test_an_export_whose_time_is_up_is_given_up(resampling: Resampling) -> None:
    case = Case(Pattern.ORGANS, (8, 9, 10), (12, 13, 14), classes(3), resampling=resampling)
    model, over = case.model(), time.monotonic() - 1
    logits, properties = case.logits(model), case.properties()
    for method in ExportMethod:
        with pytest.raises(Deadline):
            label_map(model, logits, properties, method, over)
    with pytest.raises(Deadline):
        label_map_and_probabilities(model, logits, properties, deadline=over)


def test_values_that_are_no_floats_are_compared_as_stock_compares_them() -> None:
    """nnU-Net's function for segmentations gives integers, and looks at all classes at once."""
    own = Resampling(cases.TORCH, STANDARD_TORCH.arguments | {"is_seg": True})
    assert_stocks_labels(Case(Pattern.INTEGERS, (5, 6, 7), (6, 7, 9), classes(3), resampling=own))


@pytest.mark.parametrize("excess", [(1, 0, 0), (3, 2, 1)])
def test_probabilities_of_logits_larger_than_the_crop_are_cut_as_in_stock(excess: cases.Shape) -> None:
    case = Case(Pattern.NOISE, (4, 5, 6), (4, 5, 6), classes(3), resampling=Resampling(cases.NONE, {}))
    grid = [size + more for size, more in zip(case.crop, excess, strict=True)]
    assert_stocks_probabilities(replace(case, grid=(grid[0], grid[1], grid[2])))


# ------------------------------------------------------------------------------------- what the caller finds unchanged


def _every_answer(case: Case) -> list[npt.NDArray[Any]]:
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    maps = [label_map(model, logits, properties, method) for method in ExportMethod]
    if (taps := resampling_of(model, logits, properties).taps) is not None:
        canvas = Canvas(model, rule_of(model), properties)
        dense.export(logits, taps, rule_of(model), canvas)
        maps.append(canvas.finish())
    return [*maps, *label_map_and_probabilities(model, logits, properties)]


@given(
    cases.cases(resamplings=st.one_of(cases.standard_plans, cases.torch_plans), dtypes=BOTH_TYPES, values=60_000),
    st.integers(1, 9),
)
@examples(25)
def test_the_number_of_threads_changes_nothing(case: Case, count: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _every_answer(case)
        torch.set_num_threads(count)
        together = _every_answer(case)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


_BLOCKS = [
    (sparse, "GRID_BLOCK"),
    (sparse, "IMAGE_BLOCK"),
    (sparse, "_ELEMENTS"),
    (nearest, "IMAGE_BLOCK"),
    (stock_arithmetic, "_ELEMENTS"),
    (probabilities_module, "_ELEMENTS"),
    (dense, "_ELEMENTS"),
    (dense, "_SETTLED_ELEMENTS"),
]


@given(
    cases.cases(resamplings=st.one_of(cases.standard_plans, cases.torch_plans), dtypes=BOTH_TYPES, values=5_000),
    st.sampled_from([1, 7, 64, 500]),
)
@examples(40)
def test_the_size_of_blocks_changes_nothing(case: Case, size: int) -> None:
    whole = _every_answer(case)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in _BLOCKS:
            patch.setattr(module, name, size)
        pieces = _every_answer(case)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@given(
    cases.cases(
        resamplings=st.one_of(cases.standard_plans, cases.torch_plans, cases.other_plans, cases.identity_plans),
        dtypes=BOTH_TYPES,
        values=6_000,
    )
)
@examples(25)
def test_logits_and_properties_are_left_as_they_were(case: Case) -> None:
    model = case.model()
    logits, properties = case.logits(model), case.properties()
    kept, kept_properties = logits.clone(), deepcopy(properties)
    for method in ExportMethod:
        label_map(model, logits, properties, method)
    label_map_and_probabilities(model, logits, properties)
    assert torch.equal(logits, kept)
    assert torch.equal(torch.signbit(logits), torch.signbit(kept))
    assert properties == kept_properties


@given(cases.cases(dtypes=BOTH_TYPES, values=60_000))
@examples(10)
def test_exports_at_the_same_time_do_not_disturb_each_other(case: Case) -> None:
    """Two models in one process, each called by a thread of its own."""
    alone, before = _every_answer(case), torch.get_num_threads()
    with ThreadPoolExecutor(3) as pool:
        for together in pool.map(_every_answer, [case] * 3):
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_answers_share_no_memory_with_the_logits_or_with_each_other() -> None:
    for pattern, crop in itertools.product([Pattern.ORGANS], [(5, 6, 7), (8, 9, 10)]):
        case = Case(pattern, (5, 6, 7), crop, classes(3), dtype="float32")
        first, kept = _every_answer(case), [each.copy() for each in _every_answer(case)]
        for answer in first:
            answer[...] = 1
        for answer, expected in zip(_every_answer(case), kept, strict=True):
            np.testing.assert_array_equal(answer, expected, strict=True)


def test_an_error_leaves_the_number_of_threads_as_it_was(threads: Callable[[int], None]) -> None:
    threads(3)
    for resampling in (STANDARD, STANDARD_TORCH):
        case = Case(Pattern.NOISE, (4, 5, 6), (6, 7, 8), classes(4), resampling=resampling)
        model, properties = case.model(), case.properties()
        infinite = case.logits(model)
        infinite[1, 2, 3, 4] = torch.inf
        too_few = case.logits(model)[:3]
        for logits in (infinite, too_few):
            for method in ExportMethod:
                with pytest.raises((NonFiniteLogits, AssertionError, ValueError, IndexError)):
                    label_map(model, logits, properties, method)
                assert torch.get_num_threads() == 3
            with pytest.raises((NonFiniteLogits, AssertionError, ValueError, IndexError)):
                label_map_and_probabilities(model, logits, properties)
            assert torch.get_num_threads() == 3


# ------------------------------------------------------------------------------------------------------- real models

MATERIAL_CASES = [
    ("Dataset501_BrainTissue", "3d_fullres", "test_000"),
    ("Dataset501_BrainTissue", "2d", "test_000"),
    ("Dataset502_BrainRegions", "3d_fullres", "test_000"),
    pytest.param("Dataset501_BrainTissue", "3d_fullres", "test_001", marks=pytest.mark.long),
    pytest.param("Dataset501_BrainTissue", "3d_fullres", "test_002", marks=pytest.mark.long),
    pytest.param("Dataset501_BrainTissue", "2d", "test_001", marks=pytest.mark.long),
    pytest.param("Dataset502_BrainRegions", "3d_fullres", "test_001", marks=pytest.mark.long),
]


@pytest.mark.material
@pytest.mark.parametrize(("dataset", "configuration", "name"), MATERIAL_CASES)
def test_no_voxel_and_no_bit_differs_for_real_logits(
    dataset: str, configuration: str, name: str, material: Path, material_pipeline: Callable[[str, str], Pipeline]
) -> None:
    pipeline = material_pipeline(dataset, configuration)
    member = pipeline.bundle.lead
    model = ExportModel(member.plans, member.configuration, member.labels)
    reader = member.plans.plans["image_reader_writer"]
    files = sorted((material / "images" / dataset).glob(f"{name}_*.nii.gz"))
    images = [codecs.open_image(file.read_bytes(), Limits(), reader) for file in files]
    volume = Volume(np.concatenate([image.read() for image in images]), images[0].geometry)
    prepared = preprocess(member, volume)
    settings = settings_for(member, Options(folds=(0,), use_mirroring=False, tile_step_size=1))
    logits = pipeline.engine.predict(prepared.data, settings, None).logits

    expected = stock_labels(model, logits, prepared.properties)
    assert len(np.unique(expected)) > 1, "a constant answer would prove nothing"
    assert_label_maps_equal(label_map(model, logits, prepared.properties, ExportMethod.EXACT), expected)
    beside, probabilities = stock_probabilities(model, logits, prepared.properties)
    got_labels, got_probabilities = label_map_and_probabilities(model, logits, prepared.properties)
    assert_label_maps_equal(got_labels, beside)
    np.testing.assert_array_equal(got_probabilities, probabilities, strict=True)
