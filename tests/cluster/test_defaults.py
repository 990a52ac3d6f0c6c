"""The server's chart as docs/kubernetes.md installs it, with nothing but the image and the archives named.

No other server is there meanwhile: a small node has room for one of the chart's own size.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from support import stock, volumes
from support.bad_requests import GOOD
from support.charts import SERVER_CHART, Values, merged, tool
from support.cluster import MODELS, TIMEOUT, WITHIN, Cluster, Release, until

pytestmark = [pytest.mark.cluster, TIMEOUT]


def alike(one: bytes, other: Any) -> float:
    """The share of voxels with the same label; ``other`` (Z, Y, X)."""
    labels = np.asarray(nib.Nifti1Image.from_bytes(volumes.gunzip(one)).dataobj).T
    assert labels.shape == other.shape
    return float(np.mean(labels == other))


def test_the_defaults_answer_a_request_after_one_command_and_leave_nothing(
    cluster: Cluster, workshop: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """A start on busy nodes has more patience than the chart's; which archive is served is said, for there are two."""
    before = cluster.everything()
    values: Values = {
        "models": {"store": {"kind": "claim", "claim": {"name": MODELS}}, "serve": ["brain=brain-1.0.mar"]},
        "startup": {"baseSeconds": 1500},
    }
    release = Release(cluster, "defaults", values)
    given = merged(cluster.image.values, values)
    with release.as_it_is_left():
        said = cluster.helm("install", release.name, str(SERVER_CHART), "--wait", WITHIN, values=given)
        assert f"http://{release.full_name}.{cluster.namespace}.svc:8080 --model MODEL" in said
        assert release.ready_pods()
        cluster.run(workshop, "sh", "-c", "mkdir -p /tmp/heads && cp /tmp/head.nii.gz /tmp/heads/head_0000.nii.gz")
        command = ["nnunet-torchserve", "predict", "--server", release.address(), "--model", "brain"]
        command += ["-i", "/tmp/heads", "-o", "/tmp/labels", "-f", "0", "--disable_tta"]
        assert "1 of 1 cases predicted" in cluster.run(workshop, *command)
        predicted = from_pod(cluster, workshop, "/tmp/labels/head.nii.gz")
        image = volumes.write(tmp_path, "head_0000.nii.gz", GOOD)
        theirs = stock.predict(models["five_folds"], [image], folds=[0], use_mirroring=False, probabilities=False)
        assert alike(predicted, theirs.labels) > 0.9999
        (tmp_path / "heads").mkdir()
        image.rename(tmp_path / "heads" / image.name)
        with forwarded(release) as url:
            command[3] = url
            here = [sys.executable, "-m", "nnunet_torchserve_tools.cli", *command[1:]]
            here[here.index("-i") + 1], here[here.index("-o") + 1] = str(tmp_path / "heads"), str(tmp_path / "labels")
            subprocess.run(here, check=True)
        assert (tmp_path / "labels" / "head.nii.gz").read_bytes() == predicted
    until(lambda: cluster.everything() == before, "nothing is left of the release")


def from_pod(cluster: Cluster, pod: str, path: str) -> bytes:
    """A file of a pod."""
    print_it = "import sys; print(open(sys.argv[1], 'rb').read().hex())"
    return bytes.fromhex(cluster.run(pod, "python", "-c", print_it, path))


@contextmanager
def forwarded(release: Release) -> Iterator[str]:
    """A URL of this machine that leads to the Service, as helm's notes have it."""
    command = [tool("kubectl"), "--namespace", release.cluster.namespace, "port-forward"]
    command += [f"service/{release.full_name}", ":8080"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            assert found
            yield f"http://{found[0]}"
        finally:
            process.terminate()
