"""Series that mean harm, each with the status and the code that it must get from a model that takes DICOM."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

import imagecodecs
import numpy as np
from pydicom.sequence import Sequence as Items

from .dicom_files import ACQUISITIONS, compressed, enhanced, file_of, files_of, series, tarred, zip_of, zipped

_VOXELS = np.arange(480, dtype=np.int16).reshape(6, 10, 8)
_AFFINE = ACQUISITIONS["axial"].affine()
_GAP = (422, "dicom_missing_slices")
_TOO_LARGE = (413, "too_large")
_BOMB_BYTES = 160 * 1024**2
_NESTED = 100_000


def hostile_series() -> Iterator[tuple[str, bytes, tuple[int, str]]]:
    """Name, body, and what it must get. Bombs stand beside a series with a gap, so that nothing is predicted."""
    images = series(_VOXELS, _AFFINE)
    gap = files_of([*images[:2], *images[3:]])
    bomb = {"a": bytes(_BOMB_BYTES)}
    yield "a bomb in a zip", zipped(gap | bomb, zipfile.ZIP_DEFLATED), _GAP
    yield "a bomb in a tar.gz", tarred(gap | bomb, packed=True), _GAP
    deflated = series(_VOXELS, _AFFINE)
    deflated[0].add_new(0x00091001, "OB", bomb["a"])
    yield "a bomb in a deflated data set", zip_of(deflated, "1.2.840.10008.1.2.1.99"), _TOO_LARGE
    yield "20,000 files", zipped(gap | {str(number): b"x" for number in range(20_000)}), _TOO_LARGE
    yield "sequences within sequences", _nested(gap), _TOO_LARGE
    frames = enhanced(_VOXELS, _AFFINE)
    frames.NumberOfFrames = 10**6
    yield "a million frames", file_of(frames), _TOO_LARGE
    items = enhanced(_VOXELS, _AFFINE)
    items.SharedFunctionalGroupsSequence = Items(list(items.SharedFunctionalGroupsSequence) * 10_000)
    yield "10,000 items that all frames share", file_of(items), (400, "malformed")
    yield "pixels without end", _huge(), (422, "dicom_unsupported_pixels")
    whole = zip_of(images)
    yield "a zip that is cut off", whole[: len(whole) // 2], (400, "malformed")
    cut = compressed(enhanced(_VOXELS, _AFFINE), [_jpeg_2000(each)[:-20] for each in _VOXELS], "1.2.840.10008.1.2.4.90")
    yield "codestreams that are cut off", cut, (422, "dicom_truncated_pixels")


def _nested(files: dict[str, bytes]) -> bytes:
    """Where the first file's pixels would begin; packed, all of them are a few kilobytes."""
    name = next(iter(files))
    pixels = files[name].index(b"\xe0\x7f\x10\x00")
    one = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    deep = files[name][:pixels] + one * _NESTED + files[name][pixels:]
    return zipped(files | {name: deep}, zipfile.ZIP_DEFLATED)


def _jpeg_2000(frame: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k"))


def _huge() -> bytes:
    """Codestreams that claim 2^31 pixels a side (ISO 15444-1, A.5.1: SIZ)."""
    made = []
    for frame in _VOXELS:
        stream = bytearray(_jpeg_2000(frame))
        at = stream.index(b"\xff\x51") + 6
        stream[at : at + 8] = b"\x7f\xff\xff\xff" * 2
        made.append(bytes(stream))
    return compressed(enhanced(_VOXELS, _AFFINE), made, "1.2.840.10008.1.2.4.90")
