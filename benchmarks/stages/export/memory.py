"""What an export takes in memory beside logits and label map, in a fresh process that holds nothing but the logits."""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness.child import last_line_of
from benchmarks.harness.memory import with_extra_memory
from benchmarks.stages.export.exported import Export, Side

PROCESSES = 3


def extra_memory(folder: Path, side: Side) -> int:
    """Bytes that one side needs beside logits and label map, measured in a process of its own."""
    return int(last_line_of("benchmarks.stages.export.memory", side, str(folder)))


def measure_memory(side: Side, folder: Path) -> int:
    """Be the process of :func:`extra_memory`; Linux only."""
    export = Export.load(folder)
    export.thinned().by(side)
    gc.collect()
    labels, extra = with_extra_memory(partial(export.by, side))
    return max(0, extra - labels.nbytes)


if __name__ == "__main__":
    print(measure_memory(Side(sys.argv[1]), Path(sys.argv[2])))
