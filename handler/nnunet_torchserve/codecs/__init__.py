"""Bytes to images and label maps to bytes: the registry of file formats.

A format is recognised from the bytes of the request, never from a name or a content type.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from isal import igzip

from ..errors import UnknownFormat
from ..limits import Limits
from ..options import OutputFormat
from ..volume import Geometry, LabelArray, LabelMap
from .inflate import ByteSource
from .nifti import HEADER_BYTES, NiftiSource, header_class
from .source import ImageSource

__all__ = ["EncodedFile", "ImageSource", "encode", "open_image", "smallest_answer"]

_GZIP_LEVEL = 2
"""igzip's levels are 0 to 3; above 2 label maps shrink little and cost twice."""

_CONTENT_TYPE = {
    OutputFormat.NIFTI_GZ: "application/gzip",
    OutputFormat.NIFTI: "application/octet-stream",
    OutputFormat.NPZ: "application/octet-stream",
}


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An answer's body and its content type."""

    body: bytes
    content_type: str


def open_image(body: bytes | bytearray | memoryview, limits: Limits, reader: str) -> ImageSource:
    """Recognise an encoded image and read its header.

    Args:
        body: the encoded image.
        limits: voxels and expanded bytes are checked against the header.
        reader: nnU-Net's reader class in the model's plans, whose conventions are followed.

    Raises:
        UnknownFormat: no format that this server reads.
        Malformed, TooLarge, BadSpacing, WrongChannels: the header says so.
    """
    source = ByteSource(body)
    head = source.read(HEADER_BYTES)
    if (kind := header_class(head)) is not None:
        return NiftiSource(head, kind, source, limits, itk=reader.startswith("SimpleITK"))
    found = "an empty body" if not head else "bytes that are no NIfTI image"
    msg = f"{found}; send a NIfTI file (.nii or .nii.gz) as the raw body or as multipart field image"
    raise UnknownFormat(msg)


def smallest_answer(geometry: Geometry, output: OutputFormat, probability_bytes: int) -> int:
    """Bytes that an answer has at least, known from the header alone.

    Probabilities travel uncompressed; a compressed label map may be close to nothing.

    Args:
        geometry: the image's.
        output: the file format.
        probability_bytes: what the probabilities of one voxel take.
    """
    plain = output is OutputFormat.NIFTI or (output is OutputFormat.NPZ and probability_bytes > 0)
    labels = geometry.voxels if plain else 0
    return labels + probability_bytes * geometry.voxels


def encode(answer: LabelMap, output: OutputFormat, image: ImageSource) -> EncodedFile:
    """Write the answer.

    With probabilities a NIfTI answer becomes a zip of ``labels.<format>`` and ``probabilities.npz``; an npz answer
    holds both.

    Args:
        answer: labels, and probabilities where they were asked for.
        output: the format of the label map.
        image: the input, whose geometry fields a NIfTI answer repeats.
    """
    if output is OutputFormat.NPZ:
        return EncodedFile(_npz(answer, labels=answer.array), _CONTENT_TYPE[output])
    body = image.encode_nifti(answer.array)
    if output is OutputFormat.NIFTI_GZ:
        body = igzip.compress(body, _GZIP_LEVEL, mtime=0)
    if answer.probabilities is None:
        return EncodedFile(body, _CONTENT_TYPE[output])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as parts:
        parts.writestr(_zip_entry(f"labels.{output}"), body)
        parts.writestr(_zip_entry("probabilities.npz"), _npz(answer))
    return EncodedFile(archive.getvalue(), "application/zip")


def _zip_entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _npz(answer: LabelMap, labels: LabelArray | None = None) -> bytes:
    """Labels, probabilities with their channels, and ITK's geometry; probabilities are not worth compressing."""
    arrays = {
        "spacing": np.array(answer.geometry.spacing),
        "origin": np.array(answer.geometry.origin),
        "direction": answer.geometry.direction,
    }
    if labels is not None:
        arrays["labels"] = labels
    if answer.probabilities is not None:
        arrays["probabilities"] = answer.probabilities
        arrays["channels"] = np.array(answer.channels)
    file = io.BytesIO()
    save = np.savez_compressed if answer.probabilities is None else np.savez
    save(file, allow_pickle=False, **arrays)
    return file.getvalue()
