"""The labels of a cascade's first stage, as a client sends them: on the image's own grid, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .codecs import ImageSource
from .errors import LONGEST_NAMES, ChannelsDisagree, RequestError, WrongChannels, WrongRange
from .export.canvas import written
from .label_manager import paints_as_default
from .member import Member
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
            RequestError: the file is damaged.
            WrongRange: a voxel is no label of the model's.
        """
        with said_of_the_labels():
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


@contextmanager
def said_of_the_labels() -> Iterator[None]:
    """What is refused within, is refused of the labels and not of the image: the message says so."""
    try:
        yield
    except RequestError as error:
        error.args = (f"{PREVIOUS_STAGE}: {error}",)
        raise


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
    if differences := list(grid_differences(source.geometry, image)):
        msg = (
            f"{PREVIOUS_STAGE} does not lie on the image's grid: it has {'; '.join(differences)}; "
            "send the labels as nnUNetv2_predict writes them for this image"
        )
        raise ChannelsDisagree(msg)


def grid_differences(labels: Geometry, image: Geometry) -> Iterator[str]:
    """What labels have otherwise than their image, in words."""
    if labels.shape != image.shape:
        yield f"{labels.shape} voxels (z, y, x), the image {image.shape}"
    if labels.assumed or image.assumed:
        return
    for name, has, wanted, tolerance in (
        ("spacing (z, y, x; mm)", labels.spacing_zyx, image.spacing_zyx, _SPACING_MM),
        ("origin (LPS; mm)", labels.origin, image.origin, _ORIGIN_MM),
        ("direction (row by row)", labels.direction, image.direction, _DIRECTION),
    ):
        if not np.allclose(has, wanted, atol=tolerance):
            yield f"the {name} {_rounded(has)}, the image {_rounded(wanted)}"


def _rounded(numbers: npt.ArrayLike) -> tuple[float, ...]:
    return tuple(round(float(number), 4) for number in np.ravel(numbers))
