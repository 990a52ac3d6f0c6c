"""Bytes to images and label maps to bytes: the registry of file formats.

A format is recognised from the bytes of the request, never from a name or a content type. Decoders read from memory
only: no byte of a request is written to a disk, and no name in it is ever opened.
"""

from __future__ import annotations

from ..errors import BadOption, UnknownFormat
from ..limits import Limits
from ..volume import Geometry, Placement
from .answer import AnswerForm, EncodedFile, answer_form, encode, smallest_answer
from .arrays import Placements, is_npy, is_npz, open_npy, open_npz
from .bmp import is_bmp, open_bmp
from .channels import check_channels
from .foreign import name_of
from .inflate import ByteSource, Payload
from .metaimage import MetaImageSource, is_metaimage
from .nifti import HEADER_BYTES, NiftiSource, header_class
from .nrrd import NrrdSource, is_nrrd
from .png import is_png, open_png
from .source import ImageSource
from .tiff import is_tiff, open_tiff

__all__ = [
    "AnswerForm", "EncodedFile", "ImageSource", "answer_form", "check_channels", "encode", "open_image",
    "open_labels", "smallest_answer",
]  # fmt: skip

_PICTURE_READERS = {
    "NaturalImage2DIO": Placement((1.0, 1.0), assumed=True),
    "Tiff3DIO": Placement((1.0, 1.0, 1.0), assumed=True),
}
"""nnU-Net's readers of files without a spacing, and the one that they make up."""


def open_image(body: Payload, limits: Limits, reader: str, placement: Placement | None = None) -> ImageSource:
    """Recognise an encoded image and read its header.

    Args:
        body: the encoded image.
        limits: voxels, channels and expanded bytes are checked against the header.
        reader: nnU-Net's reader class in the model's plans, whose conventions are followed.
        placement: where the request says that an array or a picture lies.

    Raises:
        UnknownFormat: no format that this server reads.
        Malformed, TooLarge, BadSpacing, WrongChannels: the header says so.
        BadOption: a place was given for a file that says itself where it lies.
    """
    source = ByteSource(body)
    head = source.peek(HEADER_BYTES)
    if (array := _open_array(source, head, limits, Placements(placement))) is not None:
        return array
    if (picture := _open_picture(source, head, limits, placement or _PICTURE_READERS.get(reader))) is not None:
        return picture
    image = _open_volume(source, head, limits, reader, " as the raw body or as multipart field image")
    if placement is not None:
        msg = "options spacing, origin and direction are for arrays and pictures; this file says itself where it lies"
        raise BadOption(msg)
    return image


def open_labels(body: Payload, limits: Limits, reader: str, image: Geometry) -> ImageSource:
    """Recognise a label map that belongs to an image, and read its header.

    Args:
        body: the encoded label map, in any format that images have, or an npz as this server answers it.
        limits: as for images.
        reader: as for images.
        image: the image's geometry: where labels lie that do not say it themselves.

    Raises:
        UnknownFormat: no format that this server reads.
        Malformed, TooLarge, BadSpacing, WrongChannels: the header says so.
    """
    plane = image.in_space()
    ndim = plane.ndim
    direction = tuple(float(number) for number in plane.direction[:ndim, :ndim].ravel())
    there = Placement(tuple(plane.spacing[:ndim]), tuple(plane.origin[:ndim]), direction, assumed=True)
    source = ByteSource(body)
    head = source.peek(HEADER_BYTES)
    return (
        _open_array(source, head, limits, Placements(default=there), names=("labels",))
        or _open_picture(source, head, limits, there)
        or _open_volume(source, head, limits, reader)
    )


def _open_array(
    source: ByteSource, head: bytes, limits: Limits, where: Placements, names: tuple[str, ...] = ("image", "data")
) -> ImageSource | None:
    if is_npy(head):
        return open_npy(source, limits, where)
    if not source.compressed and is_npz(head):
        return open_npz(source.body, limits, where, names)
    return None


def _open_picture(source: ByteSource, head: bytes, limits: Limits, placement: Placement | None) -> ImageSource | None:
    if source.compressed:
        return None
    if is_png(head):
        return open_png(source.body, limits, placement)
    if is_tiff(head):
        return open_tiff(source.body, limits, placement)
    if is_bmp(head):
        return open_bmp(source.body, limits, placement)
    return None


def _open_volume(source: ByteSource, head: bytes, limits: Limits, reader: str, how: str = "") -> ImageSource:
    """A file with a geometry of its own; ``how`` ends the advice where it is none that is known."""
    if (kind := header_class(head)) is not None:
        return NiftiSource(source, kind, limits, as_nibabel=reader.startswith("Nibabel"))
    if is_nrrd(head):
        return NrrdSource(source, limits)
    if is_metaimage(head):
        return MetaImageSource(source, limits)
    msg = (
        f"{name_of(head, packed=source.compressed)}; "
        f"send NIfTI (.nii, .nii.gz), NRRD, MHA, npy, npz, PNG, TIFF or BMP{how}"
    )
    raise UnknownFormat(msg)
