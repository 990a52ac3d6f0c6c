"""Tables of parameters: every pair of values in ``make test``, every combination in ``make test-long``.

Most of what goes wrong with parameters goes wrong with one value or with two together: R. Kuhn, D. Wallace,
A. Gallo, Software Fault Interactions and Implications for Software Testing, IEEE Transactions on Software Engineering
30(6), 2004.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from allpairspy import AllPairs


def table(*columns: Iterable[object]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``, always the same; rows that no pair of values needs are long."""
    values = [list(column) for column in columns]
    needed = {tuple(row) for row in AllPairs(values)}
    return [pytest.param(*row, marks=() if row in needed else pytest.mark.long) for row in product(*values)]
