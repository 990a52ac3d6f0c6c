"""A trial request: its image is small, made up, and of the kind that the model knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import nibabel as nib
import numpy as np

from .bundle import ModelBundle
from .intensities import made_up_image
from .member import Member
from .previous_stage import labels_of
from .recipe import Cascade
from .request import PREVIOUS_STAGE, RAW_BODY

_Number = TypeVar("_Number", int, float)

_AXES = 3
_VOXELS = 12
_SEED = 0


def trial_parts(bundle: ModelBundle) -> dict[str, bytes]:
    """The fields of the request: an image, and what a cascade's last stage needs that has no first one."""
    recipe, image = bundle.description.recipe, trial_image(bundle)
    if not isinstance(recipe, Cascade) or recipe.first is not None:
        return {RAW_BODY: image}
    read = nib.Nifti1Image.from_bytes(image)
    known = sorted(labels_of(bundle.lead))[: 1 + len(bundle.lead.labels.foreground_labels)]
    labels = np.random.default_rng(_SEED).choice(known, read.shape[:3]).astype(np.uint16)
    return {"image": image, PREVIOUS_STAGE: nib.Nifti1Image(labels, read.affine).to_bytes()}


def trial_options(bundle: ModelBundle) -> dict[str, object]:
    """One fold of each member is enough, without mirroring."""
    common = set.intersection(*(set(member.folds) for member in bundle.members.values()))
    folds = {"folds": [next(fold for fold in bundle.lead.folds if fold in common)]} if common else {}
    return folds | {"use_mirroring": False}


def trial_image(bundle: ModelBundle) -> bytes:
    """A NIfTI file with the model's channels on its fourth axis, at the spacing of the leading member's network.

    It is large enough that something of it is left on every member's grid. Its values are those that the plans say the
    model sees; see :func:`~.intensities.value_range`.
    """
    lead = bundle.lead
    spacing = _in_image_order(lead, [1.0, *lead.configuration.spacing][-_AXES:])
    shape = _in_image_order(lead, [1, *(_VOXELS,) * len(lead.patch_size)][-_AXES:])  # one slice of a 2-D network
    for member in bundle.members.values():
        # a 2-D network sees each slice as it is
        targets = _in_image_order(member, [0.0, *member.configuration.spacing][-_AXES:])
        shape = [
            max(voxels, math.ceil(target / own)) for voxels, target, own in zip(shape, targets, spacing, strict=True)
        ]
    channels = made_up_image(lead, shape, _SEED)
    image: bytes = nib.Nifti1Image(channels.T, np.diag([*spacing[::-1], 1.0])).to_bytes()
    return image


def _in_image_order(member: Member, values: Sequence[_Number]) -> list[_Number]:
    """Values of the plan's axes, as the image has these."""
    return [values[axis] for axis in member.plans.transpose_backward]
