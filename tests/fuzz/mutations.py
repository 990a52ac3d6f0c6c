"""Bytes -> other bytes: what chance, a broken disk and an attacker do to a file.

Half of the mutations are blind. The others know the format that they find in the bytes, so that the damage reaches
what lies behind a checksum, a decompressor or a text header.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from nibabel.nifti1 import header_dtype as nifti_1
from nibabel.nifti2 import header_dtype as nifti_2

from .guard import CANARY

_LARGEST_BYTES = 2**18
_INNER_BYTES = 2**16
"""Of a packed stream, of which a seed's holds far less."""

_BYTES = (0, 1, 0x7F, 0x80, 0xFF)
_INTEGERS = (
    0, 1, -1, 2, 3, 7, 8, 64, 127, 128, 255, 256, 1000, 32767, 32768, 65535, 65536, 2**20, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
_FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-7, 1e-38, 1e-320, 1e9, 1e38, 3e38, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
_NUMBERS = (
    b"0", b"-1", b"1", b"2", b"4", b"256", b"65536", b"2147483648", b"4294967296", b"18446744073709551616", b"9" * 40,
    b"9" * 5000, b"1e9", b"1e308", b"1e999", b"nan", b"-inf", b"0x10", b"1_000", b"0.5", b".", b"-", b"", b"1e-320",
    b"\xd9\xa1", b"\xb2", b"True", b"1j",
)  # fmt: skip
_TOKENS = (
    b"\n", b"\r\n", b"\n\n", b"\0", b" ", b"\t", b"=", b":", b":=", b"(", b"(1,0,0)", b"none", b"(nan,nan,nan)", b'"',
    b"[", b"{", b"#", b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}",
    b"{'descr': '<f4', 'fortran_order': True, 'shape': ()}", b"'<U9999'", b"'|V1'", b"'<m8[ns]'", b"'<c16'", b"'>f2'",
    b"[('a', '<i2')]", b"(1,)", b"(-1, -1, -1)", b"(True, 2, 2)", b"((2, 2), 2)", b"encoding: hex\n",
    b"encoding: gz\n", b"encoding: txt\n", b"encoding: bz2\n", b"endian: big\n", b"byte skip: -1\n",
    b"byte skip: 7\n", b"line skip: 2\n", b"line skip: 99999999999\n", b"byteskip: 99999999999\n", b"block size: 8\n",
    b"type: block\n", b"kinds: vector domain domain\n", b"kinds: list domain domain\n", b"dimension: 17\n",
    b"sizes: 0 0 0\n", b"space dimension: 3\n", b"space: scanner-xyz\n", b"space: RAS\n",
    b'space units: "mm" "mm" "mm"\n', b"centerings: cell node cell\n", b"units: mm mm mm\n",
    b"measurement frame: (1,0,0) (0,1,0) (0,0,1)\n", b"old min: 0\n", b"data file: " + CANARY.encode() + b"\n",
    b"thicknesses: 1 1 1\n", b"axis mins: 0 0 0\n", b"DOE:=JANE\n", b"NDims = 17\n", b"BinaryData = False\n",
    b"BinaryDataByteOrderMSB = True\n", b"CompressedData = True\n", b"CompressedDataSize = 1\n",
    b"CompressedDataSize = -1\n", b"ElementNumberOfChannels = 4\n", b"ElementNumberOfChannels = 0\n",
    b"HeaderSize = -1\n", b"HeaderSize = 17\n", b"ElementType = MET_FLOAT_ARRAY\n", b"ElementType = MET_STRING\n",
    b"ElementType = MET_LONG\n", b"ElementDataFile = " + CANARY.encode() + b"\n", b"ElementDataFile = LIST 2\n",
    b"ElementToIntensityFunctionSlope = 2\n", b"ElementSize = 1 1 1\n", b"Orientation = 1 0 0 0 1 0 0 0 1\n",
    b"Rotation = 0 0 0 0 0 0 0 0 0\n", b"Origin = 1 2 3\n", b"Position = 1 2 3\n", b"CenterOfRotation = 5 5 5\n",
    b"\x1f\x8b\x08\0", b"BZh9", b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"II*\0", b"PK\3\4", b"PK\5\6", b"NRRD0005\n",
    b"n+1\0", b"n+2\0", b"spacing", b"folds", b"null", b"true", b"1e400", b"\\u0000", b"\\ud800", b"9" * 400,
    b"image_0000", b"image_9999", b"X-Request-Id",
)  # fmt: skip

_NUMBER = re.compile(rb"[-+]?[0-9][0-9.eE+-]*")
_PNG, _GZIP, _ZIP = b"\x89PNG\r\n\x1a\n", b"\x1f\x8b", b"PK\3\4"
_PNG_CHUNKS = (
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"pHYs", b"acTL", b"fcTL",
    b"fdAT", b"eXIf", b"gAMA", b"CgBI",
)  # fmt: skip
_TIFF_TAGS = (
    254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 282, 284, 296, 317, 320, 322, 323, 324, 325, 330,
    338, 339, 347, 32997, 33628, 34377, 50838, 50839, 34412, 42112, 51123,
)  # fmt: skip
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34712, 34887, 34925, 50000, 50001, 50002, 52546, 65535)


def mutate(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One to a handful of mutations of ``data``.

    Args:
        data: what to change.
        others: what may be spliced in.
        random: the only source of chance.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        data = _once(data, others, random)[:_LARGEST_BYTES]
    return data


def _once(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    if random.random() < 0.6 and (knowing := _knowing(data)) is not None:
        try:
            return knowing(data, others, random)
        except (struct.error, IndexError, ValueError, OverflowError):  # too damaged to be known
            pass
    return random.choice(_BLIND)(data, others, random)


_Mutation = Callable[[bytes, Sequence[bytes], Random], bytes]


def _span(data: bytes, random: Random, longest: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 4, 8, random.randint(1, longest))))


def _flip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _set(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, stop = _span(data, random)
    value = random.choice((*_BYTES, random.randrange(256)))
    return data[:start] + bytes([value]) * (stop - start) + data[stop:]


def _cut(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, stop = _span(data, random)
    return data[:start] + data[stop:]


def _insert(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    new = random.choice(
        (random.choice(_TOKENS), random.randbytes(random.randint(1, 32)), bytes(random.choice((1, 4096))))
    )
    return data[:at] + new + data[at:]


def _repeat(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, stop = _span(data, random, 512)
    return data[:stop] + data[start:stop] * random.choice((1, 1, 3, 200)) + data[stop:]


def _splice(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(others) if others else data
    at, start = random.randrange(len(data) + 1), random.randrange(len(other) + 1)
    if random.random() < 0.5:
        return data[:at] + other[start:]
    piece = other[start : start + random.randint(1, 64)]
    return data[:at] + piece + data[at + len(piece) :]


def _integer(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    size = random.choice((1, 2, 4, 8))
    at = random.randrange(len(data) + 1)
    order = random.choice(("little", "big"))
    new = (random.choice(_INTEGERS) % (1 << 8 * size)).to_bytes(size, "little" if order == "little" else "big")
    return data[:at] + new + data[at + size :]


def _number(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    found = list(_NUMBER.finditer(data[:4096]))
    if not found:
        return _integer(data, others, random)
    match = random.choice(found)
    return data[: match.start()] + random.choice(_NUMBERS) + data[match.end() :]


_BLIND: tuple[_Mutation, ...] = (_flip, _flip, _set, _cut, _remove, _insert, _repeat, _splice, _integer, _number)


def _knowing(data: bytes) -> _Mutation | None:
    """The mutation that knows the format."""
    for start, mutation in _KNOWING.items():
        if data.startswith(start):
            return mutation
    if data[344:348] in (b"n+1\0", b"ni1\0") or data[4:8] == b"n+2\0":
        return _nifti
    return _text if b"NDims" in data[:200] or data[:1] in b"{[" else None


def _gzip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Something else inside, packed again."""
    try:
        inner = zlib.decompressobj(31).decompress(data, _INNER_BYTES)
    except zlib.error:
        return _flip(data, others, random)
    packer = zlib.compressobj(random.choice((0, 1, 9)), zlib.DEFLATED, 31)
    packed = packer.compress(_once(inner, others, random)) + packer.flush()
    match random.randrange(6):
        case 0:
            return packed + packed
        case 1:  # a checksum or a length that is wrong
            return packed[:-8] + _integer(packed[-8:], others, random)[:8]
        case 2:  # a header with optional fields
            return packed[:3] + bytes([random.randrange(256)]) + packed[4:]
    return packed


def _nifti(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    kind = nifti_2 if data[4:8] == b"n+2\0" else nifti_1
    order = "<" if data[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    name = random.choice([name for name in kind.names or () if name not in ("sizeof_hdr", "magic")])
    dtype, offset = kind.fields[name][:2] if kind.fields else (kind, 0)
    base = dtype.base
    if base.kind not in "iuf":
        return _flip(data, others, random)
    count = dtype.itemsize // base.itemsize
    at = int(offset) + base.itemsize * random.randrange(count)
    if base.kind == "f":
        with np.errstate(over="ignore"):
            new = np.array(random.choice(_FLOATS)).astype(base.newbyteorder(order)).tobytes()
    else:
        value = random.choice((*_INTEGERS, *range(10)))
        new = (value % (1 << 8 * int(base.itemsize))).to_bytes(base.itemsize, "little" if order == "<" else "big")
    return data[:at] + new + data[at + base.itemsize :]


def _text(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The lines of a text header."""
    ends = [end for mark in (b"\n\n", b"ElementDataFile") if (end := data.find(mark)) >= 0]
    end = min(ends, default=min(len(data), 4096))
    lines = data[:end].split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, random.choice(lines))
        case 2:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines.insert(at, random.choice(_TOKENS).rstrip(b"\n"))
        case 4:
            lines[at] = lines[at].replace(
                random.choice((b" ", b",", b":", b"=")), random.choice((b"", b"  ", b"\t", b"\0")), 1
            )
        case 5:
            lines[at] += random.choice((b" ", b"\r", b" 1", b" none", b"9" * 100, b"\xff"))
        case _:
            lines[at] = _number(lines[at], others, random)
    return b"\n".join(lines) + data[end:]


def _npy(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    if len(data) < 12:
        return _flip(data, others, random)
    wide = data[6] > 1
    start = 12 if wide else 10
    length = int.from_bytes(data[8:start], "little")
    header, voxels = data[start : start + length], data[start + length :]
    changed = random.choice((_number, _number, _insert, _remove, _flip, _descr))(header, others, random)
    if random.random() < 0.8:
        length = len(changed)
    length %= 1 << 8 * (start - 8)
    return data[:8] + length.to_bytes(start - 8, "little") + changed + voxels


def _descr(header: bytes, others: Sequence[bytes], random: Random) -> bytes:
    dtypes = (
        b"<f8",
        b">u2",
        b"|b1",
        b"|O",
        b"<U3",
        b"|S1",
        b"<c8",
        b"<f2",
        b"<f16",
        b"|V4",
        b"<M8[s]",
        b"(2,)<i2",
        b"i4,f4",
        b"",
    )
    return re.sub(rb"'descr': '[^']*'", lambda _: b"'descr': '" + random.choice(dtypes) + b"'", header)


def _zip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The entries of an archive, or what its directory says of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.open(info).read(_INNER_BYTES)) for info in archive.infolist()[:20]]
    except Exception:  # noqa: BLE001 (a damaged archive, in whatever way)
        return _flip(data, others, random)
    at = random.randrange(len(entries)) if entries else 0
    match random.randrange(8):
        case 0:  # a lie in the central directory, where sizes and offsets are
            start = data.rfind(b"PK\1\2")
            return data[:start] + _integer(data[start : start + 46], others, random) + data[start + 46 :]
        case 1:
            entries = entries * 2
        case 2:
            entries.append(
                (random.choice(("spacing.npy", "origin.npy", "image.npy", "../x", "a", "/etc/x", "\0")), b"x")
            )
        case 3 if entries:
            entries[at] = (
                random.choice(("image", "spacing.npy", "direction.npy", "", CANARY, "x" * 300)),
                entries[at][1],
            )
        case 4 if entries:
            del entries[at]
        case _ if entries:
            entries[at] = (entries[at][0], _once(entries[at][1], others, random))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name or "x")
            packing = random.choice(
                (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            )
            archive.NameToInfo.pop(info.filename, None)  # so that twice the same name is no warning
            archive.writestr(info, content, packing)
    return file.getvalue()


def _png(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: C901 (one case a mutation)
    """Chunks, with their checksums set right."""
    chunks = _chunks(data)
    if not chunks:
        return _flip(data, others, random)
    at = random.randrange(len(chunks))
    name, content = chunks[at]
    match random.randrange(9):
        case 0:
            del chunks[at]
        case 1:
            chunks.insert(random.randrange(len(chunks) + 1), chunks[at])
        case 2:
            other = random.randrange(len(chunks))
            chunks[at], chunks[other] = chunks[other], chunks[at]
        case 3:
            chunks[at] = (random.choice(_PNG_CHUNKS), content)
        case 4:
            chunks.insert(max(1, at), (random.choice(_PNG_CHUNKS), random.randbytes(random.randint(0, 30))))
        case 5 if name == b"IDAT":
            try:
                inner = zlib.decompressobj().decompress(content, _INNER_BYTES)
            except zlib.error:
                inner = content
            chunks[at] = (name, zlib.compress(_once(inner, others, random), 1))
        case 6 if chunks[0][0] == b"IHDR":
            chunks[0] = (b"IHDR", _header_of_png(chunks[0][1], random))
        case 7:  # a length that is wrong
            built = _build_png(chunks)
            offset = 8 + sum(12 + len(content) for _, content in chunks[:at])
            return built[:offset] + struct.pack(">I", random.choice(_INTEGERS) % 2**32) + built[offset + 4 :]
        case _:
            chunks[at] = (name, random.choice(_BLIND)(content, others, random))
    return _build_png(chunks)


def _header_of_png(content: bytes, random: Random) -> bytes:
    fields = list(struct.unpack(">IIBBBBB", content)) if len(content) == 13 else [1, 1, 8, 0, 0, 0, 0]
    at = random.randrange(7)
    choices = (
        (1, 0, 4, 9, 512, 2**15, 2**31 - 1, 2**32 - 1), (1, 0, 4, 9, 512, 2**15, 2**31 - 1, 2**32 - 1),
        (1, 2, 4, 8, 16, 0, 3, 255), (0, 2, 3, 4, 6, 1, 255), (0, 1), (0, 1), (0, 1, 2),
    )  # fmt: skip
    fields[at] = random.choice(choices[at])
    return struct.pack(">IIBBBBB", *fields)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = []
    at = 8
    while at + 12 <= len(data) and len(found) < 100:
        [length] = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _build_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    built = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return _PNG + b"".join(built)


def _tiff(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The entries of a directory: tag, type, count and value."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    entry, head = (20, ">Q" if order == ">" else "<Q") if big else (12, order + "I")
    directories = _directories(data, order, head, big=big)
    start, count = random.choice(directories)
    at = start + entry * random.randrange(count)
    link = start + entry * count
    match random.randrange(8):
        case 0:
            new = struct.pack(order + "H", random.choice(_TIFF_TAGS))
        case 1:
            at, new = at + 2, struct.pack(order + "H", random.choice((1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 0, 99)))
        case 2:
            at, new = at + 4, struct.pack(head, random.choice(_INTEGERS) % 256 ** struct.calcsize(head))
        case 3:  # the next directory: none, the same one, anywhere
            where = random.choice((0, start - 2, 1, 8, random.randrange(len(data)), 2**31))
            at, new = link, struct.pack(head, where)
        case 4:
            at, new = start - (8 if big else 2), struct.pack(order + "H", random.choice((0, 1, count + 1, 65535)))
        case 5:
            tags = {
                struct.unpack_from(order + "H", data, start + entry * n)[0]: start + entry * n for n in range(count)
            }
            value = 8 + (4 if big else 0)
            at, new = tags.get(259, at) + value, struct.pack(order + "H", random.choice(_TIFF_COMPRESSIONS))
        case _:
            value, width = (12, "Q") if big else (8, random.choice("HI"))
            number = random.choice((*_INTEGERS, *range(20))) % 256 ** struct.calcsize("<" + width)
            at, new = at + value, struct.pack(order + width, number)
    return data[:at] + new + data[at + len(new) :]


def _directories(data: bytes, order: str, head: str, *, big: bool) -> list[tuple[int, int]]:
    """Where the entries of each directory start, and how many there are."""
    found: list[tuple[int, int]] = []
    [at] = struct.unpack_from(head, data, 8 if big else 4)
    while at and len(found) < 8:
        [count] = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        start = at + (8 if big else 2)
        if count > 100 or not count:
            break
        found.append((start, count))
        [at] = struct.unpack_from(head, data, start + (20 if big else 12) * count)
    return found


_KNOWING: dict[bytes, _Mutation] = {
    _GZIP: _gzip,
    _PNG: _png,
    _ZIP: _zip,
    b"II": _tiff,
    b"MM": _tiff,
    b"\x93NUMPY": _npy,
    b"NRRD": _text,
}
