"""The only maker of responses.

TorchServe builds the HTTP answer outside any ``try``: a header value that is no ``str``, a line break in a header or
a reason phrase, or a body above its limit kills the worker and with it whatever it does next. So status, content
type, headers and size are checked here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus

from .accuracy import AccuracyReport
from .errors import ResponseTooLarge, ServingError
from .stated_accuracy import said_of
from .telemetry import SERVER_TIMING

CLIENT_REQUEST_ID = "X-Request-Id"
"""What a client may send. TorchServe's front end puts an id of its own in the response header of this name."""

REQUEST_ID = "X-Nnunet-Request-Id"
"""The id that the log and a problem have: the client's if it sent a usable one, else the front end's."""

MODEL = "X-Nnunet-Model"
BACKEND = "X-Nnunet-Backend"
"""What ran the networks: ``eager``, as nnU-Net runs them, or another backend, with its measured Dice to eager."""

RETRY_AFTER = "Retry-After"
PROBLEM_JSON = "application/problem+json"

EVENTS = "application/vnd.nnunet-torchserve.events"
"""The content type of a stream of events: lines of JSON, then the bytes of the result. No type that proxies compress,
because they would hold the events back for it."""

NO_BUFFERING = {"X-Accel-Buffering": "no"}
"""Has nginx hand every event on at once."""

_HEADER_TEXT = re.compile(r"[\x20-\x7e]*")
_REQUEST_ID = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")


_LONGEST_DETAIL = 4096
"""Characters: a message that repeats what a client sent must not become an answer above TorchServe's limit."""

WARNING = "X-Nnunet-Warning"


class Warnings(StrEnum):
    """What a client should know of an answer that was given all the same, as stock gives it."""

    CONSTANT_IMAGE = "constant_image"
    CHANNELS_MISALIGNED = "channels_misaligned"
    SINGLE_SLICE = "single_slice"
    SPACING_ASSUMED = "spacing_assumed"
    DICOM_FILES_IGNORED = "dicom_files_ignored"
    SEGMENTS_UNCODED = "segments_uncoded"
    FRAME_OF_REFERENCE_MADE = "frame_of_reference_made"


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer, ready for TorchServe."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResponseMaker:
    """Makes the answers of one model.

    Attributes:
        model: the value of ``X-Nnunet-Model``.
        limit: bytes that a body may have; TorchServe's own limit lies above it.
    """

    model: str
    limit: int

    def result(
        self,
        body: bytes,
        content_type: str,
        request_id: str,
        server_timing: str,
        warnings: Sequence[str] = (),
        *,
        backends: Collection[str],
        measured: AccuracyReport | None = None,
    ) -> Response:
        """A 200 with the segmentation.

        Args:
            body: the segmentation.
            content_type: of the body.
            request_id: of the request.
            server_timing: the value of the header.
            warnings: see :class:`Warnings`.
            backends: what ran the networks; several only where an engine was replaced by another one meanwhile.
            measured: what is known of such answers as this one, if they are another backend's.

        Raises:
            ResponseTooLarge: the body is above the limit.
        """
        if len(body) > self.limit:
            raise ResponseTooLarge(too_large_message(len(body), self.limit))
        headers = self._headers(request_id) | {SERVER_TIMING: server_timing, BACKEND: said_of(backends, measured)}
        if warnings:
            headers[WARNING] = ", ".join(warnings)
        return _checked(Response(HTTPStatus.OK, content_type, body, headers))

    def problem(self, error: ServingError, request_id: str) -> Response:
        """An RFC 9457 problem: ``status``, a stable ``code``, and a ``detail`` for a person."""
        headers = self._headers(request_id)
        if error.retry_after_s is not None:
            headers[RETRY_AFTER] = str(error.retry_after_s)
        return _checked(_problem(error, request_id, headers))

    def json(self, document: object, request_id: str) -> Response:
        """A 200 with a JSON document."""
        body = json.dumps(document, ensure_ascii=True, indent=2).encode("ascii")
        return _checked(Response(HTTPStatus.OK, "application/json", body, self._headers(request_id)))

    def events(self, request_id: str) -> Response:
        """The head of a stream of events; its body comes by and by."""
        return _checked(Response(HTTPStatus.OK, EVENTS, b"", self._headers(request_id) | NO_BUFFERING))

    def _headers(self, request_id: str) -> dict[str, str]:
        return {REQUEST_ID: request_id, MODEL: self.model}


def last_resort(request_id: str) -> Response:
    """The problem where no other answer can be made: it needs no model and no header."""
    msg = "an unexpected error outside of the request's own work; the server's log has it"
    return _problem(ServingError(msg), request_id)


def _problem(error: ServingError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    document = {
        "type": "about:blank",
        "title": error.status.phrase,
        "status": int(error.status),
        "code": error.code,
        "detail": str(error)[:_LONGEST_DETAIL],
        "request_id": request_id,
    }
    body = json.dumps(document, ensure_ascii=True).encode("ascii")
    return Response(error.status, PROBLEM_JSON, body, headers or {})


def too_large_message(size: int, limit: int) -> str:
    """The one sentence that says an answer does not fit."""
    return (
        f"the answer would have {size} bytes, this server sends at most {limit}; "
        "ask for fewer probability_channels, probability_dtype float16, no probabilities, or output_format nii.gz"
    )


def usable_request_id(candidate: str | None) -> str | None:
    """The client's request id if it can stand in a header: printable ASCII, 1 to 128 characters."""
    return candidate if candidate is not None and _REQUEST_ID.fullmatch(candidate) else None


def _checked(response: Response) -> Response:
    for name, value in (*response.headers.items(), ("Content-Type", response.content_type)):
        if not _HEADER_TEXT.fullmatch(value):
            msg = f"header {name} holds characters that HTTP does not allow"
            raise ValueError(msg)
    return response
