"""The image of a trial: small, made up, and of the kind that the model knows."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from .intensities import made_up_image
from .member import Member

_VOXELS = 12
_SEED = 0


def trial_image(member: Member) -> bytes:
    """A NIfTI file with the model's channels on its fourth axis, at the spacing of the network.

    Its values are those that the plans say the model sees; see :func:`~.intensities.value_range`.
    """
    order = member.plans.transpose_backward
    target = [1.0, *member.configuration.spacing][-3:]
    spacing_zyx = [float(target[axis]) for axis in order]
    shape = [1, *(_VOXELS,) * len(member.patch_size)][-3:]  # in the plan's axis order: one slice of a 2-D network
    channels = made_up_image(member, [shape[axis] for axis in order], _SEED)
    image: bytes = nib.Nifti1Image(channels.T, np.diag([*spacing_zyx[::-1], 1.0])).to_bytes()
    return image
