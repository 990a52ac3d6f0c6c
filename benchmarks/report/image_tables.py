"""The table of docs/performance.md about the container image."""

from __future__ import annotations

from statistics import median

from benchmarks.report.results import load, seconds, source, table

_STARTS = {
    "cold": "new, none of the image's files in memory",
    "warm": "new, right after another",
    "again": "the same container, stopped and started",
}


def image_start() -> str:
    """A container until it is ready."""
    document = load("cold_start")
    rows = [
        (
            _STARTS[kind],
            seconds(median(each["ready_s"] for each in starts)),
            seconds(max(each["ready_s"] for each in starts)),
            seconds(median(each["processor_s"] for each in starts)),
        )
        for kind, starts in document["starts"].items()
    ]
    size = f"{document['image_bytes'] / 1e9:.2f} GB"
    head = (f"a container of the image ({size})", "ready after, median", "the slowest", "processor seconds until then")
    return table(head, rows) + "\n\n" + source("cold_start")
