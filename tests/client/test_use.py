"""What cannot be meant is refused before anything is sent."""

from __future__ import annotations

import io
import json
import pickle
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nnunet_torchserve_client import Case, Client, RemotePredictor, errors
from nnunet_torchserve_client.answers import Answer
from nnunet_torchserve_client.client import URL_VARIABLE
from nnunet_torchserve_client.stopping import Stop
from support import peer
from support.peer import Peer, Received, Wire

URL = "http://127.0.0.1:1"


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (("127.0.0.1:8080", "m"), {}),
        (("ftp://host", "m"), {}),
        (("http://", "m"), {}),
        (("http://host/?a=b", "m"), {}),
        (("http://host..example", "m"), {}),
        (("http://host:99999", "m"), {}),
        (("http://host/predictions/m", "m"), {}),
        (([], "m"), {}),
        ((URL, ""), {}),
        ((URL, "a/b"), {}),
        ((URL, "a#b"), {}),
        ((URL, "a?b"), {}),
        ((URL, ".."), {}),
        ((URL, "a%2Fb"), {}),
        ((URL, "köpfe"), {}),
        ((URL, "m\n"), {}),
        ((URL, "m", ""), {}),
        ((URL, "m", "."), {}),
        ((URL, "m", "1 0"), {}),
        ((URL, "m"), {"deadline_s": 0}),
        ((URL, "m"), {"deadline_s": float("inf")}),
        ((URL, "m"), {"silence_s": float("nan")}),
        ((URL, "m"), {"headers": {"Content-Length": "3"}}),
        ((URL, "m"), {"headers": {"x-request-id": "3"}}),
    ],
)
def test_a_client_that_cannot_be_meant(arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    with pytest.raises(errors.WrongUse):
        Client(*arguments, **settings)


def test_the_environment_says_where_the_servers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, "http://a:8080, https://b/path/ http://a:8080/")
    assert Client(None, "m").urls == ["http://a:8080", "https://b/path"]
    monkeypatch.delenv(URL_VARIABLE)
    with pytest.raises(errors.WrongUse, match=URL_VARIABLE):
        Client(None, "m")


@pytest.mark.parametrize("options", [{"spacing": [float("nan")]}, {"folds": {1}}, {"spacing": [1.0] * 2000}])
def test_options_that_no_header_can_hold(options: dict[str, object], server: Peer) -> None:
    with Client(server.url, "blobs") as client, pytest.raises(errors.WrongUse, match="options"):
        client.predict(Case("head", b"image"), options)
    assert not server.received


def test_numbers_of_numpy_are_numbers(server: Peer) -> None:
    with Client(server.url, "blobs") as client:
        numbers = {"folds": [np.int64(1)], "spacing": np.array([1.5, 2.0]), "timeout_s": np.float32(2.5)}
        client.predict(Case("head", b"image"), numbers)
        client.predict(Case("head", b"image"), {"timeout_s": "2.5"})
    first, second = (received.options for received in server.received)
    assert (first["folds"], first["spacing"], first["timeout_s"]) == ([1], [1.5, 2.0], 2.5)
    assert second["timeout_s"] == "2.5", "which the server refuses"


def test_folds_and_use_folds_are_one_option_and_the_last_choice_holds(server: Peer) -> None:
    image, properties = np.zeros((1, 2, 2, 2), np.uint8), {"spacing": [1.0, 1.0, 1.0]}
    with pytest.raises(errors.WrongUse, match="folds"):
        RemotePredictor(server.url, "blobs", use_folds=0, folds=[1])
    with RemotePredictor(server.url, "blobs", folds=[1]) as predictor:
        assert predictor.use_folds == (1,)
        predictor.use_folds = (0,)  # as initialize_from_trained_model_folder does
        with pytest.raises(errors.BadAnswer):  # an echo is no npz
            predictor.predict_single_npy_array(image, properties)
    assert [request.options["folds"] for request in server.received] == [[0]]


def test_nothing_goes_on_once_a_call_has_raised(server: Peer) -> None:
    """One case is held; the other one's error is of all cases."""
    held, never = threading.Event(), threading.Event()

    def hold(wire: Wire, _: Received) -> None:
        wire.head()
        wire.event(event="heartbeat")
        held.set()
        never.wait(60)

    def refuse(wire: Wire, received: Received) -> None:
        held.wait(60)
        peer.plain(404)(wire, received)

    server.replies = [hold, refuse]
    item = {"data": np.zeros((1, 2, 2, 2), np.uint8), "data_properties": {"spacing": [1.0, 1.0, 1.0]}, "ofile": None}
    with RemotePredictor(server.url, "blobs") as predictor:
        with pytest.raises(errors.UnknownModel):
            predictor.predict_from_data_iterator([item, item])
        assert not [each for each in threading.enumerate() if each.name.startswith("case-")]
    never.set()


def test_a_client_that_is_closed_just_before_it_sends_gives_the_case_up(server: Peer) -> None:
    class Closing:
        """Is asked for its numbers when the request is made."""

        def tolist(self) -> list[int]:
            client.close()
            return [0]

    client = Client(server.url, "blobs")
    client.describe()
    with pytest.raises(errors.Cancelled):
        client.predict(Case("head", b"image"), {"folds": Closing()})
    assert not server.received


def test_a_version_is_part_of_the_path_and_a_proxys_path_comes_first(server: Peer) -> None:
    with Client(f"{server.url}/behind/a/proxy/", "blobs", "2.0") as client:
        client.predict(Case("head", b"image"))
    assert server.paths == ["/behind/a/proxy/predictions/blobs/2.0"] * 2


def test_errors_come_whole_from_another_process(server: Peer) -> None:
    server.replies = [peer.problem(422, "too_thin")]
    with Client(server.url, "blobs") as client, pytest.raises(errors.TooThin) as caught:
        client.predict(Case("head", b"image"))
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (our own)
    assert (str(copy), copy.case, copy.status) == (str(caught.value), "head", 422)
    several = pickle.loads(pickle.dumps(errors.CasesFailed([caught.value], [None, 1])))  # noqa: S301
    assert (str(several.failures[0]), several.results) == (str(caught.value), [None, 1])


def test_an_answer_that_is_no_description(server: Peer) -> None:
    for description in ({}, {"served": [1]}):
        server.description = description
        with Client(server.url, "blobs") as client, pytest.raises(errors.BadAnswer, match="no description"):
            client.describe()


@pytest.mark.parametrize(
    ("place", "values"),
    [(30 + len("labels.nii"), b"\xff\xff"), (8, b"\x01"), (10, b"\x63")],
    ids=["the stream", "encrypted", "packed in an unknown way"],
)
def test_a_damaged_zip_is_a_bad_answer(place: int, values: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.nii", bytes(range(256)) * 9)
    damaged = bytearray(file.getvalue())
    start = 0 if place > 10 else damaged.index(b"PK\x01\x02")  # the file's own head, or the directory
    damaged[start + place : start + place + len(values)] = values
    answer = Answer("head", bytes(damaged), "application/zip", {}, "id", URL)
    with pytest.raises(errors.BadAnswer, match="damaged"):
        answer.parts()
    with pytest.raises(errors.BadAnswer, match="damaged"):
        answer.arrays()


@pytest.mark.parametrize(
    ("header", "backend", "dice"),
    [
        (None, None, None),
        ("eager", None, None),
        ("openvino:float32", "openvino:float32", None),
        ("openvino:bf16; dice=0.9989", "openvino:bf16", 0.9989),
        ("openvino:int8; dice=0.9989; images=calibration", "openvino:int8", 0.9989),
        ("openvino:bf16; dice=many", "openvino:bf16", None),
        ("eager, openvino:float32", "eager, openvino:float32", None),
    ],
)
def test_what_ran_the_network_is_told_apart_from_what_was_measured_of_it(
    header: str | None, backend: str | None, dice: float | None
) -> None:
    headers = {} if header is None else {"x-nnunet-backend": header}
    answer = Answer("head", b"", "application/gzip", headers, "id", URL)
    assert (answer.other_backend, answer.measured_dice) == (backend, dice)


def test_times_are_numbers_whatever_comes() -> None:
    headers = {"server-timing": "decode;dur=5, network;dur=1.25.3, reused;desc=volume"}
    answer = Answer("head", b"", "application/gzip", headers, "id", URL)
    assert answer.timing == {"decode": 0.005, "network": 0.00125}


def test_a_caller_that_waits_for_anothers_description_may_give_up(server: Peer) -> None:
    asked, never, stop = threading.Event(), threading.Event(), Stop()

    def describe(wire: Wire, _: Received) -> None:
        asked.set()
        never.wait(60)
        wire.whole(200, json.dumps(peer.DESCRIPTION).encode(), {"Content-Type": "application/json"})

    server.description, server.replies = None, [describe]
    caught: list[BaseException] = []

    def wait(client: Client) -> None:
        try:
            client.describe(stop=stop)
        except errors.ClientError as error:
            caught.append(error)

    with Client(server.url, "blobs") as client:
        first = threading.Thread(target=client.describe)
        first.start()
        assert asked.wait(60)
        second = threading.Thread(target=wait, args=(client,))
        second.start()
        stop.set()
        second.join(120)
        assert [type(error) for error in caught] == [errors.Cancelled]
        never.set()
        first.join(60)
