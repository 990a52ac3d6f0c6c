"""The labels of a cascade's first stage, as a client sends them: on the image's own grid, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .codecs import ImageSource
from .errors import LONGEST_NAMES, ChannelsDisagree, WrongChannels, WrongRange
from .export.canvas import written
from .member import Member, paints_as_default
from .orientation import Turn
from .postprocessing import LARGEST_LABEL
from .request import PREVIOUS_STAGE
from .volume import Geometry, LabelArray

_SPACING_MM, _ORIGIN_MM, _DIRECTION = 1e-3, 1e-2, 1e-3
"""How far apart two headers of one grid may be: formats round what they store."""


@dataclass(frozen=True, slots=True)
class PreviousStage:
    """A label map whose header was read.

    Attributes:
        source: its file.
        turn: how it becomes what the model sees.
        known: the labels that it may hold.
    """

    source: ImageSource
    turn: Turn
    known: frozenset[int]

    def decode(self) -> LabelArray:
        """Labels (Z, Y, X), uint8 or uint16, as the model sees them.

        Raises:
            WrongRange: a voxel is no label of the model's.
        """
        values = self.turn.turn(self.source.read())[0]
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= LARGEST_LABEL and np.array_equal(values, np.rint(values))):  # NaN is in no range
            msg = f"{PREVIOUS_STAGE} holds values from {low:g} to {high:g}; labels are whole numbers from 0"
            raise WrongRange(msg)
        labels = written(values)
        known = np.zeros(LARGEST_LABEL + 1, bool)
        known[list(self.known)] = True
        if not known[labels].all():
            strange = int(labels[~known[labels]].min())
            msg = f"{PREVIOUS_STAGE} holds the label {strange}, which the model does not have; it has "
            raise WrongRange(msg + ", ".join(map(str, sorted(self.known)))[:LONGEST_NAMES])
        return labels


def labels_of(member: Member) -> frozenset[int]:
    """The labels that a first stage may give: the dataset's, and those that its regions are painted with.

    Somebody's own label manager may paint anything.
    """
    manager = member.labels
    if not paints_as_default(manager):
        return frozenset(range(LARGEST_LABEL + 1))
    # nnU-Net paints the numbers of channels, also where those of dataset.json have gaps
    painted = manager.regions_class_order if manager.has_regions else range(manager.num_segmentation_heads)
    return frozenset({0, *map(int, manager.foreground_labels), *map(int, painted)})


def check_grid(source: ImageSource, image: Geometry) -> None:
    """Refuse labels that do not lie where the image lies.

    Args:
        source: the labels.
        image: the geometry of the image, as it was sent.

    Raises:
        WrongChannels: there is more than one channel.
        ChannelsDisagree: another grid.
    """
    if source.channels != 1:
        msg = f"{PREVIOUS_STAGE} has {source.channels} channels; it must be a label map, with one"
        raise WrongChannels(msg)
    labels = source.geometry
    same_place = (
        labels.assumed
        or image.assumed
        or (
            np.allclose(labels.spacing_zyx, image.spacing_zyx, atol=_SPACING_MM)
            and np.allclose(labels.origin, image.origin, atol=_ORIGIN_MM)
            and np.allclose(labels.direction, image.direction, atol=_DIRECTION)
        )
    )
    if labels.shape != image.shape or not same_place:
        differ = "shape" if labels.shape != image.shape else "spacing, origin or direction"
        msg = (
            f"{PREVIOUS_STAGE} and the image have another {differ}: {_grid(labels)} and {_grid(image)}; "
            "send the labels on the image's grid, as nnUNetv2_predict writes them"
        )
        raise ChannelsDisagree(msg)


def _grid(geometry: Geometry) -> str:
    shape, spacing = geometry.shape, tuple(round(mm, 4) for mm in geometry.spacing_zyx)
    return f"{shape} voxels of {spacing} mm (z, y, x) at {tuple(round(mm, 3) for mm in geometry.origin)}"
