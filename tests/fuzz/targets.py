"""Bytes -> what a request would do with them, and what must be true of the outcome.

A target raises :class:`Find` where an outcome is wrong, lets every exception out that is not the client's fault, and
else says in a word how it ended: ``accepted`` or a problem's code. It knows nothing of the process around it; that is
``guard``'s part.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pydicom
from nibabel.nifti1 import header_dtype as nifti_1
from nibabel.nifti2 import header_dtype as nifti_2
from PIL import Image

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs.geometry import make_geometry
from nnunet_torchserve.errors import BadOption, RequestError, ServingError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat, parse_options
from nnunet_torchserve.orientation import turn_towards
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.provenance import Provenance
from nnunet_torchserve.responses import ResponseMaker
from nnunet_torchserve.volume import Geometry, LabelMap, Placement

from .guard import ACCEPTED, CANARY
from .seeds import SECRET

LIMITS = Limits(
    body_bytes=2**20,
    response_bytes=2**26,
    expanded_bytes=2**22,
    voxels=2**18,
    channels=8,
    header_bytes=2**14,
    header_fields=64,
    dicom_files=64,
    dicom_frames=64,
    dicom_header_bytes=2**16,
    dicom_elements=2**14,
    memory_bytes=2**30,
)
"""Small, so that memory beyond what they promise stands out."""

_LONGEST_MESSAGE = 600
_TOLERANCE = 2e-3
"""Of a voxel's step: a direction's columns may be 1e-3 longer or shorter than 1, which formats settle differently."""

_REPEATED = ("pixdim", "quatern", "qoffset", "srow")
_TURN = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
_PATHS = (sys.prefix, tempfile.gettempdir(), "/proc/self/fd", "/dev/shm", CANARY)
_STRUCTURES = {"one": (1,), "both": (1, 2)}
_PROVENANCE = Provenance("model", "1.0", "0" * 64, ("0" * 64,), None, {})


class Find(AssertionError):
    """Something that must not be true is."""


class Setting(NamedTuple):
    """What else of a request decides how an image is read."""

    reader: str
    placement: Placement | None = None


SETTINGS = (
    Setting("SimpleITKIO"),
    Setting("NibabelIO"),
    Setting("NaturalImage2DIO"),
    Setting("Tiff3DIO"),
    Setting("SimpleITKIO", Placement((0.5, 0.7), (3.0, -4.0), (0.8, -0.6, 0.6, 0.8))),
    Setting("SimpleITKIO", Placement((0.5, 0.7, 2.0), (3.0, -4.0, 5.0), _TURN)),
)


def image(data: bytes) -> str:
    """An image under every setting: decoded, turned, and a label map of its grid written in every format."""
    answered: set[str] = set()
    outcomes = [_image(data, setting, answered) for setting in SETTINGS]
    return ACCEPTED if ACCEPTED in outcomes else outcomes[0]


def _image(data: bytes, setting: Setting, answered: set[str]) -> str:
    """One setting; ``answered`` are the geometries whose answers were written under another one."""
    try:
        source = codecs.open_image(data, LIMITS, setting.reader, setting.placement)
        geometry = source.geometry
        _check_geometry(geometry)
        array = source.read()
    except ServingError as error:
        if any(path in str(error) for path in _PATHS):
            msg = f"a message with a path: {ascii(str(error))[:2000]}"
            raise Find(msg) from error
        _check_secret(str(error).encode())
        return _refused(error)
    if array.shape != (source.channels, *geometry.shape) or array.dtype != np.float32:
        msg = f"read() gave {array.dtype} {array.shape}; channels {source.channels}, geometry {geometry.shape}"
        raise Find(msg)
    if repr(geometry) in answered:
        return ACCEPTED
    answered.add(repr(geometry))
    for towards, as_itk in (("RAS", False), ("LPS", True), ("SAR", False)):
        turn = turn_towards(geometry, towards, as_itk=as_itk)
        _check_geometry(turn.after)
        if turn.turn(array).shape[1:] != turn.after.shape:
            msg = f"turned towards {towards}, the array has {turn.turn(array).shape}, its geometry {turn.after.shape}"
            raise Find(msg)
        labels = LabelMap(np.zeros(turn.after.shape, np.uint8), turn.after)
        if turn.turn_back(labels).array.shape != geometry.shape:
            msg = f"turned back from {towards}, the labels do not have the image's shape"
            raise Find(msg)
    _check_answers(source, setting)
    return ACCEPTED


def _check_geometry(geometry: Geometry) -> None:
    numbers = [*geometry.spacing_zyx, *geometry.spacing, *geometry.origin, *geometry.direction.ravel().tolist()]
    if not np.isfinite(numbers).all() or min(*geometry.spacing, *geometry.spacing_zyx) <= 0:
        msg = f"accepted with an impossible geometry {geometry}"
        raise Find(msg)
    if min(geometry.shape) < 1 or geometry.voxels > LIMITS.voxels or geometry.ndim not in (2, 3):
        msg = f"accepted with an impossible shape {geometry}"
        raise Find(msg)


def _check_answers(source: codecs.ImageSource, setting: Setting) -> None:
    geometry = source.geometry
    labels: Any = (np.arange(geometry.voxels) % 3).reshape(geometry.shape)
    labels = labels.astype(np.uint8 if geometry.voxels % 2 else np.uint16)
    probabilities = np.zeros((2, *geometry.shape), np.float32)
    answer = LabelMap(labels, geometry, probabilities, (0, 1))
    about = codecs.About([source], Painting(_STRUCTURES), provenance=_PROVENANCE)
    for output in OutputFormat:
        is_series = isinstance(source, codecs.DicomSource)
        try:
            form = codecs.answer_form(Options(output_format=output), source.native_format, geometry)
        except BadOption:
            if (output in _PICTURES and geometry.shape[0] > 1) or (output is OutputFormat.DICOM_SEG and not is_series):
                continue
            raise
        try:
            body = codecs.encode(LabelMap(labels, geometry), form, about).body
        except RequestError:
            if output is OutputFormat.DICOM_SEG:  # texts of a header are read only now
                continue
            raise
        if output is not OutputFormat.DICOM_SEG:  # which says whose it is
            _check_secret(_without_affine(body))
        _READ_BACK[output](body, labels, geometry, setting)
    options = Options(output_format=(OutputFormat.NIFTI_GZ, OutputFormat.NPZ), save_probabilities=True)
    form = codecs.answer_form(options, source.native_format, geometry)
    body = codecs.encode(answer, form, about).body
    if (bad := zipfile.ZipFile(io.BytesIO(body)).testzip()) is not None:
        msg = f"{bad} in the zip is damaged"
        raise Find(msg)


def _without_affine(body: bytes) -> bytes:
    """An answer without the numbers that a NIfTI answer repeats bit for bit, which damage may have made a text."""
    for dtype in (nifti_1, nifti_2):
        header = np.frombuffer(body[: dtype.itemsize], dtype) if len(body) >= dtype.itemsize else None
        if header is not None and header["sizeof_hdr"][0] in (dtype.itemsize, int(np.int32(dtype.itemsize).byteswap())):
            texts = [header[name].tobytes() for name in dtype.names or () if not name.startswith(_REPEATED)]
            return b" ".join(texts) + body[dtype.itemsize :]
    return body


def _decoded_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    """Our own decoder must read what our own encoder wrote: the same labels, at the same place."""
    try:
        again = codecs.open_image(body, LIMITS, setting.reader)
        array = again.read()
    except ServingError as error:
        msg = f"an answer cannot be read back: {error}"
        raise Find(msg) from error
    if array.shape != (1, *labels.shape) or not np.array_equal(array[0], labels):
        msg = "the labels of an answer that is read back are others"
        raise Find(msg)
    if geometry.ndim == 2 or again.geometry.ndim == 2:
        same = np.allclose(again.geometry.spacing[:2], geometry.spacing[:2], rtol=_TOLERANCE, atol=0)
    else:
        near = 1e-5 * max(map(abs, geometry.origin)) + 1e-5
        same = np.allclose(again.geometry.origin, geometry.origin, rtol=1e-5, atol=near) and np.allclose(
            again.geometry.direction * again.geometry.spacing / geometry.spacing, geometry.direction, atol=_TOLERANCE
        )
    if not same:
        msg = f"an answer lies elsewhere: {again.geometry} for {geometry}"
        raise Find(msg)


def _npz_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    with np.load(io.BytesIO(body), allow_pickle=False) as loaded:
        for name in loaded.files:
            loaded[name]
        found = loaded["labels"]
    if not np.array_equal(found.reshape(labels.shape), labels):
        msg = "the labels of the npz are others"
        raise Find(msg)


def _picture_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    with Image.open(io.BytesIO(body)) as picture:
        if not np.array_equal(np.asarray(picture), labels[0]):
            msg = "the labels of the picture are others"
            raise Find(msg)


def _tiff_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    """Their place is not in the file."""
    placement = Placement((1.0, 1.0) if geometry.is_flat else (1.0, 1.0, 1.0))
    array = codecs.open_image(body, LIMITS, setting.reader, placement).read()
    if not np.array_equal(array.reshape(labels.shape), labels):
        msg = "the labels of the tif are others"
        raise Find(msg)


def _json_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    json.loads(body, parse_constant=_no_json)


def _segmentation_back(body: bytes, labels: Any, geometry: Geometry, setting: Setting) -> None:
    """pydicom finds each segment in the slices where it is, by their places in the patient."""
    with warnings.catch_warnings(action="ignore"):  # of texts that stand there as the source has them
        found = pydicom.dcmread(io.BytesIO(body))
        groups = found.PerFrameFunctionalGroupsSequence
    frames = np.reshape(found.pixel_array, (-1, *labels.shape[1:])).astype(bool)
    normal = geometry.direction[:, 2]
    seen = np.zeros((2, *labels.shape), bool)
    for frame, group in zip(frames, groups, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float) - geometry.origin
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        seen[number - 1, round(float(place @ normal) / geometry.spacing[2])] |= frame
    for number, values in enumerate(_STRUCTURES.values()):
        if not np.array_equal(seen[number], np.isin(labels, values)):
            msg = "a segment of a DICOM segmentation is another"
            raise Find(msg)


def _no_json(constant: str) -> None:
    msg = f"{constant} is no JSON"
    raise Find(msg)


_PICTURES = {OutputFormat.PNG, OutputFormat.BMP}
_READ_BACK: dict[OutputFormat, Callable[[bytes, Any, Geometry, Setting], None]] = {
    OutputFormat.NIFTI_GZ: _decoded_back,
    OutputFormat.NIFTI: _decoded_back,
    OutputFormat.NRRD: _decoded_back,
    OutputFormat.MHA: _decoded_back,
    OutputFormat.NPZ: _npz_back,
    OutputFormat.PNG: _picture_back,
    OutputFormat.TIFF: _tiff_back,
    OutputFormat.BMP: _picture_back,
    OutputFormat.JSON: _json_back,
    OutputFormat.DICOM_SEG: _segmentation_back,
}


def options(data: bytes) -> str:
    """The text of options."""
    try:
        parsed = parse_options(data)
    except ServingError as error:
        return _refused(error)
    if parse_options(parsed.model_dump_json(exclude_unset=True).encode()) != parsed:
        msg = "options written as JSON and parsed again are others"
        raise Find(msg)
    placement = parsed.placement
    if placement is not None and len(placement.spacing) in (2, 3):
        ndim = len(placement.spacing)
        try:
            make_geometry(
                (2,) * ndim,
                placement.spacing,
                placement.origin or (0,) * ndim,
                placement.direction or np.eye(ndim).ravel().tolist(),
            )
        except ServingError as error:
            return _refused(error)
    return ACCEPTED


def geometry(data: bytes) -> str:
    """Dimensions (one byte), then doubles: the shape, spacing, origin and direction."""
    ndim = 2 if data[:1] == b"\2" else 3
    count = 3 * ndim + ndim * ndim
    if len(data) <= 8 * count:
        return "short"
    numbers = struct.unpack_from(f"<{count}d", data, 1)
    shape = [int(min(max(number, 1), 2**18)) if np.isfinite(number) else 1 for number in numbers[:ndim]]
    spacing, origin, direction = numbers[ndim : 2 * ndim], numbers[2 * ndim : 3 * ndim], numbers[3 * ndim :]
    try:
        made = make_geometry(shape, spacing, origin, direction)
    except ServingError as error:
        return _refused(error)
    if min(made.shape) < 1 or not np.isfinite(made.affine).all():
        msg = f"accepted with an impossible geometry {made}"
        raise Find(msg)
    small = Geometry((1, 2, 3), made.spacing_zyx, made.spacing, made.origin, made.direction, made.ndim)
    for towards, as_itk in (("RAS", False), ("LPS", True), ("SAR", True)):
        turn = turn_towards(small, towards, as_itk=as_itk)
        _check_geometry(turn.after)
        back = turn.turn_back(LabelMap(np.zeros(turn.after.shape, np.uint8), turn.after))
        if back.array.shape != small.shape:
            msg = f"turned towards {towards} and back, the labels have another shape"
            raise Find(msg)
    return ACCEPTED


def request(data: bytes) -> str:
    """A request's fields and headers, between zero bytes.

    ``P name=content`` is a field of bytes, ``S`` of text, ``J`` of JSON as the front end parsed it; ``H name=value``
    is a header.
    """
    from nnunet_torchserve.request import Request

    parts: dict[str, object] = {}
    headers: dict[str, str] = {}
    for piece in data.split(b"\0"):
        name, _, content = piece[2:].partition(b"=")
        key, text = name.decode("utf-8", "replace"), content.decode("latin-1")
        match piece[:2]:
            case b"P ":
                parts[key] = content
            case b"S ":
                parts[key] = content.decode("utf-8", "surrogateescape")
            case b"J ":
                try:
                    parts[key] = json.loads(content)
                except (ValueError, RecursionError):
                    parts[key] = {}
            case b"H ":
                headers[name.decode("latin-1")] = text
    made = Request(parts, headers, "server")
    ResponseMaker("model", LIMITS.response_bytes).json({"describe": made.is_describe}, made.id)
    try:
        parse_options(made.options_text())
        bodies = made.images()
    except ServingError as error:
        return _refused(error, made.id)
    if not bodies or not all(isinstance(file, bytes) for body in bodies for file in body) or not all(bodies):
        msg = f"accepted {parts} with images {bodies}"
        raise Find(msg)
    return ACCEPTED


def _refused(error: ServingError, request_id: str = "-") -> str:
    """The code of a refusal, which must be one that can be sent, blames the client, and names nobody."""
    if not isinstance(error, RequestError):
        msg = f"a client's bytes were answered with {error.status}: {error}"
        raise Find(msg) from error
    message = str(error)
    if not message or len(message) > _LONGEST_MESSAGE or not message.isprintable():
        msg = f"an unprintable message or a long one: {ascii(message)[:2000]}"
        raise Find(msg) from error
    ResponseMaker("model", LIMITS.response_bytes).problem(error, request_id)
    return error.code


def _check_secret(content: bytes) -> None:
    if SECRET.encode() in content:
        msg = f"a free text of the file came out again: {ascii(content)[:300]}"
        raise Find(msg)


TARGETS: dict[str, Callable[[bytes], str]] = {
    "image": image,
    "options": options,
    "geometry": geometry,
    "request": request,
}
