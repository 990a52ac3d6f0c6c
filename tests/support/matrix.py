"""The matrix of models: what nnU-Net can make, as columns; rows in which each two values stand together once.

Rows are generated: the ones of AllPairs, and as many more as it takes, for AllPairs gives up where rules forbid what it
would do next. A pair that no row has is forbidden by a rule, by name (:func:`forbidden`).
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from allpairspy import AllPairs
from skimage.io import imsave

from . import volumes
from .odd_models import LABELS, Json, OddModel, old_format, resampled_by

PICTURE = "NaturalImage2DIO"
STACK = "Tiff3DIO"
CASCADE = "3d_cascade_fullres"
ENSEMBLE = "ensemble"

COLUMNS: OrderedDict[str, tuple[str, ...]] = OrderedDict(
    network=(
        "plain",
        "no deep supervision",
        "batch norm",
        "ResEnc M",
        "ResEnc L",
        "ResEnc XL",
        "old plans",
        "old plans, residual",
        "Primus",
    ),
    reader=("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", STACK, PICTURE),
    normalization=("z score", "CT", "no normalization", "0 to 1", "RGB", "one each"),
    configuration=("2d", "3d_fullres", "3d_lowres", CASCADE, ENSEMBLE),
    labels=("labels", "ignore", "regions", "regions and ignore", "more than 255"),
    resampling=("spline", "torch", "torch, thick axis apart", "no_resampling_hack"),
    image=("whole", "cropped", "thick", "smaller than the patch"),
    folds=("one fold", "two folds", "fold_all", "checkpoint_best"),
    channels=("one channel", "two channels", "three colours"),
    axes=("as they are", "swapped", "turned"),
    mirroring=("no axis", "one axis", "every axis"),
    asked=("nothing", "no mirroring", "other tiles"),
    mask=("no mask", "mask"),
    postprocessing=("as predicted", "largest component"),
    answer=("labels", "probabilities"),
)
"""Values that a plan, a checkpoint, an image or a request may have; the longest columns come first."""


class Row(NamedTuple):
    """One model, its image and what it is asked: a value of each column."""

    network: str
    reader: str
    normalization: str
    configuration: str
    labels: str
    resampling: str
    image: str
    folds: str
    channels: str
    axes: str
    mirroring: str
    asked: str
    mask: str
    postprocessing: str
    answer: str

    def __str__(self) -> str:
        """The values that are not the usual ones of their column."""
        return ", ".join(value for value, usual in zip(self, USUAL, strict=True) if value != usual) or "usual"


USUAL = Row(
    network="plain",
    reader="SimpleITKIO",
    normalization="z score",
    configuration="3d_fullres",
    labels="labels",
    resampling="spline",
    image="whole",
    folds="one fold",
    channels="one channel",
    axes="as they are",
    mirroring="no axis",
    asked="nothing",
    mask="no mask",
    postprocessing="as predicted",
    answer="labels",
)

Partial = Mapping[str, str]
"""Some columns of a row."""


@dataclass(frozen=True)
class Rule:
    """Values that cannot stand together.

    Attributes:
        reason: why there is no such model, image or request.
        one, other: a column and its values; never one of ``one`` beside one of ``other``.
    """

    reason: str
    one: tuple[str, frozenset[str]]
    other: tuple[str, frozenset[str]]

    def forbids(self, values: Partial) -> bool:
        return all(values.get(column) in wrong for column, wrong in (self.one, self.other))


def _rule(reason: str, one: dict[str, Sequence[str]], other: dict[str, Sequence[str]]) -> Rule:
    [(first, values)], [(second, others)] = one.items(), other.items()
    return Rule(reason, (first, frozenset(values)), (second, frozenset(others)))


def _but(column: str, *values: str) -> dict[str, Sequence[str]]:
    """A column's other values."""
    return {column: [value for value in COLUMNS[column] if value not in values]}


_PICTURES: dict[str, Sequence[str]] = {"reader": [PICTURE]}
_PRIMUS: dict[str, Sequence[str]] = {"network": ["Primus"]}

RULES = (
    _rule("pictures have one slice, and nnU-Net plans 2d for them", _PICTURES, _but("configuration", "2d")),
    _rule("pictures have no thick axis", _PICTURES, {"image": ["thick"]}),
    _rule("nnU-Net transposes pictures never: their first axis has 999 mm", _PICTURES, _but("axes", "as they are")),
    _rule("Primus is a network of volumes", _PRIMUS, {"configuration": ["2d"]}),
    _rule("so there are no pictures for it", _PRIMUS, _PICTURES),
    _rule("one channel has one normalisation", {"normalization": ["one each"]}, {"channels": ["one channel"]}),
)


def forbidden(values: Partial) -> bool:
    """Whether a rule says that these cannot stand together."""
    return any(rule.forbids(values) for rule in RULES)


@cache
def rows() -> tuple[Row, ...]:
    """Every pair of values that no rule forbids, always the same rows."""
    names = list(COLUMNS)
    found = [
        Row(*values)
        for values in AllPairs(list(COLUMNS.values()), lambda part: not forbidden(dict(zip(names, part, strict=False))))
    ]
    missing = pairs() - {pair for row in found for pair in pairs_of(row)}
    while missing:
        completed = _completed(min(missing), missing)
        missing -= pairs_of(completed)
        found.append(completed)
    return tuple(found)


Pair = tuple[tuple[str, str], tuple[str, str]]


@cache
def pairs() -> frozenset[Pair]:
    """All that no rule forbids."""
    return frozenset(
        ((one, value), (other, another))
        for one, other in combinations(COLUMNS, 2)
        for value in COLUMNS[one]
        for another in COLUMNS[other]
        if not forbidden({one: value, other: another})
    )


def pairs_of(row: Row) -> frozenset[Pair]:
    """Those that stand in it."""
    return frozenset(combinations(row._asdict().items(), 2))


def _completed(pair: Pair, missing: frozenset[Pair]) -> Row:
    """A row with that pair, and with as many more that are missing as is easily had."""
    values = dict(pair)

    def gain(column: str, value: str) -> int:
        return sum(
            ((column, value), other) in missing or (other, (column, value)) in missing for other in values.items()
        )

    for column, possible in COLUMNS.items():
        if column not in values:
            allowed = [value for value in possible if not forbidden(values | {column: value})]
            values[column] = max(allowed, key=lambda value: gain(column, value))
    return Row(**values)


def covering(*columns: str) -> tuple[Row, ...]:
    """Few rows in which every value of these columns stands, but Primus, which loads a library for seconds."""
    left = {(column, value) for column in columns for value in COLUMNS[column] if value != "Primus"}
    possible = [row for row in rows() if row.network != "Primus"]
    chosen: list[Row] = []
    while left:
        best = max(possible, key=lambda row: len(left & set(row._asdict().items())))
        left -= set(best._asdict().items())
        chosen.append(best)
    return tuple(chosen)


@cache
def thin() -> tuple[Row, ...]:
    """Few rows in which every value of all columns stands, but Primus."""
    return covering(*COLUMNS)


# What a row is made of


@dataclass(frozen=True)
class Made:
    """A row's models: folders in the order of its recipe, and how the archive and stock take them.

    Attributes:
        folders: one; a cascade's two stages; an ensemble's members.
        folds: what is chosen of them.
        checkpoint: the file's name.
    """

    folders: tuple[Path, ...]
    folds: tuple[int | str, ...] | None
    checkpoint: str


_FOLDS: dict[str, tuple[tuple[int | str, ...], str]] = {
    "one fold": ((0,), "checkpoint_final.pth"),
    "two folds": ((1, 3), "checkpoint_final.pth"),
    "fold_all": (("all",), "checkpoint_final.pth"),
    "checkpoint_best": ((0,), "checkpoint_best.pth"),
}
_SCHEMES = {
    "z score": "ZScoreNormalization",
    "CT": "CTNormalization",
    "no normalization": "NoNormalization",
    "0 to 1": "RescaleTo01Normalization",
    "RGB": "RGBTo01Normalization",
}
_MIXED = ("CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization")
_CHANNELS = {"one channel": ("MR",), "two channels": ("T1", "T2"), "three colours": ("R", "G", "B")}
_AXES = {"as they are": (0, 1, 2), "swapped": (1, 0, 2), "turned": (2, 0, 1)}
"""``transpose_forward`` of nnU-Net's planner for a thick z, y or x; the last is not its own inverse."""
_RESAMPLING: dict[str, Callable[[Json], None] | None] = {
    "spline": None,
    "torch": resampled_by("resample_torch_fornnunet", force_separate_z=False, memefficient_seg_resampling=False),
    "torch, thick axis apart": resampled_by(
        "resample_torch_fornnunet",
        force_separate_z=None,
        memefficient_seg_resampling=False,
        separate_z_anisotropy_threshold=3,
    ),
    "no_resampling_hack": resampled_by("no_resampling_hack"),
}
"""As nnU-Net's planners write them: ``resampling/`` of its experiment planners."""
_NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no deep supervision": {"trainer": "nnUNetTrainerNoDeepSupervision"},
    "batch norm": {"trainer": "nnUNetTrainerBN"},
    "ResEnc M": {"residual": True, "plans_name": "nnUNetResEncUNetMPlans"},
    "ResEnc L": {"residual": True, "plans_name": "nnUNetResEncUNetLPlans", "features": (4, 8, 8)},
    "ResEnc XL": {"residual": True, "plans_name": "nnUNetResEncUNetXLPlans", "features": (6, 12, 12)},
    "old plans": {},
    "old plans, residual": {"residual": True},
    "Primus": {"trainer": "nnUNet_PrimusV2S_Trainer"},
    "Primus S": {"trainer": "nnUNet_Primus_S_Trainer"},
}
"""M, L and XL are one topology of several sizes: their planners differ in the memory that they aim at."""
WHOLE_PRIMUS = USUAL._replace(network="Primus S", image="cropped", channels="two channels")
"""A network of a size that people train; one row, for it takes a quarter of a minute."""

MANY = 262
"""Labels: more than 8 bits can tell apart."""


def shrink_primus(patch: pytest.MonkeyPatch) -> None:
    """Let Primus V2 be small in this process: as it is, each row takes a quarter of a minute."""
    from dynamic_network_architectures.architectures import primus  # slow

    patch.setitem(primus._PRIMUS_CONFIGS, "S", {"eva_depth": 2, "eva_numheads": 2, "embed_dim": 132})


def labels_of(row: Row) -> tuple[Json, Json]:
    """``labels`` of dataset.json, and what else they need there."""
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
    order = {"regions_class_order": [1, 2, 3]}
    match row.labels:
        case "labels":
            return LABELS, {}
        case "ignore":
            return LABELS | {"ignore": 4}, {}
        case "regions":
            return regions, order
        case "regions and ignore":
            return regions | {"ignore": 4}, order
        case _:
            return {"background": 0} | {f"part {k}": k for k in range(1, MANY + 1)}, {}


def steps_of(row: Row) -> list[Any]:
    """``labels_or_regions`` of each step of a postprocessing, all of the foreground first, as nnU-Net finds them."""
    single: list[Any] = [1, 2, 3]
    return [] if row.postprocessing == "as predicted" else [single, *single]


def made(row: Row, folder: Path) -> Made:
    """Write the folders."""
    folds, checkpoint = _FOLDS[row.folds]
    channels = _CHANNELS[row.channels]
    schemes = _MIXED[: len(channels)] if row.normalization == "one each" else (_SCHEMES[row.normalization],)
    labels, more = labels_of(row)
    changes = [_RESAMPLING[row.resampling], old_format if row.network.startswith("old plans") else None]

    def change(plans: Json) -> None:
        for each in changes:
            if each is not None:
                each(plans)

    usual = OddModel(
        channels=channels,
        schemes=schemes * (len(channels) // len(schemes)),
        labels=labels,
        more_dataset=more,
        change_plans=change,
        folds=folds,
        checkpoint=checkpoint,
        reader=row.reader,
        transposed=_AXES[row.axes],
        masked=row.mask == "mask",
        **_NETWORKS[row.network],
    )
    flat, lowres = usual.but(dimensions=2), usual.but(named="3d_lowres", spacing=3.0)
    models = {
        "2d": [flat],
        "3d_fullres": [usual],
        "3d_lowres": [lowres],
        CASCADE: [lowres, usual.but(named=CASCADE, previous_stage="3d_lowres")],
        ENSEMBLE: [usual, lowres if row.network.startswith("Primus") else flat],
    }[row.configuration]
    many = row.labels == "more than 255"
    folders = []
    for seed, model in enumerate(models):
        axes = _mirroring(row, model.dimensions)
        folders.append(model.but(mirroring=axes, change_weights=_varied(seed, many=many)).write(folder))
    return Made(tuple(folders), folds, checkpoint)


def _mirroring(row: Row, dimensions: int) -> tuple[int, ...] | None:
    return {"no axis": None, "one axis": (dimensions - 1,), "every axis": tuple(range(dimensions))}[row.mirroring]


def _varied(seed: int, *, many: bool) -> Callable[[dict[str, torch.Tensor]], None]:
    """Weights under which no class wins everywhere, and of many classes the last ones win often.

    Kernels see differences, not how bright the image is; another seed is another network.
    """

    def change(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in weights.values():
            if not tensor.is_floating_point():
                continue
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
            if set(tensor.shape[2:]) == {3}:
                tensor.sub_(tensor.mean(dim=list(range(2, tensor.ndim)), keepdim=True))
            if set(tensor.shape[2:]) == {1} and tensor.shape[1] > 1:
                tensor.sub_(tensor.mean(dim=1, keepdim=True))
            if many and tensor.shape[:1] == (MANY + 1,):
                tensor[255:].mul_(2)

    return change


def options_of(row: Row) -> dict[str, Any]:
    """What the predictor's constructor and a request have the same names for."""
    match row.asked:
        case "no mirroring":
            return {"use_mirroring": False}
        case "other tiles":
            return {"tile_step_size": 0.75, "use_gaussian": False}
        case _:
            return {}


# Its image

_SPACING = {"thick": (5.0, 1.2, 1.4)}
_SHAPES = {"thick": (7, 24, 21), "smaller than the patch": (11, 13, 9)}
_USUAL_SPACING = (1.2, 1.5, 1.9)
_USUAL_SHAPE = (22, 25, 19)


@dataclass(frozen=True)
class Image:
    """What a row is asked about.

    Attributes:
        files: as stock reads them, a file for each channel, or one picture of three colours.
        options: what their format needs to be told.
        stored: from the axes of stock's answer (Z, Y, X), which a reader may have turned, to those of the file.
    """

    files: tuple[Path, ...]
    options: dict[str, Any]
    stored: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def image_of(row: Row, folder: Path) -> Image:
    """Write its files."""
    eight_bits = row.reader == PICTURE or row.normalization == "RGB"
    arrays = [_array(row, seed, eight_bits=eight_bits) for seed in range(len(_CHANNELS[row.channels]))]
    if row.reader == PICTURE:
        return _pictures(arrays, folder)
    spacing = _SPACING.get(row.image, _USUAL_SPACING)
    if row.reader == STACK:
        return _stacks(arrays, spacing, folder)
    affine = np.diag([*spacing, 1.0])[[1, 2, 0, 3]] * np.array([[-1.0], [1.0], [-1.0], [1.0]])  # a sagittal one
    files = [
        volumes.write(folder, f"case_{k:04d}.nii.gz", volumes.nifti_gz(array, affine)) for k, array in enumerate(arrays)
    ]

    def stored(answer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not row.reader.endswith("WithReorient"):
            return answer
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(affine)
        )
        turned: npt.NDArray[Any] = nib.orientations.apply_orientation(answer.T, turn).T
        return turned

    return Image(tuple(files), {}, stored)


def _array(row: Row, seed: int, *, eight_bits: bool) -> npt.NDArray[Any]:
    """A channel (x, y, z) in values that the demo model's fingerprint describes."""
    shape = _SHAPES.get(row.image, _USUAL_SHAPE)
    array, _ = volumes.blobs(shape, seed=3 + seed)
    array = np.clip(array, 1, 255 if eight_bits else None)
    if row.image == "cropped":
        inside = np.zeros(shape, bool)
        inside[2:-3, 1:-2, 1:-1] = True
        inside[9:12, 10:13, 7:10] = False  # a hole is no border
        array[~inside] = 0
    return array.astype(np.uint8 if eight_bits else np.int16)


def _same(answer: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return answer


def _pictures(arrays: Sequence[npt.NDArray[Any]], folder: Path) -> Image:
    """The middle slices of the channels, y and x."""
    slices = [array[:, :, array.shape[2] // 2].T for array in arrays]
    contents = [np.stack(slices, -1)] if len(slices) == 3 else slices
    files = [folder / f"case_{k:04d}.png" for k in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        imsave(file, content, check_contrast=False)
    return Image(tuple(files), {}, _same)


def _stacks(arrays: Sequence[npt.NDArray[Any]], spacing: tuple[float, float, float], folder: Path) -> Image:
    """Pages of pictures, whose size stands in a file beside them."""
    (folder / "case.json").write_text(json.dumps({"spacing": spacing[::-1]}))
    files = []
    for k, array in enumerate(arrays):
        content = io.BytesIO()
        tifffile.imwrite(content, array.T)
        files.append(volumes.write(folder, f"case_{k:04d}.tif", content.getvalue()))
    return Image(tuple(files), {"spacing": list(spacing)}, _same)
