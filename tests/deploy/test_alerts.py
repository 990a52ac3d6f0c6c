"""Alerts and the query that scales, judged by Prometheus' own tool on made-up series: each fires, and keeps silent."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.charts import DEPLOY, NAME, NAMESPACE, ROOT, STORE, Rendered, Values, merged, serve, tool
from support.metrics import configured

RULES = DEPLOY / "prometheus" / "alerts.yaml"
RUNBOOKS = ROOT / "docs" / "operations.md"
MODEL = 'job="nnunet", instance="a", model_name="brain", model_version="1.0"'
DEVICE = f'{MODEL}, device="cuda0"'

Series = dict[str, str]

ARCHIVE: Values = {"url": "https://models.example.org/brain.mar", "sha256": "0" * 64, "maxBytes": 2**29}


def requests(status: int, code: str, per_minute: int, job: str = "nnunet") -> Series:
    labels = MODEL.replace("nnunet", job)
    name = f'nnunet_requests_total{{{labels}, status="{status}", code="{code}"}}'
    return {name: f"0+{per_minute}x120"}


def front_end(kind: str, per_minute: int) -> Series:
    return {f'Requests{kind}XX{{job="nnunet", instance="a", Level="Host"}}': f"0+{per_minute}x120"}


def on_device(metric: str, values: str, labels: str = DEVICE) -> Series:
    return {f"{metric}{{{labels}}}": values}


def device_memory(used: int) -> Series:
    """Of a hundred."""
    total = on_device("nnunet_device_memory_total_bytes", "100x60")
    return total | on_device("nnunet_device_memory_used_bytes", f"{used}x60")


FIRES: dict[str, list[tuple[int, Series]]] = {
    "NnunetNoServer": [(10, {}), (10, {'up{job="nnunet", instance="a"}': "1 1 0x20"})],
    "NnunetServerDown": [(6, {'up{job="nnunet", instance="a"}': "1 1 0x20"})],
    "NnunetEngineDown": [(10, on_device("nnunet_engine_up", "1 0x20"))],
    "NnunetStuck": [(20, on_device("nnunet_passes_waiting", "10x40") | on_device("nnunet_passes_total", "100x40"))],
    "NnunetEngineRestarts": [(10, on_device("nnunet_engine_restarts_total", "0x5 1x20"))],
    "NnunetCaseStrikes": [(10, on_device("nnunet_strikes_total", "0x5 1x20", MODEL))],
    "NnunetErrors": [
        (30, requests(200, "none", 60) | requests(500, "internal", 6)),
        (30, requests(504, "deadline", 1)),
    ],
    "NnunetFrontEndErrors": [
        (30, front_end("5", 12) | requests(200, "none", 60) | requests(500, "internal", 2)),
        (30, front_end("5", 12) | requests(200, "none", 60)),
        (30, front_end("5", 12)),
    ],
    "NnunetBusy": [(60, requests(200, "none", 60) | requests(429, "busy", 30))],
    "NnunetWorkWaits": [
        (30, on_device("nnunet_passes_waiting", "700x60") | on_device("nnunet_passes_total", "0+60x60"))
    ],
    "NnunetDeadlines": [
        (30, on_device("nnunet_requests_total", "0x5 5x60", f'{MODEL}, status="504", code="deadline"'))
    ],
    "NnunetOutOfMemory": [
        (30, on_device("nnunet_requests_total", "0x5 1x60", f'{MODEL}, status="507", code="out_of_memory"'))
    ],
    "NnunetCasesWaitForMemory": [(40, on_device("nnunet_cases_waiting", "1x60"))],
    "NnunetDeviceMemory": [
        (40, device_memory(99))
    ],
}  # fmt: skip
"""Alert -> series, one sample a minute, and the minute in which it fires."""

SILENT: dict[str, list[tuple[int, Series]]] = {
    "NnunetNoServer": [(10, {'up{job="nnunet", instance="a"}': "0x20", 'up{job="nnunet", instance="b"}': "1x20"})],
    "NnunetServerDown": [
        (6, {'up{job="nnunet", instance="a"}': "1 0 1x20"}),
        (6, {'up{job="other", instance="a"}': "0x20"}),
    ],
    "NnunetEngineDown": [
        (10, on_device("nnunet_engine_up", "1 0x3 1x20")),  # started again by the next request
        (10, on_device("nnunet_engine_up", "0x20", DEVICE.replace("nnunet", "other"))),
    ],
    "NnunetStuck": [
        (20, on_device("nnunet_passes_waiting", "10x40") | on_device("nnunet_passes_total", "100+5x40")),
        (20, on_device("nnunet_passes_waiting", "0x40") | on_device("nnunet_passes_total", "100x40")),
    ],
    "NnunetEngineRestarts": [(90, on_device("nnunet_engine_restarts_total", "0x5 1x120"))],  # an hour and a half ago
    "NnunetCaseStrikes": [(10, on_device("nnunet_strikes_total", "1x20", MODEL))],
    "NnunetErrors": [
        (30, requests(200, "none", 60) | requests(500, "internal", 2)),
        (30, requests(200, "none", 60) | requests(503, "draining", 60)),
        (30, requests(200, "none", 60) | requests(422, "wrong_channels", 60)),
    ],
    "NnunetFrontEndErrors": [
        (30, front_end("5", 12) | requests(200, "none", 60) | requests(500, "internal", 12)),
        (30, front_end("5", 1) | requests(200, "none", 60)),
        (30, front_end("5", 0) | requests(200, "none", 0)),  # nobody asks: 0 / 0
    ],
    "NnunetBusy": [(60, requests(200, "none", 60) | requests(429, "busy", 6))],
    "NnunetWorkWaits": [
        (30, on_device("nnunet_passes_waiting", "300x60") | on_device("nnunet_passes_total", "0+60x60")),
        (30, on_device("nnunet_passes_waiting", "0x60") | on_device("nnunet_passes_total", "100x60")),  # idle
    ],
    "NnunetDeadlines": [
        (30, on_device("nnunet_requests_total", "0x5 1x60", f'{MODEL}, status="504", code="deadline"'))
    ],
    "NnunetOutOfMemory": [
        (30, on_device("nnunet_requests_total", "1x60", f'{MODEL}, status="507", code="out_of_memory"')),
        (30, requests(429, "busy", 10)),
    ],
    "NnunetCasesWaitForMemory": [(40, on_device("nnunet_cases_waiting", "1x25 0 1x60"))],
    "NnunetDeviceMemory": [
        (40, device_memory(90))
    ],
}  # fmt: skip
"""The nearest that must not."""


def alerts() -> list[Values]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(folder: Path, document: Values) -> str:
    """What promtool has against a test document; empty if nothing."""
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(document))
    run = subprocess.run([tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else run.stdout + run.stderr


def block(series: Series, minute: int, expression: str, values: list[float]) -> Values:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": samples} for name, samples in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": value} for value in values],
            }
        ],
    }


def firing(table: dict[str, list[tuple[int, Series]]], count: int) -> Values:
    """That each alert fires so often on its series."""
    blocks = [
        block(series, minute, f'count(ALERTS{{alertname="{name}", alertstate="firing"}})', [count] if count else [])
        for name, cases in table.items()
        for minute, series in cases
    ]
    return {"rule_files": [str(RULES)], "evaluation_interval": "2m", "tests": blocks}


def test_the_rules_are_rules() -> None:
    run = subprocess.run([tool("promtool"), "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(alerts())} rules found" in run.stdout


def test_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    assert set(FIRES) == {alert["alert"] for alert in alerts()}
    assert promtool(tmp_path, firing(FIRES, 1)) == ""


def test_every_alert_is_silent_when_it_should_be(tmp_path: Path) -> None:
    assert set(SILENT) == set(FIRES)
    assert promtool(tmp_path, firing(SILENT, 0)) == ""


def test_a_rule_that_is_wrong_would_be_noticed(tmp_path: Path) -> None:
    assert "NnunetErrors" in promtool(tmp_path, firing({"NnunetErrors": SILENT["NnunetErrors"]}, 1))


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_where_to_read_what_to_do(alert: Values) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert page == "docs/operations.md"
    headings = re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_rules_name_metrics_that_there_are_and_one_job() -> None:
    selectors = re.findall(r"(\w+)\{(.*?)\}", " ".join(alert["expr"] for alert in alerts()))
    assert len(selectors) > 20
    assert all('job="nnunet"' in labels for _, labels in selectors)
    ours = {name for name, _ in selectors}
    assert ours - set(configured()) == {"up", "Requests5XX"}


def test_the_charts_rules_are_these_for_its_own_pods(tmp_path: Path) -> None:
    rules: Values = {
        "metrics": {
            "enabled": True,
            "monitor": "pod",
            "rules": {"enabled": True, "runbook": "https://wiki.example.org/nnunet"},
        }
    }
    rendered = serve(STORE, rules)
    groups = rendered.kind("PrometheusRule")["spec"]["groups"]
    assert [rule["alert"] for rule in groups[1]["rules"]] == [alert["alert"] for alert in alerts()]
    text = yaml.safe_dump(groups)
    assert 'job="nnunet"' not in text
    assert text.count(f'namespace="{NAMESPACE}",pod=~"{NAME}-[a-z0-9]+-[a-z0-9]+"') > 20
    urls = {rule["annotations"]["runbook_url"].partition("#")[0] for rule in groups[1]["rules"]}
    assert urls == {"https://wiki.example.org/nnunet"}
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": groups}))
    subprocess.run([tool("promtool"), "check", "rules", str(file)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("models", "more_s"),
    [
        ({"gibibytes": 1}, 40),
        ({"gibibytes": 2.5}, 100),
        pytest.param(
            {"store": {"kind": "fetch", "fetch": {"archives": [ARCHIVE, ARCHIVE | {"name": "b.mar"}]}}}, 2 * 40,
            id="fetched first, then unpacked",
        ),
    ],
)  # fmt: skip
def test_a_pod_that_starts_is_not_taken_for_one_that_is_down(models: Values, more_s: int) -> None:
    """Prometheus looks at its metrics port while archives are fetched and unpacked."""
    values = {"models": models, "metrics": {"enabled": True, "monitor": "pod", "rules": {"enabled": True}}}
    [_, group] = serve(values).kind("PrometheusRule")["spec"]["groups"]
    patience = {rule["alert"]: rule.get("for") for rule in group["rules"]}
    own = {rule["alert"]: rule.get("for") for rule in alerts()}
    assert (own["NnunetServerDown"], own["NnunetNoServer"]) == ("2m", "5m")
    changed = {"NnunetServerDown": f"{120 + more_s}s", "NnunetNoServer": f"{300 + more_s}s"}
    assert patience == own | changed


POD = f'namespace="{NAMESPACE}", pod="{NAME}-7d9f-x{{}}", model_name="brain", device="cpu"'


def fleet(*pods: tuple[str, str]) -> Series:
    """Waiting and done passes of each pod."""
    series: Series = {}
    for number, (waiting, done) in enumerate(pods):
        labels = POD.format(number)
        series |= {f"nnunet_passes_waiting{{{labels}}}": waiting, f"nnunet_passes_total{{{labels}}}": done}
    return series


@pytest.fixture(scope="module")
def scaled() -> Rendered:
    return serve(
        {"metrics": {"enabled": True, "monitor": "pod", "rules": {"enabled": True}}, "autoscaling": {"kind": "keda"}}
    )


@pytest.mark.parametrize(
    ("series", "seconds"),
    [
        pytest.param(fleet(("0x20", "500x20")), [0], id="idle"),
        pytest.param(fleet(("240x20", "0+60x20")), [240], id="busy"),
        pytest.param(fleet(("240x20", "0+60x20"), ("0x20", "0+60x20")), [120], id="the pods' pace together"),
        pytest.param(fleet(("100x20", "0x20")), [200], id="just started: the floor"),
        pytest.param(fleet(("100x20", "0x20"), ("0x20", "0x20")), [100], id="just started, two pods"),
        pytest.param(fleet(("100x20", "_x9 0")), [200], id="just started: one sample"),
        pytest.param(fleet(("60x20", "0x9 0+12x20")), [60 / 0.5], id="a first case is not divided by next to nothing"),
        pytest.param({}, [], id="no pod: no number, so no scaling"),
    ],
)
def test_pods_are_scaled_by_the_seconds_that_work_waits(
    scaled: Rendered, series: Series, seconds: list[float], tmp_path: Path
) -> None:
    [trigger] = scaled.kind("ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    recorded = scaled.kind("PrometheusRule")["spec"]["groups"][0]["rules"][0]
    assert recorded["expr"] == query
    assert trigger["metricType"] == "Value"
    assert promtool(tmp_path, {"tests": [block(series, 10, query, seconds)]}) == ""


def test_the_metrics_adapter_gets_what_the_autoscaler_asks_for() -> None:
    values = merged(
        {"metrics": {"enabled": True, "monitor": "pod", "rules": {"enabled": True}}}, {"autoscaling": {"kind": "hpa"}}
    )
    rendered = serve(values)
    [metric] = rendered.kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    recorded: Any = rendered.kind("PrometheusRule")["spec"]["groups"][0]["rules"][0]
    assert metric["external"]["metric"]["name"] == recorded["record"] == "nnunet_waiting_seconds"
    asked = metric["external"]["metric"]["selector"]["matchLabels"].items()
    assert asked <= recorded["labels"].items()
    assert metric["external"]["target"] == {"type": "Value", "value": "60"}
