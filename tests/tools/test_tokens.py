"""TorchServe's tokens: read from its key file, made anew when they have expired. A live server is in tests/serve."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve_tools.management import TOKEN_VARIABLE, management
from nnunet_torchserve_tools.tokens import Bearer, key_file, read_keys

URL = "http://127.0.0.1:9"


class Front:
    """A management API that takes its keys from the file, as TorchServe's does."""

    def __init__(self, control: Path) -> None:
        self.control, self.made, self.asked = control, 0, list[str]()
        key_file(control).parent.mkdir(parents=True)
        self.write("old", minutes=60)

    def write(self, key: str, minutes: float) -> None:
        until = (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%S.%f789Z")
        own = {"key": key, "expiration time": until}
        content = {"management": own, "inference": own | {"key": "for predictions"}, "API": {"key": "maker"}}
        key_file(self.control).write_text(json.dumps(content))

    def answer(self, request: httpx.Request) -> httpx.Response:
        shown = request.headers.get("Authorization", "")
        self.asked.append(f"{request.url.path} {shown}")
        keys = read_keys(self.control)
        assert keys is not None
        if request.url.path == "/token":
            assert (shown, request.url.params["type"]) == ("Bearer maker", "management")
            self.made += 1
            self.write(f"new {self.made}", minutes=60)
            return httpx.Response(200)
        is_good = shown == f"Bearer {keys.current['management']}"
        return httpx.Response(200 if is_good and not keys.has_expired("management", datetime.now(UTC)) else 400)

    def get(self) -> int:
        transport = httpx.MockTransport(self.answer)
        with httpx.Client(base_url=URL, transport=transport, auth=Bearer(URL, self.control)) as client:
            return client.get("/models").status_code


@pytest.fixture
def front(tmp_path: Path) -> Front:
    return Front(tmp_path / "control")


def test_a_key_that_is_valid_is_used_as_it_is(front: Front) -> None:
    assert front.get() == 200
    assert front.asked == ["/models Bearer old"]


def test_a_key_that_has_expired_is_replaced_once(front: Front) -> None:
    front.write("old", minutes=-1)
    assert [front.get(), front.get()] == [200, 200]
    assert front.asked == ["/token Bearer maker", "/models Bearer new 1", "/models Bearer new 1"]


def test_a_key_that_somebody_else_replaced_meanwhile_is_read_again(front: Front) -> None:
    answer = front.answer

    def replaced_first(request: httpx.Request) -> httpx.Response:
        if not front.asked:
            front.write("theirs", minutes=60)
        return answer(request)

    front.answer = replaced_first  # type: ignore[method-assign]
    assert front.get() == 200
    assert front.asked == ["/models Bearer old", "/models Bearer theirs"]


def test_keys_are_shown_in_no_message(front: Front) -> None:
    keys = read_keys(front.control)
    assert keys is not None
    assert "old" not in repr(keys)
    assert "maker" not in repr(keys)


def test_a_server_without_tokens_is_shown_none(tmp_path: Path) -> None:
    with management(URL, tmp_path / "control", 1.0) as client:
        request = client.build_request("GET", "/models")
        assert client.auth is not None
        assert "Authorization" not in next(client.auth.auth_flow(request)).headers


def test_who_is_on_another_machine_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with management(URL, None, 1.0) as client:
        assert client.headers["Authorization"] == "Bearer secret"
