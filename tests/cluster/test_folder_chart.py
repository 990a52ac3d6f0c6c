"""The folder's chart on a cluster: parts of a folder as Jobs, one of whose pods is killed in the middle."""

from __future__ import annotations

import json

import pytest

from support.charts import FOLDER_CHART, Values, merged
from support.cluster import CASES, STUDY, TIMEOUT, WITHIN, Cluster, Release, name_of, until

pytestmark = [pytest.mark.cluster, TIMEOUT]

PARTS = 2
FILES = "/study/predictions"
SLOW = ["-f", 0, "-step_size", 0.1]
"""A case has so many patches that a part is seen in its middle."""


@pytest.fixture
def server(release: Release) -> Release:
    release.apply()
    return release


def predictions(cluster: Cluster, workshop: str) -> dict[str, str]:
    """The files of the folder -> inode and size."""
    lines = cluster.run(workshop, "sh", "-c", f"cd {FILES} && stat -c '%n %i/%s' -- * 2>/dev/null || true").splitlines()
    return dict(line.split(" ") for line in lines)


def test_a_folder_is_predicted_whole_and_once_although_a_pod_is_killed(server: Release, workshop: str) -> None:
    cluster = server.cluster
    values: Values = {
        "servers": [server.address()],
        "model": "brain",
        "images": {"claim": STUDY, "path": "imagesTs"},
        "predictions": {"claim": STUDY},
        "parts": PARTS,
        "arguments": ["--json", *SLOW],
        "resources": {"requests": {"cpu": "10m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
    selector = "--selector=app.kubernetes.io/instance=study"
    cluster.helm("install", "study", str(FOLDER_CHART), values=merged(cluster.image.values, values))
    try:
        indexed = cluster.version() >= (1, 22)
        jobs = cluster.get("jobs", selector)
        assert [job["spec"].get("completionMode") for job in jobs] == (["Indexed"] if indexed else [None] * PARTS)
        mine = [f"case_{case:02}.nii.gz" for case in range(0, CASES, PARTS)]

        def done() -> dict[str, str]:
            there = predictions(cluster, workshop)
            return {name: there[name] for name in mine if name in there}

        until(done, "a case of part 0 is there")
        [victim] = [pod for pod in cluster.get("pods", selector) if part_of(pod) == 0]
        cluster.kubectl("delete", "pod", name_of(victim), "--grace-period=0", "--force")
        before = done()
        assert 0 < len(before) < len(mine), "it was killed in the middle of its part"

        def finished() -> bool:
            return all(done_with(job) for job in cluster.get("jobs", selector))

        until(finished, "the Jobs are done")
        after = predictions(cluster, workshop)
        assert sorted(name for name in after if name.startswith("case_")) == [
            f"case_{n:02}.nii.gz" for n in range(CASES)
        ]
        assert not [name for name in after if "failed" in name]
        assert {name: after[name] for name in before} == before, "what was there was not predicted again"
        summaries = {}
        for pod in cluster.get("pods", selector):
            said = cluster.kubectl("logs", name_of(pod))
            summaries[part_of(pod)] = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
        assert {part: each["cases"] for part, each in summaries.items()} == dict.fromkeys(range(PARTS), CASES // PARTS)
        assert summaries[0]["already_there"] >= len(before)
        assert summaries[0]["already_there"] + summaries[0]["done"] == len(mine)
        assert (summaries[1]["already_there"], summaries[1]["done"]) == (0, CASES - len(mine))
    finally:
        cluster.helm("uninstall", "study", "--wait", WITHIN)
    until(lambda: not cluster.get("pods", selector), "nothing runs any more")


def part_of(pod: Values) -> int:
    """The part that a pod predicts; in an Indexed Job it is the annotation that the argument's variable comes from."""
    index = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index")
    arguments = pod["spec"]["containers"][0]["args"]
    return int(index if index is not None else arguments[arguments.index("-part_id") + 1])


def done_with(job: Values) -> bool:
    conditions = {each["type"]: each["status"] for each in job["status"].get("conditions", [])}
    assert conditions.get("Failed") != "True", conditions
    return conditions.get("Complete") == "True"
