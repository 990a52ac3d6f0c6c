"""How many examples a property is tried on: few in ``make test``, many in ``make test-long``, more in a search.

``pytest --hypothesis-profile long`` chooses the many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

QUICK, LONG = "quick", "long"

SEARCH_VARIABLE = "NNUNET_TORCHSERVE_SEARCH"
"""Set to a factor: so many times the examples, and other ones each time."""

_SHARE = 5
"""``make test`` tries one in so many, but no fewer than :data:`_FEWEST`."""

_FEWEST = 12


def register_profiles() -> None:
    """Make the profiles known to Hypothesis, and take the quick one; its option on the command line comes later.

    No example has a deadline, and none is too slow to draw: that would fail on a machine that does much else.
    """
    for name, count in ((QUICK, 30), (LONG, 100)):
        settings.register_profile(name, max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile(QUICK)


def thin(count: int) -> int:
    """What is left of ``count`` tries in the chosen profile."""
    is_long = settings.get_current_profile_name() == LONG
    return count if is_long or SEARCH_VARIABLE in os.environ else min(count, max(count // _SHARE, _FEWEST))


def examples(count: int) -> settings:
    """``count`` examples with the long tests, the same ones in every run unless a search is asked for."""
    factor = int(os.environ.get(SEARCH_VARIABLE, "0"))
    return settings(max_examples=thin(count) * max(factor, 1), derandomize=factor == 0, database=None)
