"""A request's progress as events, in this process: their order, their numbers, and how a stream ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_torchserve import events
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings, price, settings_for
from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.engine.faults import Hold
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.prediction import Prediction, Reservation
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE, TESTING_VARIABLE
from nnunet_torchserve.errors import Busy, CaseFailed, Deadline, NoEngine, OutOfMemory, ServingError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import EVENTS, Response
from support import volumes
from support.bad_requests import BAD_REQUESTS, BODY_LIMIT, FAST, GOOD, INT16
from support.chaos import engine_processes
from support.events import Stream, assert_complete, read_stream

Load = Callable[[str], Pipeline]

STREAMED = json.dumps(json.loads(FAST) | {"stream": True})


class Wire:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.parts: list[Response] = []

    def __call__(self, part: Response) -> None:
        self.parts.append(part)


class CutWire(Wire):
    """Takes the first part, and then no other."""

    def __call__(self, part: Response) -> None:
        if self.parts:
            raise BrokenPipeError
        super().__call__(part)


def ask(pipeline: Pipeline, options: str = STREAMED, body: bytes = GOOD, wire: Wire | None = None) -> Stream:
    """The stream that answers a request."""
    wire = wire or Wire()
    threads = threading.active_count()
    last = pipeline.answer(Request({"body": body}, {"X-Nnunet-Options": options}, "front-end-id"), wire)
    assert threading.active_count() <= threads
    parts = [*wire.parts, last]
    assert len(parts) > 1, last.body
    assert {(part.status, part.content_type, str(part.headers)) for part in parts} == {
        (HTTPStatus.OK, EVENTS, str(last.headers))
    }
    return read_stream(b"".join(part.body for part in parts))


@pytest.fixture
def plain(pipeline: Load) -> Response:
    return pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST}, "front-end-id"))


def test_a_stream_tells_every_stage_and_ends_with_the_plain_answers_bytes(pipeline: Load, plain: Response) -> None:
    stream = ask(pipeline("five_folds"))
    assert_complete(stream)
    assert stream.result == plain.body
    last = stream.last
    assert (last["status"], last["content_type"]) == (200, plain.content_type)
    assert last["headers"].keys() == plain.headers.keys()
    assert last["headers"]["X-Nnunet-Request-Id"] == "front-end-id"
    assert "network;dur=" in last["headers"]["Server-Timing"]


@pytest.mark.parametrize("options", [{}, {"accumulate": "float32"}, {"folds": [3, 1], "use_mirroring": True}])
def test_the_network_counts_the_passes_of_the_price(options: dict[str, object], pipeline: Load) -> None:
    model = pipeline("five_folds")
    asked = json.dumps({"folds": [0], "use_mirroring": False, "stream": True} | options)
    stream = ask(model, asked)
    parsed = parse_options(asked.encode())
    member = model.bundle.lead
    image = open_image(GOOD, Limits(), member.reader)
    expected = price(member, image.geometry, 1, settings_for(member, parsed), parsed).passes
    steps = stream.of("progress", "network")
    assert [step["done"] for step in steps] == list(range(expected + 1))


def test_what_is_cropped_away_is_not_counted(pipeline: Load) -> None:
    """nnU-Net predicts the box of nonzero voxels only."""
    wide = np.zeros((80, 80, 36), np.int16)
    wide[:40, :38] = INT16 + 1
    stream = ask(pipeline("five_folds"), body=volumes.nifti_gz(wide, np.diag([1.5, 1.5, 1.5, 1])))
    assert_complete(stream)
    assert stream.of("progress", "network")[-1]["done"] == 12


def test_a_warning_stands_in_the_result_event(pipeline: Load) -> None:
    stream = ask(pipeline("five_folds"), body=volumes.nifti_gz(np.ones((32, 32, 32), np.int16)))
    assert stream.last["headers"]["X-Nnunet-Warning"] == "constant_image"


CROPPED = "too thin once it is cropped"
"""What preprocessing finds, which is a stage of the stream already."""


def test_what_preprocessing_refuses_is_an_error_event(pipeline: Load) -> None:
    body = BAD_REQUESTS[CROPPED].body
    assert body is not None
    stream = ask(pipeline(BAD_REQUESTS[CROPPED].model), body=body)
    assert stream.kinds() == ["preprocess", "error"]
    assert (stream.last["status"], stream.last["code"]) == (422, "too_thin")


@pytest.mark.parametrize(
    "name", [name for name, bad in BAD_REQUESTS.items() if bad.body is not None and name != CROPPED]
)
def test_a_refused_request_is_a_plain_problem(name: str, pipeline: Load) -> None:
    bad, wire = BAD_REQUESTS[name], Wire()
    assert bad.body is not None
    options = bad.options or "{}"
    if options.startswith("{") and options.endswith("}"):
        options = '{"stream": true' + (", " if options != "{}" else "") + options[1:]
    limited = replace(pipeline(bad.model), limits=Limits(body_bytes=BODY_LIMIT, response_bytes=BODY_LIMIT))
    body: object = bad.body
    if bad.headers.get("content-type") == "application/json":
        body = json.loads(bad.body)
    response = limited.answer(Request({"body": body}, dict(bad.headers) | {"X-Nnunet-Options": options}), wire)
    assert (int(response.status), json.loads(response.body)["code"]) == (bad.status, bad.code)
    assert response.content_type == "application/problem+json"
    assert not wire.parts


@pytest.mark.parametrize("value", ['"yes"', "1", "null"])
def test_stream_is_true_or_false(value: str, pipeline: Load) -> None:
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": f'{{"stream": {value}}}'}))
    assert json.loads(response.body)["detail"] == "option stream: should be true or false, without quotes"


def test_without_a_way_for_events_a_stream_is_refused(pipeline: Load) -> None:
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": STREAMED}))
    assert (int(response.status), json.loads(response.body)["code"]) == (400, "bad_option")


def test_without_the_option_there_are_no_events(pipeline: Load, plain: Response) -> None:
    wire = Wire()
    response = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": FAST}), wire)
    assert (response.body, wire.parts) == (plain.body, [])


class Scripted:
    """An engine that fails as it is told."""

    backend: Backend | None = None

    def __init__(self, error: Exception, *, waits: bool = False, at_once: bool = False) -> None:
        self.error, self._waits, self._at_once = error, waits, at_once

    def reserve(self, *_: object, watcher: Any = None, **__: object) -> AbstractContextManager[Reservation]:
        if self._waits:
            watcher.queued(1)
        if self._at_once:
            raise self.error
        return nullcontext(Reservation(0.0))

    def predict(self, *_: object) -> Prediction:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(Busy("many wait", 7), 429), (OutOfMemory("too much"), 507), (NoEngine("none", 7), 503), (Deadline("late"), 504)],
)
def test_what_the_engine_refuses_is_plain_unless_the_case_waited(
    error: ServingError, status: int, pipeline: Load
) -> None:
    wire, request = Wire(), Request({"body": GOOD}, {"X-Nnunet-Options": STREAMED})
    refusing = replace(pipeline("five_folds"), engine=Scripted(error, at_once=True))
    response = refusing.answer(request, wire)
    assert (int(response.status), wire.parts) == (status, [])

    stream = ask(replace(pipeline("five_folds"), engine=Scripted(error, waits=True, at_once=True)))
    assert stream.events[0] == {"event": "queued", "position": 1}
    assert (stream.last["event"], stream.last["status"], stream.last["code"]) == ("error", status, error.code)
    assert stream.last["headers"].get("Retry-After") == response.headers.get("Retry-After")


@pytest.mark.parametrize(
    ("error", "code"),
    [(CaseFailed("no"), "case_failed"), (MemoryError(), "out_of_memory"), (RuntimeError("/secret"), "internal")],
)
def test_an_error_after_the_stream_began_is_its_last_event(error: Exception, code: str, pipeline: Load) -> None:
    stream = ask(replace(pipeline("five_folds"), engine=Scripted(error)))
    assert stream.kinds() == ["preprocess", "network", "error"]
    assert (stream.last["code"], stream.last["type"], stream.result) == (code, "about:blank", b"")
    assert stream.last["request_id"] == "front-end-id"
    assert "secret" not in json.dumps(stream.last)


def test_an_answer_above_the_limit_is_an_error_event(pipeline: Load) -> None:
    """Its compressed size is known in the end only."""
    model = pipeline("five_folds")
    stream = ask(replace(model, limits=replace(model.limits, response_bytes=600)))
    assert stream.last["code"] == "response_too_large"


def test_a_deadline_is_an_error_event(pipeline: Load) -> None:
    """It is longer where it has passed before the network began, on a machine that does much else."""
    for timeout_s in (0.5, 5.0, 50.0):
        asked, wire = json.dumps({"stream": True, "tile_step_size": 0.1, "timeout_s": timeout_s}), Wire()
        request = Request({"body": GOOD}, {"X-Nnunet-Options": asked}, "front-end-id")
        last = pipeline("five_folds").answer(request, wire)
        if any(b'"network"' in part.body for part in wire.parts):
            break
    stream = read_stream(b"".join(part.body for part in (*wire.parts, last)))
    assert stream.last["code"] == "deadline"
    assert stream.of("progress", "network")[-1]["done"] < stream.of("progress", "network")[-1]["total"]


def test_a_wire_that_is_cut_costs_the_request_nothing(pipeline: Load, plain: Response) -> None:
    wire = CutWire()
    last = pipeline("five_folds").answer(Request({"body": GOOD}, {"X-Nnunet-Options": STREAMED}), wire)
    assert len(wire.parts) == 1
    assert last.body == plain.body


def test_the_heart_of_a_stream_that_nobody_takes_stops(pipeline: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold the lock for ever, and the request would wait for it until its deadline."""
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.02)
    broken = Scripted(CaseFailed("no"))

    def predict(*_: object) -> Prediction:
        for thread in [thread for thread in threading.enumerate() if thread.name == "heartbeat"]:
            thread.join(300)
            assert not thread.is_alive()
        raise broken.error

    monkeypatch.setattr(broken, "predict", predict)
    asked = Request({"body": GOOD}, {"X-Nnunet-Options": json.dumps({"stream": True, "timeout_s": 290})})
    response = replace(pipeline("five_folds"), engine=broken).answer(asked, CutWire())
    assert json.loads(response.body)["code"] == "case_failed"


class Waiting(Scripted):
    """An engine that waits until so many heartbeats were sent."""

    def __init__(self, wire: Wire, beats: int) -> None:
        super().__init__(CaseFailed("no"))
        self._wire, self._beats = wire, beats

    def predict(self, *_: object) -> Prediction:
        until = time.monotonic() + 300
        while sum(b"heartbeat" in part.body for part in self._wire.parts) < self._beats and time.monotonic() < until:
            time.sleep(0.01)
        raise self.error


def test_a_silent_stage_has_heartbeats(pipeline: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.05)
    wire = Wire()
    began = time.monotonic()
    stream = ask(replace(pipeline("five_folds"), engine=Waiting(wire, 4)), wire=wire)
    assert len(stream.of("heartbeat")) >= 4
    assert time.monotonic() - began > 4 * 0.05
    assert stream.last["code"] == "case_failed"


def test_a_worker_that_hangs_falls_silent_after_its_deadline(pipeline: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe counts from the last part, and would never notice it."""
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(events, "_GRACE_S", 0.1)
    hanging = Scripted(CaseFailed("no"))

    def heart() -> threading.Thread | None:
        return next((thread for thread in threading.enumerate() if thread.name == "heartbeat"), None)

    def predict(*_: object) -> Prediction:
        if (beating := heart()) is not None:  # else it has ended already, on a machine that does much else
            beating.join(600)
            assert not beating.is_alive()
        raise hanging.error

    monkeypatch.setattr(hanging, "predict", predict)
    worker = replace(pipeline("five_folds"), engine=hanging)
    for timeout_s in (0.5, 5.0, 50.0):
        wire, options = Wire(), json.dumps(json.loads(STREAMED) | {"timeout_s": timeout_s})
        last = worker.answer(Request({"body": GOOD}, {"X-Nnunet-Options": options}), wire)
        if any(b"heartbeat" in part.body for part in wire.parts):
            break
    stream = read_stream(b"".join(part.body for part in (*wire.parts, last)))
    assert stream.last["code"] == "case_failed"
    assert 1 <= len(stream.of("heartbeat")) <= (timeout_s + 0.1) / 0.02 + 1


def test_heartbeats_keep_the_promise() -> None:
    assert events.HEARTBEAT_S <= 5


# -- engines tell -----------------------------------------------------------------------------------------------------


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.done: list[int] = []
        self.waits, self.works = threading.Event(), threading.Event()

    def queued(self, ahead: int) -> None:
        self.ahead.append(ahead)
        self.waits.set()

    def passes(self, done: int) -> None:
        self.done.append(done)
        if done:
            self.works.set()


@pytest.fixture(params=["local", "remote"])
def engine(
    request: pytest.FixtureRequest, unpacked: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Makes callers of one engine that has memory for one case."""
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "run"))
    bundle, cpu, made = ModelBundle(unpacked("five_folds")), torch.device("cpu"), []
    limits = Limits(memory_bytes=1000, waiting_cases=3)
    local = LocalEngine(bundle, cpu, limits=limits) if request.param == "local" else None

    def make() -> LocalEngine | RemoteEngine:
        made.append(local or RemoteEngine(bundle, cpu, limits=limits))
        return made[-1]

    yield make
    for each in made:
        if isinstance(each, RemoteEngine):
            each.disconnect()
    for process in engine_processes(tmp_path / "run"):
        process.kill()


CASE = Price(grid=(1, 1, 1), patches=1, passes=1, bytes=1000, preprocess_s=0, export_s=0)


def test_cases_that_wait_are_told_their_position(engine: Any) -> None:
    first, told, go_on = engine(), [Told(), Told()], threading.Event()

    def wait(caller: Any, watcher: Told) -> None:
        with caller.reserve(CASE, None, watcher=watcher):
            go_on.wait(300)

    threads = []
    watcher = Told()
    with first.reserve(CASE, None, watcher=watcher):
        for each in told:
            threads.append(threading.Thread(target=wait, args=(engine(), each)))
            threads[-1].start()
            assert each.waits.wait(300)
    deadline = time.monotonic() + 300
    while 0 not in told[1].ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(300)
    assert watcher.ahead == []
    assert set(told[0].ahead) == {0}
    assert (told[1].ahead[0], told[1].ahead[-1]) == (1, 0)


def test_a_case_is_told_its_passes(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, told = Settings("3d_fullres", (0,), (0,), 0.25, use_gaussian=True), Told()
    data = torch.randn((1, 40, 44, 36), generator=torch.Generator().manual_seed(0))
    slow = Hold(shape=(1, 40, 44, 36), pass_s=0.02)  # all passes together take longer than news of them wait
    monkeypatch.setenv(FAULTS_VARIABLE, f"[{slow.model_dump_json()}]")
    monkeypatch.setenv(TESTING_VARIABLE, "1")
    engine().predict(data, settings, None, told)
    assert told.done[0] == 0
    assert told.done == sorted(told.done)
    assert len(set(told.done)) > 1


@pytest.mark.long  # tests/serve/test_stream.py has it with a live server
def test_progress_begins_again_when_the_engine_dies(
    unpacked: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "run"))
    engine, told = RemoteEngine(ModelBundle(unpacked("five_folds")), torch.device("cpu")), Told()

    def kill_once_it_works() -> None:
        assert told.works.wait(300)
        for process in engine_processes(tmp_path / "run"):
            process.kill()

    killer = threading.Thread(target=kill_once_it_works)
    killer.start()
    data = torch.randn((1, 40, 44, 36), generator=torch.Generator().manual_seed(0))
    settings = Settings("3d_fullres", (0,), (0, 1, 2), 0.25, use_gaussian=True)
    prediction = engine.predict(data, settings, None, told)
    killer.join()
    engine.disconnect()
    assert told.done.count(0) > 1
    assert told.done != sorted(told.done)
    assert prediction.logits.shape[1:] == data.shape[1:]
    for process in engine_processes(tmp_path / "run"):
        process.kill()
