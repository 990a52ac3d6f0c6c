"""Helm charts, rendered by helm itself, and the other programs that look at them (tests/deploy/install_tools.sh)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"
DEPLOY = ROOT / "deploy"
SERVER_CHART, FOLDER_CHART = DEPLOY / "helm" / "nnunet-torchserve", DEPLOY / "helm" / "nnunet-predict-folder"
CHARTS = (SERVER_CHART, FOLDER_CHART)
RELEASE, NAMESPACE = "r", "hospital"
NAME = f"{RELEASE}-nnunet-torchserve"

Values = dict[str, Any]

STORE: Values = {"models": {"store": {"kind": "claim", "claim": {"name": "models"}}}}
"""The least that the server's chart must be told."""

FOLDER: Values = {
    "servers": ["http://a:8080"],
    "model": "brain",
    "images": {"claim": "images"},
    "predictions": {"claim": "predictions"},
}
"""The least that the folder's chart must be told."""


def tool(name: str, folder: str = "") -> str:
    """A program, from .tools or from the system; the test is skipped where there is none."""
    found = shutil.which(name, path=str(TOOLS / folder)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: tests/deploy/install_tools.sh does it, Debian's prometheus has promtool")
    return found


def merged(*values: Mapping[str, Any]) -> Values:
    """Values as helm merges them: mappings into each other, all else replaced."""
    result: Values = {}
    for each in values:
        for key, value in each.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, Mapping)
            result[key] = merged(old, value) if both and isinstance(old, dict) else value
    return result


@dataclass(frozen=True)
class Rendered:
    """What helm made of a chart.

    Attributes:
        refusal: helm's words if it refused; else empty.
        text: the manifests.
    """

    refusal: str
    text: str

    @property
    def manifests(self) -> list[Values]:
        assert not self.refusal, self.refusal
        return [each for each in yaml.load_all(self.text, Loader=yaml.CSafeLoader) if each]

    def kind(self, kind: str, suffix: str = "") -> Values:
        """The one manifest of a kind, whose name ends so."""
        [found] = [each for each in self.manifests if each["kind"] == kind and _ends(each, suffix)]
        return found

    def kinds(self) -> set[str]:
        return {each["kind"] for each in self.manifests}

    @property
    def pod(self) -> Values:
        spec: Values = self.kind("Deployment")["spec"]["template"]["spec"]
        return spec

    def container(self, name: str = "server") -> Values:
        [found] = [each for each in self.pod["containers"] if each["name"] == name]
        container: Values = found
        return container


def _ends(manifest: Values, suffix: str) -> bool:
    return not suffix or manifest["metadata"]["name"].endswith(suffix)


def render(chart: Path, values: Mapping[str, Any], *arguments: str) -> Rendered:
    """Have helm render a chart."""
    return _rendered(chart, json.dumps(values, sort_keys=True), arguments)


@cache
def _rendered(chart: Path, values: str, arguments: tuple[str, ...]) -> Rendered:
    command = [tool("helm"), "template", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", "-", *arguments]
    run = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    return Rendered(run.stderr if run.returncode else "", run.stdout)


def serve(*values: Mapping[str, Any], kube: str | None = None) -> Rendered:
    """The server's chart with a store, and these values."""
    return render(SERVER_CHART, merged(STORE, *values), *([f"--kube-version={kube}"] if kube else []))
