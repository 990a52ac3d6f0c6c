"""How a header says that stored numbers become values: a Modality LUT, or slope and intercept."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DicomReason, DicomRefused, Malformed
from .element_values import values_of, words_of
from .functional_groups import group_of
from .image_classes import Modality
from .library import quietly
from .rescale import UNSCALED, Linear, Rescale, Table
from .stored_pixels import Pixels


def read_table(found: Any, pixels: Pixels) -> Table | None:
    """The Modality LUT of all frames, if there is one."""
    with quietly():
        tables = found.get("ModalityLUTSequence")
        return _table(tables[0], pixels) if tables else None


def read_rescale(found: Any, shared: Any, own: Any, table: Table | None, modality: Modality) -> Rescale:
    """Of one frame, from its functional group or, as single-frame objects and some writers have it, from the top.

    MR images may go without; those of CT and PET may not (type 1 in PS3.3, C.8.2.1 and C.8.9.4), and would be read as
    other values than they are.
    """
    with quietly():
        group = group_of("PixelValueTransformationSequence", shared, own)
        given = {pair for place in (group, found) if place is not None and (pair := _pair(place)) is not None}
    if len(given) + (table is not None) > 1:
        msg = "an image says in two ways how its stored numbers become values, and they differ"
        raise Malformed(msg)
    if table is not None:
        return table
    if not given:
        if modality is Modality.MR:
            return UNSCALED
        msg = (
            f"a {modality} image has no RescaleSlope and RescaleIntercept, so nobody knows its values; send the files "
        )
        raise DicomRefused(DicomReason.INCOMPLETE, f"{msg}as the scanner wrote them")
    ((slope, intercept),) = given
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        msg = f"an image is rescaled by slope {slope:g} and intercept {intercept:g}, which makes no values"
        raise Malformed(msg)
    return Linear(slope, intercept)


def _pair(place: Any) -> tuple[float, float] | None:
    """Slope and intercept; ``None`` if neither is there."""
    slope, intercept = (values_of(place, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if not slope and not intercept:
        return None
    if not slope or not intercept:
        msg = "an image has one of RescaleSlope and RescaleIntercept, and not the other, so nobody knows its values"
        raise DicomRefused(DicomReason.INCOMPLETE, msg)
    return float(slope[0]), float(intercept[0])


def _table(item: Any, pixels: Pixels) -> Table:
    """A Modality LUT (PS3.3, C.11.1.1): its descriptor and data are bytes where the file says no representation."""
    order = "<" if pixels.encoding.little else ">"
    descriptor = words_of(item, 0x00283002, f"{order}u2")
    if len(descriptor) != 3:
        msg = "a Modality LUT has no descriptor of three numbers"
        raise Malformed(msg)
    entries, first, bits = (int(number) for number in descriptor)
    entries = entries or 2**16
    if pixels.signed and first >= 2**15:
        first -= 2**16
    values = words_of(item, 0x00283006, f"{order}u2")
    if len(values) == (entries + 1) // 2 and bits <= 8:  # two in a word, the lower byte first
        values = values.astype("<u2").view(np.uint8)
    if len(values) < entries:
        msg = f"a Modality LUT of {entries} entries has {len(values)}"
        raise Malformed(msg)
    return Table(first, values[:entries].astype(np.float32))
