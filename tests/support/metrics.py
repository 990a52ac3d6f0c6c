"""The text that Prometheus scrapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).parents[2]
METRICS_YAML, DOCUMENT = ROOT / "metrics.yaml", ROOT / "docs" / "metrics.md"

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Scrape:
    """One scrape: metric and labels -> value."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; 0 if there is none."""
        wanted = labels.items()
        return sum(value for (metric, have), value in self.samples.items() if metric == name and wanted <= have)

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of each sample of a metric."""
        return [dict(labels) for metric, labels in self.samples if metric == name]


def scrape(url: str) -> Scrape:
    """Scrape a server's metrics URL."""
    answer = httpx.get(f"{url}/metrics", timeout=300, trust_env=False).raise_for_status()
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    found = [match.groups() for line in lines if (match := _SAMPLE.fullmatch(line))]
    assert len(found) == len(lines)
    return Scrape({(name, frozenset(_LABEL.findall(labels or ""))): float(value) for name, labels, value in found})


def configured() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our metrics in metrics.yaml: name -> type and labels."""
    metrics = yaml.safe_load(METRICS_YAML.read_text())["model_metrics"]
    return {
        each["name"]: (kind, tuple(each["dimensions"]))
        for kind, group in metrics.items()
        for each in group
        if each["name"].startswith("nnunet_")
    }


def documented() -> dict[str, set[str]]:
    """The documentation's table: name -> labels beyond the model's."""
    rows = re.findall(r"^\| `(nnunet_\w+)` \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def queries(language: str = "promql") -> list[str]:
    """The documentation's queries."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line and not line.startswith("#")]
