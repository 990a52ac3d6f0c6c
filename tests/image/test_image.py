"""The image, built and run: a server in a read-only root, as a user without a name, with a memory limit."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from packaging.utils import canonicalize_name

from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from support import volumes
from support.bad_requests import FAST, GOOD
from support.chaos import Case, has_ended, shared_memory, wait_for
from support.charts import serve
from support.foreground import Clients
from support.image import BASE, NOBODYS_UID, Container, base, build, container, podman
from support.locks import GPU_ONLY, INSTALLED, locked, version_of_project

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

MODEL = "five_folds"
WORKERS, CLIENTS = 2, 8
LOAD = Case((40, 38, 6))
THOROUGH = "{}"
"""All folds and mirrorings: long enough to be met in the engine."""
MEMORY_MIB = 2500
AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])


@pytest.fixture(scope="module")
def store(archive_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store that any user may read."""
    folder = tmp_path_factory.mktemp("store")
    Path(shutil.copy(archive_of(MODEL), folder)).chmod(0o644)
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def created(image: str, store: Path) -> Iterator[Container]:
    arguments = ["serve", "--foreground", "--host=0.0.0.0", "--health-host=0.0.0.0", "--model-store=/models"]
    options = [f"--volume={store}:/models:ro"]
    # the default lets two requests wait for each worker; TorchServe refuses more of them, without Retry-After
    arguments += [f"--workers={WORKERS}", f"--queue={CLIENTS}"]
    with container(image, *arguments, options=options, memory=f"{MEMORY_MIB}m") as each:
        yield each


@pytest.fixture
def server(created: Container) -> Container:
    """A server that is ready, whatever a test before has done to it."""
    if not created.state()["Running"]:
        created.start()
    created.wait_until_ready()
    return created


def solid(edge: int) -> bytes:
    """A cube of so many voxels a side, nowhere zero, in a small body."""
    return volumes.nifti_gz(np.ones((edge, edge, edge), np.uint8), AFFINE)


def settings(server: Container) -> dict[str, str]:
    """What the kernel says of process 1."""
    lines = server.execute("cat", "/proc/1/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_answer_is_the_librarys(server: Container, pipeline: Callable[[str], Pipeline]) -> None:
    answer = server.predict(MODEL, GOOD, FAST)
    assert answer.status_code == HTTPStatus.OK, answer.text
    expected = pipeline(MODEL).answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST}))
    ours, theirs = labels(answer.content), labels(expected.body)
    assert len(np.unique(ours)) > 1
    np.testing.assert_array_equal(ours, theirs)


def labels(file: bytes) -> npt.NDArray[np.generic]:
    return np.asanyarray(nib.Nifti1Image.from_bytes(gzip.decompress(file)).dataobj)


def test_process_1_is_the_server_itself_as_nobody_in_a_root_that_cannot_be_written(server: Container) -> None:
    command = server.execute("cat", "/proc/1/cmdline").split("\0")
    assert Path(command[1]).name == "nnunet-torchserve"
    assert command[2:4] == ["serve", "--foreground"]
    status = settings(server)
    assert status["Uid"].split() == [str(NOBODYS_UID)] * 4
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
    assert server.execute("sh", "-c", f"getent passwd {NOBODYS_UID}; true") == ""
    assert server.execute("sh", "-c", "touch /models/x /opt/x /x 2>&1; true").count("Read-only file system") == 3
    assert server.execute("nnunet-torchserve", "health") == f"{WORKERS} workers of {MODEL}/1.0 are READY"


def test_a_folder_is_predicted_by_the_same_image(image: str, server: Container, tmp_path: Path) -> None:
    images, predictions = tmp_path / "images", tmp_path / "predictions"
    images.mkdir()
    predictions.mkdir()
    (images / "case_0000.nii.gz").write_bytes(GOOD)
    for folder in (tmp_path, images, predictions):
        folder.chmod(0o777)
    arguments = [
        "--server",
        server.url,
        "--model",
        MODEL,
        "-i",
        "/images",
        "-o",
        "/predictions",
        "-f",
        "0",
        "--disable_tta",
    ]
    volumes_of = [f"--volume={each}:/{each.name}" for each in (images, predictions)]
    with container(image, "predict", *arguments, options=volumes_of, memory="1g") as client:
        assert podman("wait", client.name) == "0", client.log()
    [answer] = predictions.glob("*.nii.gz")
    assert answer.stat().st_uid == NOBODYS_UID
    np.testing.assert_array_equal(labels(answer.read_bytes()), labels(server.predict(MODEL, GOOD, FAST).content))


def test_a_killed_engine_costs_nobody_but_time(server: Container) -> None:
    undisturbed = server.predict(MODEL, GOOD, THOROUGH)
    assert undisturbed.status_code == HTTPStatus.OK, undisturbed.text
    engine = server.engine()
    with ThreadPoolExecutor(WORKERS) as pool:
        asked = [pool.submit(server.predict, MODEL, GOOD, THOROUGH) for _ in range(WORKERS)]
        wait_for(lambda: len(shared_memory([engine], "logits")) == WORKERS)
        engine.kill()
        answers = [each.result() for each in asked]
    assert [each.status_code for each in answers] == [HTTPStatus.OK] * WORKERS
    assert {each.content for each in answers} == {undisturbed.content}
    assert has_ended(engine)
    server.wait_until_ready()
    assert server.engine().pid != engine.pid
    wait_for(lambda: not [each for each in server.processes() if each.status() == psutil.STATUS_ZOMBIE])


def test_a_memory_limit_refuses_cases_and_kills_nothing(server: Container) -> None:
    """The limit that counts is the container's: 40 % of it are for cases (docs/operations.md)."""
    before = server.lasting()
    assert len(before) == 3 + WORKERS
    refused = server.predict(MODEL, solid(500), FAST)
    assert (refused.status_code, refused.json()["code"]) == (HTTPStatus.INSUFFICIENT_STORAGE, "out_of_memory")
    needed, has = map(int, re.findall(r"\d+", refused.json()["detail"]))
    assert has == pytest.approx(0.4 * MEMORY_MIB * 1024**2, rel=0.01)
    fits = solid(int(500 * (0.8 * has / needed) ** (1 / 3)))
    with ThreadPoolExecutor(WORKERS + 1) as pool:
        options = json.dumps(json.loads(FAST) | {"tile_step_size": 1.0})
        asked = [pool.submit(server.predict, MODEL, fits, options) for _ in range(WORKERS + 1)]
        statuses = {each.result().status_code for each in asked}
    allowed = {HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INSUFFICIENT_STORAGE}
    assert HTTPStatus.OK in statuses <= allowed
    assert server.lasting() == before
    assert server.predict(MODEL, GOOD, FAST).status_code == HTTPStatus.OK


def test_a_stop_under_load_loses_nothing_and_the_next_start_finds_what_the_first_wrote(
    server: Container, measured: list[str]
) -> None:
    clients = Clients(f"{server.url}/predictions/{MODEL}", LOAD.body, LOAD.options)
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(clients.run) for _ in range(CLIENTS)]
        wait_for(lambda: len(clients.answers) >= 2 * CLIENTS)
        began = time.monotonic()
        podman("stop", "--time=1300", server.name)
        measured.append(f"SIGTERM under {CLIENTS} clients to exit: {time.monotonic() - began:.1f} s")
        clients.stop()
        for each in running:
            each.result()
    assert server.state()["ExitCode"] == 0, server.log()
    assert clients.lost == []
    assert clients.refused + clients.turned_away > 0
    assert len(set(clients.answers)) == 1

    before = written(server)
    began = time.monotonic()
    server.start()
    server.wait_until_ready()
    measured.append(f"the second start of a container to ready: {time.monotonic() - began:.1f} s")
    assert written(server) == before, "made anew"
    assert server.predict(MODEL, LOAD.body, LOAD.options).content == clients.answers[0]


def written(server: Container) -> set[str]:
    """Files that libraries keep in the home directory: path, size and time of change; a stopped container's too."""
    root = Path(podman("volume", "inspect", "--format={{.Mountpoint}}", f"{server.name}-0"))
    passing = ("nnunet-ts-", "hsperfdata_")
    files = [
        each for each in root.rglob("*") if each.is_file() and not each.relative_to(root).parts[0].startswith(passing)
    ]
    return {f"{each.relative_to(root)} {each.stat().st_size} {each.stat().st_mtime_ns}" for each in files}


def test_a_server_that_was_killed_starts_again_over_what_it_left(server: Container) -> None:
    podman("kill", "--signal=KILL", server.name)
    assert podman("wait", server.name) == "137"
    server.start()
    server.wait_until_ready()
    assert server.predict(MODEL, GOOD, FAST).status_code == HTTPStatus.OK
    assert server.execute("sh", "-c", "ls -d /tmp/nnunet-ts-* | wc -l") == "1", "what it had unpacked is still there"


def test_it_starts_by_its_own_command(image: str, store: Path, measured: list[str]) -> None:
    began = time.monotonic()
    with container(image, options=[f"--volume={store}:/models:ro"], memory="3500m") as each:
        each.wait_until_ready()
        seconds, computed = time.monotonic() - began, each.processor_seconds()
        assert f"ready http://127.0.0.1:8080 {MODEL}" in each.log()
        assert each.execute("nnunet-torchserve", "health", "--live")
    measured.append(f"start to ready: {seconds:.1f} s; its processes computed for {computed:.1f} s until then")


def test_it_starts_as_the_chart_starts_it(image: str, store: Path, tmp_path: Path) -> None:
    rendered = serve({"models": {"serve": [f"{MODEL}.mar"]}, "server": {"workers": 1, "heapMiB": 512}})
    charted = rendered.container()
    config = tmp_path / "config.properties"
    config.write_text(rendered.kind("ConfigMap")["data"]["config.properties"])
    config.chmod(0o644)
    options = [f"--volume={store}:/models:ro", f"--volume={config}:/etc/nnunet-torchserve/config/config.properties:ro"]
    options += [
        f"--workdir={charted['workingDir']}",
        *(f"--env={each['name']}={each['value']}" for each in charted["env"]),
    ]
    user = rendered.pod["securityContext"]["runAsUser"]
    assert charted["securityContext"]["readOnlyRootFilesystem"] is True
    arguments = [*charted["command"][1:], *charted["args"]]
    with container(image, *arguments, options=options, user=user) as each:
        each.wait_until_ready()
        listed = each.execute("nnunet-torchserve", "list", "--state-dir", ".nnunet-torchserve")
        assert MODEL in listed
        hook = charted["lifecycle"]["preStop"]["exec"]["command"]
        each.execute(*hook[:2], hook[2].replace("sleep 5", "sleep 0"))
        podman("stop", "--time=1300", each.name)
        assert each.state()["ExitCode"] == 0, each.log()


INSPECTION = """\
for program in cc gcc c++ g++ make; do command -v "$program"; done
find /tmp /models /var/lib/nnunet-torchserve /run/nnunet-torchserve /root/.cache /build -mindepth 1 2>/dev/null
find /opt/nnunet-torchserve ! -user root -o ! -type l -perm /022
find /opt/nnunet-torchserve -name '*.whl' -o -name pip -o -name hatchling
exit 0
"""


def test_it_has_no_compiler_no_cache_and_nothing_that_its_user_may_change(image: str) -> None:
    assert podman("run", "--rm", "--pull=never", "--user=0", "--entrypoint=/bin/sh", image, "-c", INSPECTION) == ""


VERSIONS = """\
import importlib.metadata, importlib.util, json, pathlib, struct
packages = list(importlib.metadata.distributions())
files = [pathlib.Path(file.locate()) for each in packages for file in each.files or () if file.suffix == ".py"]
def is_compiled(file):
    compiled = pathlib.Path(importlib.util.cache_from_source(file))
    if not compiled.exists():
        return False
    status = file.stat()
    return struct.unpack("<3I", compiled.read_bytes()[4:16]) == (0, int(status.st_mtime), status.st_size)
compiled = sum(map(is_compiled, files))
versions = {each.metadata["Name"]: each.version for each in packages}
print(json.dumps([versions, len(files), compiled]))
"""


def test_it_has_what_is_locked_compiled_beforehand(image: str) -> None:
    """Nothing could be compiled later: the root is read-only."""
    said = podman("run", "--rm", "--pull=never", "--entrypoint=python", image, "-c", VERSIONS)
    versions, files, compiled = json.loads(said)
    found = {canonicalize_name(name): version for name, version in versions.items()}
    extra = {} if "cuda" in labels_of(image)["nnunet-torchserve.variant"] else locked(GPU_ONLY)
    wanted = {name: version for path in INSTALLED for name, version in locked(path).items() if name not in extra}
    assert found == wanted | {"nnunet-torchserve": version_of_project()}
    assert compiled > 0.99 * files  # a few, as templates, are not Python of this version


def test_it_has_all_verbs(image: str) -> None:
    said = podman("run", "--rm", "--pull=never", "--read-only", f"--user={NOBODYS_UID}", image, "trainers")
    assert "nnUNetTrainerRegionLabelmap" in said
    assert said.splitlines()[-1].startswith("export nnUNet_extTrainer=/opt/nnunet-torchserve/")


def labels_of(image: str) -> dict[str, str]:
    labels: dict[str, str] = json.loads(podman("image", "inspect", "--format={{json .Labels}}", image))
    return labels


def test_its_labels_name_its_base_by_digest(image: str, measured: list[str]) -> None:
    labels = labels_of(image)
    assert "@sha256:" in labels["org.opencontainers.image.base.name"]
    assert labels["org.opencontainers.image.version"] == version_of_project()
    size = int(podman("image", "inspect", "--format={{.Size}}", image))
    measured.append(f"size, by podman image inspect --format '{{{{.Size}}}}': {size / 1e9:.2f} GB")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([f"BASE={BASE}"], "name it by its digest"), (["VARIANT=tpu"], "VARIANT is tpu, and must be cpu or cuda")],
)
@pytest.mark.usefixtures("image")
def test_a_build_that_would_not_be_what_was_meant_is_refused(arguments: list[str], says: str) -> None:
    done = build("localhost/nnunet-torchserve:refused", f"BASE={base()}", *arguments)
    assert done.returncode != 0
    assert says in done.stdout
