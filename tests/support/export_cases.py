"""Exports to compare with stock: every kind of plan, grid, crop, label and logit that nnU-Net's own export takes.

A :class:`Case` is a handful of small values whose ``repr`` rebuilds it, so that a falsifying example can be pasted.
The strategies draw cases; ``stock_labels`` and ``stock_probabilities`` are the oracle: nnU-Net's function, run live.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from scipy.ndimage import gaussian_filter

from nnunet_torchserve.tiling import STOCK_THREADS

from .logits import ExportModel, export_model_of
from .untrained import DEMO_MODEL

DEFAULT = "resample_data_or_seg_to_shape"
TORCH = "resample_torch_fornnunet"
NONE = "no_resampling_hack"

Shape = tuple[int, int, int]
FloatArray = npt.NDArray[np.floating[Any]]
LabelArray = npt.NDArray[np.integer[Any]]


# ------------------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Resampling:
    """``resampling_fn_probabilities`` of a plan and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Labelling:
    """The ``labels`` of a dataset.json and, where they are regions, its ``regions_class_order``."""

    labels: dict[str, int | list[int]]
    regions_class_order: list[int] | None = None


STANDARD = Resampling(DEFAULT, {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None})
"""What nnU-Net's planners write."""

STANDARD_TORCH = Resampling(TORCH, {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False})
"""What its ``torchres`` planners write."""


def classes(count: int) -> Labelling:
    """Background and ``count - 1`` labels."""
    return _labelling(range(1, count))


def _labelling(labels: Iterable[int]) -> Labelling:
    named: dict[str, int | list[int]] = {f"part_{label}": label for label in labels}
    return Labelling({"background": 0, **named})


@cache
def _demo_plans() -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((DEMO_MODEL / "plans.json").read_text())
    return plans


def planned_model(
    labelling: Labelling,
    resampling: Resampling = STANDARD,
    target: Sequence[float] = (2.0, 2.0, 2.0),
    transpose: Sequence[int] = (0, 1, 2),
) -> ExportModel:
    """The demo model's plans with another resampling, spacing, transpose and other labels.

    Args:
        labelling: of the dataset.
        resampling: of the logits.
        target: the configuration's spacing; two numbers make it a 2-D configuration.
        transpose: ``transpose_forward``.
    """
    plans = deepcopy(_demo_plans())
    plans["transpose_forward"] = [int(axis) for axis in transpose]
    plans["transpose_backward"] = [int(axis) for axis in np.argsort(transpose)]
    name = "2d" if len(target) == 2 else "3d_fullres"
    plans["configurations"][name] |= {
        "spacing": list(target),
        "resampling_fn_probabilities": resampling.name,
        "resampling_fn_probabilities_kwargs": resampling.arguments,
    }
    return export_model_of(
        plans, {"labels": labelling.labels, "regions_class_order": labelling.regions_class_order}, name
    )


# ------------------------------------------------------------------------------------------------------------ logits


class _Named(Enum):
    """An enum whose members print as they are written."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class Pattern(_Named):
    """Logits that an export may get wrong."""

    ORGANS = "smooth fields with confident interiors"
    NOISE = "white noise"
    NEGATIVE_NOISE = "white noise far below zero"
    INTEGERS = "few integers, so that ties are everywhere"
    ALL_ALIKE = "one volume for all classes"
    NEAR_TIES = "classes that differ by up to three units in the last place"
    SIGNED_ZEROS = "zeros of both signs"
    CONSTANT = "one value for each class"
    HUGE = "up to the largest number"
    SUBNORMAL = "below the smallest normal number"
    MIXED = "magnitudes from the smallest to the largest number"
    RAMPS = "ramps of whole units in the last place, whose interpolations lie half-way between two halves"
    CHECKERBOARD = "each class alternates from voxel to voxel"
    THIRD_WINS = "a class that is first at no corner of a cell wins in its middle"
    THRESHOLD = "around the smallest values with a sigmoid above one half"
    NONE_POSITIVE = "negative or zero"
    ALL_POSITIVE = "positive"


class Layout(_Named):
    """How the logits lie in memory."""

    CONTIGUOUS = "contiguous"
    UNPADDED = "a view into a larger inference tensor, as the engine hands them over"
    CHANNELS_LAST = "channels last"


def _mantissa_bits(dtype: np.dtype[Any]) -> int:
    return int(np.finfo(dtype).nmant)


def _ulps(base: FloatArray, steps: npt.NDArray[np.integer[Any]]) -> FloatArray:
    """``base`` moved away from zero by so many units in the last place."""
    integer = np.int16 if base.dtype == np.float16 else np.int32
    moved: FloatArray = (base.view(integer) + steps.astype(integer)).view(base.dtype)
    return moved


def _organs(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    field = gaussian_filter(rng.standard_normal(shape), (0, 1.5, 1.5, 1.5))
    logits: FloatArray = (field * rng.choice([5, 60]) + 0.05 * rng.standard_normal(shape)).astype(dtype)
    return logits


def _near_ties(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    kind = rng.integers(3)
    if kind == 0:
        base = np.full((1, *shape[1:]), rng.uniform(0.5, 40))
    elif kind == 1:
        base = 4 + gaussian_filter(rng.standard_normal((1, *shape[1:])), (0, 1, 1, 1))
    else:
        base = 2 ** rng.uniform(-8, 12, (1, *shape[1:]))
    signed = np.broadcast_to(base * rng.choice([-1, 1]), shape).astype(dtype)
    return _ulps(signed, rng.integers(-3, 4, shape))


def _mixed(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    low, high = (-24.0, 15.9) if dtype == np.float16 else (-149.0, 127.0)
    logits: FloatArray = (rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(low, high, shape)).astype(dtype)
    return logits


def _huge(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    largest = 65504 if dtype == np.float16 else 3e38
    logits: FloatArray = np.clip(1.07 * rng.uniform(-largest, largest, shape), -largest, largest).astype(dtype)
    return logits


def _subnormal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    largest = 2 ** rng.choice([1, 3, _mantissa_bits(dtype)])
    unit = float(np.finfo(dtype).smallest_subnormal)
    logits: FloatArray = (rng.integers(-largest, largest, shape) * unit).astype(dtype)
    return logits


def _ramps(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    places = np.indices(shape[1:])
    steps = rng.integers(0, 4, (shape[0], 3)) * (rng.random((shape[0], 3)) < 0.6)
    rise = np.einsum("ca,azyx->czyx", steps, places) + rng.integers(0, 4, (shape[0], 1, 1, 1))
    ramp: FloatArray = (2.0 ** _mantissa_bits(dtype) + rise).astype(dtype)
    return ramp if rng.integers(2) else -ramp[:, ::-1, ::-1, ::-1]


def _parity(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
    """0 or 1: alternating along every axis, or along one."""
    places = np.indices(shape[1:])
    axis = rng.integers(4)
    odd: npt.NDArray[np.integer[Any]] = (places.sum(axis=0) if axis == 3 else places[axis]) % 2
    return odd


def _checkerboard(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    pairs = rng.integers(-6, 7, (shape[0], 2))
    logits: FloatArray = pairs[:, _parity(rng, shape)].astype(dtype)
    return logits


def _third_wins(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    pairs = np.tile(rng.integers(-9, 0, (shape[0], 1)), 2)
    pairs[rng.permutation(shape[0])[:3]] = [[10, 0], [0, 10], [9, 9]][: shape[0]]
    logits: FloatArray = pairs[:, _parity(rng, shape)].astype(dtype)
    return logits


_AROUND_THRESHOLD = [0.0, 5.96e-8, 2.0**-24, 1.19e-7, 2.0**-23, 1.79e-7, 2.0**-22, 4.8e-7, 1e-6, 2.0**-14, 1.0]


def _threshold(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    logits: FloatArray = (rng.choice([-1, 1], shape) * rng.choice(_AROUND_THRESHOLD, shape)).astype(dtype)
    return logits


_PATTERNS: Mapping[Pattern, Callable[[np.random.Generator, tuple[int, ...], np.dtype[Any]], FloatArray]] = {
    Pattern.ORGANS: _organs,
    Pattern.NOISE: lambda rng, shape, dtype: (3 * rng.standard_normal(shape)).astype(dtype),
    Pattern.NEGATIVE_NOISE: lambda rng, shape, dtype: (rng.standard_normal(shape) - 40).astype(dtype),
    Pattern.INTEGERS: lambda rng, shape, dtype: rng.integers(-2, rng.integers(0, 9), shape).astype(dtype),
    Pattern.ALL_ALIKE: lambda rng, shape, dtype: np.tile(_near_ties(rng, (1, *shape[1:]), dtype), (shape[0], 1, 1, 1)),
    Pattern.NEAR_TIES: _near_ties,
    Pattern.SIGNED_ZEROS: lambda rng, shape, dtype: rng.choice(np.array([0.0, -0.0], dtype), shape),
    Pattern.CONSTANT: lambda rng, shape, dtype: np.broadcast_to(
        _near_ties(rng, (shape[0], 1, 1, 1), dtype), shape
    ).copy(),
    Pattern.HUGE: _huge,
    Pattern.SUBNORMAL: _subnormal,
    Pattern.MIXED: _mixed,
    Pattern.RAMPS: _ramps,
    Pattern.CHECKERBOARD: _checkerboard,
    Pattern.THIRD_WINS: _third_wins,
    Pattern.THRESHOLD: _threshold,
    Pattern.NONE_POSITIVE: lambda rng, shape, dtype: -np.abs(_threshold(rng, shape, dtype)),
    Pattern.ALL_POSITIVE: lambda rng, shape, dtype: np.abs(_mixed(rng, shape, dtype)),
}


def make_logits(
    pattern: Pattern, shape: tuple[int, ...], seed: int, dtype: str = "float16", layout: Layout = Layout.CONTIGUOUS
) -> torch.Tensor:
    """Logits (C, z, y, x) of a pattern.

    Args:
        pattern: what they look like.
        shape: (C, z, y, x).
        seed: other values of the same pattern.
        dtype: ``float16`` or ``float32``.
        layout: how they lie in memory.
    """
    values = torch.from_numpy(_PATTERNS[pattern](np.random.default_rng(seed), shape, np.dtype(dtype)))
    if layout is Layout.CHANNELS_LAST:
        return values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout is Layout.UNPADDED:
        with torch.inference_mode():
            padded = torch.full([shape[0], *(size + 3 for size in shape[1:])], 7.0, dtype=values.dtype)
            view = padded[:, 1:-2, 2:-1, 1:-2]
            view.copy_(values)
            return view
    return values


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One export.

    Attributes:
        pattern, seed, dtype, layout: of the logits.
        labelling, resampling: of the model.
        grid: (z, y, x) of the network's grid, in the plan's axis order.
        crop: voxels of the nonzero region on the image's grid, in the plan's axis order.
        margins: empty voxels before and after it on each axis.
        spacing: mm of the image, in the file's axis order.
        target: mm of the network's grid, in the plan's; two numbers for a 2-D configuration.
        transpose: ``transpose_forward``.
    """

    pattern: Pattern
    grid: Shape
    crop: Shape
    labelling: Labelling
    seed: int = 0
    dtype: str = "float16"
    layout: Layout = Layout.CONTIGUOUS
    resampling: Resampling = STANDARD
    margins: tuple[tuple[int, int], ...] = ((0, 0),) * 3
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    target: tuple[float, ...] = (2.0, 2.0, 2.0)
    transpose: tuple[int, ...] = (0, 1, 2)

    def model(self) -> ExportModel:
        """The model."""
        return planned_model(self.labelling, self.resampling, self.target, self.transpose)

    def logits(self, model: ExportModel) -> torch.Tensor:
        """The logits (C, z, y, x)."""
        shape = (int(model.labels.num_segmentation_heads), *self.grid)
        return make_logits(self.pattern, shape, self.seed, self.dtype, self.layout)

    def properties(self) -> dict[str, Any]:
        """What ``DefaultPreprocessor`` leaves behind."""
        sizes = list(zip(self.margins, self.crop, strict=True))
        return {
            "spacing": list(self.spacing),
            "shape_before_cropping": tuple(before + size + after for (before, after), size in sizes),
            "bbox_used_for_cropping": [[before, before + size] for (before, _), size in sizes],
            "shape_after_cropping_and_before_resampling": self.crop,
        }


@st.composite
def _axes(draw: st.DrawFn, voxels: int, *, same_grid: bool) -> tuple[Shape, Shape]:
    """Network grid and crop of at most so many voxels each."""
    limit = max(1, min(24, math.floor(voxels ** (1 / 3))))
    anything = st.tuples(st.integers(1, limit), st.integers(1, limit))
    same = st.integers(1, limit).map(lambda size: (size, size))
    factors = [(1, 2), (1, 3), (2, 1), (3, 1), (3, 4), (4, 3), (2, 3), (3, 2), (5, 2)]
    ratios = [(a * k, b * k) for a, b in factors for k in range(1, 9) if max(a, b) * k <= limit]
    axis = st.one_of(anything, st.sampled_from(ratios), same) if ratios else same
    pairs = [draw(same if same_grid else axis) for _ in range(3)]
    if not same_grid and voxels >= 94 * 4 and draw(st.sampled_from([False] * 9 + [True])):
        # 2 mm from 3 mm in a head of 19 cm; too long for the other axes to be long too
        pairs = [(min(a, 2), min(b, 2)) for a, b in pairs]
        pairs[draw(st.integers(0, 2))] = draw(st.sampled_from([(94, 63), (63, 94)]))
    (z, y, x), (z_crop, y_crop, x_crop) = (tuple(pair[k] for pair in pairs) for k in range(2))
    return (z, y, x), (z_crop, y_crop, x_crop)


_TYPICAL_SPACINGS = [
    (1.0, 1.0, 1.0),
    (2.0, 2.0, 2.0),
    (1.17, 1.17, 1.17),
    (5.0, 1.0, 1.0),
    (0.7, 0.7, 5.0),
    (0.78, 3.1, 0.78),
    (3.0, 1.0, 1.0),  # not more than three times
    (3.0000001, 1.0, 1.0),
    (0.24, 1.25, 1.25),  # two thick axes: not separate
    (2.0, 1.5, 1.0),
    (1.5, 2.0, 1.0),
    (999.0, 1.0, 1.0),  # a 2-D image
]
spacings = st.one_of(
    st.sampled_from(_TYPICAL_SPACINGS), st.tuples(*[st.floats(0.1, 8, allow_subnormal=False).map(float)] * 3)
)
targets = st.one_of(spacings, spacings.map(lambda spacing: spacing[1:]))
transposes = st.permutations((0, 1, 2)).map(tuple)
margins = st.one_of(st.just(((0, 0),) * 3), st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3))

plain_labels = st.one_of(st.integers(2, 6), st.sampled_from([1, 10, 20, 40, 60])).map(classes)
ignored_labels = st.integers(2, 5).map(lambda count: Labelling(classes(count).labels | {"ignore": count}))
gappy_labels = st.sets(st.integers(1, 254), min_size=1, max_size=5).map(_labelling)
many_labels = st.sampled_from([254, 255, 256, 257, 300]).map(classes)
many_regions = st.sampled_from([253, 254, 255, 256, 300]).map(
    lambda count: Labelling(classes(count).labels | {"all": list(range(1, count + 1))}, [*range(2, count + 1), 1])
)


@st.composite
def _regions(draw: st.DrawFn) -> Labelling:
    """Overlapping regions, single labels among them, painted in any order with any label, also twice."""
    region = st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True)
    wide = draw(st.lists(st.integers(0, 5), min_size=2, max_size=4, unique=True))
    drawn = draw(st.lists(st.one_of(st.integers(1, 5), region), max_size=6))
    labels: dict[str, int | list[int]] = {"background": 0, "wide": wide}
    labels |= {f"region_{number}": each for number, each in enumerate(drawn)}
    if draw(st.booleans()):
        used = [label for each in [wide, *drawn] for label in (each if isinstance(each, list) else [each])]
        labels["ignore"] = max(used) + 1
    order = draw(st.lists(st.integers(0, 254), min_size=len(drawn) + 1, max_size=len(drawn) + 1))
    if draw(st.booleans()):
        order = [1 + label % 3 for label in order]
    return Labelling(labels, order)


region_labels = _regions()
labellings = st.one_of(plain_labels, plain_labels, region_labels, ignored_labels, gappy_labels)

_force = st.sampled_from([None, True, False])
standard_plans = st.one_of(
    st.just(STANDARD), _force.map(lambda force: Resampling(DEFAULT, STANDARD.arguments | {"force_separate_z": force}))
)
"""The default function with the planners' orders: what nearly every plan has."""

_optional_arguments = st.fixed_dictionaries(
    {},
    optional={
        "is_seg": st.just(False),
        "order": st.sampled_from([0, 1, 3]),
        "order_z": st.sampled_from([0, 1]),
        "force_separate_z": _force,
        "separate_z_anisotropy_threshold": st.sampled_from([1.2, 3, 6]),
    },
)
other_plans = _optional_arguments.map(lambda arguments: Resampling(DEFAULT, arguments))
"""The default function with any orders; arguments that a plan leaves out have the function's own defaults."""

torch_plans = st.one_of(
    st.just(STANDARD_TORCH),
    _force.map(lambda force: Resampling(TORCH, STANDARD_TORCH.arguments | {"force_separate_z": force})),
    st.fixed_dictionaries(
        {},
        optional={
            "is_seg": st.just(False),
            "num_threads": st.sampled_from([1, 2]),
            "force_separate_z": _force,
            "separate_z_anisotropy_threshold": st.sampled_from([1.2, 3, 6]),
            "mode": st.sampled_from(["linear", "nearest-exact", "nearest", "area"]),
            "aniso_axis_mode": st.sampled_from(["nearest-exact", "nearest", "trilinear"]),
        },
    ).map(lambda arguments: Resampling(TORCH, arguments)),
)

identity_plans = st.just(Resampling(NONE, {}))


@st.composite
def cases(
    draw: st.DrawFn,
    patterns: st.SearchStrategy[Pattern] | None = None,
    resamplings: st.SearchStrategy[Resampling] = standard_plans,
    labels: st.SearchStrategy[Labelling] = labellings,
    dtypes: st.SearchStrategy[str] | None = None,
    layouts: st.SearchStrategy[Layout] | None = None,
    values: int = 30_000,
) -> Case:
    """Exports of at most so many ``values`` (voxels times classes) on either grid."""
    labelling, resampling = draw(labels), draw(resamplings)
    heads = len(labelling.regions_class_order or labelling.labels)
    grid, crop = draw(_axes(max(1, values // heads), same_grid=resampling.name == NONE))
    return Case(
        pattern=draw(patterns if patterns is not None else st.sampled_from(Pattern)),
        grid=grid,
        crop=crop,
        labelling=labelling,
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(dtypes if dtypes is not None else st.just("float16")),
        layout=draw(layouts if layouts is not None else st.sampled_from(Layout)),
        resampling=resampling,
        margins=draw(margins),
        spacing=draw(spacings),
        target=draw(targets),
        transpose=draw(transposes),
    )


# ------------------------------------------------------------------------------------------------------------- stock


def stock_labels(model: ExportModel, logits: torch.Tensor, properties: dict[str, Any]) -> LabelArray:
    """nnU-Net's label map (Z, Y, X)."""
    labels: LabelArray = _stock(model, logits, properties, probabilities=False)
    return labels


def stock_probabilities(
    model: ExportModel, logits: torch.Tensor, properties: dict[str, Any]
) -> tuple[LabelArray, npt.NDArray[np.float32]]:
    """nnU-Net's label map (Z, Y, X) where probabilities are asked for, and these, float32 (C, Z, Y, X)."""
    labels, probabilities = _stock(model, logits, properties, probabilities=True)
    return labels, probabilities


def _stock(model: ExportModel, logits: torch.Tensor, properties: dict[str, Any], *, probabilities: bool) -> Any:
    threads = torch.get_num_threads()
    try:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            model.plans,
            model.configuration,
            model.labels,
            deepcopy(properties),
            return_probabilities=probabilities,
            num_threads_torch=STOCK_THREADS,
        )
    finally:
        torch.set_num_threads(threads)  # which stock forgets when it fails
