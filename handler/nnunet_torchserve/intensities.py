"""What values a model's images have, as far as its plans say: for trials with made-up images.

A network that has only ever seen 0 to 1 may overflow on 0 to 1000, and nnU-Net's normalisation of pictures refuses
what is no 8-bit picture. What a model answers must be tried with data of the model's own kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.normalization.default_normalization_schemes import RGBTo01Normalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from .member import Member

_PICTURE = (0.0, 255.0)
_GREATEST = 1e30
"""Beyond it float32 has no room for sums."""

_UNIT = (0.0, 1.0)
"""Where nothing is known: every normalisation takes it, and a network without one is least likely to overflow."""


def takes_pictures(scheme: Any) -> bool:
    """Whether a normalisation is one of pictures with 8 bits."""
    return isinstance(scheme, type) and issubclass(scheme, RGBTo01Normalization)


def refuses_others(scheme: Any) -> bool:
    """Whether it asserts that they have 8 bits, as nnU-Net's own does; a class derived from that may not."""
    return takes_pictures(scheme) and scheme.run is RGBTo01Normalization.run


def value_range(member: Member, channel: int) -> tuple[float, float]:
    """The least and the greatest value that a trial of a channel should have.

    Pictures (by the plan's normalisation or the channel's name) have 0 to 255; else the fingerprint's percentiles of
    the training images' foreground decide, or its range; where that says nothing, it is 0 to 1.
    """
    schemes = [member.normalizations[channel]]
    channels = list(member.channel_names.values())
    schemes += [get_normalization_scheme(channels[channel])] if channel < len(channels) else []
    if any(takes_pictures(scheme) for scheme in schemes):
        return _PICTURE
    seen = _fingerprint(member, channel)
    for names in (("percentile_00_5", "percentile_99_5"), ("min", "max")):
        low, high = (_number(seen.get(name)) for name in names)
        if -_GREATEST < low < high < _GREATEST:
            return low, high
    return _UNIT


def made_up_image(member: Member, shape: Sequence[int], seed: int) -> npt.NDArray[np.float32]:
    """Noise with the values of the model's images, not normalised.

    Args:
        member: the model.
        shape: of one channel.
        seed: the same one gives the same image.

    Returns:
        float32 (C, *shape); whole numbers where a channel's range is wide, as scanners and cameras give them.
    """
    noise = np.random.default_rng(seed).random((member.channels, *shape), dtype=np.float32)
    for channel in range(len(noise)):
        low, high = value_range(member, channel)
        noise[channel] *= high - low
        noise[channel] += low
        if high - low >= _PICTURE[1]:
            noise[channel] = np.rint(noise[channel]).clip(low, high)
    return noise


def _fingerprint(member: Member, channel: int) -> Mapping[str, Any]:
    """What nnU-Net found of a channel in the training images' foreground; empty if the plans do not say."""
    plans = member.plans.plans
    found = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality"
    )
    seen = found.get(str(channel)) if isinstance(found, Mapping) else None
    return seen if isinstance(seen, Mapping) else {}


def _number(value: Any) -> float:
    """A number of the fingerprint; NaN, which lies in no range, for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
