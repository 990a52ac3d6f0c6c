"""What the values of a segmentation mean: which structures of dataset.json a painted voxel belongs to.

nnU-Net does not write dataset.json's numbers. Of labels it writes the number of the winning channel. Of regions it
paints one after the other, each with its value of ``regions_class_order``, later ones over earlier ones
(``LabelManager.convert_probabilities_to_segmentation``). So the last region of a voxel is known; whether it belongs to
an earlier one too follows from dataset.json where one region lies within the other, and from nothing where they only
overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_IGNORE = "ignore"
_LARGEST = 2**16 - 1
_FEW = 255
"""nnU-Net writes label maps of fewer foreground labels as uint8, of others as uint16; larger values are cut off."""


@dataclass(frozen=True, slots=True)
class Painting:
    """How a model's segmentations are read.

    Attributes:
        structures: name -> the values that make it up, without background; a region has several. ``None`` where its
            voxels cannot be told from others'.
        remarks: sentences on what the values do not say, or not as dataset.json's numbers would suggest; none for most
            models.
    """

    structures: Mapping[str, tuple[int, ...] | None]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Region:
    """One region.

    Attributes:
        name: in dataset.json.
        labels: that make it up there.
        value: that paints it, as it is written.
    """

    name: str
    labels: frozenset[int]
    value: int


def read_painting(labels: Mapping[str, Any], order: Sequence[Any] | None, *, has_regions: bool) -> Painting:
    """What dataset.json says of the values.

    Args:
        labels: its ``labels``; numbers are whatever nnU-Net's ``int()`` takes.
        order: its ``regions_class_order``.
        has_regions: whether nnU-Net takes them for regions.

    Raises:
        ValueError, TypeError: they are none, or nnU-Net cannot paint them.
    """
    if has_regions:
        return _of_regions(labels, order or ())
    numbers = {name: integers(value) for name, value in labels.items() if name != _IGNORE}
    value_of = {number: value for value, number in enumerate(sorted({n for each in numbers.values() for n in each}))}
    structures: dict[str, tuple[int, ...] | None] = {
        name: tuple(value_of[number] for number in each) for name, each in numbers.items() if each != [0]
    }
    moved = [f"{value_of[n]} is {name}" for name, each in numbers.items() for n in each if value_of[n] != n]
    remarks = () if not moved else (f"{_OTHER_NUMBERS}, because dataset.json leaves numbers out: {', '.join(moved)}.",)
    return Painting(structures, remarks)


def unknown_painting(labels: Mapping[str, Any], manager: str) -> Painting:
    """Of a model whose own label manager decides what is painted: nobody knows.

    Args:
        labels: dataset.json's.
        manager: the class's name.
    """
    structures = {name: None for name, value in labels.items() if name != _IGNORE and not _is_background(value)}
    remark = f"The model's own label manager, {manager}, decides which values are painted: what they mean is not known."
    return Painting(structures, (remark,))


_OTHER_NUMBERS = "The values in the label map are not dataset.json's label numbers"


def _of_regions(labels: Mapping[str, Any], order: Sequence[Any]) -> Painting:
    named = [(name, value) for name, value in labels.items() if name != _IGNORE and not _is_background(value)]
    values = [int(each) for each in order]
    if odd := [value for value in values if not 0 <= value <= _LARGEST]:
        msg = f"regions_class_order holds {odd[0]}; nnU-Net paints values from 0 to {_LARGEST}"
        raise ValueError(msg)
    numbers = {number for _, value in named for number in integers(value)} - {0}
    written = 2**8 if len(numbers) < _FEW else 2**16
    regions = [
        _Region(name, frozenset(integers(value)), painted % written)
        for (name, value), painted in zip(named, values, strict=True)
    ]
    cut = [f"{value} is written as {value % written}" for value in values if value >= written]
    structures: dict[str, tuple[int, ...] | None] = {}
    hidden = [f"Label maps of fewer than {_FEW} labels have 8 bits: {', '.join(cut)}."] if cut else []
    for number, region in enumerate(regions):
        if not any(region.labels):  # "0", which nnU-Net takes for a region
            continue
        members: dict[int, list[bool | None]] = {0: [False]}  # of what was never painted
        for painter, other in enumerate(regions):
            members.setdefault(other.value, []).append(_belongs(number, painter, regions))
        structures[region.name] = tuple(sorted(v for v, belong in members.items() if all(belong)))
        unknown = {v for v, belong in members.items() if not all(belong) and any(each is not False for each in belong)}
        over = [
            f"{other.name} ({other.value})"
            for painter, other in enumerate(regions)
            if other.value in unknown and painter > number
        ]
        if unknown:
            hidden.append(_hidden(region, over, regions, shared=region.value in unknown))
            if region.value in unknown:
                structures[region.name] = None
    remarks = [] if _as_numbered(regions, structures) else [_other_values(regions)]
    return Painting(structures, (*remarks, *hidden))


def _belongs(number: int, painter: int, regions: Sequence[_Region]) -> bool | None:
    """Whether a voxel that region ``painter`` painted last lies in region ``number``; ``None`` if nobody knows.

    An earlier painter was not painted over: the voxel lies in no later region.
    """
    if painter <= number:
        return painter == number
    this, last = regions[number].labels, regions[painter].labels
    if last <= this:
        return True
    return None if last & this else False


def _hidden(region: _Region, over: Sequence[str], regions: Sequence[_Region], *, shared: bool) -> str:
    """Why a region cannot be measured."""
    if region.value == 0:
        return f"{region.name} is painted with 0, as background is: its voxels cannot be told from those of nothing."
    if shared:
        others = ", ".join(other.name for other in regions if other.value == region.value and other is not region)
        return f"{region.name} has the value {region.value} in common with {others}: it cannot be told from that."
    return (
        f"{region.name} is painted over by {', '.join(over)}: voxels that belong to both count for the later one only, "
        f"so {region.name} may be larger than reported."
    )


def _as_numbered(regions: Sequence[_Region], structures: Mapping[str, tuple[int, ...] | None]) -> bool:
    """Whether a region's values are those of its labels that are painted at all."""
    painted = {region.value for region in regions}
    return all(set(values) == r.labels & painted for r in regions if (values := structures.get(r.name)) is not None)


def _other_values(regions: Sequence[_Region]) -> str:
    values = ", ".join(f"{region.value} is {region.name}" for region in regions if any(region.labels))
    return (
        f"{_OTHER_NUMBERS}: regions are painted with the values of regions_class_order, one over the other ({values})."
    )


def integers(value: Any) -> list[int]:
    """As nnU-Net takes them: a label, or a list of labels, each whatever ``int()`` takes."""
    return [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]


def _is_background(value: Any) -> bool:
    """As ``LabelManager`` decides, to which ``"0"`` is a region."""
    if isinstance(value, list | tuple):
        return len(np.unique(value)) == 1 and bool(np.unique(value)[0] == 0)
    return bool(np.isscalar(value) and value == 0)
