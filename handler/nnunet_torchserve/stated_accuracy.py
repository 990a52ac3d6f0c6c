"""What an answer's head says of a backend and of its measured accuracy, in one line."""

from __future__ import annotations

import math
from collections.abc import Collection

from .accuracy import AccuracyReport
from .backend import names_of

_HEADER_DIGITS = 4
_ROUNDING = 1e-9
"""Less than what one voxel of any image can do to a Dice of so many digits, more than what float64 does."""


def said_of(backends: Collection[str], measured: AccuracyReport | None) -> str:
    """What ran the networks, for a header, with what is known of its answers.

    Args:
        backends: what ran.
        measured: the archive's report, of an answer that was made as those were that it compares.

    >>> said_of({"eager"}, None)
    'eager'
    """
    names = names_of(backends)
    if measured is None or set(backends) != {measured.backend} or (known := measured.dice) is None:
        return names
    stated = f"{names}; dice={rounded_down(known, different=sum(case.different for case in measured.cases))}"
    if not (seen := measured.calibrated_cases):
        return stated
    return f"{stated}; images={'calibration' if seen == len(measured.cases) else 'partly-calibration'}"


def rounded_down(value: float, *, different: int = 0) -> str:
    """A Dice with four digits, and 1.0000 only for 1.

    Args:
        value: the Dice.
        different: voxels that it is about; if there is any, it is not 1, however many others there are.

    >>> rounded_down(0.99999), rounded_down(1.0), rounded_down(0.9989), rounded_down(1.0, different=1)
    ('0.9999', '1.0000', '0.9989', '0.9999')
    """
    scale = 10**_HEADER_DIGITS
    most = scale - 1 if different else scale
    return f"{min(math.floor(value * scale + _ROUNDING), most) / scale:.{_HEADER_DIGITS}f}"
