"""A namespace of the cluster that KUBECONFIG names, with volumes, a pod to work from, and a release of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import volumes
from support.bad_requests import GOOD
from support.charts import Values, merged
from support.cluster import CASES, MODELS, NAMESPACE, STUDY, WORKSHOP, Cluster, Image, Release, is_ready, until

_CLASS = NAMESPACE
_HOST = "kubernetes.io/hostname"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"

SMALL: Values = {
    "models": {"store": {"kind": "claim", "claim": {"name": MODELS}}, "serve": ["brain=brain-1.0.mar"]},
    # 8 clients never find the queue full, and three pods find room on a small node.
    "server": {"workers": 2, "queue": 16, "heapMiB": 384, "bodyLimitMiB": 4, "longestRequestSeconds": 300},
    "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
    # Nodes that have other work.
    "startup": {"baseSeconds": 1500},
}
"""Values of the pods that most tests are about."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """With an empty namespace, which goes with everything in it in the end."""
    cluster = Cluster(Image.given())
    there = cluster.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "--output=name").strip()
    assert not there, f"{there} is there already: is somebody else at it? Else: kubectl delete {there}"
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=600s")
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=1800s")


@pytest.fixture(scope="session")
def claims(cluster: Cluster) -> Iterator[None]:
    """Volumes for models and a study: of the cluster's default class, or, on a cluster of one node, of that node."""
    classes = cluster.get("storageclasses")
    has_default = any(each["metadata"].get("annotations", {}).get(_DEFAULT_CLASS) == "true" for each in classes)
    names = [f"{NAMESPACE}-{name}" for name in (MODELS, STUDY)]
    if not has_default:
        if len(cluster.get("nodes")) > 1:
            pytest.skip("the cluster has several nodes and no default StorageClass: where would volumes be?")
        cluster.apply(*(_volume(name) for name in names))
    try:
        cluster.apply(*(_claim(name, "" if has_default else _CLASS) for name in (MODELS, STUDY)))
        yield
    finally:
        cluster.kubectl("delete", "persistentvolumeclaim", MODELS, STUDY, "--ignore-not-found", "--wait=false")
        if not has_default:
            cluster.kubectl("delete", "persistentvolume", *names, "--ignore-not-found", "--wait=false")


def _volume(name: str) -> Values:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": _CLASS,
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "claimRef": {"namespace": NAMESPACE, "name": name.removeprefix(f"{NAMESPACE}-")},
            "hostPath": {"path": f"/var/tmp/{name}", "type": "DirectoryOrCreate"},
        },
    }


def _claim(name: str, storage_class: str) -> Values:
    spec: Values = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    if storage_class:
        spec["storageClassName"] = storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


@pytest.fixture(scope="session")
def workshop(cluster: Cluster, claims: None, models: dict[str, Path]) -> Iterator[str]:
    """A pod of the server's image that sleeps: it has made archives of two folds of one model, and has images.

    It is root, for it fills volumes whose owner nobody knows; whoever reads them is not.
    """
    mounts = {MODELS: "/models", STUDY: "/study"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": WORKSHOP, "namespace": NAMESPACE},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": WORKSHOP,
                    "image": cluster.image.name,
                    "imagePullPolicy": cluster.image.pull,
                    "command": ["sleep", "infinity"],
                    "env": [{"name": name, "value": "/tmp"} for name in ("HOME", "TMPDIR")],
                    "securityContext": {"runAsUser": 0},
                    "volumeMounts": [
                        *({"name": name, "mountPath": path} for name, path in mounts.items()),
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                *({"name": name, "persistentVolumeClaim": {"claimName": name}} for name in mounts),
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
    cluster.apply(pod)
    until(lambda: is_ready(cluster.get("pod", WORKSHOP)), f"the pod {WORKSHOP} runs: kubectl describe it")
    cluster.run(WORKSHOP, "sh", "-c", "rm -rf /models/* /study/*; mkdir -m 777 /study/imagesTs /study/predictions")
    cluster.put(WORKSHOP, {"five_folds": models["five_folds"], "head.nii.gz": GOOD}, "/tmp")
    for version, fold in (("1.0", "0"), ("2.0", "1")):
        command = f"nnunet-torchserve archive /tmp/five_folds --folds {fold} --name brain --version {version}"
        cluster.run(WORKSHOP, "sh", "-c", f"{command} --output /tmp && mv /tmp/brain.mar /models/brain-{version}.mar")
    cluster.run(WORKSHOP, "sh", "-c", "chmod 644 /models/*.mar")
    images = {}
    for case in range(CASES):
        image, _ = volumes.blobs((40, 38, 36), seed=case)
        images[f"case_{case:02}_0000.nii.gz"] = volumes.nifti_gz(image.astype("int16"), volumes.oblique((1.5,) * 3))
    cluster.put(WORKSHOP, images, "/study/imagesTs")
    yield WORKSHOP
    cluster.run(WORKSHOP, "sh", "-c", "rm -rf /models/* /study/*", check=False)
    cluster.kubectl("delete", "pod", WORKSHOP)


@pytest.fixture(scope="module")
def release(cluster: Cluster, workshop: str) -> Iterator[Release]:
    """One that a file's tests share; each brings it to the values that it is about. On one node, as its volumes."""
    node = cluster.get("pod", workshop)["spec"]["nodeName"]
    labels = cluster.get("node", node)["metadata"]["labels"]
    here = {"nodeSelector": {_HOST: labels[_HOST]}}
    with Release(cluster, "shared", merged(SMALL, here)).as_it_is_left() as release:
        yield release
