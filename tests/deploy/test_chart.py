"""The Helm charts: what they make of values, what they refuse, and what others say of the result.

helm renders; Kubernetes' own schemas, yamllint and checkov judge. That it runs is tested on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from allpairspy import AllPairs

from support.charts import (
    CHARTS,
    DEPLOY,
    FOLDER,
    FOLDER_CHART,
    NAME,
    ROOT,
    SERVER_CHART,
    STORE,
    Rendered,
    Values,
    merged,
    render,
    serve,
    tool,
)

SHA256 = "0123456789abcdef" * 4
GIB = 1024**3

FETCH: Values = {
    "models": {
        "store": {
            "kind": "fetch",
            "fetch": {
                "archives": [
                    {"url": "https://models.example.org/brain.mar", "sha256": SHA256, "maxBytes": 3 * GIB},
                    {"urlFrom": {"secret": "s3", "key": "url"}, "name": "b.mar", "sha256": SHA256, "maxBytes": GIB},
                ]
            },
        }
    },
    "volumes": {"tmp": {"sizeLimit": "4Gi"}},
}
PROXY: Values = {"proxy": {"enabled": True, "tls": {"secretName": "tls"}}}
TOKENS: Values = merged(PROXY, {"proxy": {"tokens": {"secretName": "tokens"}}})
METRICS: Values = {"metrics": {"enabled": True}}
RULES: Values = merged(
    METRICS, {"metrics": {"monitor": "pod", "rules": {"enabled": True}, "dashboard": {"enabled": True}}}
)

OPTIONS: list[list[Values]] = [
    [STORE, FETCH, {"models": {"store": {"kind": "image"}}}],
    [{}, PROXY, TOKENS],
    [METRICS, RULES, merged(RULES, {"metrics": {"monitor": "service"}})],
    [{}, {"autoscaling": {"kind": "keda"}}],
    [{}, {"gpu": {"enabled": True, "runtimeClassName": "nvidia"}}],
    [{}, {"server": {"workers": 2, "queue": 4, "bodyLimitMiB": 64, "heapMiB": 2048, "settings": {"a_key": 8}}}],
    [{}, {each: {"enabled": False} for each in ("podDisruptionBudget", "networkPolicy", "topologySpread")}],
    [{}, {"serviceAccount": {"name": "mine"}, "priorityClassName": "high", "image": {"pullSecrets": ["registry"]}}],
    [{}, {"podSecurityContext": {"runAsUser": None, "fsGroup": None}, "volumes": {"tmp": {"medium": ""}}}],
    [{}, {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"operator": "Exists"}], "podLabels": {"a": "b"}}],
]  # fmt: skip
ROWS: list[Values] = [merged(*row) for row in AllPairs(OPTIONS)]

UNKNOWN_TO_KUBERNETES = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of the Prometheus operator and of KEDA, whose schemas Kubernetes does not have."""

OLDEST = "1.20.2"

ARGUED = {
    "CKV_K8S_43": "an image by its digest: whoever builds the image knows it; NOTES warn without one",
    "CKV_K8S_35": "addresses and tokens are in the environment of containers that end with their work",
    "CKV_K8S_15": "pullPolicy Always: an image that a node was given by hand has no registry",
    "CKV2_K8S_6": "the folder's pods take no connections; the server's policy names who may come",
}
"""Findings of checkov that stay, and why."""


@pytest.fixture(scope="module")
def rows() -> list[Rendered]:
    rendered = [render(SERVER_CHART, row) for row in ROWS]
    assert not [each.refusal for each in rendered if each.refusal]
    return rendered


def folders(kube: str | None = None) -> Rendered:
    more = {"parts": 3, "token": {"secret": "t"}, "authorities": {"configMap": "ca"}, "arguments": ["-f", 0]}
    return render(FOLDER_CHART, merged(FOLDER, more), *([f"--kube-version={kube}"] if kube else []))


def test_helm_lint_has_nothing_to_say(rows: list[Rendered], tmp_path: Path) -> None:
    for chart, values in ((SERVER_CHART, STORE), (FOLDER_CHART, FOLDER)):
        file = tmp_path / "values.json"
        file.write_text(json.dumps(values))
        run = subprocess.run(
            [tool("helm"), "lint", "--strict", "-f", str(file), str(chart)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout
        assert set(re.findall(r"^\[(\w+)\]", run.stdout, re.MULTILINE)) <= {"INFO"}


def newest_versions(count: int) -> list[str]:
    folder = Path(tool("kubernetes-validate", "lint/bin")).parents[1] / "lib"
    found = {path.name.split("-")[0][1:] for path in folder.glob("*/*/kubernetes_validate/kubernetes-json-schema/v*")}
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])[-count:]


def validated(manifests: list[Values], versions: list[str]) -> list[str]:
    """What kubernetes-validate says, strictly, version after version."""
    interpreter = Path(tool("kubernetes-validate", "lint/bin")).with_name("python")
    command = [str(interpreter), str(Path(__file__).with_name("validate.py")), *versions]
    lines = "".join(json.dumps(each) + "\n" for each in manifests)
    run = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_every_pair_of_values_renders_to_what_the_newest_kubernetes_know(rows: list[Rendered]) -> None:
    versions = newest_versions(3)
    on_gpu = render(SERVER_CHART, STORE, "--values", str(SERVER_CHART / "values-gpu.yaml"))
    rendered = [*rows, on_gpu, hpa(versions[-1]), folders(versions[0]), folders(versions[-1])]
    unique = {json.dumps(each, sort_keys=True) for row in rendered for each in row.manifests}
    known = [each for each in map(json.loads, unique) if each["kind"] not in UNKNOWN_TO_KUBERNETES]
    assert len(known) > len(rows)
    assert validated(known, versions) == [f"OK {version} {len(known)}" for version in versions]


def test_a_field_that_kubernetes_does_not_know_would_be_noticed() -> None:
    service = serve().kind("Service")
    service["spec"]["sessionAffinty"] = "None"
    wrong, ok = validated([service], newest_versions(1))
    assert "sessionAffinty" in wrong
    assert ok.endswith(" 0")


def hpa(kube: str) -> Rendered:
    return serve(RULES, {"autoscaling": {"kind": "hpa"}}, kube=kube)


def test_a_cluster_of_2020_gets_what_it_knows() -> None:
    old = serve(PROXY, kube=OLDEST)
    assert old.kind("PodDisruptionBudget")["apiVersion"] == "policy/v1beta1"
    assert "unhealthyPodEvictionPolicy" not in old.text
    probes = ("startupProbe", "livenessProbe")
    assert {old.container()[each].get("terminationGracePeriodSeconds") for each in probes} == {None}
    assert "matchLabelKeys" not in old.pod["topologySpreadConstraints"][0]
    assert hpa(OLDEST).kind("HorizontalPodAutoscaler")["apiVersion"] == "autoscaling/v2beta2"
    new = serve(kube="1.37.0")
    assert new.kind("PodDisruptionBudget")["apiVersion"] == "policy/v1"
    assert {new.container()[each]["terminationGracePeriodSeconds"] for each in probes} == {30}
    assert new.pod["topologySpreadConstraints"][0]["matchLabelKeys"] == ["pod-template-hash"]
    assert hpa("1.37.0").kind("HorizontalPodAutoscaler")["apiVersion"] == "autoscaling/v2"


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_yamllint_has_nothing_to_say(chart: Path) -> None:
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, braces: disable}}"
    files = [str(file) for file in [*chart.glob("*.yaml"), *DEPLOY.glob("*/*.yaml")]]
    run = subprocess.run(
        [tool("yamllint", "lint/bin"), "--strict", "-d", rules, *files], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    row = serve(TOKENS)
    hooks = [each["lifecycle"]["preStop"]["exec"]["command"] for each in row.pod["containers"]]
    commands = [*hooks, row.container("proxy")["command"]]
    assert {tuple(command[:2]) for command in commands} == {("/bin/sh", "-c")}
    files = [*ROOT.glob("tests/*/install_tools.sh"), DEPLOY / "container" / "lock.sh"]
    for number, command in enumerate(commands):
        files.append(tmp_path / f"{number}.sh")
        files[-1].write_text(f"#!/bin/sh\n{command[2]}\n")
    run = subprocess.run(
        [tool("shellcheck", "lint/bin"), *map(str, files)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_schemas_are_schemas() -> None:
    command = [tool("check-jsonschema", "lint/bin"), "--check-metaschema"]
    files = [str(chart / "values.schema.json") for chart in CHARTS]
    run = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def leaves(values: object, schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Values that no property of the schema names."""
    properties = schema.get("properties")
    if not isinstance(values, dict) or properties is None:
        return
    for key, value in values.items():
        if key not in properties:
            yield f"{path}.{key}"
        else:
            yield from leaves(value, properties[key], f"{path}.{key}")


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_the_schema_names_every_value_and_no_other(chart: Path) -> None:
    values = yaml.safe_load((chart / "values.yaml").read_text())
    schema = json.loads((chart / "values.schema.json").read_text())
    assert list(leaves(values, schema)) == []
    assert set(schema["properties"]) - {"global"} == set(values)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_every_number_has_its_reason_beside_it(chart: Path) -> None:
    """Each number of values.yaml has a comment above it, or above the lines that it follows."""
    bare = []
    lines = (chart / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s*[\w-]+: [0-9.]+[a-zA-Z]*$", line):
            continue
        above = number - 1
        while re.match(r"\s*[\w-]+: \S", lines[above]) and not lines[above].lstrip().startswith("#"):
            above -= 1
        if not lines[above].lstrip().startswith("#") and not re.fullmatch(
            r"\s*(port|appVersion|runAsGroup|fsGroup): .*", line
        ):
            bare.append(f"{number + 1}: {line}")
    assert bare == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": {"store": {"kind": ""}}}, "where are the archives?"),
        ({"models": {"store": {"kind": "claim", "claim": {"name": ""}}}}, "models.store.claim.name"),
        ({"models": {"store": {"kind": "fetch"}}}, "models.store.fetch.archives"),
        (merged(FETCH, {"volumes": {"tmp": {"sizeLimit": "4000Mi"}}}), "volumes.tmp.sizeLimit 4000Mi cannot hold"),
        ({"stop": {"terminationGracePeriodSeconds": 1264}}, "would cut requests"),
        ({"proxy": {"enabled": True}}, "proxy.tls.secretName"),
        (merged(TOKENS, {"management": {"enabled": True}}), "choose one of them"),
        ({"service": {"type": "LoadBalancer"}}, "proxy.enabled asks who they are"),
        ({"metrics": {"monitor": "pod"}}, "metrics.enabled"),
        ({"autoscaling": {"kind": "keda"}}, "metrics.enabled"),
        ({"metrics": {"rules": {"enabled": True}}}, "metrics.rules.enabled: metrics.enabled and metrics.monitor"),
        ({"metrics": {"enabled": True, "rules": {"enabled": True}}}, "metrics.monitor"),
        (merged(METRICS, {"autoscaling": {"kind": "hpa"}}), "metrics.rules.enabled"),
        (merged(METRICS, {"autoscaling": {"kind": "keda", "minReplicas": 9}}), "minReplicas"),
        ({"rollout": {"maxSurge": 0}}, "must be above 0"),
        ({"metrics": {"enabled": True, "port": 8083}}, "metrics.port"),
        (merged(PROXY, {"proxy": {"port": 8082}}), "proxy.port"),
        ({"replica": 2}, "replica"),
        ({"server": {"workers": 0}}, "workers"),
        ({"podSecurityContext": {"runAsNonRoot": False}}, "runAsNonRoot"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"server": {"settings": {"management_address": "http://0.0.0.0:8081"}}}, "management_address"),
        ({"models": {"serve": ["../brain.mar"]}}, "serve"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(values: Values, said: str) -> None:
    assert said in serve(values).refusal


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://models.example.org/brain.mar"},
        {"url": "https://models.example.org/brain.mar", "sha256": ""},
        {"url": "https://models.example.org/brain.mar", "sha256": "latest"},
        {"url": "https://models.example.org/brain.mar", "maxBytes": 0},
        {"urlFrom": {"secret": "s3", "key": "url"}},
        {"url": "https://models.example.org/brain.mar", "urlFrom": {"secret": "s3", "key": "url"}, "name": "b.mar"},
    ],
)
@pytest.mark.parametrize(
    "schema",
    [pytest.param([], id="schema", marks=pytest.mark.long), pytest.param(["--skip-schema-validation"], id="template")],
)
def test_no_archive_is_fetched_without_https_and_sha256(wrong: Values, schema: list[str]) -> None:
    archive = {"sha256": SHA256, "maxBytes": GIB} | wrong
    values = {"models": {"store": {"kind": "fetch", "fetch": {"archives": [archive]}}}}
    assert "models" in render(SERVER_CHART, values, *schema).refusal


@pytest.mark.parametrize("proxy", [{}, PROXY])
def test_the_pods_grace_period_covers_the_hook_and_the_servers_own_and_its_end(proxy: Values) -> None:
    def grace(values: Values) -> int:
        row = serve(proxy, values)
        hook = row.container()["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert ("drain" in hook) == bool(proxy), "nginx would wait for the whole queue"
        hook_s = sum(map(int, re.findall(r"(?:sleep|seq) (\d+)", hook.replace("sleep 1;", ""))))
        [server_s] = [int(each.partition("=")[2]) for each in row.container()["args"] if each.startswith("--grace")]
        pod_s = int(row.pod["terminationGracePeriodSeconds"])
        longest_s = values.get("server", {}).get("longestRequestSeconds", 1200)
        assert (hook_s if proxy else server_s) > longest_s
        assert server_s >= 20
        assert hook_s + server_s == pod_s - 20, "workers are let go before the kubelet kills"
        return pod_s

    assert [grace({}), grace({"server": {"longestRequestSeconds": 3600}})] == [1265, 3665]
    assert grace({"stop": {"terminationGracePeriodSeconds": 2000}}) == 2000


def test_names_leave_room_for_what_kubernetes_adds() -> None:
    command = [tool("helm"), "template", "a" * 53, str(SERVER_CHART), "--values", "-"]
    run = subprocess.run(command, input=json.dumps(STORE), capture_output=True, text=True, check=True)
    names = [each["metadata"]["name"] for each in yaml.safe_load_all(run.stdout) if each]
    assert max(map(len, names)) <= 63 - len("-1234567890") - len("-12345")


def test_a_start_has_time_for_the_archives() -> None:
    def seconds(*values: Values) -> int:
        container = serve(*values).container()
        probe = container["startupProbe"]
        limit_s = probe["periodSeconds"] * probe["failureThreshold"]
        assert f"--ready-timeout={limit_s - 10}" in container["args"], "it says itself why it was not ready"
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    assert seconds() == 220
    assert seconds({"models": {"archives": 5, "gibibytes": 2.5}}) == 520
    assert seconds(FETCH) == 120 + 2 * 60 + 4 * 40


def test_every_container_is_held_as_tightly_as_can_be(rows: list[Rendered]) -> None:
    for row in rows:
        pod = row.pod
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        bounded = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert all(volume.get("sizeLimit") for volume in bounded)


def test_only_inference_and_health_are_open_unless_asked_for() -> None:
    plain = serve()
    arguments = plain.container()["args"]
    assert not [each for each in arguments if each.startswith(("--management", "--metrics", "--tokens"))]
    assert {port["name"] for port in plain.container()["ports"]} == {"inference", "health"}
    assert [each["metadata"]["name"] for each in plain.manifests if each["kind"] == "Service"] == [NAME]
    policy = plain.kind("NetworkPolicy")["spec"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": 8080}]]
    assert policy["egress"] == []
    opened = serve(METRICS, {"management": {"enabled": True}, "metrics": {"monitor": "service"}})
    assert "--tokens" in opened.container()["args"]
    services = [each for each in opened.manifests if each["kind"] == "Service"]
    assert {(each["metadata"]["name"], each["spec"]["type"]) for each in services} == {
        (NAME, "ClusterIP"), (f"{NAME}-metrics", "ClusterIP"), (f"{NAME}-management", "ClusterIP"),
    }  # fmt: skip
    ports = [rule["ports"][0]["port"] for rule in opened.kind("NetworkPolicy")["spec"]["ingress"]]
    assert ports == [8080, 8082]  # nobody is named who may reach management


def test_with_the_proxy_the_server_itself_is_reached_by_nobody() -> None:
    row = serve(TOKENS)
    assert "--host=127.0.0.1" in row.container()["args"]
    assert "--host=0.0.0.0" in serve().container()["args"]
    [port] = row.kind("Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8443, "inference")
    assert row.container("proxy")["ports"][0]["name"] == "inference"
    ingress = row.kind("NetworkPolicy")["spec"]["ingress"]
    assert ingress[0]["ports"] == [{"protocol": "TCP", "port": 8443}]


def test_nginx_and_the_server_share_no_volume_but_the_file_that_says_that_nginx_has_ended() -> None:
    """They are of one user, whom an engine's socket lets in."""
    row = serve(TOKENS)
    mounts = [{each["name"]: each for each in row.container(name)["volumeMounts"]} for name in ("server", "proxy")]
    assert set(mounts[0]) & set(mounts[1]) == {"proxy-end"}
    assert mounts[0]["proxy-end"]["readOnly"] is True
    folder = mounts[0]["proxy-end"]["mountPath"]
    hook = row.container()["lifecycle"]["preStop"]["exec"]["command"][-1]
    command = row.container("proxy")["command"][-1]
    assert f"[ -e {folder}/ended ]" in hook
    assert f"touch {folder}/ended;" in command
    assert "proxy-end" not in serve().text


def test_quantities_that_are_given_as_numbers_are_text() -> None:
    """A Kubernetes of 1.20 takes no others from helm 4, which has it apply ("expected string")."""
    numbers = {"requests": {"cpu": 1, "memory": 8589934592}, "limits": {"cpu": 2, "memory": None}}
    server = render(SERVER_CHART, merged(STORE, {"resources": numbers})).container()["resources"]
    [predict] = render(FOLDER_CHART, merged(FOLDER, {"resources": numbers}), "--kube-version=1.37.0").kind("Job")[
        "spec"
    ]["template"]["spec"]["containers"]
    for resources in (server, predict["resources"]):
        assert resources["requests"] == {"cpu": "1", "memory": "8.589934592e+09"}
        assert resources["limits"] == {"cpu": "2"}
    limit = {"sizeLimit": "4294967296"}
    volumes = dict.fromkeys(("tmp", "runtime", "state"), limit)
    pod = serve(PROXY, {"volumes": volumes, "proxy": {"bodies": limit}}).pod
    limits = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume]
    assert limits == ["4294967296"] * 4 + ["1Mi"]


@pytest.mark.parametrize(
    ("chart", "values"),
    [
        pytest.param(SERVER_CHART, merged(STORE, {"models": {"store": {"claim": {"name": "7"}}}}), id="server"),
        pytest.param(FOLDER_CHART, merged(FOLDER, {"images": {"claim": "7"}}), id="folder"),
    ],
)
@pytest.mark.parametrize("kube", ["1.37.0", OLDEST])
def test_releases_and_claims_may_be_named_by_a_number(chart: Path, values: Values, kube: str) -> None:
    """As a folder of images by its date: Kubernetes refuses a name or a label that YAML takes for a number."""
    command = [tool("helm"), "template", "20261129", str(chart), f"--kube-version={kube}", "--values", "-"]
    run = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=True)
    manifests = [each for each in yaml.safe_load_all(run.stdout) if each]
    assert manifests
    for each in manifests:
        template = each.get("spec", {}).get("template", {})
        labels = [*each["metadata"]["labels"].values(), *template.get("metadata", {}).get("labels", {}).values()]
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in template.get("spec", {}).get("volumes", [])
            if "persistentVolumeClaim" in volume
        ]
        names = [each["metadata"]["name"], *labels, *claims]
        assert [name for name in names if not isinstance(name, str)] == []


def test_a_pod_has_one_gpu() -> None:
    gpu = ["--values", str(SERVER_CHART / "values-gpu.yaml")]
    row = render(SERVER_CHART, STORE, *gpu)
    container = row.container()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "--device=cuda" in container["args"]
    assert row.kind("Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    slice_of_one = render(
        SERVER_CHART, merged(STORE, {"gpu": {"resource": "nvidia.com/mig-2g.20gb"}}), *gpu
    ).container()
    assert slice_of_one["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/mig-2g.20gb": "1"}
    assert "--device=cpu" in serve().container()["args"]


def test_another_configuration_is_another_pod() -> None:
    def checksum(*values: Values) -> str:
        annotations = serve(*values).kind("Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    changed = {"server": {"settings": {"number_of_netty_threads": 8}}}
    assert checksum() == checksum({"replicas": 3}) != checksum(changed)
    text = serve(changed).kind("ConfigMap")["data"]["config.properties"]
    assert text.startswith((ROOT / "config.properties").read_text())
    assert text.rstrip().endswith("number_of_netty_threads=8")


def test_an_archive_comes_by_the_image_itself_with_its_secrets_from_secrets() -> None:
    row = serve(
        FETCH, {"models": {"store": {"fetch": {"tokenFrom": {"secret": "t"}, "authorities": {"configMap": "ca"}}}}}
    )
    first, second = row.pod["initContainers"]
    assert first["image"] == row.container()["image"]
    assert first["args"] == [
        "https://models.example.org/brain.mar", f"--sha256={SHA256}", f"--max-bytes={3 * GIB}", "--into=/models",
        "--verify=/etc/nnunet-torchserve/authorities/ca.crt",
    ]  # fmt: skip
    assert "https" not in json.dumps(second["args"])
    secrets = {each["name"]: each.get("valueFrom") for each in second["env"]}
    assert secrets["NNUNET_TORCHSERVE_FETCH_URL"] == {"secretKeyRef": {"name": "s3", "key": "url"}}
    assert secrets["NNUNET_TORCHSERVE_FETCH_TOKEN"] == {"secretKeyRef": {"name": "t", "key": "token"}}
    models = [volume for volume in row.pod["volumes"] if volume["name"] == "models"]
    assert int(models[0]["emptyDir"]["sizeLimit"]) == 4 * GIB * 17 // 16
    egress = row.kind("NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 5353, 443}


def test_notes_say_how_to_call_it() -> None:
    def notes(*values: Values) -> str:
        command = [tool("helm"), "install", "r", str(SERVER_CHART), "--dry-run=client", "--values", "-"]
        given = json.dumps(merged(STORE, *values))
        run = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout.partition("NOTES:")[2]

    plain, proxied = notes(), notes(TOKENS, {"image": {"digest": f"sha256:{SHA256}"}})
    assert f"curl --fail-with-body -X POST -T head.nii.gz http://{NAME}.default.svc:8080/predictions/MODEL" in plain
    assert "nobody is asked who they are" in plain
    assert f"https://{NAME}.default.svc:8443" in proxied
    assert "NNUNET_TORCHSERVE_TOKEN" in proxied
    assert "WARNING" not in proxied


def test_replicas_are_left_to_whoever_scales() -> None:
    assert serve().kind("Deployment")["spec"]["replicas"] == 1
    scaled = serve(METRICS, {"autoscaling": {"kind": "keda"}})
    assert "replicas" not in scaled.kind("Deployment")["spec"]
    assert (
        scaled.kind("ScaledObject")["spec"]["scaleTargetRef"]["name"] == scaled.kind("Deployment")["metadata"]["name"]
    )


@pytest.mark.parametrize(
    "file", ["nginx.conf", "prometheus/alerts.yaml", "grafana/dashboard.json", "../config.properties"]
)
def test_the_chart_has_the_projects_own_files(file: str) -> None:
    source = DEPLOY / file
    assert (SERVER_CHART / "files" / source.name).read_bytes() == source.read_bytes(), "make chart copies them"


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_the_chart_is_of_this_version(chart: Path) -> None:
    described = yaml.safe_load((chart / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (described["version"], described["appVersion"]) == (version, version)


# The folder's chart


def test_each_part_of_a_folder_is_an_index_that_fails_for_itself() -> None:
    job = folders("1.37.0").kind("Job")["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    assert job["backoffLimitPerIndex"] == 3
    [container] = job["template"]["spec"]["containers"]
    arguments = container["args"]
    assert arguments[arguments.index("-num_parts") + 1] == "3"
    assert arguments[arguments.index("-part_id") + 1] == "$(PART)"
    assert "--continue_prediction" in arguments
    assert arguments[-2:] == ["-f", "0"]
    [index] = [each for each in container["env"] if each["name"] == "PART"]
    field = index["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_where_kubernetes_knows_no_indexes_each_part_is_a_job() -> None:
    jobs = [each for each in folders(OLDEST).manifests if each["kind"] == "Job"]
    parts = [each["spec"]["template"]["spec"]["containers"][0]["args"] for each in jobs]
    assert [part[part.index("-part_id") + 1] for part in parts] == ["0", "1", "2"]
    assert len({each["metadata"]["name"] for each in jobs}) == 3
    assert not {"completionMode", "backoffLimitPerIndex", "podFailurePolicy"} & set(jobs[0]["spec"])
    middle = folders("1.27.0").kind("Job")["spec"]
    assert (middle["backoffLimit"], "backoffLimitPerIndex" in middle, "podFailurePolicy" in middle) == (9, False, True)


@pytest.mark.parametrize(("claim", "mounted"), [("i", {"images": "i"}), ("p", {"images": "i", "predictions": "p"})])
def test_a_claim_is_one_volume_whatever_it_holds(claim: str, mounted: dict[str, str]) -> None:
    """A pod with two volumes of one claim does not start."""
    values = merged(FOLDER, {"images": {"claim": "i"}, "predictions": {"claim": claim}})
    pod = render(FOLDER_CHART, values, "--kube-version=1.37.0").kind("Job")["spec"]["template"]
    volumes = {each["name"]: each.get("persistentVolumeClaim") for each in pod["spec"]["volumes"]}
    claims = {name: volume["claimName"] for name, volume in volumes.items() if volume}
    assert claims == mounted
    mounts = {each["mountPath"]: each for each in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["/images"] == {"name": "images", "mountPath": "/images", "readOnly": True}
    assert claims[mounts["/predictions"]["name"]] == claim
    assert "readOnly" not in mounts["/predictions"]


def test_the_jobs_arguments_are_the_commands() -> None:
    """The parser of ``nnunet-torchserve predict`` itself takes them."""
    from nnunet_torchserve_tools.predict import parser

    [container] = folders("1.37.0").kind("Job")["spec"]["template"]["spec"]["containers"]
    asked = parser().parse_args([argument.replace("$(PART)", "2") for argument in container["args"]])
    assert (asked.i, asked.o, asked.part_id, asked.num_parts) == ("/images/", "/predictions/predictions", 2, 3)
    assert (asked.f, asked.continue_prediction, asked.server) == (["0"], True, ["http://a:8080"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"servers": []}, "which server?"),
        ({"model": ""}, "the model's name"),
        ({"images": {"claim": ""}}, "images.claim"),
        ({"arguments": ["-part_id", "0"]}, "arguments"),
        ({"images": {"claim": "i", "path": "../../etc"}}, "path"),
        ({"parts": 0}, "parts"),
    ],
)
def test_a_folder_that_cannot_be_meant_is_refused(values: Values, said: str) -> None:
    assert said in render(FOLDER_CHART, merged(FOLDER, values)).refusal


@pytest.mark.long  # test_every_container_is_held_as_tightly_as_can_be has the most of it
def test_checkov_finds_nothing_that_is_not_argued(rows: list[Rendered], tmp_path: Path) -> None:
    checkov = tool("checkov", "checkov/bin")
    rendered = [serve(TOKENS, RULES), serve(FETCH), folders()]
    for row in rendered:
        (tmp_path / f"{hashlib.sha256(row.text.encode()).hexdigest()[:8]}.yaml").write_text(row.text)
    command = [checkov, "-d", str(tmp_path), "--framework", "kubernetes", "-o", "json", "--skip-download", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(run.stdout)
    assert report["summary"]["passed"] > 100
    found = {
        f"{each['check_id']} {each['check_name']}: {each['resource']}" for each in report["results"]["failed_checks"]
    }
    assert {each for each in found if each.split()[0] not in ARGUED} == set()
    assert {each.split()[0] for each in found} == set(ARGUED)
