"""NIfTI headers that are written anew and say nothing but where an image lies: no description, no names.

A NIfTI answer to a NIfTI image repeats the input's affine fields, bit for bit. ITK and nibabel are shown such a header
where what they themselves read of it is needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from ..volume import RAS_TO_LPS, Geometry
from .nifti_affine import is_turn

_GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def geometry_of_itk(
    template: Any, sizes: Sequence[int]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """What ITK makes of a checked header: spacing, origin and direction, x, y(, z), to the last bit.

    :class:`~.nifti.NiftiSource` computes the same in double precision; ITK's library does some of it in single.
    ITK sees a header that is written anew, in memory; it takes nothing for NIfTI that has not its ending.

    Args:
        template: the header of an image.
        sizes: voxels along x, y(, z).
    """
    header = _header_like(template, len(sizes), Nifti1Header)  # ITK reads no NIfTI-2
    header.set_data_dtype(np.uint8)
    header.set_data_shape(sizes)
    header["vox_offset"] = header.sizeof_hdr + 4
    with (
        open(os.memfd_create("header"), "wb", buffering=0) as file,  # noqa: PTH123 (a descriptor, not a path)
        tempfile.TemporaryDirectory() as folder,
    ):
        file.write(header.binaryblock)
        named = Path(folder) / "header.nii"
        named.symlink_to(f"/proc/self/fd/{file.fileno()}")
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NiftiImageIO")
        reader.SetFileName(str(named))
        reader.ReadImageInformation()
        return reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()


def image_of_nibabel(template: Any | None, geometry: Geometry) -> Any:
    """An image without voxels, in three dimensions, whose affine and zooms are those that nibabel reads.

    Args:
        template: the header of a NIfTI image, or ``None`` for one that was no NIfTI, and is written as one.
        geometry: where it lies.
    """
    no_voxels = np.broadcast_to(np.uint8(0), geometry.shape[::-1])
    if template is None:
        return nib.Nifti1Image(no_voxels, RAS_TO_LPS @ geometry.affine)
    header = _header_like(template, 3)
    header.set_data_dtype(np.uint8)
    header.set_data_shape(no_voxels.shape)
    if header["pixdim"][0] not in (-1, 1):  # as nibabel mends it
        header["pixdim"][0] = 1
    image = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    return image(no_voxels, header.get_best_affine(), header)


def _header_like(template: Any, ndim: int, kind: Any = None) -> Any:
    """A new header, of the same kind unless another is named, that says nothing but where the image lies."""
    header = (kind or type(template))()
    for field in _GEOMETRY_FIELDS:
        header[field] = template[field]
    header["pixdim"][: ndim + 1] = template["pixdim"][: ndim + 1]
    return header


def encode_nifti(array: npt.NDArray[Any], geometry: Geometry, template: Any | None) -> bytes:
    """An uncompressed NIfTI file.

    Args:
        array: (Z, Y, X), or (C, Z, Y, X) with the channels to be the fourth axis; integers or float32.
        geometry: where it lies.
        template: the NIfTI header of the input, if it was one, whose affine fields are repeated; else a NIfTI-1
            header gets the geometry as sform, and as qform too where that can say it.
    """
    solid = geometry.ndim == 3 or array.ndim == 4
    voxels = array.T if solid else array[0].T
    header = Nifti1Header() if template is None else _header_like(template, geometry.ndim)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(voxels.shape)
    if template is None:
        affine = RAS_TO_LPS @ geometry.affine
        header.set_xyzt_units("mm")
        header.set_qform(affine, 1 if is_turn(affine) else 0)
        header.set_sform(affine, 1)
        header["pixdim"][1:4] = geometry.spacing
    image = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    return bytes(image(voxels, None, header).to_bytes())
