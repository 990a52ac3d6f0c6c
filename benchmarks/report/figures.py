"""The figures of docs/performance.md: SVG with no background, in colours that can be read on white and on black.

What a figure shows is kept in its file (``dc:description``), so that a test can tell, without drawing, whether the
committed figure is that of the committed results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import ROOT
from benchmarks.report.results import MIB, load, seconds, small_case

FOLDER = ROOT / "docs" / "figures"

_INK, _STOCK, _HERE, _MORE = "#777a80", "#c77720", "#3f86d8", "#2a9a78"
"""Each has a contrast of at least 3 with white and with a nearly black page; grey text has more than 4."""

_DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)

Numbers = dict[str, Any]


def throughput() -> Numbers:
    """Requests a second of each side."""
    return {"requests_per_second": load("throughput")["requests_per_second"]}


def fairness() -> Numbers:
    """Seconds of every small request, by what ran beside it."""
    return {
        small_case(name): {
            "seconds": [round(each["seconds"], 3) for each in case["repetitions"]],
            "p95": round(case["p95_seconds"], 3),
            "lower_bound": case["is_lower_bound"],
        }
        for name, case in load("fairness")["cases"].items()
    }


def export() -> Numbers:
    """Seconds and extra memory by number of classes, on the same grids."""
    cases = [each for name, each in load("export")["cases"].items() if name.startswith("organs-")]
    return {
        "classes": [case["logits"][0] for case in cases],
        "seconds": {side: [case[f"{side}_seconds"]["median"] for case in cases] for side in ("stock", "our")},
        "mib": {side: [round(case["extra_bytes"][side] / MIB, 1) for case in cases] for side in ("stock", "ours")},
    }


def memory() -> Numbers:
    """A worker's memory after each request, and what engine and workers take together."""
    totals = {}
    for network in load("engine_memory")["networks"].values():
        for server in network["servers"]:
            loaded, count = server["loaded"], server["workers"]
            weights = f"{network['weights_mib']:.0f} MiB of weights"
            totals[f"{weights}, {count} worker{'s' if count > 1 else ''}"] = {
                "engine": loaded["engine_uss_mib"],
                "workers": round(sum(loaded["workers_uss_mib"]), 1),
            }
    return {
        "worker_mb": [round(size / 1e6, 1) for size in load("memory")["workers_uss_bytes_after_each"]],
        "mib": totals,
    }


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        numbers: what it shows, from the result files.
        size: inches.
        panels: side by side.
        draw: puts the numbers onto the panels (matplotlib's axes).
    """

    numbers: Callable[[], Numbers]
    size: tuple[float, float]
    panels: int
    draw: Callable[[Numbers, Sequence[Any]], None]

    def save(self, file: Path) -> None:
        """Draw it; the same bytes from the same numbers and the same matplotlib."""
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas

        numbers = self.numbers()
        style = {
            "svg.hashsalt": file.name,
            "svg.fonttype": "path",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        }
        with mpl.rc_context(style):
            canvas = Canvas(figsize=self.size, layout="constrained")
            panels = canvas.subplots(1, self.panels, squeeze=False)[0]
            self.draw(numbers, panels)
            metadata = {"Date": None, "Creator": None, "Description": json.dumps(numbers)}
            canvas.savefig(file, transparent=True, metadata=metadata)


def shown_by(file: Path) -> Numbers:
    """The numbers that a figure was drawn from."""
    found = _DESCRIPTION.search(file.read_text())
    assert found is not None
    numbers: Numbers = json.loads(unescape(found[1]))
    return numbers


def _draw_throughput(numbers: Numbers, panels: Sequence[Any]) -> None:
    [axes] = panels
    rates = numbers["requests_per_second"]
    colours = [_STOCK, _HERE, _HERE, _MORE]
    bars = axes.barh(list(rates), list(rates.values()), color=colours, height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=4, color=_INK)
    axes.invert_yaxis()
    axes.set_xlabel("requests a second")


def _draw_fairness(numbers: Numbers, panels: Sequence[Any]) -> None:
    [axes] = panels
    for row, case in enumerate(numbers.values()):
        p95, bound = case["p95"], case["lower_bound"]
        axes.plot(case["seconds"], [row] * len(case["seconds"]), "o", color=_HERE, alpha=0.35, markersize=6, mew=0)
        axes.plot(p95, row, "|", color=_STOCK, markersize=16, mew=2.5)
        place: dict[str, Any] = {"xytext": (-10, 0), "ha": "right"} if bound else {"xytext": (8, 0)}
        label = f"{'more than ' if bound else ''}{seconds(p95)}"
        axes.annotate(label, (p95, row), textcoords="offset points", va="center", **place)
        if bound:
            axes.annotate("", (2.2 * p95, row), (p95, row), arrowprops={"arrowstyle": "->", "color": _STOCK})
    axes.set_yticks(range(len(numbers)), list(numbers))
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(0.2, 300)
    axes.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlabel("seconds to the answer; the bar is the p95")


def _draw_export(numbers: Numbers, panels: Sequence[Any]) -> None:
    classes = numbers["classes"]
    for axes, measure, unit in zip(panels, ("seconds", "mib"), ("seconds", "extra memory, MiB"), strict=True):
        for (side, values), colour, above in zip(numbers[measure].items(), (_STOCK, _HERE), (True, False), strict=True):
            axes.plot(classes, values, "o-", color=colour)
            name, at = "stock" if side == "stock" else "here", (classes[-1], values[-1])
            axes.annotate(name, at, (8, 0), textcoords="offset points", va="center", color=colour)
            for count, value in zip(classes, values, strict=True):
                inside = above and classes[0] < count < classes[-1]
                axes.annotate(
                    f"{value:,.0f}" if value >= 100 else f"{value:.2g}",
                    (count, value),
                    (-5 if inside else 0, 7 if above else -16),
                    textcoords="offset points",
                    ha="right" if inside else "center",
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.margins(0.14, 0.2)
        axes.set_xticks(classes, [str(each) for each in classes])
        axes.minorticks_off()
        axes.set_xlabel("classes")
        axes.set_ylabel(unit)


def _draw_memory(numbers: Numbers, panels: Sequence[Any]) -> None:
    growth, totals = panels
    sizes = numbers["worker_mb"]
    growth.plot(range(1, len(sizes) + 1), sizes, color=_HERE)
    growth.set_ylim(0, 1.25 * max(sizes))
    growth.annotate(f"{median(sizes):.0f} MB", (len(sizes), sizes[-1]), (0, 8), textcoords="offset points", ha="right")
    growth.set_xlabel("requests")
    growth.set_ylabel("a worker's memory, MB")
    rows = list(numbers["mib"])
    engine, workers = ([each[part] for each in numbers["mib"].values()] for part in ("engine", "workers"))
    totals.barh(rows, engine, color=_MORE, height=0.6, label="engine")
    bars = totals.barh(rows, workers, left=engine, color=_HERE, height=0.6, label="workers")
    totals.bar_label(bars, [f"{one + two:,.0f}" for one, two in zip(engine, workers, strict=True)], padding=4)
    totals.invert_yaxis()
    totals.margins(x=0.18)
    totals.set_xlabel("MiB in all")
    totals.legend(frameon=False, loc="upper right", labelcolor=_INK)


FIGURES = {
    "throughput": Figure(throughput, (7.2, 2.3), 1, _draw_throughput),
    "fairness": Figure(fairness, (7.2, 2.8), 1, _draw_fairness),
    "export": Figure(export, (7.2, 3.2), 2, _draw_export),
    "memory": Figure(memory, (8.4, 3.0), 2, _draw_memory),
}
"""Every figure by the name of its file."""
