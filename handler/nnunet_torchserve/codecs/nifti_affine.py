"""The affine of a NIfTI header: what ITK makes of its sform and qform, and what nibabel does.

The standard lets a header have both forms and does not say which one a program shall follow. The two libraries differ
in that, and in how they compute a qform.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError

from ..errors import Malformed
from ..volume import RAS_TO_LPS

_ORTHONORMAL = 1e-4
"""How far from a turn ITK lets an sform be (``itkNiftiImageIO.cxx``)."""

_HALF_TURN = 1e-7
"""Below it NIfTI's library takes a quaternion's first number for 0 (``nifti_quatern_to_mat44``)."""

_LONGEST_QUATERNION = 1 + 1e-4
_NO_ROTATION = "the NIfTI header's qform is no rotation"


def affine_of_itk(header: Any) -> npt.NDArray[np.float64]:
    """Voxel (x, y, z) to RAS (4, 4), in the header's length unit, from the form that ITK takes.

    The sform if its code is 1 or there is no qform, unless it is no turn and there is a qform; else the qform;
    without either, no turn and no origin, in LPS.

    Raises:
        Malformed: the qform is no rotation.
    """
    qform, sform = int(header["qform_code"]), int(header["sform_code"])
    if sform == 1 or (sform > 0 and qform <= 0):
        affine = np.asarray(header.get_sform(), np.float64)
        if qform <= 0 or is_turn(affine):
            return affine
    if qform > 0:
        return _qform_of_itk(header)
    return RAS_TO_LPS.copy()


def affine_of_nibabel(header: Any) -> npt.NDArray[np.float64]:
    """Voxel (x, y, z) to RAS (4, 4), in the header's length unit, as nibabel has it.

    The sform, else the qform, else nibabel's own (x to the left, centred).

    Raises:
        Malformed: the qform is no rotation.
    """
    if int(header["sform_code"]) > 0:
        return np.asarray(header.get_sform(), np.float64)
    if int(header["qform_code"]) > 0:
        return _qform_of_nibabel(header)
    return np.asarray(header.get_base_affine(), np.float64)


def _qform_of_itk(header: Any) -> npt.NDArray[np.float64]:
    """As NIfTI's own library computes it (``nifti_quatern_to_mat44``).

    nibabel differs where the turn is half of a full one, nearly: it takes what the rounding of b, c and d left of a
    as it is, which is up to half a millimetre at the edge of a large image.
    """
    b, c, d = (float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d"))
    length = b * b + c * c + d * d
    if not length <= _LONGEST_QUATERNION:
        raise Malformed(_NO_ROTATION)
    a = math.sqrt(1 - length) if 1 - length >= _HALF_TURN else 0.0
    affine = np.eye(4)
    affine[:3, :3] = quat2mat((a, b, c, d)) * header["pixdim"][1:4].astype(np.float64)
    if header["pixdim"][0] < 0:
        affine[:3, 2] *= -1
    affine[:3, 3] = [float(header[name]) for name in ("qoffset_x", "qoffset_y", "qoffset_z")]
    return affine


def _qform_of_nibabel(header: Any) -> npt.NDArray[np.float64]:
    header = header.copy()
    if header["pixdim"][0] not in (-1, 1):  # as nibabel mends it
        header["pixdim"][0] = 1
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError):
        raise Malformed(_NO_ROTATION) from None


def is_turn(affine: npt.NDArray[np.float64]) -> bool:
    """Whether the columns are orthogonal once their lengths are set to 1; a column of 0 is left to be refused."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all() or not np.isfinite(lengths).all():
        return True
    columns = affine[:3, :3] / lengths
    off: npt.NDArray[np.float64] = np.abs(columns @ columns.T - np.eye(3))  # in ITK's order
    return bool(off.max() <= _ORTHONORMAL)
