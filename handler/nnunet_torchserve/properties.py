"""The properties of a case, as nnU-Net pickles them beside its probabilities: what the option ``properties`` asks for.

nnU-Net's ensembling, and whatever else writes a segmentation, hands them to the plan's reader, which has put in where
the image lies, under a key of its own. They are JSON here, number for number the doubles that stock's reader gives for
the same file: ITK interprets an image's header itself, nibabel too.

Where stock has no reader for a file (an array, a PNG for a model of volumes), they are those of a file of the reader's
own format in the same place. SimpleITK sees a file of several channels in four dimensions, and stock cannot write a
segmentation then; these are the three in space.

Arrays of an answer lie on the image's own grid. Those of stock's ``…WithReorient`` readers lie on a turned one, and so
do their properties: ``turn`` says how one becomes the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nibabel.orientations import io_orientation

from .codecs import ImageSource
from .codecs.nifti_headers import geometry_of_itk, image_of_nibabel
from .member import REORIENTING_READERS, Member
from .orientation import Turn
from .volume import Geometry

_SHAPE, _BOX, _CROPPED = (
    "shape_before_cropping",
    "bbox_used_for_cropping",
    "shape_after_cropping_and_before_resampling",
)

_SPATIAL = 3


def properties_document(member: Member, image: ImageSource, turn: Turn, case: Mapping[str, Any]) -> bytes:
    """The file :data:`~.codecs.answer.PROPERTIES_FILE` of an answer.

    Args:
        member: the model.
        image: the first channel's.
        turn: how it became what the model saw.
        case: what the preprocessor said of that: :attr:`~.preprocess.PreprocessedCase.properties`.

    Returns:
        JSON: ``reader``; ``properties``, with stock's keys in stock's order; ``turn``, ``null`` or ``axes`` and
        ``flip``: an array ``a`` (Z, Y, X) of the answer is stock's after ``numpy.flip(a.transpose(axes), flip)``.
    """
    reader = member.reader
    reorients = reader in REORIENTING_READERS
    geometry = turn.before
    if reader.startswith("SimpleITK"):
        where = _of_simpleitk(image, turn, reorients=reorients)
    elif reader.startswith("Nibabel"):
        where = _of_nibabel(image, geometry, reorients=reorients)
    else:
        where = {"spacing": _spacing(geometry)}
    crop = {key: case[key] for key in (_SHAPE, _BOX, _CROPPED)}
    if turn.back is not None and not reorients:
        crop = _turned_back(crop, turn.back, member.plans.transpose_forward)
    document = {
        "reader": reader,
        "properties": where | crop,
        "turn": None if turn.there is None or not reorients else _on_arrays(turn.there),
    }
    return json.dumps(document, default=_plain, indent=1).encode("ascii")


def _of_simpleitk(image: ImageSource, turn: Turn, *, reorients: bool) -> dict[str, Any]:
    """What ``SimpleITKIO`` says of an image."""
    own = _itk_image(image, turn.before)
    turned = own if turn.there is None else _turned_image(own, turn.there, turn.before.shape[::-1])
    read = turned if reorients else own
    spacing, direction = read.GetSpacing(), own.GetDirection()
    stuff = {"spacing": spacing, "origin": read.GetOrigin(), "direction": read.GetDirection()}
    if reorients and len(spacing) == _SPATIAL:
        stuff["original_orientation"] = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(direction)
    # a plane has nnU-Net's placeholder first
    for_nnunet = [abs(size) for size in reversed(spacing)]
    return {
        "sitk_stuff": stuff,
        "spacing": for_nnunet if len(spacing) == _SPATIAL else [turn.before.spacing_zyx[0], *for_nnunet],
    }


def _itk_image(image: ImageSource, geometry: Geometry) -> Any:
    """A SimpleITK image of one voxel where the image lies."""
    ndim = geometry.ndim
    placed = sitk.Image([1] * ndim, sitk.sitkUInt8)
    if image.nifti_header is not None:
        spacing, origin, direction = geometry_of_itk(image.nifti_header, geometry.shape[::-1][:ndim])
    else:
        spacing, origin = geometry.spacing[:ndim], geometry.origin[:ndim]
        direction = tuple(geometry.direction[:ndim, :ndim].ravel().tolist())
    placed.SetSpacing(spacing)
    placed.SetOrigin(origin)
    placed.SetDirection(direction)
    return placed


def _turned_image(own: Any, there: npt.NDArray[np.float64], sizes: Sequence[int]) -> Any:
    """ITK's own arithmetic of ``DICOMOrient``, without voxels: axes permuted, then flipped about the image's corners.

    Args:
        own: of one voxel.
        there: nibabel's transform, x, y, z.
        sizes: the image's, x, y, z.
    """
    source = [int(axis) for axis in np.argsort(there[:, 0])]
    permuted = sitk.PermuteAxes(own, source)
    flipped = [bool(there[axis, 1] < 0) for axis in source]
    corner = [sizes[axis] - 1 if flip else 0 for axis, flip in zip(source, flipped, strict=True)]
    axes = np.reshape(permuted.GetDirection(), (3, 3)) * [-1.0 if flip else 1.0 for flip in flipped]
    origin = permuted.TransformIndexToPhysicalPoint(corner)
    permuted.SetOrigin(origin)
    permuted.SetDirection(axes.ravel().tolist())
    return permuted


def _of_nibabel(image: ImageSource, geometry: Geometry, *, reorients: bool) -> dict[str, Any]:
    """What ``NibabelIO`` says of an image."""
    read = image_of_nibabel(image.nifti_header, geometry)
    stuff = {"original_affine": read.affine}
    if reorients:
        read = read.as_reoriented(io_orientation(read.affine))
        stuff["reoriented_affine"] = read.affine
    return {"nibabel_stuff": stuff, "spacing": [float(size) for size in read.header.get_zooms()[::-1]]}


def _spacing(geometry: Geometry) -> list[float]:
    """Of a reader of pictures, which makes whole numbers up where nobody says it."""
    return [int(size) if geometry.assumed else size for size in geometry.spacing_zyx]


def _turned_back(crop: Mapping[str, Any], back: npt.NDArray[np.float64], order: Sequence[int]) -> dict[str, Any]:
    """The crop of a turned image as that of the image itself.

    Args:
        crop: shapes and box, in the plan's axis order.
        back: nibabel's transform from the turned image, x, y, z.
        order: the plan's ``transpose_forward``.
    """
    moved = _on_arrays(back)
    axes, flip = moved["axes"], moved["flip"]
    place = list(np.argsort(order))  # where each of z, y, x lies in the plan's order
    shape, box, cropped = ([crop[key][at] for at in place] for key in (_SHAPE, _BOX, _CROPPED))
    boxes = []
    for axis, source in enumerate(axes):
        low, high = box[source]
        boxes.append([shape[source] - high, shape[source] - low] if axis in flip else [low, high])
    turned = {_SHAPE: [shape[axis] for axis in axes], _BOX: boxes, _CROPPED: [cropped[axis] for axis in axes]}
    return {key: [values[axis] for axis in order] for key, values in turned.items()}


def _on_arrays(transform: npt.NDArray[np.float64]) -> dict[str, list[int]]:
    """A transform of nibabel's, of axes x, y, z, for arrays (Z, Y, X): ``transpose(axes)``, then ``flip`` of some."""
    source = np.argsort(transform[:, 0])[::-1]
    flip = [axis for axis, before in enumerate(source) if transform[before, 1] < 0]
    return {"axes": [2 - int(before) for before in source], "flip": flip}


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return value.tolist()
