"""The chart, played by podman: what helm renders makes a pod whose server answers.

A smoke test, and no more. Podman skips ServiceAccount, Service, PodDisruptionBudget and NetworkPolicy; it ignores
``preStop``, the grace period, ``runAsNonRoot`` and ``fsGroup``, and ends a pod at once. All that is for a cluster to
judge (``tests/cluster``).

What podman 4.3 cannot do is left out by the values: no Secret (it crashes on a volume of one that is not marked as
optional), so no proxy and no token.
"""

from __future__ import annotations

import gzip
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from support.bad_requests import FAST, GOOD
from support.chaos import has_ended
from support.charts import NAME, RELEASE, Rendered, Values, serve
from support.cluster import Image
from support.image import Container, podman

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

MODEL = "five_folds"
NETWORK = "podman"
"""The one that podman always has. Without it a network for all that is played would be made, and stay."""
CONFIGURATION = NAME
"""The ConfigMap; to podman, a volume of that name."""
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.fixture
def claim(archive_of: Callable[[str], Path]) -> Iterator[str]:
    """A claim that has an archive: to podman, a volume of that name."""
    name = f"nnunet-torchserve-test-{uuid.uuid4().hex[:12]}"
    podman("volume", "create", name)
    try:
        folder = Path(podman("volume", "inspect", "--format={{.Mountpoint}}", name))
        Path(shutil.copy(archive_of(MODEL), folder)).chmod(0o644)
        yield name
    finally:
        podman("volume", "rm", "--force", name)


def playable(rendered: Rendered, prefix: str) -> str:
    """All manifests, with other names of the pod's volumes and without probes.

    An ``emptyDir`` is to podman 4.3 a volume of its bare name, and ``tmp`` may be somebody else's. A liveness probe is
    a healthcheck that cannot pass: it calls curl, which the image has not, on port 0, which a port's name becomes.
    """
    manifests = rendered.manifests
    [deployment] = [each for each in manifests if each["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    for each in (*pod["volumes"], *container["volumeMounts"]):
        each["name"] = f"{prefix}-{each['name']}"
    for probe in PROBES:
        del container[probe]
    return yaml.safe_dump_all(manifests)


@pytest.fixture
def played(image: str, claim: str, tmp_path: Path) -> Iterator[tuple[Container, Path]]:
    """The server that podman makes of the chart, and the file by which it can be taken down."""
    enough = {"cpu": "2", "memory": "2500Mi"}
    values: Values = {
        "models": {"serve": [f"{MODEL}.mar"], "store": {"claim": {"name": claim}}},
        "server": {"workers": 1, "heapMiB": 512},
        "resources": {"requests": enough, "limits": enough},
    }
    file = tmp_path / "manifests.yaml"
    file.write_text(playable(serve(Image(image, pull="Never").values, values), prefix=claim))
    try:
        said = podman("kube", "play", "--replace", f"--network={NETWORK}", str(file))
        yield Container(said.splitlines()[-1]), file
    finally:
        for pod in listed("pod", f"--filter=label=app.kubernetes.io/instance={RELEASE}"):
            podman("pod", "rm", "--force", pod)
        podman("volume", "rm", "--force", CONFIGURATION)


def test_the_chart_as_podman_plays_it_answers_and_leaves_nothing(
    played: tuple[Container, Path], claim: str, pipeline: Callable[[str], Pipeline]
) -> None:
    server, file = played
    server.wait_until_ready()
    answer = server.predict(MODEL, GOOD, FAST)
    assert answer.status_code == HTTPStatus.OK, answer.text
    expected = pipeline(MODEL).answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST}))
    ours, theirs = (
        np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(each)).dataobj)
        for each in (answer.content, expected.body)
    )
    assert len(np.unique(ours)) > 1
    np.testing.assert_array_equal(ours, theirs)

    pod, volumes, processes = pod_of(server), mounted(server), server.processes()
    assert {claim, CONFIGURATION} < volumes
    podman("kube", "down", str(file))
    assert pod not in listed("pod")
    assert server.name not in listed("container", "--all")
    assert all(map(has_ended, processes))
    assert volumes & listed("volume", full=False) == {claim, CONFIGURATION}, "those that have names of their own stay"


def mounted(server: Container) -> set[str]:
    """The names of the volumes that a container has."""
    mounts = json.loads(podman("inspect", "--format={{json .Mounts}}", server.name))
    return {each["Name"] for each in mounts if each["Type"] == "volume"}


def pod_of(server: Container) -> str:
    return podman("inspect", "--format={{.Pod}}", server.name)


def listed(kind: str, *options: str, full: bool = True) -> set[str]:
    """All ``pod`` or ``container`` ids, or ``volume`` names, that podman has."""
    untruncated = ["--no-trunc"] if full else []
    return set(podman(kind, "ls", "--quiet", *untruncated, *options).split())
