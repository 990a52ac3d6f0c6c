"""Bytes to images and label maps to bytes: the registry of file formats.

A format is recognised from the bytes of the request, never from a name or a content type. Decoders read from memory
only: no byte of a request is written to a disk, and no name in it is ever opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..errors import BadOption, UnknownFormat
from ..limits import Limits
from ..volume import Geometry, Placement
from .answer import About, AnswerForm, EncodedFile, answer_form, encode, making_bytes, smallest_answer
from .arrays import Placements, holds_arrays, is_npy, open_npy, open_npz
from .bmp import is_bmp, open_bmp
from .channels import check_channels
from .dicom import DicomSource, check_one_body, is_dicom, is_tar, open_series
from .dicom.container import DIRECTORY_BYTES
from .foreign import name_of
from .inflate import ByteSource, Payload
from .metaimage import MetaImageSource, is_metaimage
from .nifti import HEADER_BYTES, NiftiSource, header_class
from .nrrd import NrrdSource, is_nrrd
from .png import is_png, open_png
from .source import ImageSource
from .tiff import is_tiff, open_tiff
from .zips import is_zip, open_zip

__all__ = [
    "About", "AnswerForm", "DicomSource", "EncodedFile", "ImageSource", "answer_form", "check_channels",
    "check_one_body", "digest_of", "encode", "making_bytes", "open_image", "open_labels", "smallest_answer",
]  # fmt: skip

_PICTURE_READERS = {
    "NaturalImage2DIO": Placement((1.0, 1.0), assumed=True),
    "Tiff3DIO": Placement((1.0, 1.0, 1.0), assumed=True),
}
"""nnU-Net's readers of files without a spacing, and the one that they make up."""

_FORMATS = "NIfTI (.nii, .nii.gz), NRRD, MHA, npy, npz, PNG, TIFF"
_LABELS = f"{_FORMATS} or BMP"
_IMAGES = f"{_FORMATS}, BMP or a DICOM series (zip, tar), as the raw body or as field image"
"""What may be sent, for people."""


def open_image(
    body: Payload | Sequence[Payload],
    limits: Limits,
    reader: str,
    placement: Placement | None = None,
    series_uid: str | None = None,
) -> ImageSource:
    """Recognise an encoded image and read its header.

    Args:
        body: the encoded image; a DICOM series may come in several pieces.
        limits: voxels, channels and expanded bytes are checked against the header.
        reader: nnU-Net's reader class in the model's plans, whose conventions are followed.
        placement: where the request says that an array or a picture lies.
        series_uid: which of several DICOM series is meant.

    Raises:
        UnknownFormat: no format that this server reads.
        Malformed, TooLarge, BadSpacing, WrongChannels, DicomRefused: the header says so.
        BadOption: a place was given for a file that says itself where it lies, or a series for one that is none.
    """
    pieces = [body] if isinstance(body, bytes | bytearray | memoryview) else list(body)
    if len(pieces) > 1 or _is_series(pieces[0], limits):
        _refuse_placement(placement)
        return open_series(pieces, limits, series_uid)
    if series_uid is not None:
        msg = "option series_uid chooses a DICOM series, and this image is none; leave it out"
        raise BadOption(msg)
    return _open_file(ByteSource(pieces[0]), limits, reader, placement)


def digest_of(image: ImageSource, body: Sequence[Payload]) -> str:
    """sha256 of an image: of its bytes as sent; of a DICOM series as :class:`~.dicom.origin.Origin` has it."""
    if isinstance(image, DicomSource):
        return image.origin.digest
    return hashlib.sha256(body[0]).hexdigest()


def _open_file(source: ByteSource, limits: Limits, reader: str, placement: Placement | None) -> ImageSource:
    """One file, of any format but DICOM."""
    head = source.peek(HEADER_BYTES)
    if (array := _open_array(source, head, limits, Placements(placement))) is not None:
        return array
    if (picture := _open_picture(source, head, limits, placement or _PICTURE_READERS.get(reader))) is not None:
        return picture
    image = _open_volume(source, head, limits, reader, _IMAGES)
    _refuse_placement(placement)
    return image


def _is_series(body: Payload, limits: Limits) -> bool:
    """Whether it holds DICOM, or is an archive that may: a zip without arrays, or a tar."""
    source = ByteSource(body)
    head = source.peek(HEADER_BYTES)
    if source.compressed or not is_zip(head):
        return is_tar(head) or (is_dicom(head) and not source.compressed)
    return not holds_arrays(open_zip(source.body, limits.dicom_files, limits.dicom_files * DIRECTORY_BYTES))


def _refuse_placement(placement: Placement | None) -> None:
    if placement is not None:
        msg = "options spacing, origin and direction are for arrays and pictures; this file says itself where it lies"
        raise BadOption(msg)


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
        or _open_volume(source, head, limits, reader, _LABELS)
    )


def _open_array(
    source: ByteSource, head: bytes, limits: Limits, where: Placements, names: tuple[str, ...] = ("image", "data")
) -> ImageSource | None:
    if is_npy(head):
        return open_npy(source, limits, where)
    if not source.compressed and is_zip(head):
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


def _open_volume(source: ByteSource, head: bytes, limits: Limits, reader: str, wanted: str) -> ImageSource:
    """A file with a geometry of its own; ``wanted`` is the advice where it is none that is known."""
    if (kind := header_class(head)) is not None:
        return NiftiSource(source, kind, limits, as_nibabel=reader.startswith("Nibabel"))
    if is_nrrd(head):
        return NrrdSource(source, limits)
    if is_metaimage(head):
        return MetaImageSource(source, limits)
    msg = f"{name_of(head, packed=source.compressed)}; send {wanted}"
    raise UnknownFormat(msg)
