"""A Kubernetes cluster of whoever runs the tests: helm, kubectl, and pods that tests work from.

Which cluster is KUBECONFIG's business, and how the image came to its nodes is whoever's who built it (docs/testing.md).
Nothing here knows more of a cluster than its API.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .charts import SERVER_CHART, Values, merged, tool

IMAGE_VARIABLE, PULL_VARIABLE = "NNUNET_TORCHSERVE_CLUSTER_IMAGE", "NNUNET_TORCHSERVE_CLUSTER_PULL"
NAMESPACE = "nnunet-cluster-test"
WORKSHOP, STUDY, MODELS = "workshop", "study", "models"
PATIENCE_S = 1800.0
"""For anything that has to happen: a start of a pod on a node whose processors have other work."""
WITHIN = f"--timeout={PATIENCE_S:.0f}s"
"""The same for helm."""
CLIENTS, CASES = 8, 24
TIMEOUT = pytest.mark.timeout(4 * PATIENCE_S)
"""Of a test in which several pods start."""

_POLL_S = 0.5
_IN_POD = Path(__file__).with_name("pod_clients.py")
_UNPACK = "import io, sys, tarfile; tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())).extractall(sys.argv[1])"
"""Reads all of it first: kubectl may hang where a program ends before. Python 3.11.2 has no filters yet."""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until something holds, and return it.

    Args:
        condition: what is asked, again and again.
        what: it is, for whoever reads that it did not come true.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"within {PATIENCE_S:.0f} s it did not come true that {what}"
        time.sleep(_POLL_S)
    return found


@dataclass(frozen=True)
class Image:
    """The server's image, as the charts' values have it.

    Attributes:
        name: ``repository:tag`` or ``repository@sha256:…``.
        pull: policy by which a node gets it.
    """

    name: str
    pull: str

    @classmethod
    def given(cls) -> Image:
        """As the environment says; the test is skipped where it says nothing."""
        name = os.environ.get(IMAGE_VARIABLE)
        if not name:
            pytest.skip(f"{IMAGE_VARIABLE} names no image: make cluster-test IMAGE=repository:tag")
        return cls(name, os.environ.get(PULL_VARIABLE) or "IfNotPresent")

    @property
    def values(self) -> Values:
        repository, at, digest = self.name.partition("@")
        if at:
            image = {"repository": repository, "digest": digest}
        else:
            repository, _, tag = self.name.rpartition(":")
            assert repository, f"{self.name}: repository:tag or repository@sha256:… was expected"
            image = {"repository": repository, "tag": tag}
        return {"image": image | {"pullPolicy": self.pull}}


@dataclass(frozen=True)
class Cluster:
    """What the tests have of a cluster: a namespace of their own.

    Attributes:
        image: of the server.
        namespace: in which everything is.
    """

    image: Image
    namespace: str = NAMESPACE

    def kubectl(self, *arguments: str, given: str | bytes = b"", check: bool = True) -> str:
        """What kubectl says; ``given`` goes to its stdin."""
        return self._run(["kubectl", "--namespace", self.namespace, *arguments], given, check=check)

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None, check: bool = True) -> str:
        """What helm says; ``values`` are those of ``--values``."""
        command = ["helm", "--namespace", self.namespace, *arguments]
        if values is not None:
            command += ["--values", "-"]
        return self._run(command, json.dumps(values or {}), check=check)

    def _run(self, command: Sequence[str], given: str | bytes, *, check: bool) -> str:
        content = given.encode() if isinstance(given, str) else given
        run = subprocess.run([tool(command[0]), *command[1:]], input=content, capture_output=True, check=False)
        said = run.stdout.decode() + (run.stderr.decode() if run.returncode or not check else "")
        assert run.returncode == 0 or not check, f"{' '.join(command)}: {said}"
        return said

    def get(self, kind: str, *arguments: str) -> Any:
        """An object, or a list's objects."""
        found = json.loads(self.kubectl("get", kind, *arguments, "--output", "json"))
        return found["items"] if found["kind"].endswith("List") else found

    def apply(self, *manifests: Values) -> None:
        text = "---\n".join(json.dumps(each) + "\n" for each in manifests)
        self.kubectl("apply", "--filename", "-", given=text)

    def version(self) -> tuple[int, int]:
        """The API server's, as (1, 37)."""
        said = json.loads(self.kubectl("version", "--output", "json"))["serverVersion"]
        return int(said["major"]), int(said["minor"].rstrip("+"))

    def events(self, name: str) -> list[str]:
        """What is told of a pod, as ``Unhealthy: Startup probe failed: …``."""
        events = self.get("events", f"--field-selector=involvedObject.name={name}")
        return [f"{each['reason']}: {each['message']}" for each in events]

    def everything(self) -> set[str]:
        """The names of all objects of the namespace, of every kind that can be listed; events are no objects."""
        kinds = self.kubectl("api-resources", "--verbs=list", "--namespaced", "--output=name").split()
        kinds = [kind for kind in kinds if kind.partition(".")[0] != "events" and not kind.endswith("metrics.k8s.io")]
        return set(self.kubectl("get", ",".join(kinds), "--output=name", "--ignore-not-found").split())

    def run(self, pod: str, *command: str, given: bytes = b"", check: bool = True) -> str:
        """What a command in a pod says."""
        stdin = ["--stdin"] if given else []
        return self.kubectl("exec", *stdin, pod, "--", *command, given=given, check=check)

    def put(self, pod: str, files: Mapping[str, Path | bytes], folder: str) -> None:
        """Files and folders into a folder of a pod, under these names."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in files.items():
                if isinstance(content, Path):
                    archive.add(content, name)
                else:
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode = len(content), 0o644
                    archive.addfile(entry, io.BytesIO(content))
        self.run(pod, "python", "-c", _UNPACK, folder, given=packed.getvalue())


@dataclass
class Answers:
    """What clients of a Service met, as :mod:`.pod_clients` tells it.

    Attributes:
        contents: of the answers that were served: which model it was -> sha256 of the body -> how many.
        refused: how many were told to come again.
        lost: everything else, in words.
        clients: of each, how many answers it got.
    """

    contents: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    clients: Counter[int] = field(default_factory=Counter)

    def take(self, line: str) -> None:
        said = json.loads(line)
        if said["kind"] == "answer":
            self.contents[said["model"]][said["sha256"]] += 1
            self.clients[said["client"]] += 1
        elif said["kind"] == "refused":
            self.refused += 1
        else:
            self.lost.append(said["words"])

    @property
    def count(self) -> int:
        return self.clients.total()

    def of(self, version: str) -> int:
        """How many came from a version of the model."""
        return sum(found.total() for model, found in self.contents.items() if f"version={version};" in model)

    def check(self) -> None:
        """Nothing was lost, and each version gave one answer to the one image."""
        assert self.lost == []
        assert self.contents
        assert {model: len(found) for model, found in self.contents.items()} == dict.fromkeys(self.contents, 1)


@contextmanager
def load(cluster: Cluster, url: str, image: str, options: str) -> Iterator[Answers]:
    """Clients in the workshop, one request after another each, until the end of the block; all have answers then.

    Args:
        cluster: with a workshop.
        url: of the model.
        image: a file of the workshop.
        options: of each request, as JSON.
    """
    command = ["python", "-c", _IN_POD.read_text(), url, image, options, str(CLIENTS)]
    kubectl = [tool("kubectl"), "--namespace", cluster.namespace, "exec", "--stdin", WORKSHOP, "--", *command]
    answers = Answers()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(kubectl, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        assert process.stdin is not None
        assert process.stdout is not None

        def listen(lines: Iterator[str]) -> None:
            for line in lines:
                answers.take(line)

        listener = threading.Thread(target=listen, args=[process.stdout])
        listener.start()
        try:
            until(lambda: answers.count >= 2 * CLIENTS or process.poll() is not None, "clients get answers")
            assert process.poll() is None, said.seek(0) or said.read()
            yield answers
            process.stdin.write("stop\n")
            process.stdin.close()
            assert process.wait(PATIENCE_S) == 0, said.seek(0) or said.read()
        finally:
            process.kill()
            process.wait()
            listener.join()
            process.stdin.close()
            process.stdout.close()


@dataclass
class Release:
    """An installed server chart.

    Attributes:
        cluster: on which.
        name: of the release.
        values: that every call of :meth:`apply` begins from.
        file: of values below those; ``None``: the chart's own alone.
    """

    cluster: Cluster
    name: str
    values: Values
    file: Path | None = None

    @property
    def full_name(self) -> str:
        return f"{self.name}-nnunet-torchserve"

    @property
    def selector(self) -> str:
        return f"--selector=app.kubernetes.io/instance={self.name}"

    def apply(self, *values: Values, wait: bool = True) -> None:
        """Install it, or upgrade it, with these values and no others; to a state that it has already costs nothing."""
        waiting = ["--wait", WITHIN] if wait else []
        given = merged(self.cluster.image.values, self.values, *values)
        below = ["--values", str(self.file)] if self.file else []
        try:
            self.cluster.helm("upgrade", "--install", self.name, str(SERVER_CHART), *waiting, *below, values=given)
        except AssertionError as error:
            error.add_note(self.cluster.kubectl("get", "pods", self.selector, check=False))
            error.add_note(self.cluster.kubectl("logs", self.selector, "--tail=20", "--prefix", check=False))
            raise
        if wait:
            replicas = given.get("replicas", 1)
            until(lambda: len(self.pods()) == replicas, "those pods are left that were asked for")

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", self.name, "--wait", "--ignore-not-found", WITHIN)
        until(lambda: not self.pods(), "its pods are gone")

    @contextmanager
    def as_it_is_left(self) -> Iterator[Release]:
        """Uninstall it in the end."""
        try:
            yield self
        finally:
            self.uninstall()

    def pods(self) -> list[Values]:
        """All of them, those that leave too."""
        found: list[Values] = self.cluster.get("pods", self.selector)
        return found

    def ready_pods(self) -> list[Values]:
        return [pod for pod in self.pods() if is_ready(pod)]

    def url(self, model: str) -> str:
        """Of a model, through the Service. Its address, for not every cluster has names."""
        return f"{self.address()}/predictions/{model}"

    def address(self) -> str:
        spec = self.cluster.get("service", self.full_name)["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def revision(self) -> int:
        """The newest one's number."""
        history = json.loads(self.cluster.helm("history", self.name, "--output=json"))
        return int(history[-1]["revision"])


def name_of(pod: Values) -> str:
    return str(pod["metadata"]["name"])


def is_ready(pod: Values) -> bool:
    """Whether the Service sends requests to it."""
    conditions = pod["status"].get("conditions", [])
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def restarts(pod: Values) -> int:
    """Of its only container."""
    [status] = pod["status"].get("containerStatuses") or [{"restartCount": 0}]
    return int(status["restartCount"])


def waits_for(pod: Values) -> str:
    """Why its only container does not run; empty if it does."""
    [status] = pod["status"].get("containerStatuses") or [{}]
    return str(status.get("state", {}).get("waiting", {}).get("reason", ""))
