"""The Grafana dashboard: its shape here; that every panel has data, in tests/serve/test_metrics.py on a live server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from support.charts import tool
from support.dashboard import DASHBOARD, panels, queries
from support.metrics import configured

FROM_TORCHSERVE = {
    "Requests2XX", "Requests4XX", "Requests5XX", "ts_queue_latency_microseconds", "ts_inference_requests_total",
}  # fmt: skip


def test_panels_have_names_and_places_of_their_own() -> None:
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_every_query_is_one_and_names_metrics_that_there_are(tmp_path: Path) -> None:
    asked = queries()
    assert len(asked) >= 20
    rules = [{"record": f"q{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    run = subprocess.run([tool("promtool"), "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    named = {name for query in asked for name in re.findall(r"(\w+)\{", query)}
    assert named - set(configured()) <= FROM_TORCHSERVE


def test_every_panel_asks_the_chosen_source_for_the_chosen_job() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "model"}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            selectors = re.findall(r"\w+\{(.*?)\}", target["expr"])
            assert selectors
            assert all('job=~"$job"' in selector for selector in selectors)
            assert target["datasource"]["uid"] == "${datasource}"
