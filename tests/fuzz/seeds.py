"""The seed corpus, made in memory by the writers that clients have; nothing binary lies in git.

Images are a few voxels large, so that most mutations hit a header. Every free-text field holds :data:`SECRET`, which
must turn up neither in a message nor in an answer, and every name of a file is that of :data:`CANARY`, which must
never be opened.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import tifffile
from isal import igzip, isal_zlib
from PIL import Image, PngImagePlugin

from support import dicom_files, volumes

from .guard import CANARY

Array = npt.NDArray[Any]

SECRET = "DOE^JANE"  # noqa: S105 (a name)
"""A patient's name."""

_BOMB_BYTES = 128 * 2**20
_TIME_OF_WRITING = re.compile(rb"# on [-0-9: ()A-Z]*")
"""What pynrrd puts into a header; the corpus should be the same each time."""

_SHAPES = {"2d": (5, 4), "3d": (5, 4, 3), "one_slice": (5, 4, 1), "4d": (4, 3, 3, 2)}
_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")


def image_seeds() -> dict[str, bytes]:
    """``format/what`` -> file, of every format that is served and a few that are not."""
    return dict(_images())


@cache
def _images() -> dict[str, bytes]:
    makers: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
        "nifti": _nifti,
        "nrrd": _nrrd,
        "mha": _mha,
        "npy": _npy,
        "npz": _npz,
        "png": _png,
        "bmp": _bmp,
        "tiff": _tiff,
        "dicom": _dicom,
        "other": _other,
    }
    return {f"{kind}/{name}": body for kind, maker in makers.items() for name, body in maker()}


def option_seeds() -> dict[str, bytes]:
    """Texts of options, right and wrong."""
    texts: list[object] = [
        {},
        {"folds": [0, 1], "use_mirroring": False, "tile_step_size": 0.5, "use_gaussian": True},
        {"folds": "all", "accumulate": "float32", "preprocess": "stock", "export": "linear", "timeout_s": 12.5},
        {"save_probabilities": True, "probability_channels": [1, 0], "probability_dtype": "float16"},
        {"save_probabilities": True, "probability_format": "nii.gz", "output_format": ["nii", "mha", "json"]},
        {
            "output_format": "npz",
            "spacing": [1, 2.5, 3e0],
            "origin": [0, -1, 2],
            "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        },
        {"spacing": [1, 1], "origin": [5, 5], "direction": [0, 1, 1, 0]},
        {"folds": 10**30, "tile_step_size": -1},
        {"\ud800": 1, "ä": [[[[]]]]},
        [1],
        None,
    ]
    seeds = {str(number): json.dumps(text).encode() for number, text in enumerate(texts)}
    deep = b'{"folds": ' + b"[" * 900 + b"]" * 900 + b"}"
    twice = b'{"folds": 1, "folds": [2], "output_format": "nii"}'
    return seeds | {"deep": deep, "twice": twice, "utf-8": b'{"export": "\xc3\xa9"}', "no utf-8": b'{"export": "\xff"}'}


def request_seeds() -> dict[str, bytes]:
    """Requests in the notation of :func:`fuzz.targets.request`."""
    return {
        "raw": b"P body=abc\0H X-Request-Id=1-2-3",
        "channels": b"P image_0001=abc\0P image_0000=abc\0S options={}",
        "gap": b"P image_0000=a\0P image_0002=b",
        "both": b"P image=a\0P image_0000=b",
        "form": b"P body=a\0H content-type=application/x-www-form-urlencoded; charset=x",
        "parsed": b'J body={"a": 1}\0J options={"folds": [0]}',
        "options twice": b'P image=a\0H x-nnunet-options={"folds": 0}\0P options={"folds": 1}',
        "describe": b"H describe=True",
        "unknown": b"P im\xffage=a\0H \xff=\xfe\0H X-Request-Id=\x01",
        "digits": "P image_٠٠٠٠=a".encode(),
    }


def geometry_seeds() -> dict[str, bytes]:
    """Geometries in the notation of :func:`fuzz.targets.geometry`."""
    affine = volumes.oblique((0.7, 1.3, 2.9))
    turn = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).ravel().tolist()
    numbers = [3, 4, 5, 0.7, 1.3, 2.9, -20, 11, 7, *turn]
    return {
        "oblique": b"\3" + struct.pack("<18d", *numbers),
        "axes": b"\3" + struct.pack("<18d", 1, 2, 3, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0),
        "flat": b"\2" + struct.pack("<10d", 3, 4, 0.7, 1.3, 5, 6, 0, 1, -1, 0),
        "tiny": b"\3" + struct.pack("<18d", 1, 1, 1, 1e-6, 1e6, 1, 1e9, -1e9, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1),
    }


def bombs() -> dict[str, bytes]:
    """Small files that unpack to 128 MiB, behind a header that declares a few voxels, or behind none."""
    zeros = bytes(_BOMB_BYTES)
    gzipped, zlibbed = igzip.compress(zeros, 1), isal_zlib.compress(zeros, 1)
    seeds = _images()
    array = seeds["npy/3d"]
    tall = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    png = seeds["png/L"]
    return {
        "gzip": gzipped,
        "nifti": igzip.compress(seeds["nifti/3d"] + zeros, 1),
        "nrrd": seeds["nrrd/gzip"].split(b"\n\n")[0] + b"\n\n" + gzipped,
        "mha": seeds["mha/by hand"].replace(b"NDims", b"CompressedData = True\nNDims").split(b"LOCAL\n")[0]
        + b"LOCAL\n"
        + zlibbed,
        "npz": _zip_of("image.npy", array + zeros, deflated_of=array + zeros),
        "npz that lies": _zip_of("image.npy", array, deflated_of=array + zeros),
        "npz beside": _zip_of("spacing.npy", array + zeros, deflated_of=array + zeros),
        "png": png[:8] + _chunk(b"IHDR", tall) + _chunk(b"IDAT", zlibbed) + _chunk(b"IEND", b""),
        "png text": _with_chunk(png, b"zTXt", b"a\0\0" + zlibbed),
        "png international text": _with_chunk(png, b"iTXt", b"a\0\1\0\0\0" + zlibbed),
        "png profile": _with_chunk(png, b"iCCP", b"a\0\0" + zlibbed),
        "tiff": _tiff_bomb(zlibbed),
        **_dicom_bombs(zeros),
    }


def _dicom_bombs(zeros: bytes) -> dict[str, bytes]:
    """Files that are no images, long elements in deflated data sets, and codestreams that claim 2**31 pixels a side."""
    affine = dicom_files.ACQUISITIONS["axial"].affine()
    images = dicom_files.series(_voxels((3, 8, 6), "int16"), affine)
    plain = dicom_files.files_of(images)
    whole = dicom_files.enhanced(_voxels((3, 8, 6), "int16"), affine)
    huge = bytearray(imagecodecs.jpeg2k_encode(_voxels((8, 6), "int16"), level=0, codecformat="j2k"))
    at = huge.index(b"\xff\x51") + 6  # the size of the image, in the marker segment SIZ
    huge[at : at + 8] = b"\x7f\xff\xff\xff" * 2
    for ds in images:
        ds.add_new(0x00091001, "OB", zeros)
    return {
        "dicom zip": dicom_files.zipped(plain | {"a": zeros}, zipfile.ZIP_DEFLATED),
        "dicom tar": dicom_files.tarred(plain | {"a": zeros}, packed=True),
        "dicom deflated": dicom_files.file_of(images[0], "1.2.840.10008.1.2.1.99"),
        "dicom jpeg 2000": dicom_files.compressed(whole, [bytes(huge)] * 3, "1.2.840.10008.1.2.4.90"),
    }


_LIES = (b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"7777")


def dicom_lies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``what`` -> a series in which four bytes somewhere say something else: every length and offset may be drawn.

    Args:
        count: how many of all that there are; all of them are 2 GB, and one after another is made.
        seed: of the draw.
    """
    series = {name: body for name, body in _images().items() if name.startswith("dicom/")}
    places = [
        (name, at)
        for name, body in series.items()
        for at in range(128 if body[128:132] == b"DICM" else 0, len(body) - 3)
    ]
    for drawn in random.Random(seed).sample(range(len(places) * len(_LIES)), count):
        (name, at), lie = places[drawn // len(_LIES)], _LIES[drawn % len(_LIES)]
        body = series[name]
        yield f"{name} at {at}: {lie.hex()}", body[:at] + lie + body[at + 4 :]


def _zip_of(name: str, declared: bytes, *, deflated_of: bytes) -> bytes:
    """A zip of one deflated file, whose directory declares the size and checksum of ``declared``."""
    packed = isal_zlib.compress(deflated_of, 1, -15)
    named = name.encode()
    sizes = struct.pack("<III", zlib.crc32(declared), len(packed), len(declared))
    local = (
        struct.pack("<4s5H", b"PK\3\4", 20, 0, 8, 0, 33) + sizes + struct.pack("<2H", len(named), 0) + named + packed
    )
    central = (
        struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 8, 0, 33)
        + sizes
        + struct.pack("<5H2I", len(named), 0, 0, 0, 0, 0, 0)
        + named
    )
    return local + central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)


def _tiff_bomb(zlibbed: bytes) -> bytes:
    """One strip of 8 x 8 voxels."""
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(zlibbed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(zlibbed)) + zlibbed + struct.pack("<H", len(tags)) + entries + bytes(4)


def _voxels(shape: tuple[int, ...], dtype: str) -> Array:
    generator = np.random.default_rng(len(shape))
    values = generator.integers(0, 100, shape)
    return values.astype(dtype)


def _nifti() -> Iterator[tuple[str, bytes]]:
    for name, shape in _SHAPES.items():
        yield name, _nifti_file(_voxels(shape, "int16"))
        yield f"{name} gz", gzip.compress(_nifti_file(_voxels(shape, "uint8")), mtime=0)
    for dtype in _DTYPES:
        yield dtype, _nifti_file(_voxels((3, 3, 2), dtype))
    yield "big endian", _nifti_file(_voxels((3, 3, 2), ">i2"), header=nib.Nifti1Header(endianness=">"))
    yield "nifti 2", _nifti_file(_voxels((3, 3, 2), "float32"), kind=nib.Nifti2Image)
    yield "nifti 2 gz", gzip.compress(_nifti_file(_voxels((3, 3, 2), "int32"), kind=nib.Nifti2Image), mtime=0)
    yield "scaled", _nifti_file(_voxels((3, 3, 2), "int16"), scl_slope=0.5, scl_inter=-3)
    yield "qform", _nifti_file(_voxels((3, 3, 2), "int16"), sform_code=0)
    yield "no form", _nifti_file(_voxels((3, 3, 2), "int16"), sform_code=0, qform_code=0)
    yield "metres", _nifti_file(_voxels((3, 3, 2), "int16"), xyzt_units=1)
    yield "pair", _nifti_file(_voxels((3, 3, 2), "int16"), magic=b"ni1")
    image = nib.Nifti1Image(_voxels((3, 3, 2), "int16"), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
    yield "extension", image.to_bytes()
    plain = _nifti_file(_voxels((3, 3, 2), "int16"))
    yield "two members", gzip.compress(plain[:300], mtime=0) + gzip.compress(plain[300:], mtime=0)


def _nifti_file(array: Array, *, header: Any | None = None, kind: Any = nib.Nifti1Image, **fields: object) -> bytes:
    affine = volumes.oblique((0.7, 1.3, 2.9))
    image = kind(array, affine, header, dtype=array.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        if field in image.header:
            image.header[field] = SECRET.encode()
    content = bytes(image.to_bytes())
    changed = type(image.header).from_fileobj(io.BytesIO(content), check=False)
    for name, value in fields.items():
        changed[name] = value
    block = bytes(changed.binaryblock)
    return block + content[len(block) :]


def _nrrd() -> Iterator[tuple[str, bytes]]:
    turn = {
        "space": "left-posterior-superior",
        "space directions": (volumes.oblique((0.7, 1.3, 2.9))[:3, :3].T).tolist(),
        "space origin": [1.0, -2.0, 3.5],
        "content": SECRET,
    }
    for encoding in ("raw", "gzip", "bzip2", "ascii"):
        yield encoding, _nrrd_file(_voxels((5, 4, 3), "int16"), turn | {"encoding": encoding})
    for dtype in _DTYPES:
        yield dtype, _nrrd_file(_voxels((3, 3, 2), dtype), turn | {"encoding": "raw"})
    yield "2d", _nrrd_file(_voxels((5, 4), "uint8"), {"encoding": "raw", "spacings": [0.5, 0.7]})
    yield (
        "2d in space",
        _nrrd_file(
            _voxels((5, 4), "uint8"),
            {"encoding": "raw", "space dimension": 2, "space directions": [[0.5, 0], [0, 0.7]], "space origin": [1, 2]},
        ),
    )
    yield "spacings", _nrrd_file(_voxels((5, 4, 3), "uint8"), {"encoding": "gzip", "spacings": [0.5, 0.7, 2]})
    yield "ras", _nrrd_file(_voxels((5, 4, 3), "uint8"), turn | {"space": "right-anterior-superior"})
    yield "big endian", _nrrd_file(_voxels((5, 4, 3), "int16").astype(">i2"), turn | {"encoding": "raw"})
    listed = turn | {
        "kinds": ["list", "domain", "domain", "domain"],
        "space directions": [[np.nan] * 3, *turn["space directions"]],
    }
    yield "list", _nrrd_file(_voxels((2, 4, 3, 3), "int16"), listed | {"encoding": "gzip"})
    plain = _nrrd_file(_voxels((3, 3, 2), "int16"), turn | {"encoding": "raw"})
    detached = plain[: plain.index(b"\n\n")]
    yield "detached", detached + f"\ndata file: {CANARY}\n\n".encode()
    yield "detached list", detached + f"\ndatafile: LIST\n{CANARY}\n{CANARY}\n\n".encode()
    yield "detached absolute", detached + f"\ndata file: /proc/self/cwd/{CANARY}\n\n".encode()
    for name, (spacing, array) in {
        "itk": ((1, 2, 3), _voxels((3, 4, 5), "int16")),
        "itk 2d": ((1, 2), _voxels((4, 5), "uint8")),
    }.items():
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        image.SetMetaData("PatientName", SECRET)
        yield name, _itk_file(image, ".nrrd")
    yield "itk gz", _itk_file(sitk.GetImageFromArray(_voxels((3, 4, 5), "int16")), ".nrrd", compress=True)
    yield "itk vector", _itk_file(sitk.GetImageFromArray(_voxels((3, 4, 5, 2), "float32"), isVector=True), ".nrrd")


def _nrrd_file(array: Array, header: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    nrrd.write(file, array, header)
    return _TIME_OF_WRITING.sub(b"# on 2000-01-01", file.getvalue(), count=1)


def _itk_file(image: Any, suffix: str, *, compress: bool = False) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a{suffix}"
        sitk.WriteImage(image, str(file), useCompression=compress)
        return file.read_bytes()


def _mha() -> Iterator[tuple[str, bytes]]:
    turn = (volumes.oblique((1, 1, 1))[:3, :3]).astype(np.float64).ravel().tolist()
    for dtype in _DTYPES:
        image = sitk.GetImageFromArray(_voxels((2, 3, 3), dtype))
        image.SetDirection(turn)
        image.SetSpacing((0.7, 1.3, 2.9))
        image.SetOrigin((1, -2, 3.5))
        image.SetMetaData("PatientName", SECRET)
        yield dtype, _itk_file(image, ".mha")
    for name, shape in _SHAPES.items():
        image = sitk.GetImageFromArray(_voxels(shape[::-1], "int16"), isVector=False)
        yield name, _itk_file(image, ".mha")
        yield f"{name} packed", _itk_file(image, ".mha", compress=True)
    yield "vector", _itk_file(sitk.GetImageFromArray(_voxels((3, 4, 5, 2), "float32"), isVector=True), ".mha")
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = {binary}\nBinaryDataByteOrderMSB = {msb}\n{more}"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\n"
        f"Comment = {SECRET}\nElementSpacing = 1 2 3\nDimSize = 3 3 2\nElementType = MET_SHORT\nElementDataFile = "
    )
    voxels = _voxels((2, 3, 3), "int16")
    plain = head.format(binary="True", msb="False", more="")
    yield "by hand", f"{plain}LOCAL\n".encode() + voxels.tobytes()
    yield (
        "big endian",
        f"{head.format(binary='True', msb='True', more='')}LOCAL\n".encode() + voxels.astype(">i2").tobytes(),
    )
    packed = zlib.compress(voxels.tobytes())
    size = f"CompressedData = True\nCompressedDataSize = {len(packed)}\n"
    yield "packed", f"{head.format(binary='True', msb='False', more=size)}LOCAL\n".encode() + packed
    text = " ".join(map(str, voxels.ravel().tolist()))
    yield "text", f"{head.format(binary='False', msb='False', more='')}LOCAL\n{text}\n".encode()
    for name, where in {
        "detached": CANARY,
        "list": f"LIST\n{CANARY}",
        "pattern": "canary%d.raw 1 2 1",
        "absolute": f"/proc/self/cwd/{CANARY}",
    }.items():
        yield name, f"{plain}{where}\n".encode() + voxels.tobytes()


def _dicom() -> Iterator[tuple[str, bytes]]:
    affine = dicom_files.ACQUISITIONS["oblique"].affine((0.7, 1.3, 2.9))
    voxels = _voxels((3, 8, 6), "int16")
    plain = {str(z): dicom_files.file_of(ds) for z, ds in enumerate(dicom_files.series(voxels, affine))}
    yield "zip", dicom_files.zipped(plain)
    yield "zip with a comment", dicom_files.zipped(plain)[:-2] + b"\6\0" + b"a PACS"
    yield "zip deflated", dicom_files.zipped(plain, zipfile.ZIP_DEFLATED)
    yield "tar", dicom_files.tarred(plain)
    yield "tar gz", dicom_files.tarred(plain, packed=True)
    for name, syntax in {
        "implicit": "1.2.840.10008.1.2",
        "big endian": "1.2.840.10008.1.2.2",
        "deflated": "1.2.840.10008.1.2.1.99",
    }.items():
        stored = voxels.byteswap() if name == "big endian" else voxels
        files = dicom_files.files_of(dicom_files.series(stored, affine, "MR", rescale=None), syntax)
        yield name, dicom_files.tarred(files)
    for modality in ("enhanced CT", "enhanced MR"):
        yield modality, dicom_files.file_of(dicom_files.enhanced(voxels, affine, modality))
    encoders: dict[str, tuple[str, Callable[[Array], bytes]]] = {
        "jpeg 2000": ("4.90", lambda one: bytes(imagecodecs.jpeg2k_encode(one, level=0, codecformat="j2k"))),
        "jpeg ls": ("4.80", lambda one: bytes(imagecodecs.jpegls_encode(one.view("u2")))),
        "jpeg": ("4.70", lambda one: bytes(imagecodecs.jpeg8_encode(one.view("u2"), lossless=True, bitspersample=16))),
        "rle": ("5", _rle),
    }
    for name, (syntax, encode) in encoders.items():
        for pieces in (1, 3):
            frames = [encode(one) for one in voxels]
            whole = dicom_files.enhanced(voxels, affine)
            yield (
                f"{name} {pieces}",
                dicom_files.compressed(whole, frames, f"1.2.840.10008.1.2.{syntax}", fragments=pieces),
            )


def _rle(frame: Array) -> bytes:
    """Two byte planes, the high one first, of literal runs (PS3.5, annex G)."""
    planes = []
    for plane in (frame.view("u2") >> 8, frame.view("u2") & 0xFF):
        raw = plane.astype(np.uint8).tobytes()
        runs = b"".join(bytes([len(raw[at : at + 128]) - 1]) + raw[at : at + 128] for at in range(0, len(raw), 128))
        planes.append(runs + b"\0" * (len(runs) % 2))
    header = struct.pack("<16L", 2, 64, 64 + len(planes[0]), *[0] * 13)
    return header + b"".join(planes)


def _npy() -> Iterator[tuple[str, bytes]]:
    for dtype in (*_DTYPES, ">i2", "bool", "float16"):
        yield dtype, _npy_file(_voxels((2, 3, 3), dtype))
    for name, shape in _SHAPES.items():
        yield name, _npy_file(_voxels(shape[::-1], "int16"))
        yield f"{name} fortran", _npy_file(np.asfortranarray(_voxels(shape[::-1], "float32")))
    for version in ((1, 0), (2, 0), (3, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, _voxels((2, 3, 3), "int16"), version)
        yield f"version {version[0]}", file.getvalue()
    yield "structured", _npy_file(np.zeros((2, 2), [("a", "i2"), ("b", "f4")]))
    yield "objects", _npy_file(np.array([[SECRET, None]], dtype=object))
    yield "text", _npy_file(np.array([[SECRET]]))
    yield "nan", _npy_file(np.full((2, 2, 2), np.nan))
    yield "none", _npy_file(np.zeros((0, 3), "int16"))


def _npy_file(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz() -> Iterator[tuple[str, bytes]]:
    place = {"spacing": np.array([1.0, 2, 3]), "origin": np.array([1.0, -2, 3]), "direction": np.eye(3)}
    flat = {"spacing": np.array([1.0, 2]), "origin": np.array([1.0, -2]), "direction": np.eye(2)}
    voxels = _voxels((2, 3, 3), "int16")
    for key in ("image", "data", "labels", "arr_0"):
        yield key, _npz_file({key: voxels, **place})
    yield "packed", _npz_file({"image": voxels, **place}, zipfile.ZIP_DEFLATED)
    yield "packed float", _npz_file({"image": voxels.astype("float32"), **place}, zipfile.ZIP_DEFLATED)
    yield "channels", _npz_file({"image": _voxels((2, 2, 3, 3), "float32"), **place}, zipfile.ZIP_DEFLATED)
    yield "flat", _npz_file({"image": _voxels((4, 5), "uint8"), **flat})
    yield "alone", _npz_file({"image": voxels})
    yield "alone packed", _npz_file({"arr_0": voxels}, zipfile.ZIP_DEFLATED)
    yield "bzip2", _npz_file({"image": voxels, **place}, zipfile.ZIP_BZIP2)
    yield "lzma", _npz_file({"image": voxels, **place}, zipfile.ZIP_LZMA)
    yield "two", _npz_file({"a": voxels, "b": voxels})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{SECRET}.txt"), SECRET)
        archive.comment = SECRET.encode()
    yield "zip", file.getvalue()


def _npz_file(arrays: dict[str, Array], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy_file(array), compression)
    return file.getvalue()


def _png() -> Iterator[tuple[str, bytes]]:
    for mode, channels in {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}.items():
        array = _voxels((4, 5, channels), "uint8")
        yield mode, _picture(Image.fromarray(array[..., 0] if channels == 1 else array))
    yield "1", _picture(Image.fromarray(_voxels((4, 9), "uint8")).convert("1"))
    yield "P", _picture(Image.fromarray(_voxels((4, 5), "uint8")).convert("P"))
    yield "P transparent", _picture(Image.fromarray(_voxels((4, 5), "uint8")).convert("P"), transparency=0)
    yield "16 bits", _picture(Image.fromarray(_voxels((4, 5), "uint16")))
    yield "dpi", _picture(Image.fromarray(_voxels((4, 5), "uint8")), dpi=(300, 150))
    yield "larger", _picture(Image.fromarray(_voxels((80, 90, 3), "uint8")))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET)
    text.add_itxt("Title", SECRET, zip=True)
    text.add_text("Packed", SECRET, zip=True)
    picture = Image.fromarray(_voxels((4, 5), "uint8"))
    yield (
        "text",
        _picture(picture, pnginfo=text, icc_profile=SECRET.encode(), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    )
    yield (
        "animated",
        _picture(picture, save_all=True, append_images=[picture, Image.fromarray(_voxels((4, 5), "uint8") + 9)]),
    )
    yield "interlaced", _interlaced()
    yield "gamma", _with_chunk(_picture(picture), b"gAMA", struct.pack(">I", 45455))
    yield "tRNS", _with_chunk(_picture(picture), b"tRNS", b"\0\3")


def _bmp() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield mode, _picture(Image.fromarray(_voxels((4, 5, 4), "uint8")).convert(mode), "BMP")
    yield "larger", _picture(Image.fromarray(_voxels((80, 90, 3), "uint8")), "BMP")


def _picture(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def _with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    return png[:33] + _chunk(name, content) + png[33:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _interlaced() -> bytes:
    """One pixel, which has one row in Adam7's first pass and none in the others."""
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1)
    rows = zlib.compress(b"\0\x2a")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _tiff() -> Iterator[tuple[str, bytes]]:
    for dtype in (*_DTYPES, "bool", "float16"):
        yield dtype, _tiff_file(_voxels((4, 5), dtype), photometric="minisblack")
    for compression in ("zlib", "lzw", "packbits", "zstd", "lzma", "jpeg", "jpeg2000", "webp", "png", "lerc", "jpegxl"):
        shape = (16, 16, 3) if compression == "webp" else (16, 16)
        photometric = "rgb" if compression == "webp" else "minisblack"
        yield compression, _tiff_file(_voxels(shape, "uint8"), photometric=photometric, compression=compression)
    yield (
        "predictor",
        _tiff_file(_voxels((16, 16), "uint16"), compression="zlib", predictor=True, photometric="minisblack"),
    )
    yield (
        "float predictor",
        _tiff_file(_voxels((16, 16), "float32"), compression="zlib", predictor=3, photometric="minisblack"),
    )
    yield "stack", _tiff_file(_voxels((3, 4, 5), "int16"), photometric="minisblack")
    yield "stack zlib", _tiff_file(_voxels((3, 4, 5), "int16"), photometric="minisblack", compression="zlib")
    yield (
        "tiles",
        _tiff_file(_voxels((3, 32, 32), "uint8"), photometric="minisblack", tile=(16, 16), compression="zlib"),
    )
    yield (
        "volume tiles",
        _tiff_file(_voxels((16, 32, 32), "uint8"), photometric="minisblack", tile=(16, 16, 16), volumetric=True),
    )
    yield "strips", _tiff_file(_voxels((40, 5), "uint8"), photometric="minisblack", rowsperstrip=7)
    yield "rgb", _tiff_file(_voxels((4, 5, 3), "uint8"), photometric="rgb")
    yield "rgb planes", _tiff_file(_voxels((3, 4, 5), "uint8"), photometric="rgb", planarconfig="separate")
    yield "big", _tiff_file(_voxels((3, 4, 5), "int16"), bigtiff=True, photometric="minisblack")
    yield "big endian", _tiff_file(_voxels((4, 5), "int16"), byteorder=">", photometric="minisblack")
    yield (
        "imagej",
        _tiff_file(
            _voxels((3, 4, 5), "uint16"),
            imagej=True,
            metadata={"spacing": 2.5, "unit": "mm", "axes": "ZYX", "Info": SECRET},
            resolution=(2, 2),
        ),
    )
    yield (
        "ome",
        _tiff_file(
            _voxels((3, 4, 5), "uint16"),
            ome=True,
            metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "Name": SECRET, "UUID": "urn:uuid:0"},
            photometric="minisblack",
        ),
    )
    yield (
        "description",
        _tiff_file(
            _voxels((4, 5), "uint8"), description=SECRET, software=SECRET, metadata=None, photometric="minisblack"
        ),
    )
    yield "white is zero", _tiff_file(_voxels((4, 5), "uint8"), photometric="miniswhite", metadata=None)
    pictures: list[tuple[str, str | None]] = [
        ("1", "group4"), ("1", "group3"), ("1", "tiff_ccitt"), ("L", "tiff_lzw"), ("P", None), ("I;16", None),
    ]  # fmt: skip
    for mode, packing in pictures:
        file = io.BytesIO()
        picture = Image.fromarray(_voxels((8, 9), "uint16" if mode == "I;16" else "uint8"))
        picture = picture if mode in ("I;16", "L") else picture.convert(mode)
        picture.save(file, "TIFF", compression=packing)
        yield f"pillow {mode} {packing}", file.getvalue()


def _tiff_file(array: Array, **settings: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def _other() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "text", b"this is not an image"
    yield "dicom", bytes(128) + b"DICM" + bytes(40)
    yield "analyze", struct.pack("<i", 348) + bytes(344)
    yield "jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20)
    yield "bzip2", bz2.compress(b"abc")
    yield "gzip of nothing", gzip.compress(b"", mtime=0)
    yield "gzip of gzip", gzip.compress(gzip.compress(_nifti_file(_voxels((3, 3, 2), "int16")), mtime=0), mtime=0)
    yield "gzip of nrrd", gzip.compress(_nrrd_file(_voxels((3, 3, 2), "int16"), {"encoding": "raw"}), mtime=0)
