"""Result files, and how their numbers are written for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from benchmarks import RESULTS

MIB = 2**20


@lru_cache
def load(name: str) -> Any:
    """``results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def small_case(name: str) -> str:
    """What fairness.json calls ``name``, for people."""
    document = load("fairness")
    if name == f"beside {document['workers']} large":
        return f"{name}: no worker is free"
    if name.endswith(", aged"):
        age_s = min(each["large_age_s"] for each in document["cases"][name]["repetitions"])
        return f"{name.removesuffix(', aged')}, {age_s:.0f} s into their passes"
    return name


def seconds(value: float) -> str:
    """A duration with two or three digits; below a tenth of a second in ms."""
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} s"


def times(value: float) -> str:
    """A ratio with two or three digits."""
    return f"{value:.{2 if value < 2 else 1 if value < 10 else 0}f}"


def quartiles(ratio: Mapping[str, float]) -> str:
    """The quartiles of a ratio."""
    return f"{times(ratio['q1'])} to {times(ratio['q3'])}"


def median_and_quartiles(ratio: Mapping[str, float]) -> str:
    """The median of a ratio, and its quartiles."""
    return f"{times(ratio['median'])} ({quartiles(ratio)})"


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / MIB:,.0f}"


def percent(share: float) -> str:
    """A share with two digits or so."""
    digits = 0 if share == 0 or abs(share) >= 0.1 else 1 if abs(share) >= 0.01 else 2
    return f"{100 * share:.{digits}f} %"


def shape(sizes: Iterable[int]) -> str:
    """Voxels along each axis."""
    return " × ".join(str(size) for size in sizes)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def link(name: str) -> str:
    """A link to a result file from a page of docs/."""
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def source(name: str) -> str:
    """When, where and with which code a result was measured, with a link to its file."""
    document = load(name)
    said = [document["date"][:10] if "date" in document else "date not noted"]
    if commits := _commits(document):
        changes = " and uncommitted changes" if document.get("uncommitted_changes") else ""
        said.append(f"commit {' and '.join(commit[:9] for commit in commits)}{changes}")
    if machine := document.get("machine"):
        flags = [flag for flag in machine.get("cpu_flags", []) if flag != "avx"]
        said.append(f"{machine['cores']} cores of {machine['cpu']}" + (f" ({', '.join(flags)})" if flags else ""))
    if gpu := document.get("gpu"):
        said.append(str(gpu).partition(",")[0])
    if "transcribed" in document:
        said.append("transcribed from the log of a run")
    return f"<sub>{link(name)}: {'; '.join(said)}</sub>"


def _commits(document: Mapping[str, Any]) -> list[str]:
    """Of its cases, where they were measured one by one, and of the last run."""
    cases = document.get("cases")
    measured = [*(cases.values() if isinstance(cases, Mapping) else cases or []), document]
    commits = [each["commit"] for each in measured if isinstance(each, Mapping) and each.get("commit")]
    return list(dict.fromkeys(commits))
