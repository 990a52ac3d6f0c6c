"""PNG and TIFF in, PNG, TIFF and BMP out, against nnU-Net's readers of pictures."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import numpy.typing as npt
import pytest
import skimage.io
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs.bmp import is_bmp, open_bmp
from nnunet_torchserve.codecs.pictures import PictureSource
from nnunet_torchserve.codecs.png import encode_png, is_png, open_png
from nnunet_torchserve.codecs.tiff import encode_tiff, is_tiff, open_tiff
from nnunet_torchserve.errors import (
    BadOption,
    BadSpacing,
    Malformed,
    ServingError,
    TooLarge,
    UnknownFormat,
    WrongChannels,
)
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.volume import LabelMap, Placement
from support import volumes

LIMITS = Limits(expanded_bytes=10_000_000, voxels=1_000_000)
PLANE, SPACE = Placement((1.0, 1.0)), Placement((1.0, 1.0, 1.0))
RNG = np.random.default_rng(11)
Array = npt.NDArray[Any]


KINDS = {is_png: open_png, is_tiff: open_tiff, is_bmp: open_bmp}


def open_picture(body: bytes, placement: Placement | None = PLANE, limits: Limits = LIMITS) -> PictureSource:
    [open_it] = [how for is_it, how in KINDS.items() if is_it(body)]
    return open_it(memoryview(body), limits, placement)


def some(shape: tuple[int, ...], dtype: str = "uint8") -> Array:
    if dtype == "bool":
        return RNG.integers(0, 2, shape).astype(bool)
    if np.dtype(dtype).kind == "f":
        return (RNG.standard_normal(shape) * 100).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype)


def png(array: Array, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **settings)
    return file.getvalue()


def palette(colours: int = 8, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(some((9, 7, 3))).quantize(colours).save(file, "PNG", **settings)
    return file.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


MAGIC = b"\x89PNG\r\n\x1a\n"


def made_png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: bytes,
    *between: bytes,
    interlace: int = 0,
    tail: bytes = b"",
) -> bytes:
    header = struct.pack(">II5B", width, height, depth, colour, 0, 0, interlace)
    return (
        MAGIC + chunk(b"IHDR", header) + b"".join(between) + chunk(b"IDAT", zlib.compress(rows)) + tail + chunk(b"IEND")
    )


def rows_of(array: Array) -> bytes:
    """As PNG packs them: a byte for the filter before each, samples of 16 bits with the high byte first."""
    return b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)


def adam7(array: Array) -> bytes:
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    return b"".join(rows_of(array[y::dy, x::dx]) for y, x, dy, dx in passes if array[y::dy, x::dx].size)


GREY, COLOUR, DEEP = some((9, 7)), some((9, 7, 3)), some((9, 7), "uint16")
BITS = np.packbits(some((9, 7), "bool"), axis=1)
PNGS: dict[str, bytes] = {
    "grey": png(GREY),
    "grey with a transparent value": png(GREY, transparency=5),
    "16 bits": png(DEEP),
    "RGB": png(COLOUR),
    "RGB with a transparent colour": png(COLOUR, transparency=(1, 2, 3)),
    "RGBA": png(some((9, 7, 4))),
    "1 bit": png(some((9, 7), "bool")),
    "2 bits": made_png(7, 9, 2, 0, rows_of(some((9, 2)))),
    "4 bits": made_png(7, 9, 4, 0, rows_of(some((9, 4)))),
    "palette": palette(),
    "palette of 1 bit": palette(2, bits=1),
    "palette with a transparent entry": palette(transparency=3),
    "RGB of 16 bits": made_png(7, 9, 16, 2, rows_of(some((9, 21), "uint16"))),
    "RGBA of 16 bits": made_png(7, 9, 16, 6, rows_of(some((9, 28), "uint16"))),
    "grey and alpha of 16 bits": made_png(7, 9, 16, 4, rows_of(some((9, 14), "uint16"))),
    "interlaced": made_png(7, 9, 8, 0, adam7(GREY), interlace=1),
    "interlaced RGB": made_png(7, 9, 8, 2, adam7(COLOUR), interlace=1),
    "gamma, profile, text and time": made_png(
        7, 9, 8, 0, rows_of(GREY), chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"iCCP", b"n\0\0" + zlib.compress(b"x")), chunk(b"tEXt", b"Patient\0NAME"), chunk(b"tIME", bytes(7)),
        tail=chunk(b"tEXt", b"a\0b"),
    ),
    "orientation": png(GREY, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "many small chunks of voxels": MAGIC + png(GREY)[8:33]
    + b"".join(chunk(b"IDAT", bytes([byte])) for byte in zlib.compress(rows_of(GREY))) + chunk(b"IEND"),
    "by imageio": iio.imwrite("<bytes>", COLOUR, extension=".png"),
    "one voxel": png(some((1, 1))),
    "three rows": png(some((3, 9))),
}  # fmt: skip


@pytest.mark.parametrize("name", PNGS)
def test_a_png_is_read_as_nnunet_reads_it(name: str, tmp_path: Path) -> None:
    content = PNGS[name]
    expected, properties = NaturalImage2DIO().read_images([str(volumes.write(tmp_path, "a.png", content))])
    image = open_picture(content)
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    assert image.geometry.spacing_zyx == properties["spacing"]
    assert (image.channels, *image.geometry.shape) == expected.shape
    assert image.native_format is OutputFormat.PNG
    assert image.nifti_header is None


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_a_palette_with_alpha_is_read_as_nnunet_reads_it(tmp_path: Path) -> None:
    content = palette(transparency=bytes([0, 100, 200, 255, 3, 4, 5, 6]))
    expected, _ = NaturalImage2DIO().read_images([str(volumes.write(tmp_path, "a.png", content))])
    np.testing.assert_array_equal(open_picture(content).read(), expected, strict=True)


def test_what_skimage_saves_is_read(tmp_path: Path) -> None:
    for array in (GREY, COLOUR, DEEP, some((9, 7, 4))):
        for ending in ("png", "tif"):
            file = tmp_path / f"a.{ending}"
            skimage.io.imsave(file, array, check_contrast=False)
            expected, _ = NaturalImage2DIO().read_images([str(file)])
            np.testing.assert_array_equal(open_picture(file.read_bytes()).read(), expected, strict=True)


def test_a_picture_larger_than_pillows_own_limit_is_ours_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(open_picture(png(GREY)).read()[0, 0], GREY)


def test_a_model_of_volumes_asks_for_a_spacing() -> None:
    for content in (png(GREY), tif(GREY), tif(some((5, 9, 7)), photometric="minisblack")):
        with pytest.raises(BadSpacing, match="option spacing"):
            open_picture(content, None)


def test_the_request_says_where_a_picture_lies() -> None:
    geometry = open_picture(png(GREY), Placement((0.5, 0.25), (3.0, 4.0))).geometry
    assert (geometry.ndim, geometry.spacing_zyx, geometry.origin) == (2, (999 * 0.5, 0.25, 0.5), (3.0, 4.0, 0.0))
    slice_ = open_picture(png(GREY), Placement((0.5, 0.25, 3.0))).geometry
    assert (slice_.ndim, slice_.spacing_zyx) == (3, (3.0, 0.25, 0.5))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_labels_written_as_png_are_read_back_by_nnunet(dtype: str, tmp_path: Path) -> None:
    labels = some((1, 9, 7), dtype)
    content = encode_png(labels)
    read, _ = NaturalImage2DIO().read_seg(str(volumes.write(tmp_path, "a.png", content)))
    np.testing.assert_array_equal(read, labels[None])
    np.testing.assert_array_equal(open_picture(content).read(), labels[None])
    assert encode_png(labels.copy()) == content


# --- BMP -------------------------------------------------------------------------------------------------------------


def bmp(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "BMP")
    return file.getvalue()


def made_bmp(bits: int, rows: bytes, *, masks: tuple[int, ...] = (), old: bool = False, height: int = 4) -> bytes:
    """Five columns; with ``masks`` of the colours, the header of Windows 95; ``old`` is that of OS/2."""
    header = struct.pack("<IHHHH", 12, 5, height, 1, bits) if old else b""
    if not old:
        header = struct.pack("<IiiHHIIiiII", 108 if masks else 40, 5, height, 1, bits, 3 if masks else 0, 0, 0, 0, 0, 0)
        header += struct.pack("<4I", *masks) + bytes(108 - 40 - 16) if masks else b""
    colours = {1: 2, 4: 16, 8: 256}.get(bits, 0)
    entry = 3 if old else 4
    palette = b"".join(bytes([n % 7 * 30, n % 5 * 50, n % 3 * 90, 0])[:entry] for n in range(colours))
    offset = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + header + palette + rows


BMPS: dict[str, bytes] = {
    "grey": bmp(Image.fromarray(GREY)),
    "RGB": bmp(Image.fromarray(COLOUR)),
    "RGBA": bmp(Image.fromarray(some((9, 7, 4)))),
    "1 bit": bmp(Image.fromarray(some((9, 7), "bool"))),
    "palette": bmp(Image.fromarray(COLOUR).quantize(8)),
    "2 colours": made_bmp(1, some((4, 4)).tobytes()),
    "16 colours": made_bmp(4, some((4, 4)).tobytes()),
    "15 bits": made_bmp(16, some((4, 12)).tobytes()),
    "16 bits": made_bmp(16, some((4, 12)).tobytes(), masks=(0xF800, 0x7E0, 0x1F, 0)),
    "32 bits": made_bmp(32, some((4, 20)).tobytes()),
    "alpha": made_bmp(32, some((4, 20)).tobytes(), masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "from above": made_bmp(24, some((4, 16)).tobytes(), height=-4),
    "of OS/2": made_bmp(24, some((4, 16)).tobytes(), old=True),
    "by imageio": iio.imwrite("<bytes>", COLOUR, extension=".bmp"),
}


@pytest.mark.parametrize("name", BMPS)
def test_a_bmp_is_read_as_nnunet_reads_it(name: str, tmp_path: Path) -> None:
    expected, properties = NaturalImage2DIO().read_images([str(volumes.write(tmp_path, "a.bmp", BMPS[name]))])
    image = open_picture(BMPS[name])
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    assert image.geometry.spacing_zyx == properties["spacing"]
    assert (image.channels, *image.geometry.shape) == expected.shape
    assert image.native_format is OutputFormat.PNG


@pytest.mark.parametrize("name", BMPS)
def test_a_bmp_that_is_cut_off_is_refused(name: str) -> None:
    content = BMPS[name]
    for end in (20, 30, len(content) // 2, len(content) - 1):
        with pytest.raises((Malformed, UnknownFormat)):
            open_picture(content[:end])


def test_a_bmp_that_claims_more_than_it_holds_or_than_is_allowed_is_refused() -> None:
    content = bytearray(BMPS["RGB"])
    content[18:26] = struct.pack("<ii", 500, 500)
    with pytest.raises(Malformed, match="cut off"):
        open_picture(bytes(content))
    content[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    with pytest.raises(TooLarge):
        open_picture(bytes(content))
    for nothing in ((0, 5), (5, 0)):
        content[18:26] = struct.pack("<ii", *nothing)
        with pytest.raises(Malformed):
            open_picture(bytes(content))


def test_a_packed_bmp_is_refused_with_what_would_be_right() -> None:
    content = bytearray(BMPS["grey"])
    content[30:34] = struct.pack("<I", 1)
    with pytest.raises(UnknownFormat, match="without compression"):
        open_picture(bytes(content))


# --- hostile PNGs ----------------------------------------------------------------------------------------------------


IHDR = png(GREY)[8:33]
IDAT = chunk(b"IDAT", zlib.compress(rows_of(GREY)))
BROKEN_IDAT = zlib.compress(rows_of(GREY))[:-10]
HOSTILE_PNGS: dict[str, tuple[bytes, type[ServingError]]] = {
    "nothing but the magic": (MAGIC, Malformed),
    "no end": (MAGIC + IHDR + IDAT, Malformed),
    "no voxels": (MAGIC + IHDR + chunk(b"IEND"), Malformed),
    "no header": (MAGIC + IDAT + chunk(b"IEND"), Malformed),
    "two headers": (MAGIC + IHDR + IHDR + IDAT + chunk(b"IEND"), Malformed),
    "a second header of another size": (
        MAGIC + IHDR + chunk(b"IHDR", struct.pack(">II5B", 999, 999, 8, 0, 0, 0, 0)) + IDAT + chunk(b"IEND"), Malformed
    ),
    "a short header": (MAGIC + chunk(b"IHDR", bytes(5)) + IDAT + chunk(b"IEND"), Malformed),
    "cut voxels": (png(GREY)[:-30], Malformed),
    "a wrong checksum of the header": (MAGIC + IHDR[:-1] + b"\0" + IDAT + chunk(b"IEND"), Malformed),
    "a flipped bit": (png(GREY)[:60] + bytes([png(GREY)[60] ^ 1]) + png(GREY)[61:], Malformed),
    "a cut stream": (MAGIC + IHDR + chunk(b"IDAT", BROKEN_IDAT) + chunk(b"IEND"), Malformed),
    "too few rows": (made_png(7, 9, 8, 0, rows_of(GREY)[:-8]), Malformed),
    "a voxel too few": (made_png(7, 9, 8, 0, rows_of(GREY)[:-1]), Malformed),
    "too few interlaced rows": (made_png(7, 9, 8, 0, adam7(GREY)[:-8], interlace=1), Malformed),
    "no stream": (MAGIC + IHDR + chunk(b"IDAT", b"hello") + chunk(b"IEND"), Malformed),
    "another picture inside": (MAGIC + b"BM" + bytes(100), Malformed),
    "depth 3": (made_png(7, 9, 3, 0, b""), Malformed),
    "colour 5": (made_png(7, 9, 8, 5, b""), Malformed),
    "interlace 2": (made_png(7, 9, 8, 0, rows_of(GREY), interlace=2), Malformed),
    "no columns": (made_png(0, 9, 8, 0, b""), Malformed),
    "2**31 columns": (made_png(2**31 - 1, 1, 8, 0, b"x"), TooLarge),
    "a trillion voxels": (made_png(10**6, 10**6, 8, 2, b"x"), TooLarge),
    "far more voxels than its bytes can hold": (made_png(1000, 1000, 8, 0, b"x"), Malformed),
    "no palette": (made_png(7, 9, 8, 3, rows_of(GREY)), Malformed),
    "a palette of 4 bytes": (made_png(7, 9, 8, 3, rows_of(GREY), chunk(b"PLTE", b"abcd")), Malformed),
    "a palette of 300": (made_png(7, 9, 8, 3, rows_of(GREY), chunk(b"PLTE", bytes(900))), Malformed),
    "two palettes": (made_png(7, 9, 8, 3, rows_of(GREY), *[chunk(b"PLTE", b"abc")] * 2), Malformed),
    "voxels in two places": (MAGIC + IHDR + IDAT + chunk(b"tEXt") + IDAT + chunk(b"IEND"), Malformed),
    "an unknown critical chunk": (made_png(7, 9, 8, 0, rows_of(GREY), chunk(b"ABCD")), Malformed),
    "a kind that is no text": (made_png(7, 9, 8, 0, rows_of(GREY), chunk(b"\xff\xfe\0\0")), Malformed),
    "grey and alpha": (png(some((9, 7, 2))), WrongChannels),
    "an animation": (made_png(7, 9, 8, 0, rows_of(GREY), chunk(b"acTL", struct.pack(">II", 2, 0))), WrongChannels),
    "a hundred thousand chunks": (made_png(7, 9, 8, 0, rows_of(GREY), chunk(b"tEXt") * 100_000), TooLarge),
    "a hundred thousand empty chunks of voxels": (
        MAGIC + IHDR + chunk(b"IDAT") * 100_000 + IDAT + chunk(b"IEND"), TooLarge
    ),
    "a chunk of 4 GB": (MAGIC + IHDR + b"\xff\xff\xff\xffIDAT" + bytes(100), Malformed),
}  # fmt: skip


def test_voxels_that_pack_well_are_all_counted() -> None:
    for width in range(700, 1000, 3):
        zeros = np.zeros((400, width), np.uint8)
        np.testing.assert_array_equal(open_picture(png(zeros)).read()[0, 0], zeros)


def test_texts_and_profiles_are_not_even_unpacked() -> None:
    bomb = zlib.compress(bytes(30_000_000))
    content = made_png(
        7, 9, 8, 0, rows_of(GREY), chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"eXIf", b"II*\0" + b"\xff" * 100),
    )  # fmt: skip
    np.testing.assert_array_equal(open_picture(content).read()[0, 0], GREY)


# TIFF


def tif(array: Array, **settings: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def by_pillow(array: Array, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF", **settings)
    return file.getvalue()


BIG, RGB = some((90, 70)), {"photometric": "rgb"}
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
PACKED: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate": {"compression": "zlib"},
    "deflate by its older number": {"compression": "deflate"},
    "lzw": {"compression": "lzw"},
    "packbits": {"compression": "packbits"},
    "predictor": {"compression": "zlib", "predictor": True},
    "lzw and predictor": {"compression": "lzw", "predictor": True},
    "strips": {"compression": "lzw", "rowsperstrip": 13},
    "plain strips": {"rowsperstrip": 7},
    "tiles": {"compression": "zlib", "tile": (32, 48)},
    "plain tiles": {"tile": (32, 48)},
    "a tile larger than the picture": {"compression": "lzw", "tile": (256, 256)},
    "big endian": {"byteorder": ">", "compression": "zlib", "predictor": True},
    "plain big endian": {"byteorder": ">"},
    "bigtiff": {"bigtiff": True, "rowsperstrip": 13},
    "big-endian bigtiff": {"bigtiff": True, "byteorder": ">", "compression": "packbits"},
}


def same_as_stock(content: bytes, tmp_path: Path, reader: Any = NaturalImage2DIO) -> PictureSource:
    expected, properties = reader().read_images([str(volumes.write(tmp_path, "a_0000.tif", content))])
    image = open_picture(content, PLANE if reader is NaturalImage2DIO else SPACE)
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    assert image.geometry.spacing_zyx == properties["spacing"]
    return image


@pytest.mark.parametrize(
    ("dtype", "packed"),  # the writer has no predictor for integers of 64 bits
    [
        (dtype, packed)
        for dtype in DTYPES
        for packed in PACKED
        if "int64" not in dtype or "predictor" not in PACKED[packed]
    ],
)
def test_a_tiff_is_read_as_nnunet_reads_it(dtype: str, packed: str, tmp_path: Path) -> None:
    image = same_as_stock(tif(some((90, 70), dtype), **PACKED[packed]), tmp_path)
    assert image.native_format is OutputFormat.PNG


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_is_read_as_nnunet_reads_it(planar: str, channels: int, packed: str, tmp_path: Path) -> None:
    shape = (channels, 90, 70) if planar == "separate" else (90, 70, channels)
    content = tif(some(shape), planarconfig=planar, **RGB, **PACKED[packed])
    assert same_as_stock(content, tmp_path).channels == channels


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_a_stack_is_read_as_nnunet_reads_it(dtype: str, packed: str, tmp_path: Path) -> None:
    image = same_as_stock(tif(some((5, 90, 70), dtype), photometric="minisblack", **PACKED[packed]), tmp_path, Tiff3DIO)
    assert (image.channels, image.geometry.shape, image.native_format) == (1, (5, 90, 70), OutputFormat.NIFTI_GZ)


@pytest.mark.parametrize("slices", [3, 4])
def test_three_or_four_pages_are_colours_in_a_plane_and_slices_in_space(slices: int, tmp_path: Path) -> None:
    content = tif(some((slices, 9, 7)), photometric="minisblack")
    assert same_as_stock(content, tmp_path).channels == slices
    assert same_as_stock(content, tmp_path, Tiff3DIO).channels == 1


OTHER_TIFFS: dict[str, Callable[[], bytes]] = {
    "1 bit": lambda: by_pillow(some((9, 7), "bool")),
    "1 bit by tifffile": lambda: tif(some((9, 7), "bool")),
    "white is zero": lambda: tif(GREY, photometric="miniswhite"),
    "palette": lambda: tif(GREY, photometric="palette", colormap=some((3, 256), "uint16")),
    "pillow's grey": lambda: by_pillow(GREY),
    "pillow's RGB": lambda: by_pillow(COLOUR),
    "pillow's RGBA": lambda: by_pillow(some((9, 7, 4))),
    "pillow's float": lambda: by_pillow(some((9, 7), "float32")),
    "pillow's 16 bits": lambda: by_pillow(DEEP),
    "pillow's lzw": lambda: by_pillow(COLOUR, compression="tiff_lzw"),
    "pillow's deflate": lambda: by_pillow(COLOUR, compression="tiff_adobe_deflate"),
    "pillow's packbits": lambda: by_pillow(GREY, compression="packbits"),
    "imageio's": lambda: iio.imwrite("<bytes>", GREY, extension=".tif"),
    "a description and a profile": lambda: tif(GREY, description="NAME", iccprofile=bytes(200_000), software="x"),
    "no metadata": lambda: tif(GREY, metadata=None),
    "imagej": lambda: tif(GREY, imagej=True),
    "imagej RGB": lambda: tif(COLOUR, imagej=True),
    "ome": lambda: tif(GREY, ome=True),
    "ome RGB": lambda: tif(COLOUR, ome=True, **RGB),
}


@pytest.mark.parametrize("name", OTHER_TIFFS)
def test_other_tiffs_are_read_as_nnunet_reads_them(name: str, tmp_path: Path) -> None:
    same_as_stock(OTHER_TIFFS[name](), tmp_path)


STACK = some((5, 9, 7), "uint16")


@pytest.mark.parametrize(
    "content",
    [
        tif(STACK, imagej=True),
        tif(STACK, imagej=True, metadata={"axes": "CYX"}),
        tif(STACK, imagej=True, metadata={"axes": "TYX"}),
        tif(STACK, ome=True, metadata={"axes": "ZYX"}),
        tif(STACK, metadata=None),
        tif(STACK, metadata={"axes": "ZYX", "spacing": 3}, photometric="minisblack"),
    ],
    ids=["imagej", "imagej channels", "imagej times", "ome", "no metadata", "axes"],
)
def test_stacks_of_other_writers_are_read_as_nnunet_reads_them(content: bytes, tmp_path: Path) -> None:
    same_as_stock(content, tmp_path, Tiff3DIO)


def test_subresolutions_are_left_alone(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(BIG, subifds=1)
        writer.write(BIG[::2, ::2], subfiletype=1)
    same_as_stock(file.getvalue(), tmp_path)


Entry = tuple[int, int, int, int]


def edited(content: bytes, *, page: int = 0, **values: int) -> bytes:
    """A little-endian classic TIFF with the inline numbers of some tags (``t256=…``) replaced."""
    body = bytearray(content)
    (offset,) = struct.unpack_from("<I", body, 4)
    for _ in range(page):
        (count,) = struct.unpack_from("<H", body, offset)
        (offset,) = struct.unpack_from("<I", body, offset + 2 + 12 * count)
    (count,) = struct.unpack_from("<H", body, offset)
    left = {int(name[1:]): value for name, value in values.items()}
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", body, position)
        if tag in left:
            struct.pack_into("<HII", body, position + 2, 4, 1, left.pop(tag))
    if 0 in left:
        struct.pack_into("<I", body, offset + 2 + 12 * count, left.pop(0))
    assert not left
    return bytes(body)


def first_page(content: bytes) -> int:
    offset: int = struct.unpack_from("<I", content, 4)[0]
    return offset


PLAIN = tif(GREY, metadata=None)
PAGES = tif(STACK, metadata=None)
OME = tif(STACK, ome=True, metadata={"axes": "ZYX"})


def two_series() -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY)
        writer.write(BIG)
    return file.getvalue()


HOSTILE_TIFFS: dict[str, tuple[bytes, type[ServingError]]] = {
    "nothing but the magic": (b"II*\0", Malformed),
    "no page": (b"II*\0\0\0\0\0", Malformed),
    "a directory outside": (b"II*\0\xff\xff\xff\x7f", Malformed),
    "a cut directory": (PLAIN[: first_page(PLAIN) + 20], Malformed),
    "60,000 tags": (b"II*\0\x08\0\0\0\x60\xea" + bytes(800_000), TooLarge),
    "a bigtiff of 2**60 tags": (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(500), TooLarge),
    "a bigtiff of odd offsets": (b"II+\0\x04\0\0\0" + bytes(500), Malformed),
    "a bigtiff directory at 2**63": (b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63) + bytes(50), Malformed),
    "a page that follows itself": (edited(PLAIN, t0=first_page(PLAIN)), Malformed),
    "pages in a circle": (edited(PAGES, page=4, t0=first_page(PAGES)), Malformed),
    "no width": (edited(PLAIN, t256=0), Malformed),
    "a trillion voxels": (edited(PLAIN, t256=10**6, t257=10**6), TooLarge),
    "more voxels than the strip has": (edited(PLAIN, t257=10), Malformed),
    "more voxels than deflate can give": (edited(tif(GREY, compression="zlib"), t257=100_000, t278=100_000), Malformed),
    "no rows in a strip": (edited(PLAIN, t278=0), Malformed),
    "a strip outside": (edited(PLAIN, t273=10**6), Malformed),
    "a strip that ends outside": (edited(PLAIN, t279=10**6), Malformed),
    "an empty strip": (edited(tif(GREY, compression="lzw"), t279=0), Malformed),
    "a cut strip": (tif(GREY)[:-5], Malformed),
    "too few strips": (edited(PLAIN, t278=1), Malformed),
    "jpeg": (edited(PLAIN, t259=7), UnknownFormat),
    "webp": (edited(PLAIN, t259=50001), UnknownFormat),
    "lzma": (tif(GREY, compression="lzma"), UnknownFormat),
    "zstd": (tif(GREY, compression="zstd"), UnknownFormat),
    "fax": (by_pillow(some((9, 7), "bool"), compression="group4"), UnknownFormat),
    "no deflate": (edited(PLAIN, t259=8), Malformed),
    "no lzw": (edited(PLAIN, t259=5), Malformed),
    "half the deflate": (edited(tif(BIG, compression="zlib"), t279=3000), Malformed),
    "half the lzw": (edited(tif(BIG, compression="lzw"), t279=3000), Malformed),
    "half the packbits": (edited(tif(BIG, compression="packbits"), t279=3000), Malformed),
    "7 bits": (edited(PLAIN, t258=7), UnknownFormat),
    "complex": (tif(some((9, 7), "float32").astype("complex64")), UnknownFormat),
    "a predictor of floats": (edited(tif(GREY, compression="zlib", predictor=True), t317=3), UnknownFormat),
    "CMYK": (tif(some((9, 7, 4)), photometric="separated"), UnknownFormat),
    "two samples": (tif(some((9, 7, 2)), photometric="minisblack", planarconfig="contig"), WrongChannels),
    "five samples": (tif(some((9, 7, 5)), photometric="minisblack", planarconfig="contig"), WrongChannels),
    "a volume in tiles": (tif(some((16, 16, 16)), tile=(16, 16, 16), photometric="minisblack"), UnknownFormat),
    "colour in pages": (tif(some((5, 9, 7, 3)), **RGB), WrongChannels),
    "pages in a plane": (PAGES, WrongChannels),
    "pages of two sizes": (two_series(), WrongChannels),
    "a hyperstack": (tif(some((2, 3, 9, 7)), imagej=True), WrongChannels),
    "tifffile's slices without pages": (
        tif(STACK, photometric="minisblack", metadata={"truncated": True}), WrongChannels
    ),
    "imagej's slices without pages": (
        tif(GREY, metadata=None, description="ImageJ=1.11a\nimages=5\nslices=5\n"), WrongChannels
    ),
    "a shape that is none": (tif(GREY, metadata=None, description='{"shape": 5}'), Malformed),
    "a shape without end": (tif(GREY, metadata=None, description='{"shape": ' + "[" * 100_000), Malformed),
    "ome channels": (
        tif(some((5, 2, 9, 7)), ome=True, metadata={"axes": "ZCYX"}, photometric="minisblack"), WrongChannels
    ),
    "ome out of order": (OME.replace(b'IFD="0" PlaneCount="5"', b'IFD="1" PlaneCount="5"'), WrongChannels),
    "ome in other files": (tif(GREY, metadata=None, description='<OME><Pixels SizeC="1" SizeT="1" SizeZ="1"><TiffData>'
        '<UUID FileName="/etc/passwd"/></TiffData></Pixels></OME>'), WrongChannels),
    "another vendor's": (tif(GREY, extratags=[(33628, 4, 1, 0, True)]), UnknownFormat),
    "a description of 5 MB": (tif(GREY, metadata=None, description="x" * 5 * 2**20), TooLarge),
    "a tag outside": (edited(PLAIN, t256=7).replace(struct.pack("<HHII", 256, 4, 1, 7),
        struct.pack("<HHII", 256, 4, 10, 2**31)), Malformed),
    "a fraction for a width": (edited(PLAIN, t256=7).replace(struct.pack("<HHII", 256, 4, 1, 7),
        struct.pack("<HHII", 256, 5, 1, 8)), Malformed),
    "a huge tile": (edited(tif(GREY, compression="lzw", tile=(16, 16)), t322=16_384, t323=16_384), TooLarge),
}  # fmt: skip


@pytest.mark.parametrize("name", [*HOSTILE_PNGS, *HOSTILE_TIFFS])
def test_hostile_bytes_are_named_for_what_they_are(name: str) -> None:
    content, expected = (HOSTILE_PNGS | HOSTILE_TIFFS)[name]
    with pytest.raises(ServingError) as refused:
        open_picture(content).read()
    assert type(refused.value) is expected


def test_strips_that_overlap_are_refused() -> None:
    content = bytearray(tif(BIG, metadata=None, rowsperstrip=1, compression="lzw"))
    offset = first_page(bytes(content))
    (count,) = struct.unpack_from("<H", content, offset)
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number, start = struct.unpack_from("<HHII", content, position)
        if tag in {273, 279}:
            size = {3: 2, 4: 4}[kind]
            value = 8 if tag == 273 else len(content) - 8
            content[start : start + number * size] = value.to_bytes(size, "little") * number
    with pytest.raises(Malformed, match="overlap"):
        open_picture(bytes(content))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BigTIFF", "deflate"])
def test_every_cut_is_refused_or_reads_the_same(name: str) -> None:
    content = {
        "PNG": png(GREY), "TIFF": PLAIN, "BigTIFF": tif(GREY, bigtiff=True), "deflate": tif(GREY, compression="zlib")
    }[name]  # fmt: skip
    for length in range(12, len(content)):
        try:
            voxels = open_picture(content[:length]).read()
        except ServingError:
            continue
        np.testing.assert_array_equal(voxels[0, 0], GREY)


def test_bytes_changed_at_random_never_raise_anything_else() -> None:
    bodies = [
        png(COLOUR),
        palette(),
        tif(BIG, compression="zlib", rowsperstrip=13),
        PAGES,
        tif(BIG, tile=(32, 48)),
        OME,
    ]
    for body in bodies:
        for _ in range(150):
            changed = bytearray(body)
            for position in RNG.integers(8, len(body), RNG.integers(1, 6)):
                changed[position] = RNG.integers(0, 256)
            try:
                open_picture(bytes(changed), SPACE).read()
            except ServingError as refused:
                assert not re.search("/|NAME", str(refused))  # noqa: PT017 (any of the two may come)


def test_no_name_in_a_file_is_opened() -> None:
    """A set of OME files by the writer's own hand, of which one was sent."""
    names = re.sub(rb'<TiffData IFD="0" PlaneCount="5"/>', b"", OME)
    assert names != OME
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watching else None)
    watching = [True]
    for content in (OME, names, HOSTILE_TIFFS["ome in other files"][0], png(GREY), PLAIN):
        try:
            open_picture(content, SPACE).read()
        except ServingError:
            continue
    watching.clear()
    assert not opened


BOMB = """
    import io, struct, sys, zlib
    import numpy as np, tifffile, imagecodecs
    from nnunet_torchserve.codecs.png import open_png
    from nnunet_torchserve.codecs.tiff import open_tiff
    from nnunet_torchserve.errors import ServingError
    from nnunet_torchserve.limits import Limits
    from nnunet_torchserve.volume import Placement

    def peak():
        status = open("/proc/self/status").read()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    size = 100_000_000
    def bomb(kind):
        if kind == "deflate":
            packer = zlib.compressobj(9)
            return b"".join(packer.compress(bytes(10**6)) for _ in range(size // 10**6)) + packer.flush()
        if kind == "packbits":
            return b"\\x81\\0" * (size // 128)
        once = imagecodecs.lzw_encode(bytes(10**6))
        return once[:-2] + bytes(2) + once * (size // 10**6)

    def tiff(kind, packed):
        number = {"deflate": 8, "lzw": 5, "packbits": 32773}[kind]
        tags = {256: 50, 257: 50, 258: 8, 259: number, 262: 1, 273: 200, 277: 1, 278: 50, 279: len(packed)}
        head = b"II*\\0\\x08\\0\\0\\0" + struct.pack("<H", len(tags))
        head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4)
        return head.ljust(200, b"\\0") + packed

    def png(packed):
        def chunk(kind, content):
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        header = struct.pack(">II5B", 50, 50, 8, 0, 0, 0, 0)
        return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")

    kind = sys.argv[1]
    packed = bomb("deflate" if kind == "png" else kind)
    body = png(packed) if kind == "png" else tiff(kind, packed)
    open_one = open_png if kind == "png" else open_tiff
    small = png(zlib.compress(bytes(51 * 50))) if kind == "png" else tiff("deflate", zlib.compress(bytes(2500)))
    open_one(memoryview(small), Limits(), Placement((1.0, 1.0))).read()  # what the libraries take once
    before = peak()
    try:
        voxels = open_one(memoryview(body), Limits(), Placement((1.0, 1.0))).read()
        assert voxels.shape == (1, 1, 50, 50) and not voxels.any()
        said = "read"
    except ServingError as refused:
        said = refused.code
    print(said, peak() - before, len(body) // 2**20)
"""


@pytest.mark.parametrize("kind", ["png", "deflate", "lzw", "packbits"])
def test_a_bomb_of_100_mb_costs_no_memory(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOMB), kind], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    said, grown, packed = done.stdout.split()
    assert said in {"read", "malformed"}
    assert int(grown) <= 3 * int(packed) + 20


def test_a_header_of_many_pages_is_bounded() -> None:
    directory = struct.pack("<H", 0)
    pages = b"".join(directory + struct.pack("<I", 8 + 6 * (n + 1)) for n in range(100_000))
    with pytest.raises(Malformed):
        open_picture(b"II*\0\x08\0\0\0" + pages)


def test_the_shape_that_tifffile_writes_is_the_one_that_is_compared() -> None:
    description = json.dumps({"shape": [5, 9, 7]})
    with pytest.raises(WrongChannels, match="5, 9, 7"):
        open_picture(tif(GREY, metadata=None, description=description), SPACE)


PICTURE_LABELS = {"few": 3, "the last of 8 bits": 254, "the first of 16 bits": 255, "many": 300}


def stocks_file(io_class: Any, labels: npt.NDArray[Any], file: Path, spacing: tuple[float, ...]) -> npt.NDArray[Any]:
    """What somebody else's reader finds in the file that stock writes."""
    io_class().write_seg(labels, str(file), {"spacing": spacing})
    voxels: npt.NDArray[Any] = tifffile.imread(file) if file.suffix == ".tif" else iio.imread(file)
    return voxels


@pytest.mark.parametrize("largest", PICTURE_LABELS)
@pytest.mark.parametrize("name", ["flat.tif", "flat.bmp", "stack.tif"])
def test_label_maps_are_those_that_stock_writes(name: str, largest: str, tmp_path: Path) -> None:
    """Voxel by voxel, in its type, read by tifffile and imageio."""
    top = PICTURE_LABELS[largest]
    if name.endswith("bmp") and top > 254:
        pytest.skip("refused before anything is computed: see below")
    labels: Any = (np.arange(5 * 9 * 7) % (top + 1)).astype(np.uint16 if top > 254 else np.uint8).reshape(5, 9, 7)
    labels[0, 0, 0] = top
    labels = labels[:1] if name.startswith("flat") else labels
    reader = NaturalImage2DIO if name.startswith("flat") else Tiff3DIO
    expected = stocks_file(reader, labels, tmp_path / f"stock_{name}", (2.0, 1.0, 1.0))
    image = open_picture(png(labels[0]), PLANE) if name.startswith("flat") else open_picture(tif(labels), SPACE)
    form = codecs.answer_form(Options(output_format=OutputFormat(name[-3:])), image.native_format, image.geometry, top)
    file = codecs.encode(LabelMap(labels, image.geometry), form, codecs.About([image], Painting({})))
    assert file.content_type == {"tif": "image/tiff", "bmp": "image/bmp"}[name[-3:]]
    written = volumes.write(tmp_path, name, file.body)
    ours = tifffile.imread(written) if name.endswith("tif") else iio.imread(written)
    np.testing.assert_array_equal(ours, expected, strict=True)
    if name.startswith("flat"):
        np.testing.assert_array_equal(NaturalImage2DIO().read_seg(str(written))[0][0], labels)
    else:
        (tmp_path / "stack.json").write_text('{"spacing": [2, 1, 1]}')
        np.testing.assert_array_equal(Tiff3DIO().read_seg(str(written))[0][0], labels)
        for page in range(5):
            with Image.open(written) as pages:  # by somebody who knows nothing of tifffile's own description
                pages.seek(page)
                np.testing.assert_array_equal(np.asarray(pages), labels[page])


def test_narrow_stacks_are_no_colours(tmp_path: Path) -> None:
    labels = (np.arange(5 * 9 * 3) % 4).astype(np.uint8).reshape(5, 9, 3)
    body = encode_tiff(labels, flat=False)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(body)), labels)
    assert len(tifffile.TiffFile(io.BytesIO(body)).pages) == 5


def test_a_bmp_of_16_bits_is_refused() -> None:
    image = open_picture(png(GREY), PLANE)
    with pytest.raises(BadOption, match="up to 254, this model's go to 255"):
        codecs.answer_form(Options(output_format=OutputFormat.BMP), image.native_format, image.geometry, 255)
