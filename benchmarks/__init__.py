"""Every number that the documentation gives, measured beside stock nnU-Net; README.md beside this file is the table.

A benchmark is run from the top of the repository by its module's name, ``python -m benchmarks.load.throughput``, and
writes ``results/throughput.json``. The tests' support, the demo's training and the trainers' recipe are used too: all
are put on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

for _folder in ("tests", "demo", "trainers/recipes"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.insert(0, str(ROOT / _folder))
