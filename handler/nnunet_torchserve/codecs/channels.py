"""Another number of channels than the model's: what a file of each kind holds as channels, and what would be right.

Whoever sends a time series, a colour picture or an array with the channels last does not know that they were counted as
channels. So the message says where they were found in this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LONGEST_NAMES, WrongChannels
from ..volume import MOST_COLOURS
from .source import ImageSource

_FILES = "a file for each channel (image_0000, image_0001, …)"


def check_channels(images: Sequence[ImageSource], names: Sequence[str]) -> None:
    """Refuse a case that has not as many channels as the model.

    Args:
        images: one file, or one a channel.
        names: of the model's channels.

    Raises:
        WrongChannels: with what would be right for such files.
    """
    wanted, found = len(names), sum(image.channels for image in images)
    if found == wanted:
        return
    msg = f"the case has {found} channel{'' if found == 1 else 's'}"
    if len(images) > 1:
        msg += f" in {len(images)} files"
    msg += f", the model takes {wanted} ({ascii(', '.join(names))[1:-1][:LONGEST_NAMES]}); "
    larger = [number for number, image in enumerate(images) if image.channels > 1]
    if len(images) == 1:
        msg += images[0].channels_advice(wanted)
    elif larger:
        msg += f"image_{larger[0]:04d} has {images[larger[0]].channels}: {images[larger[0]].channels_advice(1)}"
    elif wanted == 1:
        msg += "send one file, as field image"
    else:
        msg += f"send as many files: image_0000 to image_{wanted - 1:04d}"
    raise WrongChannels(msg)


def series_advice(channels: int, wanted: int | None) -> str:
    """For an image whose fourth axis, if it has one, holds the channels; ``None``: no model takes so many."""
    if channels == 1:
        return f"send {_FILES}, or one image with the channels along a fourth axis"
    where = f"the fourth axis of an image holds its channels, and this one has {channels} volumes"
    if wanted is None or wanted == 1:
        return f"{where}: of a time series send one volume"
    return f"{where}: send the {wanted} of the model in its order, or {_FILES}; of a time series send one point in time"


def vector_advice(channels: int, wanted: int | None) -> str:
    """For an image with several numbers a voxel."""
    what = f"the {channels} numbers of each voxel (vectors or colours) are its channels"
    if wanted is None or wanted == 1:
        return f"{what}: send one number a voxel"
    return f"{what}: send {wanted} numbers a voxel in the model's order, or {_FILES}"


def picture_advice(channels: int, wanted: int | None, pages: int = 1) -> str:
    """For a picture, whose colours are its channels, or a TIFF whose pages are."""
    if pages > 1 and channels > 1:
        return f"the {pages} pages of the TIFF are its channels: send one page, or {_FILES}"
    if pages > 1:
        return f"a stack of grey pages is one channel: send {_FILES}"
    if channels > 1 and wanted in {None, 1}:
        return f"the {channels} colours of a picture are its channels: send it in grey"
    if (channels, wanted) == (4, 3):
        return "the fourth channel is transparency (alpha): send RGB without it"
    if (channels, wanted) == (1, 3):
        return "the picture is grey: send it in RGB"
    return f"the colours of a picture are its channels: send {_FILES}"


def array_advice(shape: Sequence[int], wanted: int | None) -> str:
    """For an array, whose first axis of four holds the channels.

    Args:
        shape: as it was sent.
        wanted: the model's channels; ``None``: no model takes so many.
    """
    last = shape[-1]
    channels_last = last == wanted or last <= MOST_COLOURS
    if len(shape) == 4:
        said = f"the first of an array's four axes holds its channels, and this one's shape is {tuple(shape)}"
        if not channels_last:
            return f"{said}: of a time series send one volume" if wanted in {None, 1} else said
        return f"{said}: if its channels come last, send numpy.moveaxis(array, -1, 0)"
    if len(shape) == 3 and shape[0] == wanted:
        return f"shape {tuple(shape)} was read as (z, y, x): if it is (channel, y, x), send array[:, None]"
    if len(shape) == 3 and channels_last:
        return (
            f"shape {tuple(shape)} was read as (z, y, x): if its last axis holds the channels of a slice, send "
            "numpy.moveaxis(array, -1, 0)[:, None], which is (channel, 1, y, x)"
        )
    return f"send (channel, z, y, x), or {_FILES}"
