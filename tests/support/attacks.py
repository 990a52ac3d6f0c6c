"""Requests that mean harm, or that a broken client would send: each has a name, its bytes, and what may come back.

The table is made by functions, one a category, so that every boundary of every format is covered and not only those
that somebody thought of. Images are a few voxels large: what is refused costs nothing, what is answered little. Every
free-text field that a format has holds :data:`MARKER`, which must come back in no answer and stand in no log.

``Attack.allowed`` is exact wherever this project decides; sets of more than one outcome say why at their place.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import tifffile

from nnunet_torchserve.options import MAX_OPTIONS_BYTES, Options

from . import volumes

MARKER = "PATIENT^NAME"

Outcome = tuple[int, str]
"""HTTP status, and the problem's code or else the ``type`` in TorchServe's own JSON or else nothing."""

ANSWERED = (200, "")
MALFORMED = (400, "malformed")
BAD_OPTION = (400, "bad_option")
UNKNOWN_OPTION = (400, "unknown_option")
TOO_LARGE = (413, "too_large")
UNKNOWN_FORMAT = (415, "unknown_format")
WRONG_CHANNELS = (422, "wrong_channels")
CHANNELS_DISAGREE = (422, "channels_disagree")
NON_FINITE = (422, "non_finite")
TOO_THIN = (422, "too_thin")
BAD_SPACING = (422, "bad_spacing")
UNKNOWN_FOLD = (422, "unknown_fold")
DEADLINE = (504, "deadline")
OUT_OF_MEMORY = (507, "out_of_memory")

BROKEN_HTTP = (400, "BadRequestException")
BAD_PATH = (403, "IllegalArgumentException")
NO_RESOURCE = (404, "ResourceNotFoundException")
NO_MODEL = (404, "ModelNotFoundException")
NO_VERSION = (404, "ModelVersionNotFoundException")
NO_METHOD = (405, "MethodNotAllowedException")
FRONT_END_TOO_LARGE = (413, "")
NO_EXPECTATION = (417, "")
BROKEN_FORM = (500, "ErrorDataDecoderException")
BROKEN_BOUNDARY = (500, "StringIndexOutOfBoundsException")
NO_SUCH_INDEX = (500, "ArrayIndexOutOfBoundsException")
CLOSED = (0, "closed")
"""The connection ended without an answer."""

SOUND = frozenset({
    ANSWERED, MALFORMED, TOO_LARGE, UNKNOWN_FORMAT, WRONG_CHANNELS, NON_FINITE, TOO_THIN, BAD_SPACING,
})  # fmt: skip
"""What an image with a flipped bit may get: it can still be one, or break any rule."""

PATH = b"/predictions/five_folds"
FLAT_PATH = b"/predictions/flat"
FAST: dict[str, object] = {"folds": [0], "use_mirroring": False}

_SHAPE = (12, 11, 10)
_SPACING = 1.5
_VOXELS: npt.NDArray[np.int16] = volumes.blobs(_SHAPE, seed=3)[0].astype(np.int16)
_ZYX = np.ascontiguousarray(_VOXELS.T)
_SLICE = (_ZYX[4] // 4).astype(np.uint8)

MIB = 1024**2
_BOMB_MIB = 320

Pairs = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One request.

    Attributes:
        wire: what is sent, from the request line on.
        allowed: what may come back.
        ends: the client ends its half of the connection after the last byte.
    """

    category: str
    name: str
    wire: bytes
    allowed: frozenset[Outcome]
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Seed:
    """A good image of one format.

    Attributes:
        signature: bytes by which the format is recognised; what is shorter is no format.
        cuts: where the format's structure has boundaries.
        header: bytes that are more structure than voxels.
        path: the model that takes it.
        options: what it needs.
    """

    body: bytes
    signature: int
    cuts: tuple[int, ...]
    header: int
    path: bytes = PATH
    options: Mapping[str, object] | None = None

    def request(self, body: bytes) -> bytes:
        """A request with ``body`` in the place of the image."""
        return request(body, path=self.path, options=FAST if self.options is None else self.options)


def request(
    body: bytes,
    *,
    path: bytes = PATH,
    method: bytes = b"POST",
    version: bytes = b"HTTP/1.1",
    options: Mapping[str, object] | bytes | None = FAST,
    headers: Pairs = (),
    length: bytes | None = b"",
) -> bytes:
    """A request's bytes; ``length`` empty is the true one, ``None`` sends none."""
    lines = [b"Host: localhost", b"Connection: close"]
    if options is not None:
        text = options if isinstance(options, bytes) else json.dumps(options).encode()
        lines.append(b"X-Nnunet-Options: " + text)
    lines += [name + b": " + value for name, value in headers]
    if length is not None:
        lines.append(b"Content-Length: " + (length or str(len(body)).encode()))
    return b"\r\n".join([b" ".join([method, path, version]), *lines, b"", body])


@cache
def attacks() -> tuple[Attack, ...]:
    """The whole table."""
    return tuple(
        Attack(category, name, wire, frozenset(allowed), ends)
        for category, maker in _CATEGORIES.items()
        for name, wire, allowed, ends in _normalised(maker())
    )


@cache
def selection() -> tuple[Attack, ...]:
    """About 100 of them: those that once hurt, and others spread evenly over every category."""
    return tuple(each for category in _CATEGORIES for each in _spread([a for a in attacks() if a.category == category]))


_ONCE_HURT = (
    "MHA with a line of spaces and",
    "TIFF of 200 pages that share",
    "TIFF text of a million dimensions",
    "TIFF text of a shape of Infinity",
    "npy shape: (0x",
    "npy shape: (-0x",
)
"""How the names begin of what a worker hung on, took memory without bound for, or answered with 500 or not at all."""


def _spread(of_one_category: list[Attack]) -> Iterator[Attack]:
    count = -(-len(of_one_category) * 100 // len(attacks()))
    chosen = {number * len(of_one_category) // count for number in range(count)}
    for number, attack in enumerate(of_one_category):
        if number in chosen or attack.name.startswith(_ONCE_HURT):
            yield attack


_Row = tuple[Any, ...]


def _normalised(rows: Iterable[_Row]) -> Iterator[tuple[str, bytes, Iterable[Outcome], bool]]:
    """Rows are (name, wire, an outcome or several[, ends])."""
    for name, wire, allowed, *ends in rows:
        yield name, wire, ({allowed} if isinstance(allowed, tuple) else allowed), bool(ends and ends[0])


# --- Good images of every format -------------------------------------------------------------------------------------


def nifti(kind: Any = nib.Nifti1Image, array: npt.NDArray[Any] = _VOXELS, **fields: Any) -> bytes:
    """A .nii file with ``MARKER`` in each text field; ``fields`` are set as they are, dicts entry by entry."""
    image = kind(array, np.diag([_SPACING, _SPACING, _SPACING, 1]), dtype=array.dtype)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        if name in image.header:
            image.header[name] = MARKER.encode()
    content = bytes(image.to_bytes())
    changed = type(image.header).from_fileobj(io.BytesIO(content), check=False)
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, entry in value.items():
                changed[name][index] = entry
        else:
            changed[name] = value
    block = bytes(changed.binaryblock)
    return block + content[len(block) :]


_NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "12 11 10",
    "space directions": "(1.5,0,0) (0,1.5,0) (0,0,1.5)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(0,0,0)",
    "content": MARKER,
}


def nrrd(
    changes: Mapping[str, str | None] | None = None,
    voxels: bytes | None = None,
    magic: str = "NRRD0004",
    more: bytes = b"",
) -> bytes:
    """A .nrrd file; a change to ``None`` leaves the field out, ``more`` are further lines."""
    fields = _NRRD | dict(changes or {})
    lines = [magic, f"# {MARKER}", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    head = "\n".join([*lines, f"PatientName:={MARKER}", ""]).encode()
    return head + more + b"\n" + (_ZYX.tobytes() if voxels is None else voxels)


_MHA = {
    "ObjectType": "Image",
    "NDims": "3",
    "Comment": MARKER,
    "PatientName": MARKER,
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "0 0 0",
    "CenterOfRotation": "0 0 0",
    "ElementSpacing": "1.5 1.5 1.5",
    "DimSize": "12 11 10",
    "ElementType": "MET_SHORT",
}


def mha(
    changes: Mapping[str, str | None] | None = None,
    voxels: bytes | None = None,
    more: bytes = b"",
    where: str = "LOCAL",
) -> bytes:
    """A .mha file; a change to ``None`` leaves the field out, ``more`` are further lines."""
    fields = _MHA | dict(changes or {})
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    head = "\n".join([*lines, ""]).encode() + more + f"ElementDataFile = {where}\n".encode()
    return head + (_ZYX.tobytes() if voxels is None else voxels)


def npy(array: npt.NDArray[Any] = _ZYX, *, header: str | None = None, version: bytes = b"\1\0") -> bytes:
    """A .npy file; ``header`` replaces the dict's text."""
    if header is None:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()
    text = header.encode("latin-1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + array.tobytes()


_PLACE = {"spacing": np.full(3, _SPACING), "origin": np.zeros(3), "direction": np.eye(3)}


def npz(members: Mapping[str, bytes] | None = None, packing: int = zipfile.ZIP_STORED) -> bytes:
    """A .npz file; without ``members`` a good one, with a text of ``MARKER`` beside the arrays."""
    if members is None:
        arrays = {f"{name}.npy": npy(array) for name, array in {"image": _ZYX, **_PLACE}.items()}
        members = arrays | {f"{MARKER}.txt": MARKER.encode()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, packing)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TEXT = chunk(b"tEXt", b"Comment\0" + MARKER.encode())


def png(
    header: Sequence[int] = (_SHAPE[0], _SHAPE[1], 8, 0, 0, 0, 0),
    before: bytes = b"",
    rows: bytes | None = None,
    end: bytes = chunk(b"IEND", b""),
) -> bytes:
    """A .png file: width, height, bits, colour, compression, filter, interlace; ``before`` are chunks before IDAT."""
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in _SLICE)) if rows is None else rows
    return _PNG_MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + _TEXT + before + chunk(b"IDAT", packed) + end


def tiff(array: npt.NDArray[Any] = _ZYX, **settings: Any) -> bytes:
    """A .tiff file with ``MARKER`` in its text tags."""
    file = io.BytesIO()
    defaults: dict[str, Any] = {
        "photometric": "minisblack",
        "metadata": None,
        "description": MARKER,
        "software": MARKER,
    }
    tifffile.imwrite(file, array, **defaults | settings)
    return file.getvalue()


def tiff_tag(content: bytes, tag: int, *, kind: int | None = None, count: int | None = None, value: int = 0) -> bytes:
    """``content`` with an entry of its first IFD (little endian, classic) set."""
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    changed = bytearray(content)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        found, has_kind, has_count = struct.unpack_from("<HHI", content, at)
        if found == tag:
            struct.pack_into("<HHII", changed, at, tag, kind or has_kind, has_count if count is None else count, value)
            return bytes(changed)
    msg = f"no tag {tag}"
    raise KeyError(msg)


def zeros(mib: int, wbits: int, front: bytes = b"") -> bytes:
    """A deflate stream of ``front`` and so many MiB of zeros, made in an instant: a full flush lets blocks repeat.

    Its checksum is wrong; nobody should come as far.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    start = packer.compress(front) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * mib + packer.flush()


@cache
def seeds() -> dict[str, Seed]:
    """A good image of every format, which the server answers."""
    nii, nii2 = nifti(), nifti(nib.Nifti2Image)
    placed = FAST | {"spacing": [_SPACING] * 3}
    flat = {"use_mirroring": False, "spacing": [_SPACING] * 2}
    packed = {
        "nii.gz": gzip.compress(nii, mtime=0),
        "nii2.gz": gzip.compress(nii2, mtime=0),
    }
    nrrds = {
        "nrrd raw": nrrd(),
        "nrrd gzip": nrrd({"encoding": "gzip"}, gzip.compress(_ZYX.tobytes(), mtime=0)),
        "nrrd bzip2": nrrd({"encoding": "bzip2"}, bz2.compress(_ZYX.tobytes())),
    }
    deflated = zlib.compress(_ZYX.tobytes())
    mhas = {
        "mha raw": mha(),
        "mha zlib": mha({"CompressedData": "True", "CompressedDataSize": str(len(deflated))}, deflated),
    }
    npzs = {"npz stored": npz(), "npz deflated": npz(packing=zipfile.ZIP_DEFLATED)}
    array, picture, stack, zipped = npy(), png(), tiff(), tiff(compression="zlib")
    return {
        "nii": Seed(nii, 348, (4, 40, 70, 108, 252, 344, 350, 352, 353, 352 + 1320), 348),
        "nii2": Seed(nii2, 540, (4, 8, 12, 16, 168, 536, 542, 544, 545, 544 + 1320), 540),
        **{
            name: Seed(each, 2, (3, 4, 9, 10, 11, len(each) // 2, *_ends(each, 9)), 12) for name, each in packed.items()
        },
        **{name: Seed(each, 8, _lines(each), each.index(b"\n\n")) for name, each in nrrds.items()},
        **{name: Seed(each, 12, _lines(each), each.index(b"LOCAL")) for name, each in mhas.items()},
        "npy": Seed(array, 6, (7, 8, 9, 10, 60, 127, 128, 129, *_ends(array, 2)), 90, options=placed),
        **{name: Seed(each, 4, _records(each), 64) for name, each in npzs.items()},
        "png": Seed(picture, 8, _chunks(picture), 33, FLAT_PATH, flat),
        "tiff": Seed(stack, 4, _tiff_cuts(stack), 200, options=placed),
        "tiff zlib": Seed(zipped, 4, _tiff_cuts(zipped), 200, options=placed),
    }


def _ends(content: bytes, *back: int) -> tuple[int, ...]:
    return tuple(len(content) - n for n in (*back, 1))


def _lines(content: bytes) -> tuple[int, ...]:
    """After each line of a text header, within its last line, and within the voxels."""
    end = content.index(b"LOCAL\n") + 6 if b"LOCAL\n" in content else content.index(b"\n\n") + 2
    cuts = [at + 1 for at in range(end) if content[at : at + 1] == b"\n"]
    return (*cuts, end - 3, end + 1, end + 2, end + 10, (end + len(content)) // 2, *_ends(content, 4))


def _records(content: bytes) -> tuple[int, ...]:
    """At and within each record of a zip."""
    starts = [at for at in range(len(content)) if content[at : at + 4] in (b"PK\3\4", b"PK\1\2", b"PK\5\6")]
    return (*(at + more for at in starts for more in (0, 5)), *_ends(content, 22, 2))


def _chunks(content: bytes) -> tuple[int, ...]:
    """Before, within and after each chunk's length, name, content and checksum."""
    cuts, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        cuts += [at, at + 4, at + 8, at + 8 + size // 2, at + 8 + size, at + 10 + size]
        at += 12 + size
    return tuple(cuts)


def _tiff_cuts(content: bytes) -> tuple[int, ...]:
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    end = start + 2 + 12 * entries + 4
    return (5, 8, start + 1, *range(start + 2, end, 36), end, (end + len(content)) // 2, *_ends(content, 18)[:1])


# --- What is cut off -------------------------------------------------------------------------------------------------


def _truncations() -> Iterator[_Row]:
    seen: set[bytes] = set()  # formats that begin alike
    for name, seed in seeds().items():
        cuts = {cut for cut in (1, seed.signature - 1, seed.signature, *seed.cuts) if 0 < cut < len(seed.body)}
        for cut in sorted(cuts):
            refused = UNKNOWN_FORMAT if cut < seed.signature else MALFORMED
            if seed.body[:cut] not in seen:
                seen.add(seed.body[:cut])
                yield f"{name} cut after {cut} bytes", seed.request(seed.body[:cut]), refused
    yield "nothing at all", request(b""), UNKNOWN_FORMAT


def _bit_flips() -> Iterator[_Row]:
    generator = np.random.default_rng(20)
    for name, seed in seeds().items():
        for place in sorted(generator.choice(seed.header * 8, 6, replace=False).tolist()):
            changed = bytearray(seed.body)
            changed[place // 8] ^= 1 << place % 8
            yield f"{name} bit {place % 8} of byte {place // 8} flipped", seed.request(bytes(changed)), SOUND


# --- Headers that lie ------------------------------------------------------------------------------------------------


def _nifti_lies() -> Iterator[_Row]:
    def lies(outcome: Outcome, **fields: Sequence[Any]) -> Iterator[_Row]:
        for field, values in fields.items():
            for value in values:
                yield f"NIfTI {field} {value}", request(gzip.compress(nifti(**{field: value}), 1)), outcome

    yield from lies(MALFORMED, dim=[{0: n} for n in (0, 1, 8, -1, 32767)])
    yield from lies(MALFORMED, dim=[{axis: n} for axis in (1, 2, 3) for n in (0, -12)])
    yield from lies(MALFORMED, dim=[{1: 13}, {3: 32767}])
    yield from lies(TOO_LARGE, dim=[{1: 1500, 2: 1500, 3: 1500}, {1: 32767, 2: 32767, 3: 32767}, {0: 4, 4: 65}])
    yield from lies(WRONG_CHANNELS, dim=[{0: 4, 4: 2}, {0: 5, 4: 1, 5: 2}, {0: 7, 4: 1, 5: 1, 6: 1, 7: 3}])
    # within the limits; whether the memory for it is there depends on the machine
    claimed = gzip.compress(nifti(dim={1: 980, 2: 980, 3: 980}, pixdim={1: 0.05, 2: 0.05, 3: 0.05}), 1)
    yield "NIfTI claims 941 million voxels", request(claimed), {MALFORMED, OUT_OF_MEMORY}
    yield from lies(UNKNOWN_FORMAT, datatype=[32, 1536, 1792, 2048])
    yield from lies(MALFORMED, datatype=[3, 999, -1])
    yield from lies(BAD_SPACING, pixdim=[{n: v} for n in (1, 2, 3) for v in (np.nan, np.inf, 0.0, -1.5, 1e-7, 1e7)])
    yield from lies(TOO_LARGE, pixdim=[{1: 1e6}, {1: 9e2, 2: 9e2, 3: 9e2}])
    yield from lies(TOO_THIN, pixdim=[{3: 1e-5}])
    yield from lies(TOO_LARGE, xyzt_units=[1])
    yield from lies(TOO_THIN, xyzt_units=[3])
    yield from lies(MALFORMED, vox_offset=[0, 100, 351, -1, np.nan, np.inf, 1e30, 2e9, 353])
    yield from lies(MALFORMED, scl_slope=[np.inf, -np.inf, 1e-30], scl_inter=[np.inf])
    yield from lies(NON_FINITE, scl_slope=[3e38])
    yield from lies(WRONG_CHANNELS, intent_code=[1004, 1006])
    yield from lies(UNKNOWN_FORMAT, magic=[b"ni1", b"n+3", b"N+1"])
    yield "NIfTI intercept without a slope", request(nifti(scl_slope=0, scl_inter=5)), MALFORMED
    rows = {"zero": (0, 0, 0, 0), "NaN": (np.nan,) * 4, "far away": (_SPACING, 0, 0, 1e30), "infinite": (np.inf,) * 4}
    for name, row in rows.items():
        yield f"NIfTI sform {name}", request(nifti(srow_x=row, qform_code=0)), MALFORMED
    singular = nifti(srow_x=(1, 0, 0, 0), srow_y=(1, 0, 0, 0), qform_code=0)
    yield "NIfTI sform of one direction", request(singular), MALFORMED
    for value in (5.0, np.nan, np.inf):
        yield f"NIfTI quaternion {value}", request(nifti(sform_code=0, quatern_b=value)), MALFORMED
    for voxel in (np.nan, np.inf, -np.inf):
        wrong = _VOXELS.astype(np.float32)
        wrong[3, 4, 5] = voxel
        yield f"NIfTI voxel {voxel}", request(nifti(array=wrong)), NON_FINITE
    yield "NIfTI-2 dim -1", request(nifti(nib.Nifti2Image, dim={1: -1})), MALFORMED
    yield "NIfTI-2 dim 2^62", request(nifti(nib.Nifti2Image, dim={1: 2**62, 2: 2**62, 3: 2**62})), TOO_LARGE
    yield "NIfTI-2 row of 40,000", request(nifti(nib.Nifti2Image, dim={1: 40_000, 2: 1, 3: 1})), TOO_LARGE
    yield "NIfTI-2 offset 2^62", request(nifti(nib.Nifti2Image, vox_offset=2**62)), MALFORMED
    yield "NIfTI-2 offset -1", request(nifti(nib.Nifti2Image, vox_offset=-1)), MALFORMED
    swapped = bytearray(nifti())
    swapped[348:352] = b"\1\0\0\0"  # an extension is announced where the voxels begin
    yield "NIfTI extension that is not there", request(bytes(swapped)), ANSWERED
    yield "NIfTI after gzip after gzip", request(gzip.compress(gzip.compress(nifti()))), UNKNOWN_FORMAT


def _nrrd_lies() -> Iterator[_Row]:
    lies: list[tuple[Outcome, dict[str, Sequence[str | None]]]] = [
        (UNKNOWN_FORMAT, {"type": ["void", "block", "complex float"], "encoding": ["ascii", "hex", "txt", "zstd"]}),
        (MALFORMED, {name: [None] for name in ("type", "dimension", "sizes", "encoding", "endian")}),
        (WRONG_CHANNELS, {"dimension": ["0", "1", "5", "-3", "999999999"]}),
        (MALFORMED, {"dimension": ["3.0", "٣", "4", "2", "9" * 30, "three", MARKER]}),
        (MALFORMED, {"sizes": ["0 11 10", "-12 11 10", "12 11", "12 11 10 1", "1e1 11 10", "9" * 30, "13 11 10"]}),
        (TOO_LARGE, {"sizes": ["30000 30000 30000", " ".join(["9" * 18] * 3), "40000 1 1"]}),
        (MALFORMED, {"space directions": ["(inf,0,0) (0,1,0) (0,0,1)", "(1,0) (0,1) (1,1)", "(1,0,0) (0,1,0) (0,0,1"]}),
        (MALFORMED, {"space directions": ["(1,0,0) (0,1,0)", "(1,0,nan) (0,1,0) (0,0,1)", MARKER, "(1,0,0) " * 3]}),
        (BAD_SPACING, {"space directions": [None, "(1e300,0,0) (0,1,0) (0,0,1)", "(1e-9,0,0) (0,1,0) (0,0,1)"]}),
        (UNKNOWN_FORMAT, {"space": ["cylinder", "left-posterior-superior-time", MARKER]}),
        (MALFORMED, {"space": [None], "space dimension": ["3"], "endian": ["middle", MARKER]}),
        (MALFORMED, {"encoding": ["gzip", "bzip2"]}),
        (
            UNKNOWN_FORMAT,
            {"data file": ["/etc/passwd", "LIST", "LIST 3", "../../../etc/passwd", "a%03d.raw 1 10 1", ""]},
        ),
        (UNKNOWN_FORMAT, {"datafile": ["/proc/self/environ", "http://localhost/x"], "Data File": ["x.raw"]}),
        (
            UNKNOWN_FORMAT,
            {"line skip": ["1", "-1", "999999"], "byte skip": ["-1", "10", "9" * 15], "block size": ["8"]},
        ),
        (MALFORMED, {"byte skip": ["x"], "kinds": ["domain domain"], "centers": ["cell"]}),
        (WRONG_CHANNELS, {"kinds": ["HSV-color domain domain", "list list domain", "domain vector domain"]}),
        (MALFORMED, {"kinds": ["vector domain domain"]}),  # a plane in a volume's space, which ITK does not take
        (MALFORMED, {"space origin": ["(inf,0,0)", "(1,2)", "(1e30,0,0)", "0 0 0", MARKER]}),
    ]
    for outcome, fields in lies:
        for field, values in fields.items():
            for value in values:
                yield f"NRRD {field}: {ascii(value)[:40]}", request(nrrd({field: value})), outcome
    for magic in ("NRRD0000", "NRRD0006", "nrrd0004"):
        yield f"NRRD magic {magic}", request(nrrd(magic=magic)), UNKNOWN_FORMAT
    for name, line in {
        "sizes twice": b"sizes: 12 11 10\n",
        "a line of nothing known": MARKER.encode() + b"\n",
        "an unknown field": b"patient: " + MARKER.encode() + b"\n",
        "a zero byte": b"# \0\n",
        "a carriage return": b"# a\rb\n",
    }.items():
        yield f"NRRD with {name}", request(nrrd(more=line)), MALFORMED
    yield "NRRD with 300 comments", request(nrrd(more=b"# a\n" * 300)), TOO_LARGE
    yield "NRRD with a line of 100 kB", request(nrrd(more=b"# " + b"a" * 100_000 + b"\n")), TOO_LARGE
    yield "NRRD that never ends", request(nrrd()[:60] + b"a" * 100_000), TOO_LARGE
    spaces = b" " * 60_000
    yield "NRRD with a line of spaces", request(nrrd(more=spaces + b"x\n")), MALFORMED
    yield "NRRD with a value of spaces", request(nrrd({"sizes": f"12{spaces.decode()}11 x"})), MALFORMED
    yield "NRRD packed as a whole", request(gzip.compress(nrrd())), ANSWERED
    no_direction = "(nan,nan,nan) (0,1.5,0) (0,0,1.5)"
    yield "NRRD axis without a direction", request(nrrd({"space directions": no_direction, "kinds": None})), MALFORMED
    flat = "(0,0,0) (0,1.5,0) (0,0,1.5)"
    yield "NRRD direction of no length", request(nrrd({"space directions": flat})), BAD_SPACING
    wrong = _ZYX.astype(np.float32)
    wrong[1, 2, 3] = np.nan
    yield "NRRD voxel NaN", request(nrrd({"type": "float"}, wrong.tobytes())), NON_FINITE


def _mha_lies() -> Iterator[_Row]:
    lies: list[tuple[Outcome, dict[str, Sequence[str | None]]]] = [
        (MALFORMED, {name: [None] for name in ("NDims", "DimSize", "ElementType")}),
        (
            UNKNOWN_FORMAT,
            {"ObjectType": ["Tube", MARKER], "BinaryData": ["False"], "HeaderSize": ["-1", "10", "9" * 15]},
        ),
        (UNKNOWN_FORMAT, {"ElementType": ["MET_NONE", "MET_STRING", MARKER, "MET_SHORT_ARRAY"]}),
        (WRONG_CHANNELS, {"NDims": ["0", "1", "5", "-3"], "ElementNumberOfChannels": ["2"]}),
        (MALFORMED, {"NDims": ["3.0", "2", "4", "9" * 30, MARKER], "ElementNumberOfChannels": ["0", "-1", "x"]}),
        (TOO_LARGE, {"ElementNumberOfChannels": ["65", "999999"]}),
        (MALFORMED, {"DimSize": ["0 11 10", "-12 11 10", "12 11", "12 11 10 1", "1.2e1 11 10", "13 11 10", MARKER]}),
        (TOO_LARGE, {"DimSize": ["30000 30000 30000", " ".join(["9" * 18] * 3), "40000 1 1"]}),
        (BAD_SPACING, {"ElementSpacing": [None, "1e300 1 1", "1e-9 1 1", "-1.5 1.5 1.5", "0 1 1"]}),
        (MALFORMED, {"ElementSpacing": ["nan 1 1", "inf 1 1", "1 1", "1 1 1 1", MARKER]}),
        (MALFORMED, {"TransformMatrix": ["0 0 0 0 0 0 0 0 0", "1 0 0 1 0 0 0 0 1", "nan 0 0 0 1 0 0 0 1", "1 0 0 1"]}),
        (MALFORMED, {"Offset": ["nan 0 0", "1e30 0 0", "0 0", MARKER], "Position": ["1 2 3"]}),
        (MALFORMED, {"CompressedData": ["True", "perhaps"], "BinaryData": [MARKER], "BinaryDataByteOrderMSB": ["2"]}),
        (MALFORMED, {"ElementByteOrderMSB": ["True"], "ElementToIntensityFunctionSlope": ["2"], "dimsize": ["1 1 1"]}),
    ]
    for outcome, fields in lies:
        for field, values in fields.items():
            for value in values:
                yield f"MHA {field} = {ascii(value)[:40]}", request(mha({field: value})), outcome
    for where in ("/etc/passwd", "LIST", "LIST 2D", "../x.raw", "a%03d.raw 1 10 1", "Local", "", "http://localhost/x"):
        yield f"MHA in {where or 'no file'}", request(mha(where=where)), UNKNOWN_FORMAT
    for name, line in {
        "DimSize twice": b"DimSize = 12 11 10\n",
        "a line of nothing known": MARKER.encode() + b"\n",
        "a zero byte": b"Comment2 = \0\n",
        "a carriage return": b"Comment2 = a\rb\n",
    }.items():
        yield f"MHA with {name}", request(mha(more=line)), MALFORMED
    yield "MHA with 300 fields", request(mha(more=b"A = b\n" * 300)), TOO_LARGE
    yield "MHA with a line of 100 kB", request(mha(more=b"A = " + b"a" * 100_000 + b"\n")), TOO_LARGE
    # a pattern that tries every way to share the spaces out would take hours
    for name, line in {"nothing else": b"x", "a name": b"Comment2"}.items():
        spaces = b" " * (2000 if line == b"x" else 40_000)
        body = mha(more=(spaces + line if line == b"x" else line + spaces + b"x") + b"\n")
        yield f"MHA with a line of spaces and {name}", request(body), MALFORMED
    packed = zlib.compress(_ZYX.tobytes())
    for size in ("1", str(len(packed) - 1), str(len(packed) + 1), "9" * 18, "-1"):
        changed = {"CompressedData": "True", "CompressedDataSize": size}
        yield f"MHA CompressedDataSize = {size}", request(mha(changed, packed)), MALFORMED
    yield "MHA with a value of spaces", request(mha({"ElementSpacing": " " * 60_000 + "x"})), MALFORMED
    yield "MHA packed as a whole", request(gzip.compress(mha())), ANSWERED


def _array_lies() -> Iterator[_Row]:
    placed = FAST | {"spacing": [_SPACING] * 3}
    head = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}"
    good = "'<i2'", "False", "(10, 11, 12)"
    lies: list[tuple[Outcome, dict[int, Sequence[str]]]] = [
        (UNKNOWN_FORMAT, {0: ["'|O'", "'<c8'", "'|S5'", "'<M8[s]'", "'|V4'", "[('a', '<i2')]", "'<i2,<i2'"]}),
        (MALFORMED, {0: ["'<i3'", "'junk'", "7", "None"], 1: ["2", "None", "'False'"]}),
        (MALFORMED, {2: ["(0, 11, 12)", "(-10, 11, 12)", "(10, 11, 13)", "(10, 11.0, 12)", "'x'", "None"]}),
        (MALFORMED, {2: ["(1320,)", "()"]}),
        (TOO_LARGE, {2: ["(30000, 30000, 30000)", f"({10**18}, {10**18}, {10**18})", "(1, 1, 40000)"]}),
        # longer than Python turns into digits
        (TOO_LARGE, {2: [f"({10**3000}, {10**3000}, {10**3000})", f"({10**3000}, 1, 1)", f"(0x{'f' * 9000}, 1, 1)"]}),
        (MALFORMED, {2: [f"(-0x{'f' * 9000}, 1, 1)"]}),
        (WRONG_CHANNELS, {2: ["(2, 10, 11, 12)", "(1, 1, 10, 11, 12)"]}),
    ]
    for outcome, changes in lies:
        for position, values in changes.items():
            for value in values:
                text = head.format(*(value if number == position else each for number, each in enumerate(good)))
                name = value if len(value) < 80 else f"{value[:9]}… of {len(value)} characters"
                yield (
                    f"npy {('descr', 'fortran_order', 'shape')[position]}: {name}",
                    request(npy(header=text), options=placed),
                    outcome,
                )
    for name, text in {
        "no dict": "[1, 2]",
        "code": "__import__('os').system('true')",
        "a set": "{1}",
        "other keys": f"{{'{MARKER}': 1}}",
        "one key more": f"{{'descr': '<i2', 'fortran_order': False, 'shape': (10, 11, 12), '{MARKER}': 1}}",
        "nesting": "(" * 3000 + ")" * 3000,
        "minus signs": "-" * 9000 + "1",
        "a zero byte": "{'descr': '<i2', 'fortran_order': False, 'shape': (10, 11, 12)}\0",
        "nothing": "",
    }.items():
        yield f"npy header: {name}", request(npy(header=text), options=placed), MALFORMED
    yield "npy header of 1 MB", request(npy(header=" " * MIB, version=b"\2\0"), options=placed), TOO_LARGE
    header_ends_later = b"\x93NUMPY\2\0\xff\xff\xff\x7f" + npy()[10:]
    yield "npy header of 2 GB, says its length", request(header_ends_later, options=placed), TOO_LARGE
    yield "npy version 9", request(npy()[:6] + b"\x09" + npy()[7:], options=placed), MALFORMED
    yield "npy without a spacing", request(npy()), BAD_SPACING
    pickled = npy(np.array([[[MARKER, None]]], dtype=object))
    yield "npy of pickled objects", request(pickled, options=placed), UNKNOWN_FORMAT
    wrong = _ZYX.astype(np.float32)
    wrong[1, 2, 3] = -np.inf
    yield "npy voxel -inf", request(npy(wrong), options=placed), NON_FINITE
    yield from _npz_lies(placed)


def _npz_lies(placed: Mapping[str, object]) -> Iterator[_Row]:
    place = {f"{name}.npy": npy(array) for name, array in _PLACE.items()}
    image = {"image.npy": npy()}
    yield "npz of nothing", request(npz({})), UNKNOWN_FORMAT
    yield "npz without an image", request(npz(place)), MALFORMED
    yield "npz of two images", request(npz(image | {"data.npy": npy()} | place)), MALFORMED
    yield "npz of two arrays without a name", request(npz({"a.npy": npy(), "b.npy": npy()} | place)), MALFORMED
    yield "npz without a spacing", request(npz(image)), BAD_SPACING
    yield "npz of text", request(npz({f"{MARKER}.txt": MARKER.encode()})), UNKNOWN_FORMAT
    # a name is a name: nothing is opened
    yield "npz with a path", request(npz({"../../image.npy": npy()} | place)), ANSWERED
    yield "npz with an absolute path", request(npz({"/etc/passwd": b""} | image | place)), ANSWERED
    yield "npz whose image is none", request(npz({"image.npy": MARKER.encode() * 9} | place)), MALFORMED
    yield "npz of 300 files", request(npz({f"{n}.npy": b"" for n in range(300)} | image | place)), TOO_LARGE
    objects = npy(np.array([[[MARKER, None]]], dtype=object))
    yield "npz of pickled objects", request(npz({"image.npy": objects} | place)), UNKNOWN_FORMAT
    places: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "spacing of zeros": ("spacing", np.zeros(3)),
        "spacing NaN": ("spacing", np.full(3, np.nan)),
        "spacing of four": ("spacing", np.ones(4)),
        "negative spacing": ("spacing", -np.ones(3)),
    }
    for name, (key, array) in places.items():
        yield f"npz with {name}", request(npz(image | place | {f"{key}.npy": npy(array)})), BAD_SPACING
    text = npy(np.array([MARKER]))
    yield "npz with a direction of text", request(npz(image | place | {"direction.npy": text})), UNKNOWN_FORMAT
    places = {
        "origin infinite": ("origin", np.full(3, np.inf)),
        "direction of zeros": ("direction", np.zeros((3, 3))),
        "direction of one axis": ("direction", np.ones((3, 3))),
        "origin of two": ("origin", np.zeros(2)),
        "origin of 100,000": ("origin", np.zeros(10**5)),
    }
    for name, (key, array) in places.items():
        yield f"npz with {name}", request(npz(image | place | {f"{key}.npy": npy(array)})), MALFORMED
    yield "npz that says it is encrypted", request(_zip_flag(npz(), 1)), MALFORMED
    for method in (1, 9, 12, 14, 99):
        yield f"npz packed by method {method}", request(_zip_method(npz(), method)), MALFORMED
    wrong_sum = bytearray(npz())
    wrong_sum[300] ^= 1
    yield "npz with a wrong checksum", request(bytes(wrong_sum)), MALFORMED
    yield "npz with bytes in front", request(b"PK\3\4" + MARKER.encode() + npz()), ANSWERED
    for said, size, expected in (
        ("with a comment", 0, ANSWERED),
        ("whose comment is longer than it says", -1, MALFORMED),
    ):
        comment = npz()[:-2] + struct.pack("<H", len(MARKER) + size) + MARKER.encode()
        yield f"npz {said}", request(comment), expected
    cut_off = npz()[:-2] + struct.pack("<H", len(MARKER) + 1) + MARKER.encode()
    yield "npz whose comment is cut off", request(cut_off), MALFORMED
    yield "npz with a place, and a place in the options", request(npz(), options=placed), BAD_OPTION


def _zip_flag(content: bytes, flag: int) -> bytes:
    changed = bytearray(content)
    for at in range(len(content) - 4):
        if content[at : at + 4] in (b"PK\3\4", b"PK\1\2"):
            changed[at + (6 if content[at + 2] == 3 else 8)] |= flag
    return bytes(changed)


def _zip_method(content: bytes, method: int) -> bytes:
    changed = bytearray(content)
    for at in range(len(content) - 4):
        if content[at : at + 4] in (b"PK\3\4", b"PK\1\2"):
            changed[at + (8 if content[at + 2] == 3 else 10)] = method
    return bytes(changed)


def _picture_lies() -> Iterator[_Row]:
    png_seed = png()
    ask = seeds()["png"].request
    width, height = _SHAPE[:2]
    for name, header, outcome in (
        ("no width", (0, height, 8, 0, 0, 0, 0), MALFORMED),
        ("no height", (width, 0, 8, 0, 0, 0, 0), MALFORMED),
        ("a width of 2^31", (2**31, height, 8, 0, 0, 0, 0), TOO_LARGE),
        ("a width of 2^31 - 1", (2**31 - 1, height, 8, 0, 0, 0, 0), TOO_LARGE),
        ("40,000 rows", (width, 40_000, 8, 0, 0, 0, 0), MALFORMED),
        ("900 million pixels", (30_000, 30_000, 8, 0, 0, 0, 0), MALFORMED),
        ("one row too many", (width, height + 1, 8, 0, 0, 0, 0), MALFORMED),
        ("3 bits", (width, height, 3, 0, 0, 0, 0), MALFORMED),
        ("64 bits", (width, height, 64, 0, 0, 0, 0), MALFORMED),
        ("colour type 5", (width, height, 8, 5, 0, 0, 0), MALFORMED),
        ("palette without one", (width, height, 8, 3, 0, 0, 0), MALFORMED),
        ("compression 1", (width, height, 8, 0, 1, 0, 0), MALFORMED),
        ("filter 1", (width, height, 8, 0, 0, 1, 0), MALFORMED),
        ("interlace 1, which it is not", (width, height, 8, 0, 0, 0, 1), MALFORMED),
        ("interlace 9", (width, height, 8, 0, 0, 0, 9), MALFORMED),
    ):
        yield f"PNG with {name}", ask(png(header)), outcome
    yield "PNG without IDAT", ask(_PNG_MAGIC + png_seed[8:33] + chunk(b"IEND", b"")), MALFORMED
    yield "PNG whose IDAT is junk", ask(png(rows=MARKER.encode() * 9)), MALFORMED
    yield "PNG without IHDR", ask(_PNG_MAGIC + _TEXT + png_seed[33:]), MALFORMED
    yield "PNG with IHDR twice", ask(png(before=png_seed[8:33])), MALFORMED
    yield "PNG of wrong checksums", ask(png_seed[:29] + b"\0\0\0\0" + png_seed[33:]), MALFORMED
    yield "PNG with a chunk of 2 GB", ask(png(before=b"\x7f\xff\xff\xfftEXt" + MARKER.encode())), MALFORMED
    yield "PNG for a model of volumes", request(png_seed), BAD_SPACING
    ask_stack = seeds()["tiff"].request
    stack = tiff()
    yield "TIFF with an IFD outside", ask_stack(stack[:4] + b"\xff\xff\xff\x7f" + stack[8:]), MALFORMED
    yield "TIFF with an IFD at 0", ask_stack(stack[:4] + bytes(4) + stack[8:]), MALFORMED
    yield "TIFF of version 44", ask_stack(stack[:2] + b"\x2c\0" + stack[4:]), UNKNOWN_FORMAT
    (start,) = struct.unpack_from("<I", stack, 4)
    (entries,) = struct.unpack_from("<H", stack, start)
    loop = bytearray(stack)
    struct.pack_into("<I", loop, start + 2 + 12 * entries, start)
    yield "TIFF whose IFDs go round in a circle", ask_stack(bytes(loop)), MALFORMED
    one = tiff(_SLICE)
    for name, tag, value, outcome in (
        ("no width", 256, 0, MALFORMED),
        ("a width of 2^31", 256, 2**31, TOO_LARGE),
        ("40,000 columns", 256, 40_000, MALFORMED),
        ("0 bits", 258, 0, UNKNOWN_FORMAT),
        ("200 bits", 258, 200, UNKNOWN_FORMAT),
        ("compression 60,000", 259, 60_000, UNKNOWN_FORMAT),
        ("zlib, which it is not", 259, 8, MALFORMED),
        ("JPEG, which it is not", 259, 7, UNKNOWN_FORMAT),
        ("a photometric interpretation of 9", 262, 9, UNKNOWN_FORMAT),
        ("strips outside", 273, 2**31, MALFORMED),
        ("200 samples a pixel", 277, 200, WRONG_CHANNELS),
        ("0 rows a strip", 278, 0, MALFORMED),
        ("a strip of no bytes", 279, 0, MALFORMED),
        ("a strip of 2^32 - 1 bytes", 279, 2**32 - 1, MALFORMED),
    ):
        yield f"TIFF with {name}", ask(tiff_tag(one, tag, kind=4, count=1, value=value)), outcome
    yield "TIFF text of 4 GB", ask(tiff_tag(one, 270, count=2**32 - 1, value=8)), TOO_LARGE
    shape = "shape=" + ",1" * 980_000
    yield "TIFF text of a million dimensions", ask(tiff(_SLICE, description=shape)), WRONG_CHANNELS
    yield "TIFF text of a nested shape", ask(tiff(_SLICE, description='{"shape": ' + "[" * 99_999)), MALFORMED
    for size in ("Infinity", "1e999", "NaN", "null", '"a"', "[]", "9" * 5000):
        text = f'{{"shape": [{size}, 1]}}'
        yield f"TIFF text of a shape of {size[:9]}", ask(tiff(_SLICE, description=text)), MALFORMED
    yield "TIFF text of digits", ask(tiff(_SLICE, description="shape=" + "9" * 99_999)), MALFORMED
    ome = '<TiffData FileName="/etc/passwd"/><Pixels SizeC="1" SizeT="1" SizeZ="1"></Pixels></OME>'
    yield "TIFF text that names a file", ask(tiff(_SLICE, description=ome)), WRONG_CHANNELS
    wrong = _ZYX.astype(np.float32)
    wrong[1, 2, 3] = np.nan
    yield "TIFF voxel NaN", ask_stack(tiff(wrong)), NON_FINITE
    yield "TIFF without a spacing", request(stack), BAD_SPACING


# --- Bombs -----------------------------------------------------------------------------------------------------------


def _bombs() -> Iterator[_Row]:
    front = nifti()
    yield "gzip bomb behind a NIfTI", request(zeros(_BOMB_MIB, 31, front)), TOO_LARGE
    members = gzip.compress(front) + gzip.compress(bytes(MIB), 9) * _BOMB_MIB
    yield "gzip bomb of many members", request(members), TOO_LARGE
    yield "gzip bomb of empty members", request(gzip.compress(front) + gzip.compress(b"", 9) * 50_000), ANSWERED
    yield "gzip bomb alone", request(zeros(_BOMB_MIB, 31)), UNKNOWN_FORMAT
    far = nifti(vox_offset=1e9)
    yield "gzip bomb before the voxels", request(zeros(_BOMB_MIB, 31, far)), MALFORMED
    voxels = _ZYX.tobytes()
    yield "NRRD gzip bomb", request(nrrd({"encoding": "gzip"}, zeros(_BOMB_MIB, 31, voxels))), TOO_LARGE
    packed = bz2.compress(voxels) + bz2.compress(bytes(16 * MIB)) * (_BOMB_MIB // 16)
    yield "NRRD bzip2 bomb", request(nrrd({"encoding": "bzip2"}, packed)), TOO_LARGE
    changed = {"CompressedData": "True"}
    yield "MHA zlib bomb", request(mha(changed, zeros(_BOMB_MIB, 15, voxels))), TOO_LARGE
    yield "MHA gzip bomb", request(mha(changed, zeros(_BOMB_MIB, 31, voxels))), TOO_LARGE
    place = {f"{name}.npy": npy(array) for name, array in _PLACE.items()}
    yield "npz bomb behind an array", request(_npz_bomb("image.npy", npy(), place)), TOO_LARGE
    spacing = _npz_bomb("spacing.npy", npy(np.ones(3)), {"image.npy": npy()})
    yield "npz bomb as the spacing", request(spacing), TOO_LARGE
    yield "npz bomb that lies about its size", request(_npz_bomb("image.npy", npy(), place, says=3000)), MALFORMED
    packed = npz({"image.npy": npy() + bytes(64 * MIB)} | place, zipfile.ZIP_BZIP2)
    yield "npz bomb of bzip2", request(packed), MALFORMED
    yield "zip in zip", request(npz({"image.npy": npz({"image.npy": npz()})} | place)), MALFORMED
    ask = seeds()["png"].request
    text = zeros(_BOMB_MIB, 15, MARKER.encode())
    # texts and profiles say nothing of the voxels: they are not unpacked
    yield "PNG zTXt bomb", ask(png(before=chunk(b"zTXt", b"a\0\0" + text))), ANSWERED
    yield "PNG iTXt bomb", ask(png(before=chunk(b"iTXt", b"a\0\1\0\0\0" + text))), ANSWERED
    yield "PNG iCCP bomb", ask(png(before=chunk(b"iCCP", b"a\0\0" + text))), ANSWERED
    yield "PNG of 100 zTXt bombs", ask(png(before=chunk(b"zTXt", b"a\0\0" + zeros(10, 15)) * 100)), ANSWERED
    yield "PNG of 20,000 chunks", ask(png(before=chunk(b"tEXt", b"a\0b") * 20_000)), TOO_LARGE
    # the decoder stops when it has the picture's rows
    yield "PNG IDAT bomb", ask(png(rows=zeros(_BOMB_MIB, 15))), ANSWERED
    yield (
        "TIFF deflate strip bomb",
        ask(_tiff_pages(1, zeros(_BOMB_MIB, 15, _SLICE.tobytes()), 8)),
        MALFORMED,
    )
    yield "TIFF of 200 pages that share 200,000 strips", ask(_tiff_shared(200, 200_000)), MALFORMED
    yield "TIFF of 17,000 pages", ask(_tiff_pages(17_000, _SLICE.tobytes(), 1)), MALFORMED


def _npz_bomb(name: str, front: bytes, others: Mapping[str, bytes], says: int | None = None) -> bytes:
    """An npz whose member ``name`` is ``front`` and then zeros; its directory tells the size, or lies."""
    size = len(front) + _BOMB_MIB * MIB
    packed = zeros(_BOMB_MIB, -15, front)
    told = size if says is None else says
    fields = struct.pack("<HHHHHIII", 20, 0, 8, 0, 33, 0, len(packed), told)
    local = b"PK\3\4" + fields + struct.pack("<HH", len(name), 0) + name.encode() + packed
    body, entries = (
        local,
        [b"PK\1\2\x14\0" + fields + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name.encode()],
    )
    for other, content in others.items():
        fields = struct.pack("<HHHHHIII", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content))
        entry = b"PK\1\2\x14\0" + fields + struct.pack("<HHHHHII", len(other), 0, 0, 0, 0, 0, len(body))
        entries.append(entry + other.encode())
        body += b"PK\3\4" + fields + struct.pack("<HH", len(other), 0) + other.encode() + content
    directory = b"".join(entries)
    tail = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + tail


def _tiff_pages(pages: int, packed: bytes, compression: int) -> bytes:
    """So many pages that share one strip."""
    height, width = _SLICE.shape
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    size = 2 + len(entries) + 4
    start = 8 + len(packed)
    links = [start + size * number for number in range(1, pages)] + [0]
    directories = b"".join(struct.pack("<H", len(tags)) + entries + struct.pack("<I", link) for link in links)
    return b"II*\0" + struct.pack("<I", start) + packed + directories


def _tiff_shared(pages: int, strips: int) -> bytes:
    """So many pages of one column, whose strips of a byte are all the same byte; one array says where and how long."""
    kind, start = {273: 3, 279: 3}, 8 + 2 * strips
    tags = {256: 1, 257: strips, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 8}
    entries = b"".join(
        struct.pack("<HHII", tag, kind.get(tag, 4), strips if tag in kind else 1, value) for tag, value in tags.items()
    )
    size = 2 + len(entries) + 4
    links = [start + size * number for number in range(1, pages)] + [0]
    directories = b"".join(struct.pack("<H", len(tags)) + entries + struct.pack("<I", link) for link in links)
    return b"II*\0" + struct.pack("<I", start) + b"\1\0" * strips + directories


# --- Content types and headers ---------------------------------------------------------------------------------------


def _content_types() -> Iterator[_Row]:
    packed, plain = seeds()["nii.gz"].body, MARKER.encode()

    def sent(name: bytes, body: bytes) -> bytes:
        return request(body, headers=[(b"Content-Type", name)])

    for name in (b"application/json", b"application/json; charset=utf-16", b"text/plain", b"text/html; charset=junk"):
        yield f"{name.decode()}: text", sent(name, b'"' + plain + b'"'), UNKNOWN_FORMAT
        # TorchServe hands over what it cannot parse as it came
        yield f"{name.decode()}: an image", sent(name, packed), ANSWERED
    for what, text in {"a list": b"[1]", "an object": b'{"image": 1}', "null": b"null", "a number": b"1e999"}.items():
        yield f"JSON: {what}", sent(b"application/json", text), UNKNOWN_FORMAT
    yield "JSON: cut off", sent(b"application/json", b"{"), UNKNOWN_FORMAT
    # TorchServe parses it in the worker; Python's parser gives up by RecursionError
    yield "JSON: nested deeply", sent(b"application/json", b"[" * 100_000), UNKNOWN_FORMAT
    yield "JSON: a number of 100,000 digits", sent(b"application/json", b"9" * 100_000), UNKNOWN_FORMAT
    yield "JSON: a lone surrogate", sent(b"application/json", b'"\\ud800"'), UNKNOWN_FORMAT
    entity = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'
    yield "XML with an entity", sent(b"application/xml", entity), UNKNOWN_FORMAT
    yield "YAML", sent(b"application/yaml", b"!!python/object/apply:os.system ['true']"), UNKNOWN_FORMAT
    yield "a form", sent(b"application/x-www-form-urlencoded", b"image=abc"), UNKNOWN_FORMAT
    yield "a form that is none", sent(b"application/x-www-form-urlencoded", b"image=%zz"), BROKEN_FORM
    for name in (b"image/png", b"", b"/", b";", b"\xff\xfe", b"text", b"application/dicom", b"x" * 1000):
        yield f"type {ascii(name)[:30]} with no image", sent(name, plain), UNKNOWN_FORMAT
    yield "multipart without a boundary", sent(b"multipart/form-data", plain), UNKNOWN_FORMAT
    yield "multipart with an empty boundary", sent(b"multipart/form-data; boundary=", plain), BROKEN_BOUNDARY
    yield "multipart that is none", sent(b"multipart/form-data; boundary=b", plain), MALFORMED
    yield "multipart/mixed", sent(b"multipart/mixed; boundary=b", plain), UNKNOWN_FORMAT
    both = [(b"Content-Type", b"application/json"), (b"Content-Type", b"application/octet-stream")]
    yield "two content types", request(b"{}", headers=both), UNKNOWN_FORMAT
    for coding in (b"gzip", b"deflate", b"br", b"zstd", b"identity", b"junk"):
        # TorchServe does not unpack: what is in the body counts
        yield (
            f"content encoding {coding.decode()}",
            request(zeros(8, 31), headers=[(b"Content-Encoding", coding)]),
            UNKNOWN_FORMAT,
        )


_STRANGE = {
    "Latin-1": b"\xe4\xff",
    "UTF-8": "\u6f22\u5b57".encode(),
    "a tab": b"a\tb",
    "an escape": b"\x1b[31m",
    "129 characters": b"a" * 129,
    "nothing": b"",
    "quotes": b'"}{"status": 200}',
    "a line separator": "\u2028".encode(),
    "encoded line breaks": b"a%0d%0aSet-Cookie: b",
    "an overlong zero": b"\xc0\x80",
}
_BREAKS = {
    "CR": b"a\rSet-Cookie: b",
    "NUL": b"a\0b",
}


def _header_texts() -> Iterator[_Row]:
    good = seeds()["nii.gz"].body

    def id_(value: bytes) -> bytes:
        return request(good, headers=[(b"X-Request-Id", value)])

    for name, value in _STRANGE.items():
        yield f"request id of {name}", id_(value), ANSWERED
        yield f"request id of {name}, refused", request(b"junk", headers=[(b"X-Request-Id", value)]), UNKNOWN_FORMAT
        options = b'{"folds": 0, "' + value.replace(b'"', b"'") + b'": 1}'
        # a header is Latin-1 to TorchServe; control characters are no JSON
        refused = UNKNOWN_OPTION if min(value, default=32) >= 32 else MALFORMED
        yield f"option named by {name}", request(good, options=options), refused
        part = multipart([(b"image", good), (b"im" + value.replace(b'"', b"'"), b"x")])
        yield f"field named by {name}", part, MALFORMED
        file = multipart([(b"image", b"junk")], filename=value.replace(b'"', b"'"))
        yield f"file named by {name}", file, UNKNOWN_FORMAT
    for name, value in _BREAKS.items():
        yield f"request id with {name}", id_(value), BROKEN_HTTP
        yield f"options with {name}", request(good, options=b'{"folds": ' + value + b"}"), BROKEN_HTTP
        yield f"content type with {name}", request(good, headers=[(b"Content-Type", value)]), BROKEN_HTTP
        yield f"field with {name}", multipart([(b"image" + value, b"x")]), MALFORMED
        yield f"file with {name}", multipart([(b"image", b"junk")], filename=value), UNKNOWN_FORMAT
        yield f"header named with {name}", request(good, headers=[(value, b"a")]), BROKEN_HTTP
    yield "a folded header", request(b"junk", headers=[(b"X-Request-Id", b"a\r\n b")]), UNKNOWN_FORMAT
    yield (
        "two request ids",
        request(b"junk", headers=[(b"X-Request-Id", b"a"), (b"x-request-id", b"b")]),
        UNKNOWN_FORMAT,
    )
    yield "two options", request(good, headers=[(b"X-Nnunet-Options", b"{}")]), ANSWERED
    yield "a describe header", request(b"junk", headers=[(b"describe", b"True")]), UNKNOWN_FORMAT
    yield "a header named like a field", request(b"junk", headers=[(b"image", b"a"), (b"body", b"b")]), UNKNOWN_FORMAT
    for where, path in {
        "line break": b"/1.0%0d%0aSet-Cookie:%20b",
        "UTF-8": b"/1.0%c3%a9",
        "no UTF-8": b"/%ff%fe",
        "raw bytes": b"/\xff\xfe",
        "-1": b"/-1",
        "2,000 digits": b"/" + b"9" * 2000,
        "..": b"/..",
        "SQL": b"/1.0'%20OR%20'1'='1",
    }.items():
        yield f"version: {where}", request(good, path=PATH + path), NO_VERSION
    yield "a line break after the version", request(good, path=PATH + b"/1.0/x%0d%0aSet-Cookie:%20b"), BAD_PATH
    yield "text after the version", request(b"junk", path=PATH + b"/1.0/..%2f..%2fetc%2fpasswd"), UNKNOWN_FORMAT
    for where, path in {"zero": b"%00", "a space": b"%20", "UTF-8": b"%c3%a9", "a dot": b"."}.items():
        yield f"model with {where}", request(good, path=PATH + path), NO_MODEL
    for where, path in {"%zz": b"%zz", "%": b"%"}.items():
        yield f"model with {where}", request(good, path=PATH + path), BAD_PATH


# --- Options ---------------------------------------------------------------------------------------------------------


def _options() -> Iterator[_Row]:
    good = seeds()["nii.gz"].body

    def asked(text: object) -> bytes:
        return request(good, options=text if isinstance(text, bytes) else json.dumps(text).encode())

    for option in Options.model_fields:
        wrong: tuple[object, ...] = ({"a": 1}, [[1]], MARKER, -1e300, [None])
        for value in wrong:
            yield f"option {option}: {value}", asked({option: value}), BAD_OPTION
        may_be_none = Options.model_fields[option].default is None
        yield f"option {option}: null", asked(FAST | {option: None}), ANSWERED if may_be_none else BAD_OPTION
    no_folds: tuple[object, ...] = ([], [0, 0], [0, "all", 0], True, "0", 0.5, [1.5])
    for value in no_folds:
        yield f"option folds: {value}", asked({"folds": value}), BAD_OPTION
    other_folds: tuple[object, ...] = (7, -1, [0, 9], "all", 10**30)
    for value in other_folds:
        yield f"option folds: {value}, not there", asked({"folds": value}), UNKNOWN_FOLD
    values_of: dict[str, tuple[object, ...]] = {
        "tile_step_size": (0, 0.049, 1.0001, True, "0.5"),
        "timeout_s": (0, -1, True, "1"),
        "use_mirroring": (0, 1, "true", []),
        "save_probabilities": (0, "yes"),
        "accumulate": ("Half", 16, ""),
        "export": ("EXACT", ["exact"]),
        "output_format": (
            [],
            ["nii", "nii"],
            "dicom",
            ["nii", 1],
            "NII.GZ",
            "png",
            ["nii", "png"],
            "../x",
            "dicom-seg",
        ),
        "seg_type": ("labelmap", "BINARY", 1),
        "spacing": ([1, 1, 1], [1, 1], [], [0, 1, 1], ["1", 1, 1], 1),
        "origin": ([0, 0, 0], []),
        "direction": ([1, 0, 0, 0, 1, 0, 0, 0, 1], []),
        "probability_channels": ([0], [], 0),
        "probability_dtype": ("float16", "float64", 32),
        "probability_format": ("nii", "nrrd", "png"),
    }
    for option, values in values_of.items():
        for value in values:
            yield f"option {option}: {value} alone", asked(FAST | {option: value}), BAD_OPTION
    yield from _probability_options(asked)
    yield from _places(npy())
    yield from _option_texts(asked, good)


def _probability_options(asked: Callable[[object], bytes]) -> Iterator[_Row]:
    probabilities = {"save_probabilities": True}
    for more in (
        {"probability_channels": [99]},
        {"probability_channels": [0, 0]},
        {"probability_channels": [-1]},
        {"probability_channels": ["low"]},
        {"probability_dtype": "float16", "probability_format": "nii"},
        {"export": "linear"},
        {"export": "nearest"},
    ):
        yield f"option save_probabilities with {more}", asked(FAST | probabilities | more), BAD_OPTION


def _places(placed: bytes) -> Iterator[_Row]:
    for more, outcome in (
        ({"spacing": [1.5, 1.5]}, BAD_SPACING),
        ({"spacing": [1.5] * 4}, BAD_SPACING),
        ({"spacing": [1e-9] * 3}, BAD_SPACING),
        ({"spacing": [1.5] * 3, "origin": [0, 0]}, MALFORMED),
        ({"spacing": [1.5] * 3, "origin": [1e30] * 3}, MALFORMED),
        ({"spacing": [1.5] * 3, "direction": [0] * 9}, MALFORMED),
        ({"spacing": [1.5] * 3, "direction": [1, 0, 0, 1]}, MALFORMED),
        ({"spacing": [1.5] * 3, "direction": [2, 0, 0, 0, 1, 0, 0, 0, 1]}, MALFORMED),
    ):
        yield f"options for an array: {more}", request(placed, options=FAST | more), outcome


def _option_texts(asked: Callable[[object], bytes], good: bytes) -> Iterator[_Row]:
    for name, text in {
        "cut off": b"{",
        "a list": b"[]",
        "null": b"null",
        "a number": b"1",
        "text": b'"folds"',
        "two objects": b"{}{}",
        "a comment": b"{/* */}",
        "single quotes": b"{'folds': 0}",
        "UTF-16": '{"folds": 0}'.encode("utf-16-le").replace(b"\0", b" ") + b"\xff",
        "deep": b'{"folds": ' + b"[" * 1500 + b"]" * 1500 + b"}",
        "4,097 bytes": b'{"folds": 0' + b" " * (MAX_OPTIONS_BYTES - 11) + b"}",
        "7,000 bytes": b'{"folds": 0' + b" " * 6988 + b"}",
    }.items():
        yield f"options: {name}", asked(text), MALFORMED
    for name, text in {
        "NaN": b'{"tile_step_size": NaN}',
        "infinity": b'{"tile_step_size": Infinity}',
        "1e999": b'{"timeout_s": 1e999}',
        "a spacing of infinity": b'{"spacing": [Infinity, 1, 1]}',
    }.items():
        yield f"options: {name}", asked(text), BAD_OPTION
    # a header is Latin-1 to TorchServe, so this is a letter
    yield "options: no UTF-8", asked(b'{"folds": "\xff"}'), BAD_OPTION
    yield "options: no UTF-8 in a part", multipart([(b"image", good), (b"options", b'{"folds": "\xff"}')]), MALFORMED
    yield "options: 4,000 digits", asked(b'{"folds": ' + b"9" * 4000 + b"}"), UNKNOWN_FOLD
    yield "options: a lone surrogate", asked(b'{"folds": "\\ud800"}'), MALFORMED
    yield "options: an escaped name", asked(b'{"\\u0066olds": 9}'), UNKNOWN_FOLD
    yield "options: a key twice, the last one wrong", asked(b'{"folds": 0, "folds": 9}'), UNKNOWN_FOLD
    yield "options: all 300 unknown", asked({f"o{n}": 1 for n in range(300)}), UNKNOWN_OPTION
    for key in ("Folds", "fold", "", "__class__", "model_config", "folds\0", "folds ", "a" * 3000):
        yield f"options: the name {ascii(key)[:30]}", asked({key: 0}), UNKNOWN_OPTION
    yield "options: in vain, no image", request(b"junk", options=b'{"folds": 9}'), UNKNOWN_FOLD
    yield "options: a deadline that has passed", asked(FAST | {"timeout_s": 1e-9}), DEADLINE


# --- Multipart -------------------------------------------------------------------------------------------------------


def multipart(
    parts: Pairs,
    *,
    filename: bytes | None = b"a",
    boundary: bytes = b"frontier",
    says: bytes | None = None,
    end: bytes | None = None,
    options: Mapping[str, object] | None = None,
    path: bytes = PATH,
) -> bytes:
    """A multipart request of (field name, content); ``says`` is the boundary that the header names."""
    file = b"" if filename is None else b'; filename="' + filename + b'"'
    body = b"".join(
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name + b'"' + file + b"\r\n"
        b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"
        for name, content in parts
    )
    body += b"--" + boundary + b"--\r\n" if end is None else end
    kind = b"multipart/form-data; boundary=" + (boundary if says is None else says)
    return request(body, headers=[(b"Content-Type", kind)], options=options, path=path)


def _multiparts() -> Iterator[_Row]:
    good = seeds()["nii.gz"].body
    fast = json.dumps(FAST).encode()
    image, options = (b"image", good), (b"options", fast)
    for name, parts, outcome in (
        ("no parts", [], MALFORMED),
        ("options alone", [options], MALFORMED),
        ("an empty image", [(b"image", b""), options], UNKNOWN_FORMAT),
        ("an image of text", [(b"image", MARKER.encode())], UNKNOWN_FORMAT),
        ("100 parts", [(b"f%d" % n, b"x") for n in range(100)], TOO_LARGE),
        ("100 channels", [(b"image_%04d" % n, b"x") for n in range(100)], TOO_LARGE),
        ("65 channels", [(b"image_%04d" % n, good) for n in range(65)], WRONG_CHANNELS),
        ("two channels", [(b"image_0000", good), (b"image_0001", good)], WRONG_CHANNELS),
        ("an unknown field", [image, (b"mask", good)], MALFORMED),
        ("a field of no name", [image, (b"", b"x")], BROKEN_FORM),
        ("image and image_0000", [image, (b"image_0000", good)], MALFORMED),
        ("a gap", [(b"image_0000", good), (b"image_0002", good)], MALFORMED),
        ("a start at 1", [(b"image_0001", good)], MALFORMED),
        ("image_9999", [(b"image_9999", good)], MALFORMED),
        ("image_00000", [(b"image_00000", good)], MALFORMED),
        ("image_-001", [(b"image_-001", good)], MALFORMED),
        ("Arabic digits", [("image_٠٠٠٠".encode(), good)], MALFORMED),
        ("IMAGE", [(b"IMAGE", good)], MALFORMED),
        ("image[]", [(b"image[]", good)], MALFORMED),
        ("body and image", [image, (b"body", good)], MALFORMED),
        *(
            (f"a field named {name.decode()}", [image, (name, b"x")], MALFORMED)
            for name in (
                b"Host",
                b"host",
                b"describe",
                b"Content-Type",
                b"X-Nnunet-Options",
                b"X-Request-Id",
                b"__proto__",
            )
        ),
        ("options that are none", [image, (b"options", b"{")], MALFORMED),
        ("options of zero bytes", [image, (b"options", bytes(10))], MALFORMED),
        ("options of 4,097 bytes", [image, (b"options", b" " * (MAX_OPTIONS_BYTES + 1))], MALFORMED),
        ("options that are an image", [image, (b"options", good)], MALFORMED),
        ("unknown fold in its options", [image, (b"options", b'{"folds": 9}')], UNKNOWN_FOLD),
        ("image twice, the last one junk", [image, (b"image", b"junk")], UNKNOWN_FORMAT),
        ("options twice, the last one junk", [image, options, (b"options", b"{")], MALFORMED),
    ):
        yield f"multipart with {name}", multipart(parts), outcome
    yield "multipart with options in both places", multipart([image, options], options=FAST), MALFORMED
    yield (
        "multipart of channels of two shapes",
        multipart(
            [(b"image_0000", good), (b"image_0001", gzip.compress(nifti(array=_VOXELS[:-1])))],
            path=b"/predictions/regions",
        ),
        CHANNELS_DISAGREE,
    )
    yield "multipart, one channel for a model of two", multipart([image], path=b"/predictions/regions"), WRONG_CHANNELS
    # TorchServe drops what its parser cannot finish, and what remains is judged
    for name, wire in {
        "another boundary": multipart([image], says=b"elsewhere"),
        "a boundary that is a prefix": multipart([image], says=b"front"),
        "an open quote about its boundary": multipart([image], says=b'"frontier'),
        "a boundary of odd bytes": multipart([image], boundary=b"a\xffb"),
        "no end": multipart([(b"image", b"junk")], end=b""),
    }.items():
        yield f"multipart with {name}", wire, MALFORMED
    yield "multipart with a boundary of 5,000", multipart([image], boundary=b"a" * 5000), ANSWERED
    inner = multipart([image], boundary=b"inner").split(b"\r\n\r\n", 1)[1]
    yield "multipart in multipart", multipart([(b"image", inner)]), UNKNOWN_FORMAT
    yield from _part_headers()


def _part_headers() -> Iterator[_Row]:
    image = b'Content-Disposition: form-data; name="image"'
    file = image + b'; filename="a"\r\n'
    junk = b"Content-Type: text/plain; charset=junk"
    nested = image + b"\r\nContent-Type: multipart/mixed"
    for name, lines, outcome in (
        ("without a disposition", b"Content-Type: application/octet-stream", BROKEN_FORM),
        ("without a name", b"Content-Disposition: form-data", BROKEN_FORM),
        ("with an open quote", image[:-1], UNKNOWN_FORMAT),
        ("with NUL", b'Content-Disposition: form-data; name="im\0age"; filename="a"', MALFORMED),
        ("with a line break", image[:-1] + b'\r\nX: y"; filename="a"', UNKNOWN_FORMAT),
        ("without headers", b"", BROKEN_FORM),
        ("with 100 kB of headers", image + b'; x="' + b"a" * 100_000 + b'"', UNKNOWN_FORMAT),
        ("with no colon", b"garbage", BROKEN_FORM),
        ("of JSON", file + b"Content-Type: application/json", UNKNOWN_FORMAT),
        ("of text in no charset", file + junk, BROKEN_FORM),
        ("of options in no charset", image.replace(b"image", b"options") + b"\r\n" + junk, BROKEN_FORM),
        ("that is nested", nested + b"; boundary=b", MALFORMED),
        ("that is nested without a boundary", nested, NO_SUCH_INDEX),
        ("with a length that lies", file + b"Content-Length: 999999", UNKNOWN_FORMAT),
        ("with a negative length", file + b"Content-Length: -5", UNKNOWN_FORMAT),
        ("in base64", file + b"Content-Transfer-Encoding: base64", BROKEN_FORM),
        ("in an unknown encoding", image + b"\r\nContent-Transfer-Encoding: x", UNKNOWN_FORMAT),
        ("with a path", image + b'; filename="/etc/passwd"', UNKNOWN_FORMAT),
        ("with a patient", image + b'; filename="' + MARKER.encode() + b'.nii"', UNKNOWN_FORMAT),
    ):
        body = b"--b\r\n" + lines + b"\r\n\r\n" + MARKER.encode() + b"\r\n--b--\r\n"
        kind = [(b"Content-Type", b"multipart/form-data; boundary=b")]
        yield f"part {name}", request(body, headers=kind, options=None), outcome


# --- HTTP ------------------------------------------------------------------------------------------------------------


def _http() -> Iterator[_Row]:
    good = seeds()["nii.gz"].body
    size = len(good)
    # what follows the body is read as another request at once, and may be answered before the first
    for name, length, outcome in (("too small", b"%d" % (size - 50), MALFORMED), ("0", b"0", UNKNOWN_FORMAT)):
        yield f"Content-Length {name}", request(good, length=length), {outcome, BROKEN_HTTP}
    for name, length in {
        "-1": b"-1",
        "text": b"abc",
        "hexadecimal": b"0x10",
        "a list": b"5, 5",
        "30 digits": b"9" * 30,
        "twice": b"%d\r\nContent-Length: 5" % size,
    }.items():
        yield f"Content-Length {name}", request(good, length=length), BROKEN_HTTP
    yield "Content-Length 10^12", request(good, length=b"9" * 12), FRONT_END_TOO_LARGE
    yield "Content-Length too large, then gone", request(good, length=b"%d" % (size + 50)), CLOSED, True
    yield "a body above both limits", request(bytes(4 * MIB)), FRONT_END_TOO_LARGE
    yield "a body above our limit", request(bytes(2 * MIB + 1)), TOO_LARGE
    chunked = [(b"Transfer-Encoding", b"chunked")]
    for name, body, outcome in (
        ("garbage", b"zz\r\nabc\r\n0\r\n\r\n", BROKEN_HTTP),
        ("a size of 2^63 - 1", b"7fffffffffffffff\r\nabc\r\n0\r\n\r\n", BROKEN_HTTP),
        ("a size of 2^32 - 1", b"ffffffff\r\nabc\r\n0\r\n\r\n", BROKEN_HTTP),
        ("a size that lies", b"5\r\n" + good + b"\r\n0\r\n\r\n", BROKEN_HTTP),
        ("a negative size", b"-5\r\nabc\r\n0\r\n\r\n", CLOSED),
        ("no last chunk", b"%x\r\n" % size + good + b"\r\n", CLOSED),
        ("nothing", b"0\r\n\r\n", UNKNOWN_FORMAT),
        ("10,000 chunks of a byte", b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n", UNKNOWN_FORMAT),
        ("a trailer", b"4\r\njunk\r\n0\r\nX-Request-Id: " + MARKER.encode() + b"\r\n\r\n", UNKNOWN_FORMAT),
    ):
        ends = outcome == CLOSED
        yield f"chunked: {name}", request(body, headers=chunked, length=None), outcome, ends
    yield "chunked, and a length that disagrees", request(good, headers=chunked), BROKEN_HTTP
    # the chunks count, as RFC 9112 has it; TorchServe answers requests of one connection in the order of completion
    smuggled = b"0\r\n\r\nGET /ping HTTP/1.1\r\n\r\n"
    hidden = {UNKNOWN_FORMAT, ANSWERED}
    yield "chunked, and a length that hides a request", request(smuggled, headers=chunked), hidden
    for coding in (b"gzip", b"identity", b"xchunked", b"chunked, chunked"):
        headers = [(b"Transfer-Encoding", coding)]
        yield f"transfer encoding {coding.decode()}", request(good, headers=headers, length=None), BROKEN_HTTP
    for name, headers in {
        "a header of 9 kB": [(b"X-A", b"a" * 9000)],
        "2,000 headers": [(b"X-%d" % n, b"a") for n in range(2000)],
        "no colon": [(b"garbage\r\nX-A", b"a")],
        "a header of no name": [(b"", b"a")],
        "a space before the colon": [(b"X-A ", b"a")],
    }.items():
        yield f"HTTP with {name}", request(good, headers=headers), BROKEN_HTTP
    yield "a request line of 5 kB", request(good, path=PATH + b"?" + b"a" * 5000), BROKEN_HTTP
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"BREW", b"post"):
        yield f"{method.decode()} of no image", request(b"junk", method=method), UNKNOWN_FORMAT
    yield "GET without a body", request(b"", method=b"GET", length=None), UNKNOWN_FORMAT
    yield "OPTIONS", request(b"junk", method=b"OPTIONS"), ANSWERED
    yield "HEAD", request(b"junk", method=b"HEAD"), (415, "")
    for name, path, outcome in (
        ("two slashes in front", b"//predictions//five_folds", NO_RESOURCE),
        ("two slashes within", b"/predictions//five_folds", NO_MODEL),
        ("dots", b"/predictions/../predictions/five_folds", NO_MODEL),
        ("encoded dots", b"/predictions/..%2f..%2fetc%2fpasswd", NO_MODEL),
        ("no model", b"/predictions", NO_RESOURCE),
        ("no model but a slash", b"/predictions/", NO_RESOURCE),
        ("the root", b"/", NO_METHOD),
        ("a whole URL", b"http://localhost/predictions/five_folds", NO_RESOURCE),
        ("a star", b"*", NO_SUCH_INDEX),
        ("another model", b"/predictions/" + b"a" * 200, NO_MODEL),
        ("a management call", b"/models?url=http://localhost/x.mar", NO_RESOURCE),
        ("a model to delete", b"/models/five_folds", NO_RESOURCE),
        ("an encoded slash", b"/predictions%2ffive_folds", UNKNOWN_FORMAT),
        ("an encoded slash before the version", b"/predictions/five_folds%2f1.0", UNKNOWN_FORMAT),
        ("a slash at the end", b"/predictions/five_folds/", UNKNOWN_FORMAT),
        ("a query", b"/predictions/five_folds?folds=9", UNKNOWN_FORMAT),
    ):
        yield f"path with {name}", request(b"junk", path=path), outcome
    for version in (b"HTTP/1.0", b"HTTP/9.9", b"FTP/1.1"):
        yield f"version {version.decode()}", request(b"junk", version=version), UNKNOWN_FORMAT
    yield "no version", b"POST " + PATH + b"\r\n\r\n", BROKEN_HTTP, True
    # without a length there is no body: what follows is read as a second request, which may be answered first
    no_length = request(b"junk\r\n\r\n", version=b"HTTP/1.0", length=None)
    yield "HTTP/1.0 without a length", no_length, {UNKNOWN_FORMAT, BROKEN_HTTP}, True
    yield "TLS on a plain port", b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3" + bytes(200) + b"\r\n\r\n", BROKEN_HTTP, True
    yield "HTTP/2 by prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30), NO_SUCH_INDEX, True
    yield "empty lines", b"\r\n\r\n", CLOSED, True
    yield "a connection that says nothing", b"", CLOSED, True
    yield "a request line that never ends", b"A" * 20_000, BROKEN_HTTP, True
    yield "half a header", b"POST " + PATH + b" HTTP/1.1\r\nHost: loc", CLOSED, True
    yield "Expect: 100-continue", request(b"junk", headers=[(b"Expect", b"100-continue")]), UNKNOWN_FORMAT
    yield "Expect: what nobody has", request(b"junk", headers=[(b"Expect", b"200-ok")]), NO_EXPECTATION
    promised = request(b"", headers=[(b"Expect", b"100-continue")], length=b"9" * 9)
    yield "Expect: 100-continue for 1 GB", promised, FRONT_END_TOO_LARGE
    piped = request(b"junk").replace(b"Connection: close\r\n", b"")
    # the second request is read at once, and may be answered before the first
    yield "junk behind a request", piped + b"GARBAGE\r\n\r\n", {UNKNOWN_FORMAT, BROKEN_HTTP}
    yield "half a request behind a request", piped + request(b"", length=b"5"), UNKNOWN_FORMAT
    for header in ((b"Upgrade", b"h2c"), (b"Upgrade", b"websocket"), (b"Range", b"bytes=0-1"), (b"Host", b"evil")):
        yield b": ".join(header).decode(), request(b"junk", headers=[header]), UNKNOWN_FORMAT


_CATEGORIES: dict[str, Callable[[], Iterator[_Row]]] = {
    "truncation": _truncations,
    "bit flip": _bit_flips,
    "NIfTI lie": _nifti_lies,
    "NRRD lie": _nrrd_lies,
    "MHA lie": _mha_lies,
    "array lie": _array_lies,
    "picture lie": _picture_lies,
    "bomb": _bombs,
    "content type": _content_types,
    "header text": _header_texts,
    "options": _options,
    "multipart": _multiparts,
    "HTTP": _http,
}

CATEGORIES = tuple(_CATEGORIES)
