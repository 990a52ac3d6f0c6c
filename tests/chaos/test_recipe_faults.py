"""Faults between two members of a recipe, on a real TorchServe: each request has its answer, and nothing is kept."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.engine.faults import Hold
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.chaos import HOLD, PATIENCE_S, Case, ChaosServer, family, serving, shared_memory, wait_for
from support.events import Reading, Stream
from support.metrics import scrape
from support.odd_models import OddModel
from support.own_grid import own_code, write

pytestmark = [
    pytest.mark.serve,
    pytest.mark.long,  # tests/handler has what they rest on: engine processes, admission, members
    pytest.mark.filterwarnings("ignore:.* goes into the archive as code", "ignore:.torch.jit:FutureWarning"),
]

IMAGE = Case((24, 26, 20), 3)
GROWTH = 2
CASCADE, ENSEMBLE, OWN = "cascade/1.0", "ensemble/1.0", "own/1.0"
ALL = (CASCADE, ENSEMBLE, OWN)
LAST = "3d_cascade_fullres"
LAST_GRID = (4, 20, 26, 24)
"""(C, z, y, x): the image, and three labels of the first stage."""

OWN_GRID = (1, 20 * GROWTH, 26 * GROWTH, 24 * GROWTH)
HELD_S, TIME_S = 5.0, 30
"""While cases are held, each of the dozen passes of a second stage takes so long: more than that time in all."""

WORKERS = {CASCADE: 2, ENSEMBLE: 1, OWN: 2}
GAUGES = ("nnunet_cases_in_flight", "nnunet_cases_waiting", "nnunet_charged_bytes", "nnunet_passes_waiting")
WORKER_DIED = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade, an ensemble of which it is a part, and somebody's own model with memory for less than two cases."""
    home, store = tmp_path_factory.mktemp("recipe_models"), tmp_path_factory.mktemp("recipe_store")
    flat, lowres = OddModel(2), OddModel(named="3d_lowres", spacing=3.0)
    folders = [model.write(home) for model in (flat, lowres, OddModel(named=LAST, previous_stage="3d_lowres"))]
    make_archives(ArchiveRequest(folders[2], store, name="cascade", previous_stages=(folders[1],)))
    ensemble = {"others": (folders[2],), "previous_stages": (folders[1],)}
    make_archives(ArchiveRequest(folders[0], store, name="ensemble", **ensemble))  # type: ignore[arg-type]
    file = own_code(home / "own", GROWTH)
    own = write(OddModel(), home / "of_own", file)
    [archive] = make_archives(ArchiveRequest(own, store, name="own", trainer_files=(file,)))
    zipfile.ZipFile(archive).extractall(home / "unpacked")
    member = ModelBundle(home / "unpacked").lead
    geometry = open_image(IMAGE.body, Limits(), member.reader).geometry
    _, z, y, x = OWN_GRID
    guessed, known = (
        price(member, geometry, 1, settings_for(member, Options()), Options(), grid).bytes for grid in (None, (z, y, x))
    )
    assert guessed < known
    between = known + (guessed + known) // 2  # one case as it is and another as it is guessed, but not two as they are
    tight = ServingSettings(limits={"memory_bytes": between})
    make_archives(ArchiveRequest(own, store, name="own", trainer_files=(file,), serving=tight))
    return store


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosServer]:
    folder = tmp_path_factory.mktemp("recipe_faults")
    held = [Hold(shape=shape, pass_s=HELD_S, while_exists=folder / HOLD) for shape in (LAST_GRID, OWN_GRID)]
    with serving(store, folder, held, workers=max(WORKERS.values())) as server:
        for model, workers in WORKERS.items():
            server.scale(model, workers)
        yield server


@pytest.fixture(scope="module")
def alone(server: ChaosServer) -> dict[str, bytes]:
    """Model -> its answer to a request that has the server for itself."""
    answers = {model: server.live.predict(model, IMAGE.body) for model in ALL}
    assert {answer.status_code for answer in answers.values()} == {HTTPStatus.OK}
    return {model: answer.content for model, answer in answers.items()}


@pytest.fixture(autouse=True)
def nothing_is_kept(server: ChaosServer, alone: dict[str, bytes]) -> Iterator[None]:
    """After each test every model answers as before, and nobody holds anything: no memory, no slot, no gauge."""
    yield
    for model in ALL:
        server.wait_ready(model, WORKERS[model])
        answer = server.live.predict(model, IMAGE.body)
        assert answer.status_code == HTTPStatus.OK, answer.text
        assert answer.content == alone[model]
    wait_for(lambda: not any(server.engine(model).reserved_bytes or server.engine(model).cases for model in ALL))
    wait_for(lambda: not nonzero_gauges(server))
    wait_for(lambda: not shared_memory(family(server.runtime), "volume"))


def nonzero_gauges(server: ChaosServer) -> dict[str, float]:
    """Those that say that a case is there."""
    scraped = scrape(server.live.server.metrics_url)
    return {name: value for name in GAUGES if (value := scraped.value(name)) != 0}


def cases_in_flight(server: ChaosServer) -> float:
    """Of the model of somebody's own."""
    return scrape(server.live.server.metrics_url).value("nnunet_cases_in_flight", model_name="own")


@contextmanager
def reading(server: ChaosServer, model: str, **options: object) -> Iterator[Reading]:
    """A request whose events are read one by one."""
    url = f"{server.live.server.inference_url}/predictions/{model}"
    headers = {"X-Nnunet-Options": json.dumps({"stream": True} | options)}
    with (
        httpx.Client(timeout=PATIENCE_S, trust_env=False) as client,
        client.stream("POST", url, content=IMAGE.body, headers=headers) as response,
    ):
        assert response.status_code == HTTPStatus.OK
        yield Reading(response)


def reach_last_stage(stream: Reading) -> None:
    """Read on until the second stage's passes are asked for."""
    stream.until(lambda event: (event.get("stage"), event.get("member")) == ("network", LAST))


def labels(body: bytes) -> npt.NDArray[np.integer]:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj)


def assert_answered(stream: Stream, expected: bytes) -> None:
    assert stream.last["event"] == "result", stream.last
    np.testing.assert_array_equal(labels(stream.result), labels(expected))


@pytest.mark.parametrize("model", [CASCADE, ENSEMBLE])
def test_an_engine_killed_in_the_second_stage_costs_only_time(
    model: str, server: ChaosServer, alone: dict[str, bytes]
) -> None:
    """The first stage is not predicted again: its labels are the worker's."""
    with reading(server, model) as stream:
        with server.held():
            reach_last_stage(stream)
            wait_for(lambda: server.engine(model).cases == 1)
            server.engine(model).kill()
        rest = stream.rest()
    assert_answered(rest, alone[model])
    assert not [event for event in rest.events if event.get("member") == "3d_lowres"]


def test_a_worker_killed_in_the_second_stage_costs_one_request(server: ChaosServer, alone: dict[str, bytes]) -> None:
    """The first has more passes left than the second in all, so that the second reaches its last stage beside it."""
    finely = {"tile_step_size": 0.2}
    fine = server.live.predict(CASCADE, IMAGE.body, options=json.dumps(finely))
    assert fine.status_code == HTTPStatus.OK, fine.text
    with server.held(), reading(server, CASCADE, **finely) as first, reading(server, CASCADE) as second:
        reach_last_stage(first)
        reach_last_stage(second)
        psutil.Process(next(iter(server.workers(CASCADE)))).kill()
        with ThreadPoolExecutor(2) as pool:
            rests = [pool.submit(each.rest) for each in (first, second)]
            wait_for(lambda: any(rest.done() for rest in rests))
            (server.runtime.with_name(HOLD)).unlink()
            ends = [rest.exception(PATIENCE_S) for rest in rests]
        (server.runtime.with_name(HOLD)).touch()
    [died] = [end for end in ends if end is not None]
    assert isinstance(died, httpx.TransportError | AssertionError)
    expected = (fine.content, alone[CASCADE])
    [answered] = [(rest.result(), body) for rest, body, end in zip(rests, expected, ends, strict=True) if end is None]
    assert_answered(*answered)


def test_a_client_that_leaves_in_the_second_stage_leaves_nothing_behind(server: ChaosServer) -> None:
    with server.held():
        with reading(server, CASCADE) as stream:
            reach_last_stage(stream)
        impatient = httpx.Client(timeout=httpx.Timeout(PATIENCE_S, read=0.5), trust_env=False)
        with impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(f"{server.live.server.inference_url}/predictions/{CASCADE}", content=IMAGE.body)


def test_a_deadline_in_the_second_stage_is_one(server: ChaosServer) -> None:
    """The first stage's passes are made, and the second's would take for as long as they are held."""
    with server.held():
        with reading(server, CASCADE, timeout_s=TIME_S) as stream:
            rest = stream.rest()
        assert (rest.last["event"], rest.last["status"], rest.last["code"]) == ("error", 504, "deadline")
        assert any(event.get("member") == LAST for event in rest.events), rest.events
        plain = server.live.predict(ENSEMBLE, IMAGE.body, options=json.dumps({"timeout_s": TIME_S}))
        assert (plain.status_code, plain.json()["code"]) == (504, "deadline")
        wait_for(lambda: not server.engine(CASCADE).reserved_bytes and not server.engine(CASCADE).cases)


def test_an_engine_killed_while_cases_wait_for_more_memory_costs_only_time(
    server: ChaosServer, alone: dict[str, bytes]
) -> None:
    """Each case of the model takes more than its header tells, and its memory holds one at a time."""
    with ThreadPoolExecutor(4) as pool:
        with server.held():
            pending = [pool.submit(server.live.predict, OWN, IMAGE.body) for _ in range(4)]
            wait_for(lambda: server.engine(OWN).cases == 1)
            wait_for(lambda: cases_in_flight(server) == WORKERS[OWN])
            engine = server.engine(OWN)
            engine.kill()
        answers = [each.result(PATIENCE_S) for each in pending]
    for answer in answers:
        assert answer.status_code == HTTPStatus.OK, answer.text
        assert answer.content == alone[OWN]


def test_everything_at_once_is_answered_and_right(server: ChaosServer, alone: dict[str, bytes]) -> None:
    """All models together, wrong requests between right ones, clients that leave, and kills of engines and workers."""
    wrong = {"folds": [7]}
    with ThreadPoolExecutor(12) as pool:
        sent = [(model, pool.submit(server.live.predict, model, IMAGE.body)) for model in ALL * 2]
        refused = [pool.submit(server.live.predict, model, IMAGE.body, options=json.dumps(wrong)) for model in ALL]
        for model in ALL:
            with suppress(httpx.TimeoutException), httpx.Client(timeout=0.3, trust_env=False) as impatient:
                impatient.post(f"{server.live.server.inference_url}/predictions/{model}", content=IMAGE.body)
            with suppress(psutil.NoSuchProcess, ValueError):
                server.engine(model).kill()
        psutil.Process(next(iter(server.workers(ENSEMBLE)))).kill()
        answers = [(model, each.result(PATIENCE_S)) for model, each in sent]
    for model, answer in answers:
        if answer.status_code != HTTPStatus.OK:
            assert answer.status_code in WORKER_DIED, answer.text
            assert answer.json()["message"] == "Worker died."
        else:
            assert answer.content == alone[model]
    assert sum(answer.status_code != HTTPStatus.OK for _, answer in answers) <= 1
    for each in refused:
        answer = each.result(PATIENCE_S)
        assert answer.status_code in (HTTPStatus.UNPROCESSABLE_ENTITY, *WORKER_DIED), answer.text
