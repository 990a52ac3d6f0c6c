"""A real TorchServe with real archives."""

from __future__ import annotations

import gc
import io
import json
import re
import time
import zipfile
from http import HTTPStatus
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from nnunet_torchserve.member_description import GOLDEN_FILE
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ToolError, UsageError
from support import volumes
from support.bad_requests import BAD_REQUESTS, FAST, GOOD
from support.ports import free_ports
from support.server import SERVED, LiveServer, running

pytestmark = pytest.mark.serve

MEMORY_GROWTH = 24 * 1024**2


def test_raw_body_and_multipart_give_the_same_answer(server: LiveServer) -> None:
    raw = server.predict("five_folds", GOOD, options=FAST)
    multipart = server.predict("five_folds", files={"image": GOOD, "options": FAST.encode()})
    numbered = server.predict("five_folds", files={"image_0000": GOOD}, options=FAST)
    assert raw.status_code == HTTPStatus.OK, raw.text
    assert raw.content == multipart.content == numbered.content


def test_the_answers_headers(server: LiveServer) -> None:
    answer = server.predict("five_folds", GOOD, options=FAST, headers={"X-Request-Id": "study-7"})
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["x-nnunet-request-id"] == "study-7"
    assert re.fullmatch(r"name=five_folds; version=1\.0; digest=sha256:[0-9a-f]{64}", answer.headers["x-nnunet-model"])
    assert answer.headers["x-nnunet-backend"] == "eager"
    stages = re.findall(r"(\w+);dur=[\d.]+", answer.headers["server-timing"])
    assert stages == ["decode", "preprocess", "queue", "network", "export", "encode"]
    assert server.logs("study-7")
    [line] = [line for line in server.request_lines() if line["id"] == "study-7"]
    assert line.pop("ms").keys() == set(stages)
    assert line == {
        "id": "study-7",
        "model": "five_folds/1.0",
        "status": 200,
        "code": None,
        "shape": [36, 38, 40],
        "patches": 12,
        "passes": 12,
        "reused": None,
        "priority": "interactive",
        "backend": "eager",
    }


def test_header_names_may_be_lower_case(server: LiveServer) -> None:
    answer = server.predict("five_folds", GOOD, headers={"x-nnunet-options": '{"folds": [9]}'})
    assert answer.json()["code"] == "unknown_fold"


@pytest.mark.parametrize(
    ("output_format", "content_type"),
    [("nii", "application/octet-stream"), ("nii.gz", "application/gzip"), ("npz", "application/octet-stream")],
)
def test_output_formats(output_format: str, content_type: str, server: LiveServer) -> None:
    options = json.dumps(json.loads(FAST) | {"output_format": output_format})
    answer = server.predict("five_folds", GOOD, options=options)
    assert (answer.status_code, answer.headers["content-type"]) == (HTTPStatus.OK, content_type)


def test_probabilities_come_in_a_zip_beside_the_labels(server: LiveServer) -> None:
    options = json.dumps(json.loads(FAST) | {"save_probabilities": True})
    answer = server.predict("five_folds", GOOD, options=options)
    assert answer.headers["content-type"] == "application/zip"
    parts = zipfile.ZipFile(io.BytesIO(answer.content))
    assert parts.namelist() == ["labels.nii.gz", "probabilities.npz"]
    probabilities = np.load(io.BytesIO(parts.read("probabilities.npz")))["probabilities"]
    assert probabilities.shape == (4, 36, 38, 40)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_reason(name: str, server: LiveServer) -> None:
    bad = BAD_REQUESTS[name]
    answer = server.predict(bad.model, bad.body, files=bad.files, options=bad.options, headers=bad.headers)
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (bad.status, bad.status, bad.code)
    assert bad.says in problem["detail"]
    assert answer.headers["x-nnunet-model"].startswith(f"name={bad.model};")


def test_bad_requests_cost_neither_the_worker_nor_its_memory(server: LiveServer) -> None:
    [worker] = server.workers("five_folds")
    bad = [each for each in BAD_REQUESTS.values() if each.model == "five_folds"]

    def send_all() -> int:
        for each in bad:
            server.predict(each.model, each.body, files=each.files, options=each.options, headers=each.headers)
        assert server.predict("five_folds", GOOD, options=FAST).status_code == HTTPStatus.OK
        gc.collect()
        uss: int = worker.memory_full_info().uss
        return uss

    send_all()
    before = send_all()
    after = [send_all() for _ in range(2)][-1]
    assert server.workers("five_folds") == [worker]
    assert after - before < MEMORY_GROWTH


def test_what_torchserve_answers_itself(server: LiveServer) -> None:
    """docs/http.md lists these."""
    unknown = server.predict("no_such_model", GOOD)
    assert (unknown.status_code, unknown.json()["code"]) == (404, 404)
    url = f"{server.server.inference_url}/predictions/five_folds/7.0"
    version = httpx.post(url, content=GOOD, timeout=300, trust_env=False)
    assert version.status_code == 404
    empty = server.predict("five_folds", b"")
    assert empty.json()["code"] == "unknown_format"
    large = server.predict("five_folds", bytes(4 * 1024**2))
    assert (large.status_code, large.content) == (413, b"")
    form = server.predict("five_folds", GOOD, headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 500
    assert server.predict("five_folds", GOOD, options=FAST).status_code == HTTPStatus.OK


def test_a_clients_describe_header_does_not_replace_its_mask(server: LiveServer) -> None:
    answer = server.predict("five_folds", GOOD, options=FAST, headers={"describe": "True"})
    assert answer.headers["content-type"] == "application/gzip"


def test_an_interrupted_start_leaves_nothing_running(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[launcher.Server] = []

    def interrupt(server: launcher.Server, *_: object) -> None:
        started.append(server)
        assert server.process() is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "wait_ready", interrupt)
    with pytest.raises(KeyboardInterrupt), running(model_store, tmp_path / "state", models=["flat.mar"]):
        pass
    assert started[0].process() is None
    assert not Path(started[0].temp_dir).exists()


def test_describe_says_what_a_client_needs(server: LiveServer) -> None:
    description = server.describe("regions")["customizedMetadata"]
    assert isinstance(description, dict)
    assert description["channels"] == {"0": "first", "1": "second"}
    assert description["labels"]["core"] == [2, 3]
    assert description["regions_class_order"] == [1, 2, 3]
    assert (description["trainer"], description["configuration"]) == ("nnUNetTrainer", "3d_fullres")
    assert (description["patch_size"], description["folds"]) == ([24, 32, 24], [0])
    assert description["spacing"] == [1.5, 1.5, 1.5]
    assert description["digest"].startswith("sha256:")


def without_nulls(value: object) -> object:
    """As TorchServe's describe API sends it."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_whoever_may_predict_is_told_what_the_model_is_and_what_is_served(method: str, server: LiveServer) -> None:
    url = f"{server.server.inference_url}/predictions/regions"
    headers = {"X-Nnunet-Options": '{"describe": true}', "X-Request-Id": f"describe-{method}"}
    answer = httpx.request(method, url, headers=headers, timeout=300, trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (HTTPStatus.OK, "application/json")
    description = answer.json()
    managed: dict[str, object] = server.describe("regions")["customizedMetadata"]  # type: ignore[assignment]
    same = {key: value for key, value in description.items() if key in managed}
    assert without_nulls(same) == managed
    nulls = {"input_orientation", "postprocessing", "code"}  # which TorchServe leaves out
    assert set(description) - set(managed) - nulls == {"dataset_json", "plans_json", "served"}
    assert description["dataset_json"]["labels"] == managed["labels"]
    assert [each["name"] for each in description["served"]] == list(SERVED)
    for model in description["served"]:
        head = server.predict(model["name"], b"no image").headers["x-nnunet-model"]
        assert head == f"name={model['name']}; version={model['version']}; digest={model['digest']}"
    [own] = [each for each in description["served"] if each["name"] == "regions"]
    assert description | own == description
    assert server.logs(f"describe-{method}")
    assert "dataset_json" not in "".join(log.read_text() for log in Path(server.server.log_dir).glob("*.log"))


def test_a_second_server_of_the_same_state_directory_is_refused(server: LiveServer, model_store: Path) -> None:
    stop = re.escape(f"nnunet-torchserve stop --state-dir {server.state_dir}")
    with pytest.raises(UsageError, match=f"runs already at {server.server.inference_url}; stop it first: {stop}$"):
        launcher.start(launcher.ServeRequest(model_store, state_dir=server.state_dir, ports=free_ports()))


def test_the_management_port_is_not_open_to_other_archives(server: LiveServer, tmp_path: Path) -> None:
    url = f"{server.server.management_url}/models"
    answer = httpx.post(url, params={"url": f"file://{tmp_path}/x.mar"}, timeout=300, trust_env=False)
    assert answer.status_code in (400, 403, 404)
    assert "allowed" in answer.text


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("its zip is damaged", r"TorchServe refused broken\.mar: .*broken"),
        pytest.param(
            "a file was changed",
            r"cannot be served: BundleError: members/2d/golden\.safetensors",
            marks=pytest.mark.long,  # tests/serve/test_start.py has a worker that dies before it loads
        ),
    ],
)
def test_a_model_that_does_not_load_is_explained_and_leaves_nothing(
    how: str, reason: str, models: dict[str, Path], tmp_path: Path
) -> None:
    [archive] = make_archives(ArchiveRequest(models["flat"], tmp_path / "store", name="broken"))
    content = archive.read_bytes()
    golden = f"members/2d/{GOLDEN_FILE}"
    entry = zipfile.ZipFile(archive).getinfo(golden)
    position = entry.header_offset + entry.file_size // 2
    changed = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    if how == "its zip is damaged":
        archive.write_bytes(changed)
    else:
        damaged = zipfile.ZipFile(io.BytesIO(content))
        with zipfile.ZipFile(archive, "w") as rewritten:
            for name in damaged.namelist():
                rewritten.writestr(name, b"no safetensors" if name == golden else damaged.read(name))
    before = {process.pid for process in psutil.process_iter()}
    with (
        pytest.raises(ToolError, match=reason),
        running(tmp_path / "store", tmp_path / "state"),
    ):
        pass
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "ts" in str(p.info["cmdline"])]
    assert not [p for p in left if str(tmp_path) in str(p.info["cmdline"])]
    assert launcher.read_state(tmp_path / "state") is None


@pytest.mark.long  # tests/chaos kills workers under load
def test_a_killed_worker_comes_back(model_store: Path, tmp_path: Path) -> None:
    with running(model_store, tmp_path / "state", models=["flat.mar"]) as live:
        [worker] = live.workers("flat")
        worker.kill()
        deadline = time.monotonic() + 300
        body = volumes.nifti_gz(np.ones((32, 32, 4), np.int16))
        while (answer := live.predict("flat", body)).status_code != HTTPStatus.OK:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.5)
        assert live.workers("flat") != [worker]
