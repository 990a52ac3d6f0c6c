"""TorchServe's gRPC inference API: the same answers as over HTTP, and a problem is never a mask.

gRPC has neither headers nor a status of ours, so that a wrong step there would be silent. The service's definition is
TorchServe's own, taken from its installed jar.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import pytest

from support import volumes
from support.bad_requests import BAD_REQUESTS, FAST, GOOD, IMAGE
from support.server import LiveServer

grpc: Any = pytest.importorskip("grpc")
protoc: Any = pytest.importorskip("grpc_tools.protoc")

pytestmark = pytest.mark.serve

SLOW = b'{"folds": [0], "tile_step_size": 0.2}'
CODES = {
    400: "INVALID_ARGUMENT",
    413: "RESOURCE_EXHAUSTED",
    415: "FAILED_PRECONDITION",
    422: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    504: "DEADLINE_EXCEEDED",
}
"""HTTP status -> TorchServe's gRPC code for it."""

PROTOS = ("inference.proto", "google/rpc/status.proto")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The compiled messages and client of TorchServe's inference.proto."""
    torchserve = importlib.util.find_spec("ts")  # importing it leaves a file open
    assert torchserve is not None
    assert torchserve.origin is not None
    folder = tmp_path_factory.mktemp("proto")
    with zipfile.ZipFile(Path(torchserve.origin).parent / "frontend" / "model-server.jar") as jar:
        for proto in PROTOS:
            jar.extract(proto, folder)
    well_known = Path(protoc.__file__).parent / "_proto"
    where = [
        f"--proto_path={folder}",
        f"--proto_path={well_known}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
    ]
    assert protoc.main(["protoc", *where, *PROTOS]) == 0
    sys.path.append(str(folder))
    yield importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")
    sys.path.remove(str(folder))


class Client:
    """A gRPC client of a live server."""

    def __init__(self, live: LiveServer, service: tuple[Any, Any], largest_answer: int = -1) -> None:
        config = (live.state_dir / "config.properties").read_text()
        [port] = re.findall(r"^grpc_inference_port=(\d+)$", config, re.MULTILINE)
        self.messages, client = service
        options = [
            ("grpc.max_receive_message_length", largest_answer),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),  # else channels with equal options share a connection
        ]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.stub = client.InferenceAPIsServiceStub(self.channel)

    def request(self, model: str, parts: dict[str, bytes], version: str = "", sequence: str | None = None) -> Any:
        return self.messages.PredictionsRequest(
            model_name=model, input=parts, model_version=version, sequence_id=sequence
        )

    def predict(self, model: str, parts: dict[str, bytes], timeout: float = 300, version: str = "") -> bytes:
        answer: bytes = self.stub.Predictions(self.request(model, parts, version), timeout=timeout).prediction
        return answer

    def problem(self, model: str, parts: dict[str, bytes], version: str = "") -> tuple[str, str]:
        """The status code's name and the details of a request that must fail."""
        with pytest.raises(grpc.RpcError) as failed:
            self.predict(model, parts, version=version)
        return failed.value.code().name, failed.value.details()


@pytest.fixture
def client(server: LiveServer, service: tuple[Any, Any]) -> Iterator[Client]:
    client = Client(server, service)
    yield client
    client.channel.close()


def problem_document(details: str) -> dict[str, Any]:
    """The problem is the first line; TorchServe appends the name of a class of its own."""
    document: dict[str, Any] = json.loads(details.partition("\n")[0])
    return document


@pytest.mark.parametrize("field", ["body", "image", "image_0000"])
def test_a_mask_is_the_same_bytes_as_over_http(field: str, server: LiveServer, client: Client) -> None:
    over_http = server.predict("five_folds", GOOD, options=FAST)
    assert over_http.status_code == 200
    assert client.predict("five_folds", {field: GOOD, "options": FAST.encode()}) == over_http.content


def test_options_arrive_and_probabilities_are_the_same_bytes(server: LiveServer, client: Client) -> None:
    options = json.dumps(json.loads(FAST) | {"save_probabilities": True, "output_format": "npz"})
    over_grpc = client.predict("five_folds", {"body": GOOD, "options": options.encode()})
    assert over_grpc == server.predict("five_folds", GOOD, options=options).content
    assert len(over_grpc) > 2 * len(client.predict("five_folds", {"body": GOOD, "options": FAST.encode()}))


def test_a_model_describes_itself(server: LiveServer, client: Client) -> None:
    over_http = server.predict("five_folds", options='{"describe": true}')
    assert client.predict("five_folds", {"options": b'{"describe": true}'}) == over_http.content


def test_a_stream_of_events_is_refused(server: LiveServer, client: Client) -> None:
    """The first event would be taken for the mask."""
    parts = {"body": GOOD, "options": json.dumps(json.loads(FAST) | {"stream": True}).encode()}
    code, details = client.problem("five_folds", parts)
    assert (code, problem_document(details)["code"]) == ("INVALID_ARGUMENT", "bad_option")
    with pytest.raises(grpc.RpcError) as failed:
        list(client.stub.StreamPredictions(client.request("five_folds", parts), timeout=300))
    assert problem_document(failed.value.details())["code"] == "bad_option"


def test_two_channels_go_into_numbered_fields(server: LiveServer, client: Client) -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1])
    channels = [volumes.nifti_gz(IMAGE, affine), volumes.nifti_gz(IMAGE.max() - IMAGE, affine)]
    parts = {f"image_{number:04d}": content for number, content in enumerate(channels)}
    over_http = server.predict("regions", files=parts, options=FAST)
    assert over_http.status_code == 200
    assert client.predict("regions", {**parts, "options": FAST.encode()}) == over_http.content
    swapped = {"image_0000": channels[1], "image_0001": channels[0], "options": FAST.encode()}
    assert client.predict("regions", swapped) != over_http.content


@pytest.mark.parametrize(
    "name", [name for name, bad in BAD_REQUESTS.items() if bad.body is not None and not bad.headers]
)
def test_a_problem_is_an_error_with_its_code_and_the_worker_lives(
    name: str, server: LiveServer, client: Client
) -> None:
    bad = BAD_REQUESTS[name]
    assert bad.body is not None
    workers = server.workers(bad.model)
    options = {} if bad.options is None else {"options": bad.options.encode()}
    code, details = client.problem(bad.model, {"body": bad.body, **options})
    document = problem_document(details)
    assert (code, document["status"], document["code"]) == (CODES[bad.status], bad.status, bad.code)
    assert bad.says in document["detail"]
    assert server.workers(bad.model) == workers


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({}, "malformed"),
        ({"data": GOOD}, "malformed"),  # the key of TorchServe's own examples
        ({"host": b"a", "content-length": b"1"}, "malformed"),
        ({"ts_request_sequence_id": b"a"}, "malformed"),
        ({"describe": b"True"}, "malformed"),
        ({"body": b""}, "unknown_format"),
    ],
)
def test_no_field_makes_a_request_look_like_http(parts: dict[str, bytes], code: str, client: Client) -> None:
    _, details = client.problem("five_folds", parts)
    assert problem_document(details)["code"] == code


def test_what_torchserve_refuses_itself(client: Client) -> None:
    """docs/http.md lists these; all have the code INTERNAL."""
    assert client.problem("no_such_model", {"body": GOOD}) == (
        "INTERNAL",
        "Model not found: no_such_model\norg.pytorch.serve.archive.model.ModelNotFoundException",
    )
    code, details = client.problem("five_folds", {"body": GOOD}, version="7.0")
    assert (code, "does not exist" in details) == ("INTERNAL", True)


def test_above_our_limit_is_explained_and_above_torchserves_is_not(server: LiveServer, client: Client) -> None:
    workers = server.workers("five_folds")
    code, details = client.problem("five_folds", {"body": bytes(2 * 1024**2 + 1)})
    assert (code, problem_document(details)["code"]) == ("RESOURCE_EXHAUSTED", "too_large")
    code, _ = client.problem("five_folds", {"body": bytes(8 * 1024**2)})
    assert code in ("RESOURCE_EXHAUSTED", "CANCELLED")  # cut midway: grpcio may see the reset before the status
    assert client.predict("five_folds", {"body": GOOD, "options": FAST.encode()})
    assert server.workers("five_folds") == workers


def test_an_answer_above_the_clients_own_limit_is_an_error(server: LiveServer, service: tuple[Any, Any]) -> None:
    """grpcio's default is 4 MB."""
    client = Client(server, service, largest_answer=1000)
    code, _ = client.problem("five_folds", {"body": GOOD, "options": FAST.encode()})
    client.channel.close()
    assert code == "RESOURCE_EXHAUSTED"


def test_a_client_that_gives_up_costs_no_worker(server: LiveServer, client: Client) -> None:
    workers = server.workers("five_folds")
    with pytest.raises(grpc.RpcError) as failed:
        client.predict("five_folds", {"body": GOOD, "options": SLOW}, timeout=0.3)
    assert failed.value.code().name == "DEADLINE_EXCEEDED"
    assert client.predict("five_folds", {"body": GOOD, "options": FAST.encode()})
    assert server.workers("five_folds") == workers


def test_ping(client: Client) -> None:
    empty = importlib.import_module("google.protobuf.empty_pb2").Empty()
    assert json.loads(client.stub.Ping(empty, timeout=300).health) == {"status": "Healthy"}


def test_streams_cost_no_worker(server: LiveServer, client: Client, service: tuple[Any, Any]) -> None:
    """StreamPredictions answers as Predictions does. StreamPredictions2 is refused."""
    body = volumes.nifti_gz(np.ones((32, 32, 4), np.int16))
    workers = server.workers("flat")
    expected = server.predict("flat", body).content
    stream = client.stub.StreamPredictions(client.request("flat", {"body": body}), timeout=300)
    assert [message.prediction for message in stream] == [expected]
    with pytest.raises(grpc.RpcError) as failed:
        list(client.stub.StreamPredictions(client.request("flat", {"body": b"no image"}), timeout=300))
    assert problem_document(failed.value.details())["code"] == "unknown_format"

    requests: SimpleQueue[Any] = SimpleQueue()  # stays open: what a half-closed one does is in docs/http.md
    requests.put(client.request("flat", {"body": body}, sequence="a"))
    with pytest.raises(grpc.RpcError):
        list(client.stub.StreamPredictions2(iter(requests.get, None), timeout=300))
    requests.put(None)
    another = Client(server, service)  # TorchServe may close the connection of a refused stream
    assert another.predict("flat", {"body": body}, timeout=300) == expected
    another.channel.close()
    assert server.workers("flat") == workers
    assert all(psutil.pid_exists(worker.pid) for worker in workers)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_without_a_host_is_not_taken_for_grpc(version: str, server: LiveServer) -> None:
    """Only an answer to gRPC may be an exception, or carry TorchServe's header of streams."""
    url = server.server.inference_url.rpartition(":")
    expected = server.predict("five_folds", GOOD, options=FAST).content
    for body, status, ending in ((GOOD, b"200", expected), (b"no image", b"415", b"}")):
        head = f"POST /predictions/five_folds HTTP/{version}\r\nContent-Length: {len(body)}\r\nX-Nnunet-Options: {FAST}"
        with socket.create_connection(("127.0.0.1", int(url[2])), timeout=300) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            answer = b""
            while not (match := re.search(rb"(?i)content-length: (\d+)\r\n(?:.+\r\n)*\r\n", answer)) or len(
                answer
            ) < match.end() + int(match[1]):
                received = connection.recv(2**16)
                assert received, answer
                answer += received
        assert answer.split()[1] == status
        assert answer.endswith(ending)
        assert b"ts_stream_next" not in answer
