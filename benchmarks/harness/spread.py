"""How measurements that were repeated scatter."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np

_DRAWS = 10_000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    found = {"min": min(values), "q1": first, "median": middle, "q3": third, "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def interval_of_median(values: Sequence[float]) -> list[float]:
    """Where the median is with 95 % certainty: a percentile bootstrap."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (_DRAWS, len(values)))
    return [round(float(each), 4) for each in np.percentile(np.median(draws, axis=1), (2.5, 97.5))]


def percentile_95(values: Sequence[float]) -> float:
    """The 95th percentile, interpolated."""
    return float(np.percentile(values, 95))


def two_or_more(text: str) -> int:
    """An argparse type: how often something is measured; twice at least, so that there is a spread."""
    count = int(text)
    if count < 2:
        msg = f"must be 2 or more, got {count}"
        raise argparse.ArgumentTypeError(msg)
    return count
