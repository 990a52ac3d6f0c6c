"""docs/performance.md: its sentences are written by hand, its tables between markers are not."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report.tables import BLOCKS

PAGE = ROOT / "docs" / "performance.md"

_BLOCK = re.compile(r"<!-- table: (\w+) -->.*?<!-- end -->", re.DOTALL)


def rewritten(page: str) -> str:
    """``page`` with every table as the result files have it; a table without a file says that it has none.

    Raises:
        KeyError: a marker names no table.
    """
    return _BLOCK.sub(lambda found: f"<!-- table: {found[1]} -->\n{_content(found[1])}\n<!-- end -->", page)


def _content(name: str) -> str:
    try:
        return BLOCKS[name]()
    except FileNotFoundError as missing:
        return f"Not measured yet ({Path(str(missing.filename)).name})."


def tables_of(page: str) -> list[str]:
    """The names in its markers."""
    return [found[1] for found in _BLOCK.finditer(page)]
