"""The Grafana dashboard's panels and their queries."""

from __future__ import annotations

import json
from typing import Any

from .charts import DEPLOY

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())

_VARIABLES = {"$job": ".+", "$model": ".+", "$__rate_interval": "5m"}
"""What Grafana puts in, where all jobs and models are chosen."""


def panels() -> list[dict[str, Any]]:
    """All but the headings."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries(*, gpu: bool = True) -> list[str]:
    """Every target's query as Prometheus gets it; those that need a GPU only with ``gpu``."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    for name, value in _VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    return [query for query in found if gpu or "nnunet_device_" not in query]
