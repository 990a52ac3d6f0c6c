"""TIFF and BigTIFF: the voxels that nnU-Net's ``NaturalImage2DIO`` and ``Tiff3DIO`` read, by way of tifffile.

tifffile decodes them, but never sees a client's header: this module reads the directories itself, within bounds, and
hands over one page at a time under a small header of its own. So vendors' tags, subdirectories and references to other
files are never parsed, a size is checked before anything is unpacked, and only compressions whose output is bounded
are taken.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from ..errors import Malformed, TooLarge, UnknownFormat, WrongChannels
from ..limits import Limits
from ..volume import LabelArray, Placement
from .geometry import check_size
from .inflate import MemoryFile
from .pictures import MOST_RATIO, PLANE, PictureSource, in_stocks_type
from .tiff_description import check_description
from .tiff_directory import Directory, unpack

_TIFF_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
"""Byte orders; the plus is BigTIFF's."""

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_DESCRIPTION, _STRIP_OFFSETS, _SAMPLES_PER_PIXEL, _ROWS_PER_STRIP, _STRIP_COUNTS = 270, 273, 277, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 284, 317, 322, 323, 324, 325
_SAMPLE_FORMAT = 339
_DIFFERENCES, _OF_FLOATS = 2, 3
"""Predictors."""

_COLOUR_MAP = 3
"""The last kind of colours that is taken: grey, inverted or not, RGB, a palette."""

_NUMBERS = (
    _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES_PER_PIXEL, _ROWS_PER_STRIP, _PLANAR,
    _PREDICTOR, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT,
)  # fmt: skip
"""The tags whose one number (or the same number for each sample) tells how to decode."""

_ANOTHER_KIND = {
    32997, 33445, 33471, 33560, 33628, 34361, 34362, 34412, 43314, 51123, 65000, 65001, 65002, 65420,
}  # fmt: skip
"""Tags of volumes in tiles (SGI) and of MD Gel, Olympus, MetaMorph, FluoView, LSM, NIH Image, Micro-Manager, EER and
NDPI files: their voxels, or the order of their slices, do not follow from the baseline tags."""

_LONG8 = 16
_RATIO = {1: 1, 5: 4096, 8: MOST_RATIO, 32773: 64, 32946: MOST_RATIO}
"""Compressions whose output can be bounded, and what each makes of a byte at most: none, LZW (a code of 12 bits stands
for at most 4,094 bytes), deflate, PackBits, and deflate by its older number."""

_DTYPES = {(1, 1), (1, 8), (1, 16), (1, 32), (1, 64), (2, 8), (2, 16), (2, 32), (2, 64), (3, 16), (3, 32), (3, 64)}
"""Sample format (unsigned, signed, float) and bits."""

_MOST_PAGES = 16_384
_MOST_SEGMENTS = 2**18
"""Strips or tiles of a page, each of which costs tifffile some hundred bytes; 2¹⁸ tiles of 256² are a slide."""

_MOST_SEGMENTS_OF_ALL = 2**22
"""Of all pages together."""

_TILE_BYTES = 64 * 1024**2
"""What tiles may take beyond the picture, whose edge they overlap; or three times the picture."""

_MOST_DESCRIPTION_BYTES = 4 * 1024**2
_TIFF_ERRORS = (ValueError, RuntimeError, OSError, IndexError, TypeError, ArithmeticError, struct.error)
"""What tifffile and imagecodecs raise for damaged strips."""


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a TIFF or a BigTIFF."""
    return head[:4] in _TIFF_MAGIC


def open_tiff(body: memoryview, limits: Limits, placement: Placement | None) -> PictureSource:
    """A TIFF or BigTIFF: one picture, or a stack of grey pages as slices.

    In a plane (two numbers of spacing) three or four grey pages are the channels of one picture: so scikit-image reads
    them for ``NaturalImage2DIO``. Compressions: none, deflate, LZW, PackBits.

    Args:
        body: the file.
        limits: what is allowed.
        placement: where the picture lies, by the request or by the model's reader (2 numbers for
            ``NaturalImage2DIO``, 3 for ``Tiff3DIO``); ``None`` where neither says it.

    Raises:
        Malformed, TooLarge, UnknownFormat, BadSpacing, WrongChannels: the header says so.
    """
    pages, description = _pages(body, limits)
    first = pages[0]
    if any(page.kind != first.kind for page in pages):
        msg = "the TIFF's pages differ in size or type; send pages of one kind, without thumbnails"
        raise WrongChannels(msg)
    check_description(description, len(pages), first)
    channels, slices = first.samples, len(pages)
    if slices > 1 and channels > 1:
        msg = "a TIFF with several pages in colour; send one picture, or a stack of grey pages"
        raise WrongChannels(msg)
    if slices > 1 and placement is not None and len(placement.spacing) == PLANE:
        if slices not in {3, 4} or first.width in {3, 4}:
            if placement.assumed:
                msg = f"a TIFF of {slices} pages, and the model takes single pictures; send one page a request"
            else:
                msg = f"a TIFF of {slices} pages, placed in a plane; send one page, or a spacing along x, y, z"
            raise WrongChannels(msg)
        channels, slices = slices, 1
    shape = (slices, first.length, first.width)
    check_size(shape, channels, max(1, first.bits // 8), limits)

    def decode() -> npt.NDArray[np.float32]:
        voxels = np.empty((channels, *shape), np.float32)
        planes = voxels.reshape(len(pages), first.samples, first.length, first.width)
        for plane, page in zip(planes, pages, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                plane[...] = page.decode(body)
        return voxels

    return PictureSource(shape, channels, placement, decode, len(pages))


def encode_tiff(labels: LabelArray, *, flat: bool) -> bytes:
    """A label map as a grey TIFF, the same bytes for the same labels.

    Of a picture as ``NaturalImage2DIO`` writes it, by way of scikit-image; of a volume as ``Tiff3DIO`` does: a page a
    slice, deflated. Neither says where it lies; ``Tiff3DIO`` reads the spacing from a JSON file beside it.

    Args:
        labels: (Z, Y, X), uint8 or uint16.
        flat: a picture, with one slice.
    """
    file = io.BytesIO()
    written = in_stocks_type(labels)
    # else tifffile takes an axis of 3 or 4 for colours
    tifffile.imwrite(
        file,
        written[0] if flat else written,
        photometric="minisblack",
        compression=None if flat else "zlib",
        maxworkers=1,
    )
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class _Page:
    """One page of a TIFF, checked.

    Attributes:
        order: ``<`` or ``>``.
        numbers: by tag, those of ``_NUMBERS`` that the page has.
        offsets: where its strips or tiles begin in the file.
        counts: their bytes, as packed.
    """

    order: str
    numbers: dict[int, int]
    offsets: npt.NDArray[np.uint64] = field(repr=False)
    counts: npt.NDArray[np.uint64] = field(repr=False)

    @property
    def kind(self) -> tuple[tuple[int, int], ...]:
        """What pages of one stack have in common; a page's strips may be cut in their own way."""
        layout = {_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH}
        return tuple(sorted((tag, number) for tag, number in self.numbers.items() if tag not in layout))

    @property
    def width(self) -> int:
        """Voxels along x."""
        return self.numbers[_WIDTH]

    @property
    def length(self) -> int:
        """Voxels along y."""
        return self.numbers[_LENGTH]

    @property
    def samples(self) -> int:
        """Channels."""
        return self.numbers[_SAMPLES_PER_PIXEL]

    @property
    def bits(self) -> int:
        """Of one sample."""
        return self.numbers[_BITS]

    @property
    def tiled(self) -> bool:
        """Whether in tiles, or in strips."""
        return _TILE_WIDTH in self.numbers

    @property
    def segment_shape(self) -> tuple[int, int]:
        """(y, x) of a strip or a tile."""
        if self.tiled:
            return self.numbers[_TILE_LENGTH], self.numbers[_TILE_WIDTH]
        return min(self.numbers[_ROWS_PER_STRIP], self.length), self.width

    @property
    def planes(self) -> int:
        """How many times the segments cover the picture: once, or once for each sample."""
        return self.samples if self.numbers[_PLANAR] == 2 else 1

    @property
    def segments(self) -> int:
        """Strips or tiles."""
        rows, columns = self.segment_shape
        return math.ceil(self.length / rows) * math.ceil(self.width / columns) * self.planes

    def decode(self, body: memoryview) -> npt.NDArray[Any]:
        """The samples, (C, Y, X), by tifffile under a header that holds this page's numbers and nothing else."""
        whole: Any = MemoryFile(memoryview(self._header()), body)
        try:
            with tifffile.TiffFile(whole) as file:
                planes = file.pages.first.asarray(squeeze=False, maxworkers=1)
        except _TIFF_ERRORS:
            msg = "the TIFF's voxels are damaged or cut off"
            raise Malformed(msg) from None
        stored: npt.NDArray[Any] = np.moveaxis(planes[:, 0], 3, 1)  # plane, sample, y, x; one of the first two is 1
        return stored.reshape(self.samples, self.length, self.width)

    def _header(self) -> bytes:
        """A BigTIFF header whose offsets count from its own start, with the file's bytes behind it."""
        offsets, counts = (_TILE_OFFSETS, _TILE_COUNTS) if self.tiled else (_STRIP_OFFSETS, _STRIP_COUNTS)
        tags = sorted([*self.numbers, offsets, counts])
        arrays_start = 16 + 8 + 20 * len(tags) + 8
        size = arrays_start + 16 * self.segments
        values = {offsets: self.offsets + np.uint64(size), counts: self.counts}
        entries = [struct.pack(f"{self.order}2s3HQQ", b"II" if self.order == "<" else b"MM", 43, 8, 0, 16, len(tags))]
        arrays: list[bytes] = []
        for tag in tags:
            numbers = values.get(tag, np.array([self.numbers.get(tag, 0)], np.uint64))
            raw = numbers.astype(f"{self.order}u8").tobytes()
            if len(numbers) > 1:
                arrays.append(raw)
                raw = struct.pack(f"{self.order}Q", arrays_start + sum(map(len, arrays[:-1])))
            entries.append(struct.pack(f"{self.order}HHQ", tag, _LONG8, len(numbers)) + raw)
        header = b"".join([*entries, bytes(8), *arrays])
        return header + bytes(size - len(header))


def _pages(body: memoryview, limits: Limits) -> tuple[list[_Page], list[str]]:
    """The pages of the main chain, each checked by itself, and the first one's descriptions."""
    order = _TIFF_MAGIC[bytes(body[:4])]
    big = b"+" in bytes(body[:4])
    if big and unpack(body, f"{order}HH", 4) != (8, 0):
        msg = "the BigTIFF header has offsets of another length than 8 bytes"
        raise Malformed(msg)
    (offset,) = unpack(body, order + ("Q" if big else "I"), 8 if big else 4)
    pages: list[_Page] = []
    descriptions: list[str] = []
    seen: set[int] = set()
    segments = packed_bytes = 0
    while offset:
        if offset in seen or len(pages) >= _MOST_PAGES:
            msg = f"the TIFF's pages form a loop, or are more than {_MOST_PAGES}"
            raise Malformed(msg)
        seen.add(offset)
        directory = Directory(body, order, big=big, offset=offset, limits=limits)
        page = _page(directory, order, len(body), limits)
        pages.append(page)
        segments += page.segments
        packed_bytes += int(page.counts.sum())
        if segments > _MOST_SEGMENTS_OF_ALL:
            msg = f"the TIFF has more than {_MOST_SEGMENTS_OF_ALL} strips or tiles in all"
            raise TooLarge(msg)
        if packed_bytes > len(body):  # at once: many pages may share one long list of strips
            msg = "the TIFF's strips or tiles overlap each other"
            raise Malformed(msg)
        descriptions = descriptions or directory.texts(_DESCRIPTION, _MOST_DESCRIPTION_BYTES)
        offset = directory.next
    if not pages:
        msg = "the TIFF has no page"
        raise Malformed(msg)
    return pages, descriptions


_DEFAULTS = {
    _BITS: 1, _COMPRESSION: 1, _FILL_ORDER: 1, _SAMPLES_PER_PIXEL: 1, _PLANAR: 1, _PREDICTOR: 1, _SAMPLE_FORMAT: 1,
    _ROWS_PER_STRIP: 2**32 - 1,
}  # fmt: skip
"""What TIFF 6.0 says of tags that are absent."""


def _page(directory: Directory, order: str, body_bytes: int, limits: Limits) -> _Page:
    """The checked page of one directory."""
    tags = directory.tags
    if tags & _ANOTHER_KIND:
        msg = "a vendor's own kind of TIFF; save it as a plain TIFF, one page a slice"
        raise UnknownFormat(msg)
    if not {_WIDTH, _LENGTH, _PHOTOMETRIC} <= tags or (_TILE_WIDTH in tags) != (_TILE_LENGTH in tags):
        msg = "a page of the TIFF does not say its size or its photometric interpretation"
        raise Malformed(msg)
    numbers = dict(_DEFAULTS)
    for tag in tags.intersection(_NUMBERS):
        values = directory.values(tag, 1 + limits.channels)
        if (values != values[0]).any():
            msg = "the samples of the TIFF are of different types; send one type for all"
            raise UnknownFormat(msg)
        numbers[tag] = int(values[0])
    if _TILE_WIDTH in numbers:
        del numbers[_ROWS_PER_STRIP]
    none = np.empty(0, np.uint64)
    page = _Page(order, numbers, none, none)
    _check_type(page)
    _check_layout(page, limits)
    offsets, counts = (_TILE_OFFSETS, _TILE_COUNTS) if page.tiled else (_STRIP_OFFSETS, _STRIP_COUNTS)
    if not {offsets, counts} <= tags:
        msg = "a page of the TIFF does not say where its strips or tiles are, or how long"
        raise Malformed(msg)
    page = replace(
        page, offsets=directory.values(offsets, page.segments), counts=directory.values(counts, page.segments)
    )
    if len(page.offsets) < page.segments or len(page.counts) < page.segments:
        msg = f"a page of the TIFF has too few strips or tiles; {page.segments} were expected"
        raise Malformed(msg)
    if not page.counts.all() or (page.counts > body_bytes).any() or (page.offsets > body_bytes - page.counts).any():
        msg = "a strip or tile of the TIFF is empty or lies outside the file; it seems cut off"
        raise Malformed(msg)
    stored_bytes = page.samples * page.length * page.width * page.bits // 8
    if stored_bytes > _RATIO[page.numbers[_COMPRESSION]] * int(page.counts.sum()):
        msg = f"a page of the TIFF declares voxels of {stored_bytes} bytes, which its strips or tiles cannot hold"
        raise Malformed(msg)
    return page


def _check_type(page: _Page) -> None:
    """Refuse what a model cannot take or what cannot be decoded within bounds."""
    numbers = page.numbers
    if numbers[_COMPRESSION] not in _RATIO:
        msg = "the TIFF is packed in a way that this server does not take; send it unpacked, or deflate, LZW, PackBits"
        raise UnknownFormat(msg)
    if (numbers[_SAMPLE_FORMAT], page.bits) not in _DTYPES:
        msg = f"TIFF samples of {page.bits} bits of this type are not taken; send integers or floats of 8 to 64 bits"
        raise UnknownFormat(msg)
    predictor_fits = {1: True, _DIFFERENCES: page.bits > 1, _OF_FLOATS: numbers[_SAMPLE_FORMAT] == 3}
    if not predictor_fits.get(numbers[_PREDICTOR]) or numbers[_FILL_ORDER] not in {1, 2}:
        msg = "the TIFF's predictor or fill order does not exist, or does not fit its samples"
        raise UnknownFormat(msg)
    if numbers[_PHOTOMETRIC] > _COLOUR_MAP or numbers[_PLANAR] not in {1, 2}:
        msg = "the TIFF's colours are neither grey, RGB nor a palette; send one of them"
        raise UnknownFormat(msg)
    if page.samples not in {1, 3, 4}:
        msg = f"a TIFF of {page.samples} samples a voxel; send 1 (grey), 3 (RGB) or 4 (RGBA)"
        raise WrongChannels(msg)


def _check_layout(page: _Page, limits: Limits) -> None:
    """Refuse strips and tiles that would cost far more than the picture."""
    size = check_size((1, page.length, page.width), page.samples, max(1, page.bits // 8), limits)
    rows, columns = page.segment_shape
    if min(rows, columns) < 1:
        msg = "the TIFF has strips or tiles without rows"
        raise Malformed(msg)
    samples = page.samples // page.planes
    tiles_bytes = page.segments * rows * columns * samples * max(1, page.bits // 8)
    if page.segments > _MOST_SEGMENTS or tiles_bytes > max(4 * size, size + _TILE_BYTES):
        msg = f"the TIFF has more than {_MOST_SEGMENTS} strips or tiles, or tiles far larger than the picture"
        raise TooLarge(msg)
