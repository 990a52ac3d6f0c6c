"""What an answer means that is no result: the server's own words, TorchServe's, or those of a proxy before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx

from .errors import Busy, ClientError, Unauthorized, WorkerDied, error_class

WORKER_DIED = "Worker died."
"""TorchServe's message, with status 500 or 507."""

_MOST_PROBLEM_BYTES = 256 * 1024
_NO_INFERENCE_PORT = {"ResourceNotFoundException", "MethodNotAllowedException"}
"""TorchServe's types of error on its other ports, and on other paths of this one."""

_WITHOUT_REASON: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "the server, or a proxy before it, wants credentials: a token or a header",
    HTTPStatus.FORBIDDEN: "the server, or a proxy before it, does not take these credentials",
    HTTPStatus.NOT_FOUND: "nothing is served at this address: is the path before /predictions right?",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the body is above the limit of the server, or of a proxy before it",
    HTTPStatus.BAD_GATEWAY: "a proxy does not reach the server",
    HTTPStatus.SERVICE_UNAVAILABLE: "the server, or a proxy before it, takes no requests now",
    HTTPStatus.GATEWAY_TIMEOUT: "a proxy gave the request up; it should wait as long as a case may take",
}
"""Of what stands before the server, and of TorchServe where it says nothing."""


def problem(response: httpx.Response) -> ClientError:
    """The error that a streamed answer is; its body is read here.

    A refusal stands by its status, also where the rest is cut off, as by a proxy that wants no more of an upload.
    """
    try:
        content = _read_some(response)
    except httpx.TransportError:
        if not response.is_client_error:
            raise
        content = b""
    return problem_of(parsed(content), lower_case(response.headers), response.status_code)


def problem_of(document: Mapping[str, Any] | None, headers: Mapping[str, str], status: int) -> ClientError:
    """The error that an answer is.

    Args:
        document: its JSON: a problem document, TorchServe's own ``code``, ``type`` and ``message``, or nothing.
        headers: names in lower case.
        status: HTTP status.
    """
    said = document or {}
    code = said.get("code")
    request_id = said.get("request_id") or headers.get("x-nnunet-request-id") or headers.get("x-request-id")
    known: dict[str, Any] = {
        "status": status,
        "request_id": request_id if isinstance(request_id, str) else None,
        "retry_after_s": _retry_after_s(headers.get("retry-after")),
    }
    if isinstance(code, str):  # docs/http.md, "Errors made by the handler"
        return error_class(status, code)(str(said.get("detail") or code), code=code, **known)
    message = said.get("message")
    if status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE) and message == WORKER_DIED:
        return WorkerDied("the worker that had the case died", **known)
    if status == HTTPStatus.INSUFFICIENT_STORAGE and said.get("type") == "OutOfMemoryError":
        return Busy("more uploads at once than the server's memory holds", **known)
    if said.get("type") == "InvalidKeyException":
        return Unauthorized("TorchServe does not take this token: it is wrong, expired or missing", **known)
    if said.get("type") in _NO_INFERENCE_PORT:
        status, message = HTTPStatus.NOT_FOUND, f"{_WITHOUT_REASON[404]} Is it the inference port (8080)?"
    if isinstance(message, str) and "type" in said:
        return error_class(status, None)(message[:500], **known)
    return error_class(status, None)(_WITHOUT_REASON.get(status) or f"HTTP {status} without a reason", **known)


def parsed(text: bytes) -> dict[str, Any] | None:
    """A JSON object; ``None`` of anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def lower_case(headers: object) -> dict[str, str]:
    """Headers with their names in lower case, as texts; empty if they are none."""
    if not isinstance(headers, Mapping):
        return {}
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _retry_after_s(text: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date."""
    if not text:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _read_some(response: httpx.Response) -> bytes:
    """The body of an error, or its beginning."""
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > _MOST_PROBLEM_BYTES:
            break
    return content
