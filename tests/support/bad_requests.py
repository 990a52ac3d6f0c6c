"""Requests that must be refused, each with the status and the code that it must get.

The same table is sent to a pipeline in this process and to a live server.
"""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np

from . import dicom_files, volumes

IMAGE, _ = volumes.blobs((40, 38, 36), seed=3)
INT16 = IMAGE.astype(np.int16)
GOOD = volumes.nifti_gz(INT16, np.diag([1.5, 1.5, 1.5, 1]))
SERIES = dicom_files.series(INT16[:8, :8, :6].T.copy(), dicom_files.ACQUISITIONS["axial"].affine())
FAST = '{"folds": [0], "use_mirroring": false}'


@dataclass(frozen=True)
class BadRequest:
    """One request; ``body`` and ``files`` as in ``LiveServer.predict``."""

    status: int
    code: str
    body: bytes | None = None
    files: dict[str, bytes] | None = None
    options: str | None = FAST
    model: str = "five_folds"
    says: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def header(content: bytes = b"", **fields: object) -> bytes:
    """``GOOD``, uncompressed, with NIfTI-1 header fields set as they are."""
    plain = content or gzip.decompress(GOOD)
    changed = nib.Nifti1Header.from_fileobj(io.BytesIO(plain), check=False)
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, entry in value.items():
                changed[name][index] = entry
        else:
            changed[name] = value
    return bytes(changed.binaryblock) + plain[348:]


def bomb() -> bytes:
    """A small body that inflates to 256 MiB, with a good image in front."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    megabyte = bytes(2**20)
    parts = [compressor.compress(header())] + [compressor.compress(megabyte) for _ in range(256)]
    return b"".join([*parts, compressor.flush()])


def long_row() -> bytes:
    """A NIfTI-2 file of few bytes whose one row scipy would pad to 25 x 25 rows."""
    row = np.ones((40_000, 1, 1), np.uint8)
    image = nib.Nifti2Image(row, np.diag([1e-3, 2.0, 2.0, 1.0]))
    return gzip.compress(image.to_bytes())


def with_voxel(value: float) -> bytes:
    """``IMAGE`` with one voxel replaced."""
    changed = IMAGE.copy()
    changed[20, 20, 20] = value
    return volumes.nifti_gz(changed)


THIN = volumes.nifti_gz(INT16[:, :, :1], np.diag([1.5, 1.5, 0.3, 1]))
THIN_WHEN_CROPPED = np.zeros_like(INT16[:, :, :3])
THIN_WHEN_CROPPED[10:30, 10:30, 1] = 50
OTHER_SHAPE = volumes.nifti_gz(INT16[:-1], np.diag([1.5, 1.5, 1.5, 1]))
OTHER_SPACING = volumes.nifti_gz(INT16, np.diag([1.5, 1.5, 1.6, 1]))

BAD_REQUESTS = {
    "not an image": BadRequest(415, "unknown_format", ("# A\n" + "xä" * 600).encode(), says="text, and no image; send"),
    "a text in gzip": BadRequest(415, "unknown_format", gzip.compress(b"a text\r\n"), says="text packed by gzip"),
    "a JPEG": BadRequest(415, "unknown_format", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(600)),
    "a PNG that is none": BadRequest(400, "malformed", b"\x89PNG\r\n\x1a\n" + bytes(600)),
    "a series for a model without orientation": BadRequest(
        422, "orientation_unknown", dicom_files.zip_of(SERIES), says="--input-orientation"
    ),
    "a series as fields": BadRequest(
        422, "orientation_unknown", files={f"dicom_{z}": dicom_files.file_of(ds) for z, ds in enumerate(SERIES)}
    ),
    "a series with a gap": BadRequest(
        422,
        "dicom_missing_slices",
        dicom_files.tarred(dicom_files.files_of([*SERIES[:3], *SERIES[4:]]), packed=True),
        says="mm",
    ),
    "an image of a series": BadRequest(422, "dicom_single_image", dicom_files.file_of(SERIES[0])),
    "a zip of texts": BadRequest(415, "unknown_format", dicom_files.zipped({"a.txt": b"no image"}), says="DICOM"),
    "zeros": BadRequest(415, "unknown_format", bytes(5000)),
    "an Analyze pair's header": BadRequest(415, "unknown_format", header(magic=b"ni1"), says=".hdr"),
    "complex voxels": BadRequest(415, "unknown_format", header(datatype=32, bitpix=64)),
    "truncated gzip": BadRequest(400, "malformed", GOOD[:-100], says="cut off"),
    "gzip with a wrong checksum": BadRequest(400, "malformed", GOOD[:-8] + bytes(8)),
    "truncated voxels": BadRequest(400, "malformed", gzip.decompress(GOOD)[:-1000], says="cut off"),
    "gzip bomb": BadRequest(413, "too_large", bomb()),
    "a header that claims 10^12 voxels": BadRequest(
        413, "too_large", header(dim={1: 10_000, 2: 10_000, 3: 10_000}), says="1000000000000 voxels"
    ),
    "an axis that no scanner makes": BadRequest(413, "too_large", long_row(), says="40000 voxels"),
    "spacing that asks for a huge grid": BadRequest(
        413, "too_large", header(pixdim={1: 5e3, 2: 5e3, 3: 5e3}), says="spacing"
    ),
    "two channels for a model of one": BadRequest(
        422, "wrong_channels", files={"image_0000": GOOD, "image_0001": GOOD}
    ),
    "one channel for a model of two": BadRequest(422, "wrong_channels", GOOD, model="regions", says="takes 2"),
    "4-D with three channels": BadRequest(422, "wrong_channels", volumes.nifti_gz(np.stack([INT16] * 3, -1))),
    "channels of different shape": BadRequest(
        422, "channels_disagree", files={"image_0000": GOOD, "image_0001": OTHER_SHAPE}, model="regions"
    ),
    "channels of different spacing": BadRequest(
        422, "channels_disagree", files={"image_0000": GOOD, "image_0001": OTHER_SPACING}, model="regions"
    ),
    "a NaN voxel": BadRequest(422, "non_finite", with_voxel(np.nan)),
    "an infinite voxel": BadRequest(422, "non_finite", with_voxel(-np.inf)),
    "too thin": BadRequest(422, "too_thin", THIN),
    "too thin once it is cropped": BadRequest(
        422, "too_thin", volumes.nifti_gz(THIN_WHEN_CROPPED, np.diag([1.5, 1.5, 0.6, 1]))
    ),
    "zero spacing": BadRequest(422, "bad_spacing", header(pixdim={2: 0.0}), says="positive"),
    "negative spacing": BadRequest(422, "bad_spacing", header(pixdim={3: -1.5})),
    "NaN spacing": BadRequest(422, "bad_spacing", header(pixdim={1: np.nan})),
    "unknown option": BadRequest(400, "unknown_option", GOOD, options='{"fold": 0}', says="fold"),
    "option out of range": BadRequest(
        400, "bad_option", GOOD, options='{"tile_step_size": 1.5}', says="tile_step_size"
    ),
    "option of the wrong type": BadRequest(400, "bad_option", GOOD, options='{"use_mirroring": "no"}'),
    "options that are no JSON": BadRequest(400, "malformed", GOOD, options="{", says="JSON"),
    "options that are not ASCII": BadRequest(
        400, "malformed", files={"image": GOOD, "options": b"\xff\x00"}, options=None
    ),
    "options twice": BadRequest(400, "malformed", files={"image": GOOD, "options": b"{}"}, says="twice"),
    "unknown fold": BadRequest(422, "unknown_fold", GOOD, options='{"folds": [7]}', says="0, 1, 2, 3, 4"),
    "fold all, which is not there": BadRequest(422, "unknown_fold", GOOD, options='{"folds": "all"}'),
    "unknown field": BadRequest(400, "malformed", files={"image": GOOD, "mask": GOOD}, says="mask"),
    "image and image_0000": BadRequest(400, "malformed", files={"image": GOOD, "image_0000": GOOD}),
    "a gap in the channels": BadRequest(400, "malformed", files={"image_0000": GOOD, "image_0002": GOOD}),
    "no image": BadRequest(400, "malformed", files={"options": b"{}"}, options=None),
    "a JSON body": BadRequest(
        415, "unknown_format", b'{"image": 1}', headers={"content-type": "application/json"}, says="octet-stream"
    ),
    "body above our limit": BadRequest(413, "too_large", bytes(2 * 1024**2 + 1), says="2097152"),
    "an answer above the response limit": BadRequest(
        413,
        "response_too_large",
        volumes.nifti_gz(np.zeros((90, 90, 90), np.uint8)),
        options='{"save_probabilities": true}',
        says="probability_channels",
    ),
    "no time": BadRequest(504, "deadline", GOOD, options='{"timeout_s": 0.001}'),
}
"""A body limit of 2 MiB in and out is assumed."""

BODY_LIMIT = 2 * 1024**2
