"""In which precisions the layers of networks run, as a backend reads them from what was compiled.

A network is not all of one precision. Of one for int8 most of what takes the time is int8, and the rest is not; so
layers are counted, by OpenVINO's names of precisions.
"""

from __future__ import annotations

from collections.abc import Mapping

INT8_NAMES = frozenset({"u8", "i8"})
"""OpenVINO's names of whole numbers of 8 bits."""


def whole_layers(precisions: Mapping[str, int]) -> tuple[int, int]:
    """Of layers that compute: how many do so in int8, and how many there are.

    >>> whole_layers({"f32": 2, "u8": 10, "i8": 1})
    (11, 13)
    """
    return sum(count for name, count in precisions.items() if name in INT8_NAMES), sum(precisions.values())
