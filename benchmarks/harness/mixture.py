"""Images of mixed sizes, as a department sends them: small ones, heads at 2 mm, large parts of heads at 1 mm."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.harness.material import Material, crop_at_random, small_shape

_SEED = 20261123


class Size(StrEnum):
    """What an image is cut from, and how much of it."""

    SMALL = "2 mm, 1 to 1.5 patches along each axis"
    WHOLE = "2 mm, 90 to 99 % of each axis"
    FINE = "1 mm, 55 to 75 % of each axis"


_S, _W, _F = Size.SMALL, Size.WHOLE, Size.FINE
MIX = (_S, _W, _S, _F, _S, _W, _S, _W, _S, _S, _W, _S, _F, _S, _W, _S)
"""The sizes of consecutive images, again and again."""


def sizes_of(count: int) -> list[Size]:
    """The sizes of the first ``count`` images."""
    return [MIX[number % len(MIX)] for number in range(count)]


def cut(material: Material, files: Sequence[Path]) -> None:
    """Write so many images (.nii.gz), no two alike, the same ones each time."""
    generator = np.random.default_rng(_SEED)
    fine, coarse = nib.load(material.fine), nib.load(material.coarse)
    for size, file in zip(sizes_of(len(files)), files, strict=True):
        if size is Size.SMALL:
            image, shape = coarse, small_shape(material, generator.uniform(1, 1.5))
        else:
            image, low, high = (coarse, 0.9, 0.99) if size is Size.WHOLE else (fine, 0.55, 0.75)
            shape = tuple(int(n * generator.uniform(low, high)) for n in image.shape)
        nib.save(crop_at_random(image, shape, generator), file)
    assert len({sha256(file.read_bytes()).digest() for file in files}) == len(files)
