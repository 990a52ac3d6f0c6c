"""Region-based datasets of warped heads: few regions and many, of the same images and labels.

The heads and their 39 parcels are those of :mod:`benchmarks.models.many_classes`. The regions are no anatomy beyond the
first three: what a loader does with a region depends on how many labels it has, and on nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib

from benchmarks.harness.material import CONFIGURATION
from benchmarks.models.many_classes import PARCELS, SPACING_MM, load_head, warped
from small_training import Recipe

CASES = 5
"""nnU-Net splits into five folds."""

COUNTS = (3, 30)
LABELS = sum(PARCELS.values())

_WIDTHS = 12
"""A region has between two labels and one more than this."""


def region_sets(count: int) -> list[list[int]]:
    """That many regions: brain, parenchyma and white matter, then runs of neighbouring parcels."""
    fluid, grey = PARCELS["fluid"], PARCELS["grey"]
    tissues = [list(range(1 + start, LABELS + 1)) for start in (0, fluid, fluid + grey)]
    starts = range(1, count - len(tissues) + 1)
    return (tissues + [[*range(start, min(start + 2 + start % _WIDTHS, LABELS) + 1)] for start in starts])[:count]


def recipe(count: int) -> Recipe:
    """nnU-Net's plan for it, shrunk to a network of 0.3 million parameters and patches of 48 × 56 × 48; no fold."""
    return Recipe(
        dataset=f"Dataset{840 + count}_BrainRegions{count}",
        configuration=CONFIGURATION,
        folds=(),
        patch_size=(48, 56, 48),
        features=(8, 16, 32, 64),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        epochs=1,
        iterations=1,
    )


def write_datasets(raw: Path) -> None:
    """Write nnU-Net's raw folder of each number of regions."""
    head = load_head()
    cases = [warped(head, SPACING_MM, case) for case in range(CASES)]
    for count in COUNTS:
        folder = raw / recipe(count).dataset
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        for case, (image, parcels) in enumerate(cases):
            nib.save(image, folder / "imagesTr" / f"head_{case:03d}_0000.nii.gz")
            nib.save(parcels, folder / "labelsTr" / f"head_{case:03d}.nii.gz")
        named = {f"region_{number}": labels for number, labels in enumerate(region_sets(count), start=1)}
        description = {
            "channel_names": {"0": "T1"},
            "labels": {"background": 0} | named,
            "regions_class_order": list(range(1, count + 1)),
            "numTraining": CASES,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description, indent=2))
