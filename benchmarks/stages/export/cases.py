"""What is exported: made-up logits and real ones, and what is promised of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER
from benchmarks.models import many_classes
from benchmarks.stages.export.exported import Export
from support.logits import export_model, organs, predicted, properties_for, white_noise

SEED = 20261123
GB = 1e9


@dataclass(frozen=True, slots=True)
class Sources:
    """Where real logits come from.

    Attributes:
        material: the material folder, if there is one.
        scratch: for files of images.
    """

    material: Path | None
    scratch: Path


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised of a case beside equal labels, which always are.

    Attributes:
        least_ratio: of stock's seconds to ours, at the lower quartile.
        most_memory_share: our extra memory in parts of stock's.
        most_seconds: ours, at the upper quartile.
        most_extra_bytes: our extra memory.
    """

    least_ratio: float | None = None
    most_memory_share: float | None = None
    most_seconds: float | None = None
    most_extra_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        title: for people.
        make: gives the logits.
        promise: what is promised of it.
        approximate: compare the methods that are not exact, too.
        stock_fits: stock's export fits this machine's memory.
        needs_material: cannot be made without the material folder.
    """

    title: str
    make: Callable[[Sources], Export]
    promise: Promise = Promise()
    approximate: bool = False
    stock_fits: bool = True
    needs_material: bool = False


def ties(classes: int, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The same noise for every class."""
    return white_noise(1, shape, seed).repeat(classes, 1, 1, 1)


def made_up(
    logits: Callable[[int, Sequence[int], int], torch.Tensor],
    classes: int,
    grid: tuple[int, int, int],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5),
) -> Export:
    """Logits of ``logits(classes, grid, seed)`` for an image of ``shape``; the network's grid has ``spacing`` mm."""
    image = [size * before / after for size, before, after in zip(spacing, grid, shape, strict=True)]
    model = export_model(classes, spacing=spacing)
    return Export(model, logits(classes, grid, SEED), properties_for(shape, image))


def made_up_regions(regions: int, grid: tuple[int, int, int], shape: tuple[int, int, int]) -> Export:
    """Ellipsoids of nested regions, like whole tumour, tumour core and enhancing tumour."""
    nested = [range(region, regions + 1) for region in range(1, regions + 1)]
    like = made_up(organs, regions + 1, grid, shape)
    return Export(export_model(regions=nested), like.logits[1:], like.properties)


def real(dataset: str, case: str, sources: Sources) -> Export:
    """Logits of a model of the material folder, fold 0, without mirroring."""
    assert sources.material is not None
    images = sorted((sources.material / "images" / dataset).glob(f"{case}_*.nii.gz"))
    trained = f"{TRAINER}__{PLANS}__{CONFIGURATION}"
    return Export(*predicted(sources.material / "models" / dataset / trained, images, FOLD))


def parcels(spacing_mm: float, sources: Sources) -> Export:
    """Logits of the 40-class network for the template."""
    image = many_classes.write_template(sources.scratch, spacing_mm)
    return Export(*predicted(many_classes.model_folder(many_classes.CACHE), [image], FOLD))


def _separate_z(thickness_mm: float, sources: Sources) -> Export:  # noqa: ARG001 (a Case's make)
    model = export_model(20, spacing=(5.0, 0.7, 0.7))
    properties = properties_for((round(40 * 5 / thickness_mm), 320, 320), (thickness_mm, 0.5, 0.5))
    return Export(model, organs(20, (40, 229, 229), SEED), properties)


_GRID, _IMAGE = (160, 128, 128), (120, 160, 160)
_LARGE_GRID, _LARGE_IMAGE = (400, 267, 267), (300, 512, 512)
_T1, _TWO_CHANNELS = "Dataset501_BrainTissue", "Dataset502_BrainRegions"

CASES = {
    "organs-3": Case(
        "3 classes",
        lambda _: made_up(organs, 3, _GRID, _IMAGE),
        Promise(least_ratio=5),
    ),
    "organs-40": Case(
        "40 classes",
        lambda _: made_up(organs, 40, _GRID, _IMAGE),
        Promise(least_ratio=12, most_memory_share=1 / 10),
    ),
    "organs-117": Case(
        "117 classes",
        lambda _: made_up(organs, 117, _GRID, _IMAGE),
        Promise(least_ratio=10, most_memory_share=1 / 10),
        approximate=True,
    ),
    "regions-12": Case(
        "12 regions",
        lambda _: made_up_regions(12, _GRID, _IMAGE),
        Promise(least_ratio=8, most_memory_share=1 / 10),
    ),
    "separate-z-20": Case(
        "20 classes, thick slices resampled one by one",
        partial(_separate_z, 5.0),
        Promise(least_ratio=8, most_memory_share=1 / 10),
    ),
    "separate-z-20-between": Case(
        "20 classes, thick slices resampled one by one, and other slices than the network's",
        partial(_separate_z, 4.0),
    ),
    "noise-40": Case(
        "white noise of 40 classes",
        lambda _: made_up(white_noise, 40, _GRID, _IMAGE),
        Promise(least_ratio=3, most_memory_share=1 / 5),
    ),
    "ties-40": Case(
        "40 classes that are equal everywhere, so that every voxel is settled in stock's arithmetic",
        lambda _: made_up(ties, 40, _GRID, _IMAGE),
    ),
    "coarse-20": Case(
        "20 classes, an image much coarser than the network's grid",
        lambda _: made_up(organs, 20, (256, 256, 256), (64, 64, 64)),
    ),
    "tissue-2mm": Case(
        "real, 4 classes, nothing is resampled",
        partial(real, _T1, "test_000"),
        Promise(least_ratio=1),
        approximate=True,
        needs_material=True,
    ),
    "tissue-oblique": Case(
        "real, 4 classes, 1.5 x 1.5 x 3 mm",
        partial(real, _T1, "test_001"),
        Promise(least_ratio=5, most_memory_share=1 / 4),
        approximate=True,
        needs_material=True,
    ),
    "tissue-1mm": Case(
        "real, 4 classes, 1 mm",
        partial(real, _T1, "test_002"),
        Promise(least_ratio=5, most_memory_share=1 / 4),
        approximate=True,
        needs_material=True,
    ),
    "regions-2mm": Case(
        "real, 3 regions, nothing is resampled",
        partial(real, _TWO_CHANNELS, "test_000"),
        Promise(least_ratio=1),
        approximate=True,
        needs_material=True,
    ),
    "regions-oblique": Case(
        "real, 3 regions, 1.5 x 1.5 x 3 mm",
        partial(real, _TWO_CHANNELS, "test_001"),
        approximate=True,
        needs_material=True,
    ),
    "parcels-2mm": Case("real, 40 classes, 2 mm", partial(parcels, 2.0), approximate=True),
    "parcels-1mm": Case("real, 40 classes, 1 mm", partial(parcels, 1.0), approximate=True),
    "large-10": Case(
        "10 classes, 300 x 512 x 512",
        lambda _: made_up(organs, 10, _LARGE_GRID, _LARGE_IMAGE),
        Promise(least_ratio=12, most_extra_bytes=GB / 2),
    ),
    "large-117": Case(
        "117 classes, 300 x 512 x 512",
        lambda _: made_up(organs, 117, _LARGE_GRID, _LARGE_IMAGE),
        Promise(most_seconds=30, most_extra_bytes=GB),
        stock_fits=False,
    ),
}
