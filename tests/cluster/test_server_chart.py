"""The server's chart on a cluster: what it promises of installing, upgrading, stopping, dying and leaving.

Requests come from a pod, through the Service. A start takes as long as the nodes let it; only what happens is judged.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.charts import SERVER_CHART, Values, merged
from support.cluster import (
    CLIENTS,
    TIMEOUT,
    WITHIN,
    Cluster,
    Release,
    is_ready,
    load,
    name_of,
    restarts,
    until,
    waits_for,
)

pytestmark = [pytest.mark.cluster, TIMEOUT]

HEAD = "/tmp/head.nii.gz"
OPTIONS = '{"use_mirroring": false}'
GPU, MADE_UP = "nvidia.com/gpu", 2
SECOND: Values = {"models": {"serve": ["brain=brain-2.0.mar"]}}
TWO: Values = {"replicas": 2}

FIND_JVM = "import psutil; print(*(p.pid for p in psutil.process_iter() if p.name() == 'java'))"


def test_a_container_is_nobody_in_particular_and_writes_into_its_volumes_only(release: Release) -> None:
    release.apply()
    [pod] = release.ready_pods()

    def run(command: str) -> str:
        return release.cluster.run(name_of(pod), "sh", "-c", command, check=False)

    assert run("id -u").strip() == "10001"
    for folder in ("/", "/usr", "/etc", "/models", "/etc/nnunet-torchserve/config"):
        assert "Read-only file system" in run(f"touch {folder}/written"), folder
    for folder in ("/tmp", "/run/nnunet-torchserve", "/var/lib/nnunet-torchserve"):
        assert run(f"touch {folder}/written && rm {folder}/written") == "", folder
    status = dict(line.split(":\t", 1) for line in run("cat /proc/1/status").splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "No such file" in run("ls /var/run/secrets/kubernetes.io/serviceaccount")


def test_a_container_that_would_be_root_is_not_run(release: Release) -> None:
    """The kubelet holds the pod's runAsNonRoot against it, whoever made it root."""
    cluster = release.cluster
    rooted = Release(cluster, "rooted", release.values)
    with rooted.as_it_is_left():
        rooted.apply({"replicas": 0}, wait=False)
        root = [{"op": "replace", "path": "/spec/template/spec/securityContext/runAsUser", "value": 0}]
        cluster.kubectl("patch", "deployment", rooted.full_name, "--type=json", f"--patch={json.dumps(root)}")
        cluster.kubectl("scale", "deployment", rooted.full_name, "--replicas=1")
        [pod] = until(rooted.pods, "there is a pod")
        until(
            lambda: waits_for(cluster.get("pod", name_of(pod))) == "CreateContainerConfigError", "the pod is held back"
        )
        assert any("runAsNonRoot" in each or "non-root" in each for each in cluster.events(name_of(pod)))


def test_a_rolling_upgrade_and_its_rollback_lose_nothing(release: Release) -> None:
    """Another archive by pod, under load, and back; meanwhile answers come from either, and each is that archive's."""
    release.apply()
    first = release.revision()
    with load(release.cluster, release.url("brain"), HEAD, OPTIONS) as answers:
        assert answers.of("2.0") == 0
        release.apply(SECOND)
        until(lambda: answers.of("2.0") >= CLIENTS, "the new archive answers")
        old = answers.of("1.0")
        release.cluster.helm("rollback", release.name, str(first), "--wait", WITHIN)
        until(lambda: answers.of("1.0") >= old + CLIENTS, "the old archive answers again")
    answers.check()
    first_labels, second_labels = (set(found) for found in answers.contents.values())
    assert not first_labels & second_labels, "other folds give other labels"


def test_an_upgrade_that_never_gets_ready_takes_nothing_away(release: Release) -> None:
    """A pod whose archive is not there fails again and again; the old one serves, and is what a rollback keeps."""
    release.apply()
    good = release.revision()
    [old] = release.ready_pods()
    with load(release.cluster, release.url("brain"), HEAD, OPTIONS) as answers:
        release.apply({"models": {"serve": ["brain=brain-3.0.mar"]}}, wait=False)
        [new] = until(lambda: [pod for pod in release.pods() if name_of(pod) != name_of(old)], "there is a new pod")
        until(lambda: restarts(release.cluster.get("pod", name_of(new))) >= 1, "the new pod's start has failed")

        def said() -> str:  # between two starts there may be no log
            command = ["logs", name_of(new)]
            return "".join(release.cluster.kubectl(*command, *which, check=False) for which in ([], ["--previous"]))

        until(lambda: "brain-3.0.mar" in said(), "the log says why")
        already = answers.count
        until(lambda: answers.count >= already + CLIENTS, "the old pod serves")
        release.cluster.helm("rollback", release.name, str(good), "--wait", WITHIN)
        until(lambda: [name_of(pod) for pod in release.pods()] == [name_of(old)], "the old pod is all there is")
    answers.check()


def test_a_pod_that_is_deleted_under_load_loses_nothing(release: Release) -> None:
    """preStop, SIGTERM, and the grace period; meanwhile the other pod serves."""
    release.apply(TWO)
    leaves, _ = release.ready_pods()
    with load(release.cluster, release.url("brain"), HEAD, OPTIONS) as answers:
        release.cluster.kubectl("delete", "pod", name_of(leaves), "--wait=false")
        until(lambda: name_of(leaves) not in map(name_of, release.pods()), "it is gone")
        gone = answers.count
        until(lambda: len(release.ready_pods()) == 2, "another one is there in its place")
        until(lambda: answers.count >= gone + 2 * CLIENTS, "requests go on being served")
    answers.check()


def test_a_drain_takes_one_pod_and_then_waits_for_another_to_be_ready(release: Release) -> None:
    """`kubectl drain` of the node, for this release's pods only, while its replacement finds no node."""
    release.apply(TWO)
    cluster = release.cluster
    [node] = {pod["spec"]["nodeName"] for pod in release.ready_pods()}
    try:
        selector = [f"--pod-{release.selector.removeprefix('--')}", "--delete-emptydir-data"]
        said = cluster.kubectl("drain", node, *selector, "--timeout=120s", check=False)
        assert "violate the pod's disruption budget" in said
        staying = release.ready_pods()
        assert len(staying) == 1, "one was evicted, the other is kept"
        budget = cluster.get("poddisruptionbudget", release.full_name)["status"]
        assert (budget["disruptionsAllowed"], budget["currentHealthy"], budget["desiredHealthy"]) == (0, 1, 1)
    finally:
        cluster.kubectl("uncordon", node)
    until(lambda: len(release.ready_pods()) == 2, "another one is there in its place")
    assert name_of(staying[0]) in map(name_of, release.ready_pods())


def test_a_server_that_hangs_is_started_again(release: Release) -> None:
    """Its JVM is stopped, so that nothing is answered any more: liveness ends it, and it comes back."""
    release.apply({"liveness": {"periodSeconds": 2, "failureThreshold": 3}, "stop": {"endpointSeconds": 1}})
    cluster = release.cluster
    [pod] = release.ready_pods()
    assert restarts(pod) == 0
    jvm = cluster.run(name_of(pod), "python", "-c", FIND_JVM).split()
    assert len(jvm) == 1
    cluster.run(name_of(pod), "sh", "-c", f"kill -STOP {jvm[0]}")
    until(lambda: not release.ready_pods(), "nobody is sent to it any more")
    until(lambda: restarts(cluster.get("pod", name_of(pod))) == 1, "it is started again")
    assert any("Liveness probe failed" in each for each in cluster.events(name_of(pod)))
    until(lambda: is_ready(cluster.get("pod", name_of(pod))), "it is ready again")
    with load(cluster, release.url("brain"), HEAD, OPTIONS) as answers:
        until(lambda: answers.count > 0, "it answers")
    answers.check()


def test_a_start_that_hangs_is_begun_again_by_the_startup_probe_and_not_before(release: Release) -> None:
    """A server that answers no probe has its whole time, whatever liveness says; then it is started again."""
    cluster = release.cluster
    hanging = Release(cluster, "hanging", release.values)
    impatient: Values = {
        "replicas": 0,
        "startup": {"baseSeconds": 20, "secondsPerArchive": 0, "secondsPerGibibyte": 0},
        "liveness": {"periodSeconds": 1, "failureThreshold": 1},
        "stop": {"endpointSeconds": 1},
    }
    sleeps = ["/bin/sh", "-c", "trap exit TERM; while :; do sleep 1; done"]
    with hanging.as_it_is_left():
        hanging.apply(impatient, wait=False)
        instead = [
            {"op": "replace", "path": f"/spec/template/spec/containers/0/{key}", "value": value}
            for key, value in (("command", sleeps), ("args", []))
        ]
        cluster.kubectl("patch", "deployment", hanging.full_name, "--type=json", f"--patch={json.dumps(instead)}")
        cluster.kubectl("scale", "deployment", hanging.full_name, "--replicas=1")
        [pod] = until(hanging.pods, "there is a pod")
        ended = until(lambda: last_end(cluster.get("pod", name_of(pod))), "it is started again")
        told = cluster.events(name_of(pod))
        assert any(each.startswith("Unhealthy: Startup probe failed") for each in told)
        assert not any("Liveness" in each or "liveness" in each for each in told)
        assert ended >= 18, "a probe every 2 s: the tenth one fails 18 s after the first"
        assert not hanging.ready_pods()


def last_end(pod: Values) -> float:
    """How many seconds its only container lived the last time; 0 if it has not ended yet."""
    [status] = pod["status"].get("containerStatuses") or [{}]
    ended = status.get("lastState", {}).get("terminated")
    if not ended:
        return 0
    began, end = (np.datetime64(ended[key].removesuffix("Z")) for key in ("startedAt", "finishedAt"))
    return float((end - began) / np.timedelta64(1, "s"))


SERVE_HTTPS = """
import functools, http.server, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tmp/tls.crt", "/tmp/tls.key")
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/models")
server = http.server.ThreadingHTTPServer(("", 8443), handler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def archives_url(cluster: Cluster, workshop: str, tmp_path: Path) -> str:
    """Where the workshop gives out its archives over https; the ConfigMap ``authority`` has who signed for it."""
    address = cluster.get("pod", workshop)["status"]["podIP"]
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=workshop", "-addext", f"subjectAltName=IP:{address}"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    cluster.kubectl("create", "configmap", "authority", f"--from-file=ca.crt={certificate}")
    cluster.put(workshop, {"tls.key": key, "tls.crt": certificate}, "/tmp")
    cluster.run(workshop, "sh", "-c", f"nohup python -c '{SERVE_HTTPS}' >/tmp/https.log 2>&1 </dev/null &")
    return f"https://{address}:8443"


def test_a_pod_fetches_its_archive_and_takes_no_other(release: Release, workshop: str, archives_url: str) -> None:
    """An init container of the same image, over https with an authority of one's own; another sha256 is no start."""
    cluster = release.cluster

    def fetching(sha256: str) -> Values:
        archive = {"url": f"{archives_url}/brain-1.0.mar", "sha256": sha256, "maxBytes": 2**28}
        fetch = {"archives": [archive], "authorities": {"configMap": "authority"}}
        return {"models": {"store": {"kind": "fetch", "fetch": fetch}}}

    said = cluster.run(workshop, "sha256sum", "/models/brain-1.0.mar")
    to_workshop: Values = {"networkPolicy": {"fetchTo": [{"ports": [{"protocol": "TCP", "port": 8443}]}]}}
    fetched = Release(cluster, "fetched", merged(release.values, to_workshop))
    with fetched.as_it_is_left():
        fetched.apply(fetching("0" * 64), wait=False)
        [pod] = until(fetched.pods, "there is a pod")
        until(lambda: ended_badly(cluster.get("pod", name_of(pod))), "its init container has failed")
        words = cluster.kubectl("logs", name_of(pod), "--container=fetch-0", "--previous", check=False)
        words += cluster.kubectl("logs", name_of(pod), "--container=fetch-0")
        assert "sha256" in words
        assert not fetched.ready_pods()
        fetched.apply(fetching(said.split()[0]))
        with load(cluster, fetched.url("brain"), HEAD, OPTIONS) as answers:
            until(lambda: answers.count > 0, "it answers")
        answers.check()


def ended_badly(pod: Values) -> bool:
    """Whether an init container has failed at least once."""
    states = pod["status"].get("initContainerStatuses") or []
    return any(
        each.get(key, {}).get("terminated", {}).get("exitCode") for each in states for key in ("state", "lastState")
    )


@pytest.fixture
def made_up_gpus(cluster: Cluster, workshop: str) -> Iterator[None]:
    """The node has GPUs that nobody has, as far as the scheduler knows."""
    node, path = cluster.get("pod", workshop)["spec"]["nodeName"], f"/status/capacity/{GPU.replace('/', '~1')}"
    if GPU in cluster.get("node", node)["status"]["capacity"]:
        pytest.skip(f"the node has {GPU} of its own")

    def patch(**operation: str) -> None:
        text = json.dumps([{"path": path, **operation}])
        cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={text}")

    patch(op="add", value=str(MADE_UP))
    try:
        until(lambda: GPU in cluster.get("node", node)["status"]["allocatable"], "the scheduler may give them out")
        yield
    finally:
        patch(op="remove")


def test_a_gpu_gets_one_pod_and_a_pod_gets_one_gpu(release: Release, made_up_gpus: None) -> None:
    """Scheduling alone: the containers find no GPU and end with the reason."""
    cluster = release.cluster
    on_gpus = Release(cluster, "gpus", release.values, SERVER_CHART / "values-gpu.yaml")

    def placed() -> list[Values]:
        return [pod for pod in on_gpus.pods() if "nodeName" in pod["spec"]]

    with on_gpus.as_it_is_left():
        on_gpus.apply({"replicas": MADE_UP + 1}, wait=False)
        until(lambda: len(placed()) == MADE_UP, "every GPU has a pod")
        [waiting] = until(lambda: [pod for pod in on_gpus.pods() if "nodeName" not in pod["spec"]], "one pod is left")
        unplaced = f"Insufficient {GPU}"
        until(lambda: any(unplaced in each for each in cluster.events(name_of(waiting))), "it says why it waits")
        [server] = waiting["spec"]["containers"]
        assert server["resources"]["limits"][GPU] == server["resources"]["requests"][GPU] == "1"
        leaves = name_of(placed()[0])
        cluster.kubectl("delete", "pod", leaves, "--grace-period=0", "--force")
        until(
            lambda: leaves not in map(name_of, on_gpus.pods()) and len(placed()) == MADE_UP, "its GPU has another pod"
        )
        assert len(on_gpus.pods()) == MADE_UP + 1
