"""``stream: true`` on a real TorchServe: what a client sees, and that nobody else sees anything of it."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from http import HTTPStatus
from http.client import HTTPResponse
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.responses import EVENTS
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support import volumes
from support.bad_requests import BAD_REQUESTS
from support.chaos import PATIENCE_S, Case, ChaosServer, Clients, clients_of, serving, wait_for
from support.events import Event, Reading, Stream, assert_complete, read_stream

pytestmark = pytest.mark.serve


class Finely(Case):
    """A case of small voxels."""

    @cached_property
    def body(self) -> bytes:
        image = np.arange(math.prod(self.shape), dtype=np.int16).reshape(self.shape)
        return volumes.nifti_gz(image, np.diag([0.5, 0.5, 0.5, 1.0]))


WORKERS = 2
MODEL, TIGHT = "blobs", "tight"
CASES = [Case((40, 44, 36), seed, '{"use_mirroring": false}') for seed in range(3)]
LONG = Case((44, 44, 36), 7, '{"use_mirroring": false, "tile_step_size": 0.4}')
"""It can be held, and its two dozen passes take longer than news of them wait."""

LEAVING = [LONG, Case(LONG.shape, 8, '{"use_mirroring": false, "tile_step_size": 0.5}')]
"""One for each worker. The second has half the passes, so that it does not wait for those of the first while both are
held."""

LARGE = Finely(
    (160, 150, 140),
    0,
    '{"use_mirroring": false, "tile_step_size": 1, "save_probabilities": true, "probability_format": "nii"}',
)
"""Its answer is much larger than any buffer of a socket, but needs few passes."""

LARGE_BYTES = 50 * 1024**2

IGNORES_S = [1.0, pytest.param(15.0, marks=pytest.mark.long)]
"""For so long the slow reader reads nothing."""

REFUSED = ["not an image", "a NaN voxel", "zero spacing", "too thin", "unknown option", "unknown fold", "no time"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream_store")


@pytest.fixture(scope="module")
def server(
    store: Path,
    models: dict[str, Path],
    unpacked: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ChaosServer]:
    state, member = tmp_path_factory.mktemp("stream"), ModelBundle(unpacked("five_folds")).lead
    make_archives(ArchiveRequest(models["five_folds"], store, folds=(0,), name=MODEL))
    faults = [LONG.held(member, state), LONG.slow(member, pass_s=0.05)]
    with serving(store, state, faults, models=[f"{MODEL}.mar"], workers=WORKERS) as server:
        yield server


@pytest.fixture(scope="module")
def clients(server: ChaosServer) -> Iterator[Clients]:
    with clients_of(server) as clients:
        yield clients


def streamed(case: Case, **more: object) -> str:
    return json.dumps(json.loads(case.options) | {"stream": True} | more)


def ask(server: ChaosServer, case: Case, model: str = MODEL, **more: object) -> Stream:
    answer = server.live.predict(model, case.body, options=streamed(case, **more))
    assert (answer.status_code, answer.headers["content-type"]) == (HTTPStatus.OK, EVENTS), answer.text
    return read_stream(answer.content)


@contextmanager
def reading(server: ChaosServer, case: Case, model: str = MODEL, **more: object) -> Iterator[Reading]:
    url = f"{server.live.server.inference_url}/predictions/{model}"
    headers = {"X-Nnunet-Options": streamed(case, **more)}
    with (
        httpx.Client(timeout=PATIENCE_S, trust_env=False) as client,
        client.stream("POST", url, content=case.body, headers=headers) as response,
    ):
        yield Reading(response)


def works(event: Event) -> bool:
    """The network has begun."""
    return event.get("stage") == "network" and event["done"] > 0


def test_the_result_is_the_plain_answer_to_the_byte(server: ChaosServer, clients: Clients) -> None:
    for case in CASES:
        stream = ask(server, case)
        assert_complete(stream)
        assert stream.result == clients.alone(case, MODEL)


def test_the_head_and_the_last_event_carry_what_headers_carry(server: ChaosServer) -> None:
    case = CASES[0]
    answer = server.live.predict(MODEL, case.body, options=streamed(case), headers={"X-Request-Id": "study-9"})
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.headers["x-nnunet-request-id"] == "study-9"
    assert answer.headers["x-nnunet-model"].startswith("name=blobs;")
    assert answer.headers["x-accel-buffering"] == "no"
    last = read_stream(answer.content).last
    assert last["content_type"] == "application/gzip"
    assert last["headers"]["X-Nnunet-Model"] == answer.headers["x-nnunet-model"]
    assert last["headers"]["X-Nnunet-Request-Id"] == "study-9"
    assert re.findall(r"(\w+);dur=[\d.]+", last["headers"]["Server-Timing"])[0] == "decode"
    assert server.live.logs("study-9")


def test_events_come_while_the_case_is_worked_on(server: ChaosServer) -> None:
    with ExitStack() as until_the_end:
        with server.held():
            stream = until_the_end.enter_context(reading(server, LONG))
            event = stream.until(works)
            assert event["done"] < event["total"]
            wait_for(lambda: server.engine(f"{MODEL}/1.0").cases == 1)  # those before it are let go of a little later
        rest = stream.rest()
    done = [each["done"] for each in rest.of("progress", "network")]
    assert done == sorted(done)
    assert len(done) > 1


def test_a_connection_is_kept_and_used_again(server: ChaosServer, clients: Clients) -> None:
    url = f"{server.live.server.inference_url}/predictions/{MODEL}"
    case, ports = CASES[0], set()
    with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
        for options in (streamed(case), case.options, streamed(case)):
            answer = client.post(url, content=case.body, headers={"X-Nnunet-Options": options})
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr")[1])
            body = read_stream(answer.content).result if "stream" in options else answer.content
            assert body == clients.alone(case, MODEL)
    assert len(ports) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_is_a_plain_problem(name: str, server: ChaosServer) -> None:
    bad = BAD_REQUESTS[name]
    options = json.dumps(json.loads(bad.options or "{}") | {"stream": True})
    answer = server.live.predict(MODEL, bad.body, options=options)
    assert (answer.status_code, answer.json()["code"]) == (bad.status, bad.code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_large_result_arrives_whole(server: ChaosServer, clients: Clients) -> None:
    stream = ask(server, LARGE)
    assert_complete(stream)
    assert len(stream.result) > LARGE_BYTES
    assert stream.result == clients.alone(LARGE, MODEL)


def test_streams_of_several_cases_at_once_are_each_their_own(server: ChaosServer, clients: Clients) -> None:
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(ask, server, case) for case in CASES]
        plain = clients.send(CASES[0], MODEL)
        for case, each in zip(CASES, pending, strict=True):
            stream = each.result(PATIENCE_S)
            assert_complete(stream)
            assert stream.result == clients.alone(case, MODEL)
        assert plain.result(PATIENCE_S).content == clients.alone(CASES[0], MODEL)


@pytest.mark.long  # tests/handler/test_events.py has it without TorchServe
def test_a_case_that_waits_for_memory_is_told_so(
    server: ChaosServer, clients: Clients, store: Path, models: dict[str, Path], unpacked: Callable[[str], Path]
) -> None:
    """Of a model that has the memory of one case."""
    member = ModelBundle(unpacked("five_folds")).lead
    options = parse_options(LONG.options.encode())
    image = open_image(LONG.body, Limits(), member.reader)
    memory = int(1.5 * price(member, image.geometry, 1, settings_for(member, options), options).bytes)
    serving = ServingSettings(limits={"memory_bytes": memory, "waiting_cases": 2})
    make_archives(ArchiveRequest(models["five_folds"], store, folds=(0,), name=TIGHT, serving=serving))
    server.register(f"{TIGHT}.mar", WORKERS)
    with ExitStack() as until_the_end:
        with server.held():
            first = until_the_end.enter_context(reading(server, LONG, TIGHT))
            first.until(works)
            second = until_the_end.enter_context(reading(server, LONG, TIGHT))
            assert second.until(lambda _: True) == {"event": "queued", "position": 0}
        assert first.rest().result == clients.alone(LONG, MODEL)
        rest = second.rest()
    assert rest.kinds()[-4:] == ["preprocess", "network", "export", "result"]
    assert rest.result == clients.alone(LONG, MODEL)


def test_a_deadline_in_the_midst_is_the_last_event(server: ChaosServer) -> None:
    """It is longer where it has passed before the stream began, on a machine that does much else."""
    workers, times_s = server.workers(MODEL), iter((1.5, 5.0, 15.0))
    with server.held():
        while (
            answer := server.live.predict(MODEL, LONG.body, options=streamed(LONG, timeout_s=next(times_s)))
        ).status_code == HTTPStatus.GATEWAY_TIMEOUT:
            pass
    assert (answer.status_code, answer.headers["content-type"]) == (HTTPStatus.OK, EVENTS), answer.text
    stream = read_stream(answer.content)
    assert (stream.last["event"], stream.last["status"], stream.last["code"]) == ("error", 504, "deadline")
    assert server.workers(MODEL) == workers
    assert ask(server, CASES[0]).last["event"] == "result"


def test_an_engine_killed_in_the_midst_costs_only_time(server: ChaosServer, clients: Clients) -> None:
    expected = clients.alone(LONG, MODEL)
    with ExitStack() as until_the_end:
        with server.held():
            stream = until_the_end.enter_context(reading(server, LONG))
            stream.until(works)
            server.engine(f"{MODEL}/1.0").kill()
        rest = stream.rest()
    done = [event["done"] for event in rest.of("progress", "network")]
    assert 0 in done
    assert done[-1] == rest.of("progress", "network")[0]["total"]
    assert rest.result == expected


@pytest.mark.long
def test_a_worker_killed_in_the_midst_ends_the_stream_without_a_last_event(server: ChaosServer) -> None:
    """A client takes that for what it is: chunked transfer has an end of its own, and it is missing."""
    with server.held(), reading(server, LONG) as stream:
        stream.until(works)
        before = set(server.workers(MODEL))
        for pid in before:
            psutil.Process(pid).kill()
        with pytest.raises(httpx.TransportError):
            stream.rest()
    server.wait_ready(MODEL, WORKERS, without=list(before))


@pytest.mark.parametrize("ignores_s", IGNORES_S)
def test_clients_that_do_not_read_or_leave_hold_up_nobody(
    ignores_s: float, server: ChaosServer, clients: Clients
) -> None:
    """Neither its worker, which has the next case long before the client reads on."""
    url = httpx.URL(server.live.server.inference_url)
    options = streamed(LARGE)
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(LARGE.body)}\r\n"
    workers = server.workers(MODEL)
    assert len(workers) == len(LEAVING)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)  # with less, a packet of loopback stalls
        slow.settimeout(PATIENCE_S)
        slow.connect((url.host, url.port or 80))
        slow.sendall(f"{head}X-Nnunet-Options: {options}\r\n\r\n".encode() + LARGE.body)
        with server.held():
            for case in LEAVING:
                with reading(server, case) as leaving:
                    leaving.until(works)
        began, answered = time.monotonic(), 0
        while answered <= WORKERS or time.monotonic() - began < ignores_s:
            with ThreadPoolExecutor(WORKERS) as pool:  # as many as there are workers
                for each in [pool.submit(ask, server, CASES[0]) for _ in range(WORKERS)]:
                    assert each.result(PATIENCE_S).result == clients.alone(CASES[0], MODEL)
                    answered += 1
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # it reads on, and as fast as it can
        body = _read_chunked(slow)
    stream = read_stream(body)
    assert_complete(stream)
    assert len(stream.result) > LARGE_BYTES
    wait_for(lambda: server.engine(f"{MODEL}/1.0").cases == 0)
    assert server.workers(MODEL) == workers


def _read_chunked(connection: socket.socket) -> bytes:
    """The body of a chunked answer; it must have its end."""
    answer = HTTPResponse(connection)
    answer.begin()
    with answer:
        assert answer.chunked
        return answer.read()
