"""TorchServe's own tokens, where a server has them on (``serve --tokens``), for whoever works on its machine.

TorchServe makes three random keys when it starts and writes them to ``key_file.json`` in its working directory,
readable by its user alone: one for the inference API and one for the management API, which expire after an hour
(``token_expiration_min``), and one that does not expire and with which new ones are made. A new one replaces the old
one in the file and is valid at once, the old one no more: so it is only asked for when the old one has expired, and
what the file holds is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import httpx

KEY_FILE = "key_file.json"
WORK_DIR = "work"
"""TorchServe's working directory, in the state directory."""

Api = Literal["management", "inference"]

_SOON = timedelta(seconds=30)
_REFUSED = (httpx.codes.BAD_REQUEST, httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Keys:
    """What the file holds.

    Attributes:
        current: of each API.
        expires: when.
        maker: makes new ones.
    """

    current: dict[str, str] = field(repr=False)
    expires: dict[str, datetime]
    maker: str = field(repr=False)

    def has_expired(self, api: Api, now: datetime) -> bool:
        """Whether a key is of no use any more, or will soon be."""
        return now + _SOON >= self.expires[api]


def key_file(control: Path) -> Path:
    """The file of the server with this private directory."""
    return control.parent / WORK_DIR / KEY_FILE


def read_keys(control: Path) -> Keys | None:
    """The keys of a server; ``None`` if it has none."""
    try:
        content = json.loads(key_file(control).read_text())
        current = {api: str(content[api]["key"]) for api in ("management", "inference")}
        expires = {api: _instant(content[api]["expiration time"]) for api in ("management", "inference")}
        return Keys(current, expires, str(content["API"]["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Bearer(httpx.Auth):
    """Shows an API the key that it wants, a new one if the old one has expired."""

    def __init__(self, management_url: str, control: Path, api: Api = "management") -> None:
        """Take the keys of the server with this management URL and private directory."""
        self._url, self._control, self._api = management_url.rstrip("/"), control, api

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """See httpx."""
        keys = read_keys(self._control)
        if keys is None:
            yield request
            return
        if keys.has_expired(self._api, datetime.now(UTC)):
            yield self._renewal(keys)
            keys = read_keys(self._control) or keys
        answer = yield self._with(request, keys)
        fresh = read_keys(self._control) or keys
        if answer.status_code in _REFUSED and fresh.current[self._api] != keys.current[self._api]:
            yield self._with(request, fresh)  # somebody else has made a new one meanwhile

    def _renewal(self, keys: Keys) -> httpx.Request:
        url, bearer = f"{self._url}/token", f"Bearer {keys.maker}"
        return httpx.Request("GET", url, params={"type": self._api}, headers={"Authorization": bearer})

    def _with(self, request: httpx.Request, keys: Keys) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {keys.current[self._api]}"
        return request


def inference_token(management_url: str, control: Path) -> str | None:
    """A key for the inference API that is valid now; ``None`` if the server wants none.

    Raises:
        httpx.HTTPError: a new one is needed and the management API does not answer.
    """
    keys = read_keys(control)
    if keys is not None and keys.has_expired("inference", datetime.now(UTC)):
        headers = {"Authorization": f"Bearer {keys.maker}"}
        url = f"{management_url.rstrip('/')}/token"
        httpx.get(url, params={"type": "inference"}, headers=headers, timeout=30, trust_env=False).raise_for_status()
        keys = read_keys(control) or keys
    return None if keys is None else keys.current["inference"]


def _instant(text: str) -> datetime:
    """An instant as Java writes it: up to nine digits of a second, which Python reads from 3.11 on."""
    return datetime.fromisoformat(text)
