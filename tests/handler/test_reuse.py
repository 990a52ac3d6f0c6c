"""What requests take over from others: preprocessed volumes, and the answers of equal ones."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nnunet_torchserve import predicting
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings, forward_passes, settings_for
from nnunet_torchserve.engine import folder, remote, shared_memory
from nnunet_torchserve.engine.cache import MOST_VOLUMES, Kept, VolumeCache
from nnunet_torchserve.engine.faults import Hold
from nnunet_torchserve.engine.flights import Flights
from nnunet_torchserve.engine.ledger import Ledger
from nnunet_torchserve.engine.messages import HEARTBEAT_S, Message, Submit
from nnunet_torchserve.engine.prediction import NO_KEYS, Keep, KeptVolume, Reservation, Watcher
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.engine.shared_memory import freeze, is_frozen, share
from nnunet_torchserve.engine.starter import Link
from nnunet_torchserve.engine.tally import Level, TallyReader, Total
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE, TESTING_VARIABLE
from nnunet_torchserve.errors import Deadline
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import Options, parse_options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.preprocess import PreprocessedCase
from nnunet_torchserve.preprocess import preprocess as plain_preprocess
from nnunet_torchserve.recipe import Cascade, Single
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import WARNING, Response
from nnunet_torchserve.reuse import keep_of, keys_of, recalled
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve.telemetry import SERVER_TIMING
from support import volumes
from support.accuracy import report, structure
from support.bad_requests import FAST, GOOD, INT16
from support.chaos import PATIENCE_S, engine_processes, wait_for
from support.descriptors import open_files

CPU = torch.device("cpu")
GOOD_BYTES = INT16.size * 4
"""Of GOOD on the network's grid, which is its own."""

OTHER_OPTIONS = '{"folds": [1], "use_mirroring": false, "save_probabilities": true, "output_format": "nrrd"}'
KEY, OTHER_KEY = "a" * 64, "b" * 64
SINGLE = Single(member="3d_fullres")
CASCADE = Cascade(first=Single(member="3d_lowres"), member="3d_cascade_fullres")


class Fleet:
    """Workers of one model, which share its engine process."""

    def __init__(self, bundle: ModelBundle, runtime: Path) -> None:
        self.bundle, self.runtime = bundle, runtime
        self.tally: TallyReader | None = None
        self._engines: list[RemoteEngine] = []

    def engine(self, cache_bytes: int = 1024**3, limits: Limits | None = None) -> RemoteEngine:
        """A worker's connection."""
        made = RemoteEngine(self.bundle, CPU, limits=limits, cache_bytes=cache_bytes, on_tally=self._watch)
        self._engines.append(made)
        return made

    def worker(self, cache_bytes: int = 1024**3, *, single_flight: bool = False) -> Pipeline:
        """A worker's pipeline."""
        engine = self.engine(cache_bytes)
        settings = HandlerSettings(cache_bytes=cache_bytes, single_flight=single_flight)
        return Pipeline(self.bundle, engine, Limits(), 600.0, settings=settings)

    def level(self, level: Level) -> int:
        """As the engine last wrote it."""
        assert self.tally is not None
        return self.tally.level(level)

    def kill(self) -> None:
        """Kill the engine."""
        for process in engine_processes(self.runtime):
            process.kill()

    def leave(self) -> None:
        """All workers leave; the engine follows some seconds later."""
        for engine in self._engines:
            engine.disconnect()

    def close(self) -> None:
        """Leave no engine behind."""
        self.leave()
        self.kill()

    def _watch(self, descriptor: int, process: int) -> None:
        self.tally = TallyReader(descriptor, os.dup(process))


def left_running(unpacked: Callable[[str], Path], runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Workers whose engine outlives them, for the next test's."""
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(runtime))
    made = Fleet(ModelBundle(unpacked("five_folds")), runtime)
    yield made
    made.leave()


@pytest.fixture(scope="module")
def one_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flying") / "run"


@pytest.fixture
def flying(unpacked: Callable[[str], Path], one_runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """As ``fleet``, but an engine that a test leaves alive goes on to the next."""
    held = Hold(shape=(1, *INT16.shape[::-1]), pass_s=PATIENCE_S, while_exists=hold_of(one_runtime))
    monkeypatch.setenv(FAULTS_VARIABLE, f"[{held.model_dump_json()}]")
    monkeypatch.setenv(TESTING_VARIABLE, "1")
    yield from left_running(unpacked, one_runtime, monkeypatch)


def hold_of(runtime: Path) -> Path:
    """While there is this file, images of GOOD's size stay in the engine."""
    return runtime.with_name("hold")


@pytest.fixture(scope="module")
def caching_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caching") / "run"


@pytest.fixture
def caching(unpacked: Callable[[str], Path], caching_runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """As ``fleet``, but what the engine keeps goes on to the next test: each sends images of its own."""
    yield from left_running(unpacked, caching_runtime, monkeypatch)


@pytest.fixture
def fleet(unpacked: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "run"))
    made = Fleet(ModelBundle(unpacked("five_folds")), tmp_path / "run")
    yield made
    made.close()


def ask(worker: Pipeline, body: bytes = GOOD, options: str = FAST, request_id: str = "one") -> Response:
    headers = {"X-Nnunet-Options": options, "X-Request-Id": request_id}
    response = worker.answer(Request({"body": body}, headers))
    assert response.status is HTTPStatus.OK, response.body
    return response


def stages(response: Response) -> set[str]:
    return set(re.findall(r"(\w+);dur", response.headers[SERVER_TIMING]))


def reused(response: Response) -> str | None:
    found = re.search(r"reused;desc=(\w+)", response.headers[SERVER_TIMING])
    return found and found[1]


# --- preprocessed volumes --------------------------------------------------------------------------------------------


def test_the_same_image_is_not_preprocessed_again(caching: Fleet, pipeline: Callable[[str], Pipeline]) -> None:
    alone = pipeline("five_folds")
    first, second = caching.worker(), caching.worker()
    kept = caching.level(Level.CACHED_BYTES)
    fresh, repeated = ask(first), ask(second, options=OTHER_OPTIONS)
    assert (reused(fresh), reused(repeated)) == (None, "volume")
    assert {"decode", "preprocess"} <= stages(fresh)
    assert "preprocess" not in stages(repeated)
    assert fresh.body == ask(alone).body
    assert repeated.body == ask(alone, options=OTHER_OPTIONS).body
    assert caching.level(Level.CACHED_BYTES) == kept + GOOD_BYTES
    assert ask(first).body == fresh.body


def test_whatever_decides_the_volume_is_in_its_key(caching: Fleet) -> None:
    worker, image = caching.worker(), INT16 + 9
    array, body = npy(image), volumes.nifti_gz(image, np.diag([1.5, 1.5, 1.5, 1]))
    placed = [json.dumps(json.loads(FAST) | {"spacing": [size] * 3}) for size in (1.5, 1.6)]
    for options in placed:
        assert reused(ask(worker, array, options)) is None
    assert reused(ask(worker, array, placed[0])) == "volume"
    assert reused(ask(worker, body)) is None
    assert reused(ask(worker, body, '{"folds": [0], "use_mirroring": false, "preprocess": "stock"}')) is None
    assert reused(ask(worker, volumes.gunzip(body))) is None  # other bytes, whatever they mean


def test_a_channel_more_is_another_key() -> None:
    options = parse_options(None)
    first = keys_of([(b"ab",), (b"c",)], options, SINGLE, answers=True)
    assert first != keys_of([(b"a",), (b"bc",)], options, SINGLE, answers=True)
    assert first == keys_of([(b"ab",), (memoryview(b"c"),)], options, SINGLE, answers=True)
    assert keys_of([(b"abc",)], options, None, answers=False) == NO_KEYS
    patient = parse_options(b'{"timeout_s": 5, "stream": true, "tile_step_size": 0.5}')
    assert first == keys_of([(b"ab",), (b"c",)], patient, SINGLE, answers=True)
    coarse = keys_of([(b"ab",), (b"c",)], parse_options(b'{"tile_step_size": 0.75}'), SINGLE, answers=True)
    assert (coarse.volumes == first.volumes, coarse.answer == first.answer) == (True, False)


def test_a_warning_is_kept_with_its_image(caching: Fleet) -> None:
    constant = volumes.nifti_gz(np.full_like(INT16, 7), np.diag([1.5, 1.5, 1.5, 1]))
    worker = caching.worker()
    for expected in (None, "volume"):
        response = ask(worker, constant)
        assert (reused(response), response.headers[WARNING]) == (expected, "constant_image")


def test_what_could_still_be_changed_is_not_kept(caching: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = caching.engine()
    with monkeypatch.context() as patch:
        patch.setattr(shared_memory, "freeze", lambda _: True)  # and does not
        keep_one(engine)
    with engine.reserve(price(1), None) as reserved:
        assert reserved.recall(KEY) is None
    keep_one(engine)
    with engine.reserve(price(1), None) as reserved:
        assert reserved.recall(OTHER_KEY) is None
        assert reserved.recall(KEY) is not None


@pytest.mark.parametrize("name", ["anisotropic", pytest.param("flat", marks=pytest.mark.long)])
def test_a_model_of_slices_and_one_that_transposes(
    name: str, unpacked: Callable[[str], Path], pipeline: Callable[[str], Pipeline], fleet: Fleet
) -> None:
    image = volumes.nifti_gz(INT16[..., :10], np.diag([1.5, 1.2, 3.1, 1]))
    fleet.bundle = ModelBundle(unpacked(name))
    worker = fleet.worker()
    assert [reused(ask(worker, image, options)) for options in (FAST, OTHER_FOLDS[name])] == [None, "volume"]
    assert ask(worker, image).body == ask(pipeline(name), image).body


OTHER_FOLDS = {"flat": '{"use_mirroring": true}', "anisotropic": '{"folds": [1], "tile_step_size": 0.7}'}


def test_what_was_not_used_for_longest_goes_first(fleet: Fleet) -> None:
    worker = fleet.worker(cache_bytes=2 * GOOD_BYTES + 100)
    images = [volumes.nifti_gz(INT16 + shift, np.diag([1.5, 1.5, 1.5, 1])) for shift in range(3)]
    asked = [reused(ask(worker, images[number])) for number in (0, 1, 0, 2, 0, 1, 2)]
    assert asked == [None, None, "volume", None, "volume", None, None]
    assert fleet.level(Level.CACHED_BYTES) == 2 * GOOD_BYTES


@pytest.mark.long  # test_the_cache_closes_what_it_drops has it without an engine
def test_what_is_larger_than_the_cache_is_not_kept(fleet: Fleet) -> None:
    worker = fleet.worker(cache_bytes=GOOD_BYTES - 1)
    assert [reused(ask(worker)) for _ in range(2)] == [None, None]
    assert fleet.level(Level.CACHED_BYTES) == 0


def test_a_new_engine_begins_with_nothing_and_keeps_again(fleet: Fleet) -> None:
    worker = fleet.worker()
    bodies = [ask(worker).body]
    fleet.kill()
    for expected in (None, "volume"):
        response = ask(worker)
        bodies.append(response.body)
        assert reused(response) == expected
    assert len(set(bodies)) == 1


OTHER = volumes.nifti_gz(np.ascontiguousarray(INT16[::-1, ::-1]), np.diag([1.5, 1.5, 1.5, 1]))
"""Another patient, of GOOD's size."""


def test_a_volume_that_comes_unasked_is_nobodys(
    fleet: Fleet, pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine dies while one worker preprocesses an image, which the next engine has from another worker then."""
    first, second = fleet.worker(), fleet.worker()
    killed: list[bool] = []

    def preprocess(*arguments: Any) -> Any:
        case = plain_preprocess(*arguments)
        if not killed:
            killed.append(True)
            fleet.kill()
            ask(second)
        return case

    monkeypatch.setattr(predicting, "preprocess", preprocess)
    ask(first)
    assert killed
    answer = ask(first, OTHER)
    assert (answer.body, reused(answer)) == (ask(pipeline("five_folds"), OTHER).body, None)


def test_a_lost_connection_leaves_no_volume_behind(
    fleet: Fleet, pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    send_as_ever = RemoteEngine._send
    cut: list[bool] = []

    def send(self: RemoteEngine, link: Link, message: Message, descriptors: Sequence[int] = ()) -> None:
        send_as_ever(self, link, message, descriptors)
        if isinstance(message, Submit) and not cut:
            wait_for(lambda: fleet.level(Level.CACHED_BYTES) > 0)
            link.endpoint.shutdown(socket.SHUT_RDWR)
            cut.append(True)

    monkeypatch.setattr(RemoteEngine, "_send", send)
    worker = fleet.worker()
    ask(worker)
    assert cut
    answer = ask(worker, OTHER)
    assert (answer.body, reused(answer)) == (ask(pipeline("five_folds"), OTHER).body, None)


def test_a_volume_of_another_key_is_never_used() -> None:
    properties: dict[str, Any] = {
        "spacing": [1.0] * 3,
        "shape_before_cropping": (1, 1, 1),
        "bbox_used_for_cropping": [[0, np.int64(1)]] * 3,
        "shape_after_cropping_and_before_resampling": (1, 1, 1),
    }
    case = PreprocessedCase(torch.zeros((1, 1, 1, 1)), properties)
    keep = keep_of(case, KEY, constant=True, backends={Backend.OPENVINO_FLOAT32})
    assert keep is not None
    found = recalled(KeptVolume(case.data, keep.note), KEY)
    assert found is not None
    assert (found.case.properties["bbox_used_for_cropping"], found.constant) == (((0, 1),) * 3, True)
    assert found.backends == {Backend.OPENVINO_FLOAT32}
    with pytest.raises(RuntimeError, match="another"):
        recalled(KeptVolume(case.data, keep.note), OTHER_KEY)
    assert keep_of(case, None, constant=True) is None
    assert keep_of(replace(case, properties=properties | {"own": 1}), KEY, constant=True) is None


OPTION_VALUES: dict[str, object] = {
    "folds": [0],
    "use_mirroring": False,
    "tile_step_size": 0.75,
    "use_gaussian": False,
    "accumulate": "float32",
    "preprocess": "stock",
    "export": "linear",
    "postprocess": False,
    "save_probabilities": True,
    "probability_channels": [1],
    "probability_dtype": "float16",
    "probability_format": "nii",
    "output_format": "nrrd",
    "seg_type": "labelmap",
    "spacing": [1, 2, 3],
    "origin": [1, 2, 3],
    "direction": [0, 1, 0, 1, 0, 0, 0, 0, 1],
    "timeout_s": 5,
    "stream": True,
    "describe": True,
    "properties": True,
    "priority": "batch",
    "series_uid": "1.2.3",
}
NEED: dict[str, dict[str, object]] = {
    **{f"probability_{what}": {"save_probabilities": True} for what in ("channels", "dtype", "format")},
    **{what: {"spacing": [1, 1, 1]} for what in ("origin", "direction")},
}
DECIDES_THE_VOLUME = {"preprocess", "spacing", "origin", "direction", "series_uid"}
DECIDES_THE_LABELS = {"folds", "use_mirroring", "tile_step_size", "use_gaussian", "accumulate"}
DECIDES_NOTHING = {"timeout_s", "stream", "describe"}


@pytest.mark.parametrize("name", Options.model_fields)
def test_each_option_is_in_the_keys_of_what_it_decides(name: str) -> None:
    """An option that is new must be added here: only then is it known what it decides."""
    plain, other = NEED.get(name, {}), NEED.get(name, {}) | {name: OPTION_VALUES[name]}
    before, after = (
        keys_of([(b"image",)], parse_options(json.dumps(options).encode()), CASCADE, answers=True)
        for options in (plain, other)
    )
    changed = {member for member, key in before.volumes.items() if key != after.volumes[member]}
    if name in DECIDES_THE_VOLUME:
        assert changed == {"3d_lowres", "3d_cascade_fullres"}
    else:
        assert changed == ({"3d_cascade_fullres"} if name in DECIDES_THE_LABELS else set())
    assert (before.answer != after.answer) == (name not in DECIDES_NOTHING)


def test_a_cache_in_the_way_is_no_reason_to_refuse_a_case(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "memory_for_cases", lambda: MACHINE_BYTES)
    engine = fleet.engine(limits=Limits(waiting_cases=0, memory_bytes=MACHINE_BYTES))
    keep_one(engine)
    wait_for(lambda: fleet.level(Level.CACHED_BYTES) == GOOD_BYTES)
    with engine.reserve(price(MACHINE_BYTES), None):
        wait_for(lambda: fleet.level(Level.CACHED_BYTES) == 0)


MACHINE_BYTES = 8 * GOOD_BYTES


def test_it_gives_way_to_a_case_that_waits_and_to_no_other(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "memory_for_cases", lambda: MACHINE_BYTES)
    engine = fleet.engine()
    keep_one(engine)
    wait_for(lambda: fleet.level(Level.CACHED_BYTES) == GOOD_BYTES)
    with engine.reserve(price(MACHINE_BYTES - GOOD_BYTES), None):
        assert fleet.level(Level.CACHED_BYTES) == GOOD_BYTES
    with engine.reserve(price(MACHINE_BYTES - GOOD_BYTES + 1), None) as reserved:
        assert reserved.waited_s < 30
        wait_for(lambda: fleet.level(Level.CACHED_BYTES) == 0)


def test_it_gives_way_to_another_engines_case(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "memory_for_cases", lambda: MACHINE_BYTES)
    keep_one(fleet.engine())
    wait_for(lambda: fleet.level(Level.CACHED_BYTES) == GOOD_BYTES)
    other = fleet.runtime / "another"
    other.mkdir()
    assert folder.take_life_lock(other)
    theirs = Ledger(other, "host")
    theirs.hold(0, wanted=MACHINE_BYTES - GOOD_BYTES, since=time.monotonic())  # there is room for both
    beats = HEARTBEAT_S * 3
    with pytest.raises(AssertionError):
        wait_for(lambda: fleet.level(Level.CACHED_BYTES) == 0, within_s=beats)
    theirs.hold(0, wanted=MACHINE_BYTES - GOOD_BYTES + 1, since=time.monotonic())
    wait_for(lambda: fleet.level(Level.CACHED_BYTES) == 0)


def keep_one(engine: RemoteEngine) -> None:
    """Have an engine keep a volume of GOOD_BYTES."""
    settings = Settings("3d_fullres", (0,), (), 1.0, use_gaussian=False)
    with engine.reserve(price(1), None), pytest.raises(Deadline):
        # kept when it is handed in, whatever becomes of the case
        engine.predict(torch.zeros((1, *INT16.shape)), settings, time.monotonic(), keep=Keep(KEY, "{}"))


def price(size: int) -> Price:
    return Price(grid=(1, 1, 1), patches=1, passes=1, bytes=size, preprocess_s=0, export_s=0)


def npy(array: npt.NDArray[np.int16]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def memory(content: bytes = b"abcd") -> int:
    """The descriptor of sealed memory."""
    shared, descriptor = share((len(content),), torch.uint8, "test")
    shared.numpy()[:] = np.frombuffer(content, np.uint8)
    return descriptor


def test_the_cache_closes_what_it_drops() -> None:
    cache, before = VolumeCache(8), open_files(collected=True)
    for key in "abcab":
        cache.keep(key, Kept(memory(), (1, 1, 1, 1), key, 4))
    assert [key for key in "abc" if cache.find(key)] == ["a", "b"]
    cache.keep("d", Kept(memory(b"123456789"), (1, 1, 1, 1), "d", 9))
    assert (cache.size, cache.find("d"), cache.find(None)) == (8, None, None)
    cache.clear()
    assert (cache.size, open_files(collected=True)) == (0, before)
    many = VolumeCache(10**9)
    for number in range(MOST_VOLUMES + 3):
        many.keep(str(number), Kept(memory(), (1, 1, 1, 1), "", 4))
    assert (open_files(collected=True) - before, many.find("2")) == (MOST_VOLUMES, None)
    many.clear()


def test_frozen_memory_cannot_be_changed_by_anybody() -> None:
    shared, descriptor = share((4,), torch.uint8, "test")
    assert not freeze(descriptor)  # somebody could write still
    assert not is_frozen(descriptor, 4)
    del shared
    assert freeze(descriptor)
    assert is_frozen(descriptor, 4)
    assert not is_frozen(descriptor, 5)
    with pytest.raises(OSError, match="not permitted"):
        os.write(descriptor, b"x")
    os.close(descriptor)
    with Path(os.devnull).open() as no_memory:
        assert not is_frozen(no_memory.fileno(), 0)


# --- equal requests at the same time ---------------------------------------------------------------------------------


def test_equal_requests_at_once_are_computed_once(
    flying: Fleet, pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    flying.bundle.accuracy = report({"a": structure(9, 9, 9)}).model_copy(update={"backend": Backend.EAGER})
    monkeypatch.setattr("nnunet_torchserve.pipeline.is_default", lambda *_: True)  # as if FAST had been measured
    workers = [flying.worker(cache_bytes=0, single_flight=True) for _ in range(3)]
    expected = ask(pipeline("five_folds"))
    assert flying.tally is not None
    flying.tally.take()
    hold_of(flying.runtime).touch()
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(ask, workers[0], request_id="leader")
        wait_for(lambda: flying.level(Level.CASES_IN_FLIGHT) == 1)
        patient = json.dumps(json.loads(FAST) | {"timeout_s": 500})  # which changes nothing in the answer
        followers = [
            pool.submit(ask, worker, options=options, request_id=f"follower {options[-5:]}")
            for worker, options in zip(workers[1:], (FAST, patient), strict=True)
        ]
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == len(followers))
        hold_of(flying.runtime).unlink()
        answers = [each.result() for each in (leader, *followers)]
    assert {answer.body for answer in answers} == {expected.body}
    assert [reused(answer) for answer in answers] == [None, "answer", "answer"]
    assert [stages(answer) for answer in answers[1:]] == [{"decode", "queue"}] * 2
    assert len({answer.headers["X-Nnunet-Request-Id"] for answer in answers}) == len(answers)
    assert {answer.content_type for answer in answers} == {expected.content_type}
    assert [answer.headers["X-Nnunet-Backend"] for answer in answers] == ["eager; dice=1.0000"] * 3
    [line] = [passes for total, passes in flying.tally.take().items() if total is Total.PASSES]
    assert line == passes_of(flying.bundle.lead, FAST)
    wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == 0)


def passes_of(member: Member, options: str) -> int:
    asked = parse_options(options.encode())
    return forward_passes(member, INT16.shape[::-1], settings_for(member, asked))


class Follower:
    """A second worker that reserves under the same key, in a thread, until it has something."""

    def __init__(
        self, flying: Fleet, key: str = KEY, deadline: float | None = None, watcher: Watcher | None = None
    ) -> None:
        self._engine, self._watcher = flying.engine(), watcher
        self.reserved: Future[Reservation] = Future()
        self.go_on = threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(key, deadline))
        self._thread.start()

    def join(self) -> None:
        self.go_on.set()
        self._thread.join(300)
        assert not self._thread.is_alive()

    def _wait(self, key: str, deadline: float | None) -> None:
        try:
            with self._engine.reserve(price(1), deadline, watcher=self._watcher, answer_key=key) as reserved:
                self.reserved.set_result(reserved)
                assert self.go_on.wait(300)
        except Exception as error:  # noqa: BLE001 (it is the answer)
            self.reserved.set_exception(error)


@pytest.fixture
def follow(flying: Fleet) -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def make(**arguments: Any) -> Follower:
        made.append(Follower(flying, **arguments))
        return made[-1]

    yield make
    for follower in made:
        follower.join()


Follow = Callable[..., Follower]
BODY = bytes(range(256)) * 20_000


def test_the_answer_goes_to_all_that_wait_for_it(flying: Fleet, follow: Follow) -> None:
    leader = flying.engine()
    with leader.reserve(price(1), None, answer_key=KEY) as reserved:
        waiting = [follow() for _ in range(3)]
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == len(waiting))
        reserved.share(BODY, "a note")
        for follower in waiting:
            answer = follower.reserved.result(300).answer
            assert answer is not None
            assert (answer.body, answer.note) == (BODY, "a note")
    with leader.reserve(price(1), None, answer_key=KEY) as reserved:  # and nobody's any more
        assert reserved.answer is None
        reserved.share(b"nobody waits", "")
        late = follow()
        assert late.reserved.result(300).answer is None


def test_other_requests_do_not_wait(flying: Fleet, follow: Follow) -> None:
    with flying.engine().reserve(price(1), None, answer_key=KEY):
        assert follow(key=OTHER_KEY).reserved.result(300).answer is None


@pytest.mark.parametrize("ends", ["error", "worker", "engine"])
def test_where_there_is_no_answer_the_next_one_is_computed(flying: Fleet, follow: Follow, ends: str) -> None:
    leader, stack = flying.engine(), ExitStack()
    with stack:
        stack.enter_context(leader.reserve(price(1), None, answer_key=KEY))
        waiting = [follow() for _ in range(2)]
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == len(waiting))
        if ends == "worker":
            leader.disconnect()
        elif ends == "engine":
            flying.kill()
        else:
            stack.close()
        wait_for(lambda: any(follower.reserved.done() for follower in waiting))
        first, second = sorted(waiting, key=lambda follower: not follower.reserved.done())
        reserved = first.reserved.result()
        assert reserved.answer is None
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == 1)
        reserved.share(BODY, "a note")
        answer = second.reserved.result(300).answer
        assert answer is not None
        assert answer.body == BODY


def test_a_leader_whose_engine_died_does_not_wait_for_its_follower(flying: Fleet, follow: Follow) -> None:
    leader, data = flying.engine(), torch.zeros((1, 24, 32, 24))
    with leader.reserve(price(1), None, answer_key=KEY) as reserved:
        follower = follow()
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == 1)
        flying.kill()
        assert follower.reserved.result(300).answer is None  # it came to the new engine first
        leader.predict(data, Settings("3d_fullres", (0,), (), 1.0, use_gaussian=False))
        reserved.share(BODY, "")  # which nobody waits for


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ahead: list[int] = []

    def queued(self, ahead: int) -> None:
        self.ahead.append(ahead)

    def passes(self, done: int) -> None:
        """Nothing is asked of it here."""


def test_a_follower_that_watches_hears_that_it_waits(flying: Fleet, follow: Follow) -> None:
    told = Told()
    with flying.engine().reserve(price(1), None, answer_key=KEY) as reserved:
        follower = follow(watcher=told)
        wait_for(lambda: told.ahead[:1] == [0])
        reserved.share(BODY, "")
        assert follower.reserved.result(300).answer is not None


def test_an_answer_that_could_still_be_changed_is_not_handed_on(
    flying: Fleet, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flying.engine().reserve(price(1), None, answer_key=KEY) as reserved:
        follower = follow()
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == 1)
        monkeypatch.setattr(shared_memory, "freeze", lambda _: True)  # and does not
        reserved.share(BODY, "")
        assert follower.reserved.result(300).answer is None


def test_a_follower_was_accepted_and_is_not_refused_later(flying: Fleet) -> None:
    """There is memory for one case, and one may wait; two followers of a failed one are computed all the same."""
    limits = Limits(memory_bytes=10, waiting_cases=1)
    got: list[str] = []

    def wait(name: str, key: str | None) -> None:
        engine = flying.engine(limits=limits)
        with engine.reserve(price(10), None, answer_key=key):
            got.append(name)

    with ThreadPoolExecutor(3) as pool, ExitStack() as leading:
        leader = flying.engine(limits=limits)
        leading.enter_context(leader.reserve(price(10), None, answer_key=KEY))
        followers = [pool.submit(wait, "follower", KEY) for _ in range(2)]
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == len(followers))
        late = pool.submit(wait, "late", None)
        wait_for(lambda: flying.level(Level.CASES_WAITING) == 1)
        leading.close()
        for each in (*followers, late):
            each.result(300)
    assert got[0] == "follower"  # it came before the late one
    assert sorted(got) == ["follower", "follower", "late"]


def test_sharing_holds_nobody_up_when_the_engine_hangs(fleet: Fleet) -> None:
    engine = fleet.engine()
    with engine.reserve(price(1), None, answer_key=KEY) as reserved:
        [process] = engine_processes(fleet.runtime)
        process.suspend()
        began = time.monotonic()
        reserved.share(BODY, "")
        assert time.monotonic() - began < remote.SILENCE_S
        process.resume()
    with engine.reserve(price(1), None):
        assert engine_processes(fleet.runtime) == [process]  # which was not killed for it


def test_a_follower_has_its_own_deadline(flying: Fleet, follow: Follow) -> None:
    with flying.engine().reserve(price(1), None, answer_key=KEY) as reserved:
        hasty = follow(deadline=time.monotonic() + 0.2)
        with pytest.raises(Deadline):
            hasty.reserved.result(300)
        wait_for(lambda: flying.level(Level.CASES_FOLLOWING) == 0)
        reserved.share(BODY, "")


def test_flights() -> None:
    flights = Flights()
    assert [flights.join("a", 1), flights.join("a", 2), flights.join("a", 3), flights.join("b", 4)] == [0, 1, 1, 0]
    assert (flights.followers(1), flights.followers(2), flights.followers(9), flights.waiting) == (2, 0, 0, 2)
    assert flights.leave(1) == 2
    assert flights.leave(2) == 3
    assert flights.followers(3) == 0  # and nobody may join it now
    assert flights.join("a", 5) is False
    assert flights.join("a", 6)
    assert flights.leave(6) is None
    assert flights.join("a", 7)
    assert flights.land(6) == []
    assert flights.land(5) == [7]
    assert [flights.leave(case) for case in (3, 4, 5, 7)] == [None] * 4
    assert flights.waiting == 0
    assert not flights.join("c", 8, may_wait=False)  # computed, and others wait for it
    assert not flights.join("c", 9, may_wait=False)  # computed by itself
    assert (flights.join("c", 10), flights.land(9), flights.land(8)) == (True, [], [10])
