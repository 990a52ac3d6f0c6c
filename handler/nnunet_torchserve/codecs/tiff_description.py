"""What a TIFF's description (ImageJ's, tifffile's, OME's) says of its pages; refused where they are no plain stack."""

from __future__ import annotations

import json
import math
import re
from typing import Protocol

from ..errors import Malformed, WrongChannels


class Page(Protocol):
    """What is asked of a page."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def length(self) -> int:
        """Rows."""

    @property
    def samples(self) -> int:
        """Numbers of a pixel."""


def check_description(texts: list[str], pages: int, page: Page) -> None:
    """Refuse a TIFF whose description says that the pages are not simply its slices in order.

    Raises:
        WrongChannels: more dimensions than a stack, or slices that are in no page of this file.
    """
    for text in texts:
        if text.startswith("ImageJ="):
            _check_imagej(text, pages, page)
        elif text.startswith(('{"shape"', "shape=")):
            _check_shaped(text, pages, page)
        elif text.rstrip().endswith("OME>"):
            _check_ome(text, pages, page)


def _check_imagej(text: str, pages: int, page: Page) -> None:
    found = {
        name: int(number)
        for name, number in re.findall(r"^(images|channels|slices|frames)=(\d{1,9})$", text, re.MULTILINE)
    }
    axes = [found.get(name, 1) for name in ("channels", "slices", "frames")]
    in_samples = page.samples > 1 and axes[0] == page.samples
    images = math.prod(axes[1:] if in_samples else axes)
    if images > 1 and (images != pages or max(axes[1:] if in_samples else axes) != images):
        msg = f"an ImageJ hyperstack of {axes} channels, slices and frames in {pages} pages; send slices alone"
        raise WrongChannels(msg)
    if found.get("images", pages) > pages:
        msg = f"an ImageJ stack whose {found['images']} images are not in pages of their own; save it as a plain TIFF"
        raise WrongChannels(msg)


def _check_shaped(text: str, pages: int, page: Page) -> None:
    """The shape that tifffile writes: of one array, whose pages may not all be there."""
    try:
        shape = json.loads(text)["shape"] if text.startswith("{") else re.findall(r"\d+", text)
        declared = [int(n) for n in shape]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        msg = "the TIFF's description is no shape, though it begins like one"
        raise Malformed(msg) from None
    expected = [n for n in (pages, page.samples, page.length, page.width) if n > 1]
    if sorted(n for n in declared if n != 1) != sorted(expected):
        msg = f"the TIFF says that it holds an array of shape {declared[:8]}, but has {pages} pages; send slices alone"
        raise WrongChannels(msg)


def _check_ome(text: str, pages: int, page: Page) -> None:
    """OME-XML may name other files, and may give the pages another order; it is not parsed as XML."""
    sizes = {axis: int(number) for axis, number in re.findall(r'\bSize([CTZ])="(\d{1,9})"', text)}
    planes = [
        dict(re.findall(r'\b(\w+)="([^"]*)"', plane)) for plane in re.findall(r"<(?:\w+:)?TiffData\b([^>]*)", text)
    ]
    in_order = all(plane.get("IFD", "0") == plane.get("FirstZ", "0") for plane in planes)
    one_image = len(re.findall(r"<(?:\w+:)?Pixels\b", text)) == 1 and "FileName" not in text
    volume = sizes.get("C") == page.samples and sizes.get("T") == 1 and sizes.get("Z") == pages
    if not (in_order and one_image and volume):
        msg = "an OME-TIFF of several files, channels or times, or with pages out of order; send slices alone"
        raise WrongChannels(msg)
