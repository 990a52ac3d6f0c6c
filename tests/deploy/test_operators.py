"""What the chart makes for operators: objects whose fields Kubernetes' own schemas do not have.

Their definitions are not at hand where there is no cluster; ``operators.schema.json`` has what of them the chart uses.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.charts import Values, merged, serve, tool

SCHEMA = Path(__file__).with_name("operators.schema.json")
KINDS = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject"}

WATCHED: Values = {"metrics": {"enabled": True, "monitor": "pod", "rules": {"enabled": True}}}
BY_SERVICE: Values = merged(WATCHED, {"metrics": {"monitor": "service", "monitorLabels": {"release": "prometheus"}}})
SCALED: Values = merged(WATCHED, {"autoscaling": {"kind": "keda"}})


def objects() -> dict[str, Values]:
    """One of each kind."""
    manifests = [each for values in (BY_SERVICE, SCALED) for each in serve(values).manifests]
    return {each["kind"]: each for each in manifests if each["kind"] in KINDS}


def refused(manifests: Mapping[str, Values], folder: Path) -> set[str]:
    """The names of those that are not what operators know."""
    for name, manifest in manifests.items():
        (folder / f"{name}.json").write_text(json.dumps(manifest))
    command = [tool("check-jsonschema", "lint/bin"), "--schemafile", str(SCHEMA), "--output-format", "json"]
    files = sorted(str(file) for file in folder.glob("*.json"))
    run = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    said = json.loads(run.stdout)
    assert said.get("parse_errors", []) == []
    return {Path(each["filename"]).stem for each in said.get("errors", [])}


def test_objects_have_the_fields_that_operators_know(tmp_path: Path) -> None:
    found = objects()
    assert set(found) == KINDS
    assert refused(found, tmp_path) == set()


def test_what_operators_do_not_know_would_be_noticed(tmp_path: Path) -> None:
    found = objects()
    [endpoint] = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    endpoint["intervall"] = endpoint.pop("interval")
    found["ServiceMonitor"]["spec"]["podMetricsEndpoints"] = found["ServiceMonitor"]["spec"].pop("endpoints")
    found["PrometheusRule"]["spec"]["groups"][-1]["rules"][0]["for"] = "300"
    found["ScaledObject"]["spec"]["triggers"][0]["metadata"]["threshold"] = 60
    assert refused(found, tmp_path) == KINDS
