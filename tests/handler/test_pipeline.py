"""One request through the pipeline, in this process: what is refused, what is left behind, what is answered."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_torchserve import pipeline as pipeline_module
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.prediction import Prediction, Reservation
from nnunet_torchserve.errors import Busy
from nnunet_torchserve.export import stock_arithmetic, streamed
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import Priority
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.telemetry import Counts
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import volumes, warm
from support.bad_requests import BAD_REQUESTS, BODY_LIMIT, FAST, GOOD, INT16, BadRequest
from support.odd_models import OddModel

Load = Callable[[str], Pipeline]


@pytest.fixture
def limited(pipeline: Load) -> Load:
    limits = Limits(body_bytes=BODY_LIMIT, response_bytes=BODY_LIMIT)
    return lambda name: replace(pipeline(name), limits=limits)


def ask(bad: BadRequest) -> Request:
    headers = dict(bad.headers) | ({} if bad.options is None else {"x-nnunet-options": bad.options})
    body: object = bad.body
    if bad.headers.get("content-type") == "application/json" and bad.body is not None:
        body = json.loads(bad.body)
    return Request(bad.files if bad.files is not None else {"body": body}, headers)


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_reason(name: str, limited: Load) -> None:
    bad = BAD_REQUESTS[name]
    response = limited(bad.model).answer(ask(bad))
    problem = json.loads(response.body)
    assert (int(response.status), problem["code"]) == (bad.status, bad.code), problem["detail"]
    assert response.content_type == "application/problem+json"
    assert bad.says in problem["detail"]
    assert "/" not in problem["detail"].replace(".hdr/.img", "").replace("application/octet-stream", "")


def test_the_request_after_a_bad_one_is_answered_as_before(limited: Load) -> None:
    pipeline = limited("five_folds")
    good = Request({"body": GOOD}, {"X-Nnunet-Options": FAST})
    before = pipeline.answer(good)
    for bad in BAD_REQUESTS.values():
        pipeline.answer(ask(bad))
    after = pipeline.answer(good)
    assert before.status == after.status == HTTPStatus.OK
    assert before.body == after.body


def test_bad_requests_leave_no_memory_and_no_thread_behind(limited: Load) -> None:
    def everything() -> None:
        for bad in BAD_REQUESTS.values():
            limited(bad.model).answer(ask(bad))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for the next one is not left behind

    everything()
    everything()
    process, threads = psutil.Process(), threading.active_count()
    before = process.memory_full_info().uss
    for _ in range(3):
        everything()
    assert threading.active_count() <= threads
    assert process.memory_full_info().uss - before < 16 * 1024**2


class BrokenEngine:
    """Fails as it is told."""

    backend: Backend | None = None

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def reserve(self, *_: object, **__: object) -> AbstractContextManager[Reservation]:
        return nullcontext(Reservation(0.0))

    def predict(self, *_: object) -> Prediction:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MemoryError(), 507, "out_of_memory"),
        (RuntimeError("/secret/path of a patient"), 500, "internal"),
        (KeyError("x"), 500, "internal"),
    ],
)
def test_an_unexpected_error_is_a_problem_without_its_text(
    error: Exception, status: int, code: str, pipeline: Load
) -> None:
    broken = replace(pipeline("five_folds"), engine=BrokenEngine(error))
    response = broken.answer(Request({"body": GOOD}, {}, "front-end-id"))
    problem = json.loads(response.body)
    assert (int(response.status), problem["code"]) == (status, code)
    assert "secret" not in problem["detail"]
    assert problem["request_id"] == "front-end-id"


def fail(*_: object, **__: object) -> Any:
    msg = "/secret/patient"
    raise ArithmeticError(msg)


class FailingCounts(Counts):
    """Cannot count."""

    add = fail


@pytest.mark.parametrize(
    ("what", "request_", "send"),
    [
        ("output_names", Request({}, {"describe": "True"}), None),
        ("channel_names", Request({}, {"describe": "True"}), None),
        ("reader", Request({"body": GOOD}, {}), None),
        (None, Request({"body": GOOD}, {"X-Nnunet-Options": FAST}, server_id="a\r\nb"), None),
        (None, Request({"body": GOOD}, {"X-Nnunet-Options": '{"stream": true, "folds": 0}'}), fail),
        (None, Request({"body": None}, {}), None),
        (None, Request({"options": 7, "image": [1]}, {}), None),
    ],
)
def test_nothing_that_goes_wrong_is_raised(
    what: str | None, request_: Request, send: Any, pipeline: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline("five_folds")
    if what is not None:
        monkeypatch.setattr(Member, what, property(fail))
    response = model.answer(request_, send)
    failed = response.status is not HTTPStatus.OK
    assert failed == (what is not None or request_.parts.get("body") is not GOOD)
    assert b"secret" not in response.body
    monkeypatch.undo()
    assert model.answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST})).status is HTTPStatus.OK


def test_an_answer_that_cannot_be_counted_goes_out_all_the_same(
    pipeline: Load, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[bytes] = []
    uncounted = replace(pipeline("five_folds"), counts=FailingCounts())
    asked = Request({"body": GOOD}, {"X-Nnunet-Options": '{"stream": true, "folds": 0, "use_mirroring": false}'})
    response = uncounted.answer(asked, lambda part: events.append(part.body))
    assert response.status is HTTPStatus.OK
    assert json.loads(events[-1])["length"] == len(response.body)
    assert "cannot be counted" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_where_no_answer_can_be_made_the_last_resort_is_a_problem_too(
    pipeline: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "model_header", fail)
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Request-Id": "mine"}))
    problem = json.loads(response.body)
    assert (response.status, problem["status"], problem["code"]) == (500, 500, "internal")
    assert problem["request_id"] == "mine"
    assert response.content_type == "application/problem+json"


def test_a_clients_request_id_is_kept(pipeline: Load) -> None:
    response = pipeline("five_folds").answer(
        Request({"body": GOOD}, {"x-request-id": "study 7", "x-nnunet-options": FAST}, "front-end-id")
    )
    assert response.headers["X-Nnunet-Request-Id"] == "study 7"


def test_one_4d_file_is_the_same_as_a_file_for_each_channel(pipeline: Load) -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1])
    second = (INT16.max() - INT16).astype(np.int16)
    files = {"image_0000": GOOD, "image_0001": volumes.nifti_gz(second, affine)}
    stacked = volumes.nifti_gz(np.stack([INT16, second], axis=-1), affine)
    regions = pipeline("regions")
    apart = regions.answer(Request(files, {"X-Nnunet-Options": FAST}))
    together = regions.answer(Request({"image": stacked}, {"X-Nnunet-Options": FAST}))
    assert apart.status == together.status == HTTPStatus.OK
    labels = [np.asarray(nib.Nifti1Image.from_bytes(volumes.gunzip(r.body)).dataobj) for r in (apart, together)]
    assert labels[1].shape == INT16.shape
    np.testing.assert_array_equal(labels[0], labels[1])


def test_an_all_zero_image_is_answered_as_stock_does(pipeline: Load) -> None:
    response = pipeline("five_folds").answer(
        Request({"body": volumes.nifti(np.zeros((30, 30, 30), np.int16))}, {"X-Nnunet-Options": FAST})
    )
    assert response.status == HTTPStatus.OK
    assert response.headers["X-Nnunet-Warning"] == "constant_image"


def test_several_patches_at_once_give_the_same_labels(pipeline: Load, unpacked: Callable[[str], object]) -> None:
    from nnunet_torchserve.engine.local import LocalEngine

    single = pipeline("five_folds")
    batched = replace(single, engine=LocalEngine(single.bundle, torch.device("cpu"), max_patch_batch=4))
    options = json.loads(FAST) | {"save_probabilities": True, "output_format": "npz"}
    request = Request({"body": GOOD}, {"X-Nnunet-Options": json.dumps(options)})
    one, four = (np.load(io.BytesIO(p.answer(request).body)) for p in (single, batched))
    np.testing.assert_allclose(four["probabilities"], one["probabilities"], atol=0.02)
    assert np.count_nonzero(four["labels"] != one["labels"]) <= one["labels"].size // 1000


def test_channels_that_do_not_lie_on_each_other_are_said(pipeline: Load) -> None:
    shifted = np.diag([1.5, 1.5, 1.5, 1.0])
    shifted[:3, 3] = (480, 0, 0)
    files = {"image_0000": GOOD, "image_0001": volumes.nifti_gz(INT16, shifted)}
    response = pipeline("regions").answer(Request(files, {"X-Nnunet-Options": FAST}))
    assert response.status == HTTPStatus.OK
    assert response.headers["X-Nnunet-Warning"] == "channels_misaligned"
    files["image_0001"] = volumes.nifti_gz(INT16, np.diag([1.5, 1.5, 1.5000009, 1]))
    response = pipeline("regions").answer(Request(files, {"X-Nnunet-Options": FAST}))
    assert "X-Nnunet-Warning" not in response.headers


def test_options_that_the_front_end_parsed_are_taken(pipeline: Load) -> None:
    response = pipeline("five_folds").answer(Request({"image": GOOD, "options": {"folds": [9]}}, {}))
    assert json.loads(response.body)["code"] == "unknown_fold"


def test_a_failing_export_leaves_the_threads_alone(pipeline: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline("five_folds")
    monkeypatch.setattr(stock_arithmetic, "rows", lambda *_: 1 / 0)
    options = json.dumps(json.loads(FAST) | {"save_probabilities": True})
    response = whole.answer(Request({"body": GOOD}, {"X-Nnunet-Options": options}))
    assert response.status == HTTPStatus.INTERNAL_SERVER_ERROR  # and the fixture below looks at the threads


def answer_with(pipeline: Pipeline, **options: object) -> dict[str, np.ndarray[Any, Any]]:
    asked = json.dumps(json.loads(FAST) | {"output_format": "npz"} | options)
    finer = volumes.nifti_gz(INT16, np.diag([1.2, 1.1, 1.3, 1.0]))  # than the network's grid
    response = pipeline.answer(Request({"body": finer}, {"X-Nnunet-Options": asked}))
    assert response.status == HTTPStatus.OK, response.body
    return dict(np.load(io.BytesIO(response.body)))


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """A list that grows with each call of ``owner.name``, which goes on doing what it does."""
    calls: list[str] = []
    whole = getattr(owner, name)

    def counted(*given: Any) -> Any:
        calls.append(name)
        return whole(*given)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_stocks_own_preprocessing_can_be_asked_for_and_gives_the_same_labels(
    pipeline: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, DefaultPreprocessor, "run_case_npy")
    ours = answer_with(pipeline("five_folds"), preprocess="exact")
    assert not calls
    stocks = answer_with(pipeline("five_folds"), preprocess="stock")
    assert calls
    np.testing.assert_array_equal(ours["labels"], stocks["labels"])


def test_approximate_exports_can_be_asked_for_and_are_near(pipeline: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, streamed, "linear")
    exact = answer_with(pipeline("five_folds"))["labels"]
    assert not calls
    linear, nearest = (answer_with(pipeline("five_folds"), export=way)["labels"] for way in ("linear", "nearest"))
    assert len(calls) == 1
    assert np.mean(linear != exact) < 1e-3
    assert 0 < np.mean(nearest != exact) < 0.2


@pytest.mark.parametrize("model", ["five_folds", "regions"])
def test_some_probabilities_in_float16_can_be_asked_for(model: str, pipeline: Load) -> None:
    image = {"image_0000": GOOD, "image_0001": GOOD} if model == "regions" else {"body": GOOD}
    answers = []
    for options in ({}, {"probability_channels": [2, 0], "probability_dtype": "float16"}):
        asked = json.dumps(json.loads(FAST) | PROBABILITIES | options)
        response = pipeline(model).answer(Request(image, {"X-Nnunet-Options": asked}))
        assert response.status == HTTPStatus.OK, response.body
        answers.append(np.load(io.BytesIO(response.body)))
    every, some = answers
    np.testing.assert_array_equal(some["labels"], every["labels"])
    assert some["channels"].tolist() == [2, 0]
    assert every["channels"].tolist() == list(range(len(every["probabilities"])))
    np.testing.assert_array_equal(some["probabilities"], every["probabilities"][[2, 0]].astype(np.float16), strict=True)


def test_a_channel_that_the_model_lacks_is_refused(pipeline: Load) -> None:
    options = json.dumps({"save_probabilities": True, "probability_channels": [0, 4]})
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": options}))
    assert (int(response.status), json.loads(response.body)["code"]) == (400, "bad_option")
    assert "0 background, 1 low, 2 middle, 3 high" in json.loads(response.body)["detail"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"high": 2, "background": 0, "low": 1, "ignore": 3}, ["background", "low", "high"]),
        ({"whole": [1, 2], "core": [2], "background": 0, "rim": 3}, ["whole", "core", "rim"]),
    ],
)
def test_channels_are_named_as_nnunet_numbers_them(
    labels: dict[str, object], names: list[str], unpacked: Callable[[str], Path]
) -> None:
    member = ModelBundle(unpacked("five_folds")).lead
    member.dataset = member.dataset | {"labels": labels, "regions_class_order": [1, 2, 3]}
    assert member.output_names == names
    assert member.classes == len(names)


def test_a_deadline_within_the_network_is_kept(pipeline: Load) -> None:
    started = time.monotonic()
    options = json.dumps({"timeout_s": 0.4, "tile_step_size": 0.1})
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": options}))
    assert (int(response.status), json.loads(response.body)["code"]) == (504, "deadline")
    assert time.monotonic() - started < 30


def test_float32_sums_are_served_and_nearly_stocks(pipeline: Load) -> None:
    labels = []
    for accumulate in ("half", "float32"):
        options = json.dumps(json.loads(FAST) | PROBABILITIES | {"accumulate": accumulate, "folds": [0, 1]})
        response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": options}))
        assert response.status == HTTPStatus.OK
        content = np.load(io.BytesIO(response.body))
        assert content["probabilities"].dtype == np.float32
        labels.append(content["labels"])
    assert np.mean(labels[0] != labels[1]) < 1e-2


def test_a_case_that_finds_too_many_waiting_is_told_when_to_come_back(pipeline: Load) -> None:
    busy = replace(pipeline("five_folds"), engine=FullEngine())
    response = busy.answer(Request({"body": GOOD}, {}))
    assert (int(response.status), json.loads(response.body)["code"]) == (429, "busy")
    assert response.headers["Retry-After"] == "7"


class Listener(BrokenEngine):
    """Hears what it is asked for."""

    def __init__(self) -> None:
        super().__init__(Busy("heard", 1))
        self.heard: list[object] = []

    def reserve(self, *_: object, **more: object) -> AbstractContextManager[Reservation]:
        self.heard.append(more["priority"])
        return nullcontext(Reservation(0.0))

    def predict(self, *asked: Any) -> Prediction:
        self.heard.append(asked[1].priority)
        return super().predict(*asked)


@pytest.mark.parametrize("priority", Priority)
def test_the_engine_is_told_who_waits(priority: Priority, pipeline: Load) -> None:
    """For memory, and for each of its passes."""
    engine = Listener()
    text = json.dumps({"priority": priority} if priority is Priority.BATCH else {})
    replace(pipeline("five_folds"), engine=engine).answer(Request({"body": GOOD}, {"X-Nnunet-Options": text}))
    assert engine.heard == [priority, priority]


class FullEngine(BrokenEngine):
    """Has no room."""

    def __init__(self) -> None:
        super().__init__(AssertionError("never asked"))

    def reserve(self, *_: object, **__: object) -> AbstractContextManager[Reservation]:
        msg = "8 cases wait"
        raise Busy(msg, 7)


MEASURE = r"""
import re, sys, torch
from pathlib import Path
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import settings_of
from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.pricing import prices_of, whole_price
from nnunet_torchserve.request import Request
bundle = ModelBundle(Path(sys.argv[1]))
pipeline = Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600)
pipeline.dry_run()
body = bytearray(Path(sys.argv[2]).read_bytes())
def memory(what):
    return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
text = sys.argv[3]
response = pipeline.answer(Request({"body": body}, {"X-Nnunet-Options": text}))
assert response.status == 200, response.body
image, options = open_image(body, Limits(), "SimpleITKIO"), parse_options(text.encode())
channels = bundle.lead.channels
prices = prices_of(bundle, image.geometry, channels, settings_of(bundle, options), options)
print(memory("VmHWM") - before, whole_price(bundle, prices, image.geometry, channels, options).bytes)
"""


EVERY_FORMAT = ["nii.gz", "nii", "nrrd", "mha", "npz", "json"]
PROBABILITIES = {"save_probabilities": True, "output_format": "npz"}
OF_REGIONS: dict[str, Any] = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3},
    "more_dataset": {"regions_class_order": [1, 2, 3]},
}


@pytest.mark.parametrize(
    ("model", "dtype", "slope", "shape", "spacing", "options"),
    [
        ("five_folds", "int16", 1, (120,) * 3, (0.67,) * 3, {}),
        pytest.param("five_folds", "int16", 1, (160,) * 3, (0.5,) * 3, {}, marks=pytest.mark.long),
        pytest.param("five_folds", "float64", 2, (200,) * 3, (0.4,) * 3, {}, marks=pytest.mark.long),
        pytest.param("five_folds", "int64", 2, (200,) * 3, (0.4,) * 3, {}, marks=pytest.mark.long),
        pytest.param("five_folds", "int16", 1, (60,) * 3, (4.5,) * 3, {}, marks=pytest.mark.long),
        ("five_folds", "int16", 1, (100,) * 3, (0.84,) * 3, {"preprocess": "stock"}),
        pytest.param("five_folds", "int16", 1, (200,) * 3, (0.4,) * 3, {"preprocess": "stock"}, marks=pytest.mark.long),
        pytest.param(
            "five_folds",
            "int16",
            1,
            (1500, 1500, 1),
            (0.35, 0.35, 1.02),
            {"preprocess": "stock"},
            marks=pytest.mark.long,
        ),
        pytest.param("five_folds", "int16", 1, (2100, 1500, 1), (0.35, 0.35, 1.02), {}, marks=pytest.mark.long),
        pytest.param("five_folds", "int16", 1, (160,) * 3, (0.6,) * 3, PROBABILITIES, marks=pytest.mark.long),
        pytest.param(
            "five_folds",
            "int16",
            1,
            (160,) * 3,
            (0.6,) * 3,
            PROBABILITIES | {"probability_channels": [1]},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "five_folds",
            "int16",
            1,
            (160,) * 3,
            (0.6,) * 3,
            PROBABILITIES | {"probability_format": "nii.gz"},
            marks=pytest.mark.long,
        ),
        ("five_folds", "int16", 1, (100,) * 3, (0.96,) * 3, PROBABILITIES | {"output_format": EVERY_FORMAT}),
        pytest.param(
            "five_folds",
            "int16",
            1,
            (160,) * 3,
            (0.6,) * 3,
            PROBABILITIES | {"output_format": EVERY_FORMAT},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "five_folds", "int16", 1, (200,) * 3, (0.4,) * 3, {"output_format": EVERY_FORMAT}, marks=pytest.mark.long
        ),
        ("regions", "int16", 1, (100,) * 3, (0.96,) * 3, PROBABILITIES),
        pytest.param("regions", "int16", 1, (160,) * 3, (0.6,) * 3, PROBABILITIES, marks=pytest.mark.long),
        pytest.param("regions", "int16", 1, (160,) * 3, (0.6,) * 3, {"export": "linear"}, marks=pytest.mark.long),
    ],
)
def test_the_price_in_bytes_is_an_upper_bound(
    model: str,
    dtype: str,
    slope: int,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    options: dict[str, object],
    unpacked: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Measured in a process of its own: the peak of a case above that of a small one."""
    channels = () if model == "five_folds" else (2,)
    voxels = np.random.default_rng(0).integers(1, 99, shape + channels).astype(dtype)
    body = bytearray(volumes.nifti(voxels, np.diag([*spacing, 1])))
    body[112:120] = np.array([slope, 0], "<f4").tobytes()  # scl_slope and scl_inter
    check_price(unpacked(model), volumes.write(tmp_path, "body", bytes(body)), options)


RECIPES = {
    "cascade": (OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres"), [], [OddModel(named="3d_lowres")]),
    "ensemble": (OddModel(), [OddModel(named="3d_lowres")], []),
    "ensemble of regions": (OddModel(**OF_REGIONS), [OddModel(named="3d_lowres", **OF_REGIONS)], []),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ensemble", PROBABILITIES | {"output_format": EVERY_FORMAT}),
        ("cascade", {}),
        ("cascade", PROBABILITIES),
        ("ensemble", {}),
        ("ensemble", PROBABILITIES | {"probability_format": "nii.gz"}),
        ("ensemble of regions", PROBABILITIES),
    ],
)
def test_the_price_of_several_members_is_an_upper_bound(
    recipe: str, options: dict[str, object], tmp_path: Path
) -> None:
    first, others, stages = RECIPES[recipe]
    folder = first.write(tmp_path / "first")
    more = tuple(model.write(tmp_path / "other") for model in others)
    previous = tuple(model.write(tmp_path / "stage") for model in stages)
    [archive] = make_archives(ArchiveRequest(folder, tmp_path, name="m", others=more, previous_stages=previous))
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    voxels = np.random.default_rng(0).integers(1, 99, (160, 140, 120)).astype(np.int16)
    file = volumes.write(tmp_path, "body", volumes.nifti(voxels, np.diag([0.8, 0.8, 0.8, 1])))
    check_price(tmp_path / "unpacked", file, options)


def check_price(model: Path, file: Path, options: dict[str, object]) -> None:
    text = json.dumps({"folds": [0], "use_mirroring": False, "tile_step_size": 1} | options)
    answer = subprocess.run(
        [str(warm.python_of_programs()), "-c", MEASURE, str(model), str(file), text],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    measured, priced = (int(number) for number in answer.stdout.split()[-2:])
    assert measured <= priced, (measured, priced)
    assert priced < 8 * measured, "a price far above the truth refuses what would fit"


def test_nan_weights_are_an_error_and_never_a_mask(pipeline: Load) -> None:
    from nnunet_torchserve.engine.local import LocalEngine

    whole = pipeline("five_folds")
    engine = LocalEngine(whole.bundle, torch.device("cpu"))
    parameter = next(next(iter(engine._core.networks.modules)).parameters())
    parameter.view(-1)[0] = float("nan")
    response = replace(whole, engine=engine).answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST}))
    assert (int(response.status), json.loads(response.body)["code"]) == (500, "case_failed")


def test_the_dry_run_answers(pipeline: Load) -> None:
    for name in ("five_folds", "flat", "regions", "anisotropic"):
        pipeline(name).dry_run()


@pytest.fixture(autouse=True)
def _threads_are_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
