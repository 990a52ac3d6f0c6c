"""What came: a request, free of TorchServe, its fields and headers, and where its images and options are among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .codecs.inflate import Body, Payload
from .errors import Malformed, UnknownFormat
from .options import HEADER, PART
from .responses import CLIENT_REQUEST_ID, usable_request_id

RAW_BODY = "body"
"""TorchServe's name for a body that is not multipart."""

PREVIOUS_STAGE = "previous_stage"
"""The field with the labels of a cascade's first stage."""

_DICOM_PREFIX = "dicom_"
_DICOM_PART = re.compile(rf"{_DICOM_PREFIX}[0-9A-Za-z._-]{{1,100}}")
_IMAGE_PART = re.compile(r"image(?:_([0-9]{4}))?")


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        parts: multipart field -> content, or ``{"body": content}``. A content that is not bytes was parsed by the
            front end because of its content type.
        headers: HTTP headers as sent; looked up without regard to case.
        server_id: the front end's id of this request.
        is_trial: a worker's own, made while it loads.
    """

    parts: Mapping[str, object]
    headers: Mapping[str, str]
    server_id: str | None = None
    is_trial: bool = False

    def header(self, name: str) -> str | None:
        """A header's value, ``None`` if it was not sent."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), None)

    @property
    def is_describe(self) -> bool:
        """Whether TorchServe's describe API asks; a client's header of that name on a real request does not count."""
        return self.headers.get("describe") == "True" and not any(self.parts.values())

    @property
    def id(self) -> str:
        """The client's id if it can stand in a header, else the front end's."""
        return usable_request_id(self.header(CLIENT_REQUEST_ID)) or usable_request_id(self.server_id) or "-"

    def options_text(self) -> bytes | None:
        """The options as they were sent, JSON for :func:`~.options.parse_options`; ``None`` if there are none.

        Raises:
            Malformed: they came twice.
            UnknownFormat: the front end parsed them into something that is no JSON object.
        """
        part, header = self.parts.get(PART), self.header(HEADER)
        if part is not None and header is not None:
            msg = f"options came twice: in the field {PART} and in the header {HEADER}; send one of them"
            raise Malformed(msg)
        if header is not None:
            return header.encode("utf-8", "surrogateescape")
        if part is None:
            return None
        if isinstance(part, dict):  # TorchServe parses a part that says it is JSON
            return json.dumps(part).encode()
        return bytes(_payload(PART, part))

    def images(self) -> list[Body]:
        """The bodies of the images, in channel order.

        Raises:
            Malformed: there is none, or fields that make no case.
            UnknownFormat: the front end took an image for a form, a text or JSON.
        """
        if (self.header("Content-Type") or "").startswith("application/x-www-form-urlencoded"):
            msg = "the image came as a form; send it with curl -T, not --data-binary, or as application/octet-stream"
            raise UnknownFormat(msg)
        if not self.parts:
            msg = "the request has no body; send the image as the raw body or as multipart field image"
            raise Malformed(msg)
        whole, numbered = self._bodies()
        if len(whole) + bool(numbered) != 1:
            msg = "send either one image, or image_0000, image_0001, … with one channel each, or dicom_… of one series"
            raise Malformed(msg)
        if whole:
            return whole
        if sorted(numbered) != list(range(len(numbered))):
            msg = f"the channels must be numbered 0000, 0001, … without a gap; got {sorted(numbered)}"
            raise Malformed(msg)
        return [(numbered[channel],) for channel in sorted(numbered)]

    def _bodies(self) -> tuple[list[Body], dict[int, Payload]]:
        """Images that came as a whole, and files by the number of their channel."""
        whole: list[Body] = []
        numbered: dict[int, Payload] = {}
        series: list[Payload] = []
        for name, content in self.parts.items():
            match = _IMAGE_PART.fullmatch(name)
            if name in (RAW_BODY, "image"):
                whole.append((_payload(name, content),))
            elif match:
                numbered[int(match[1])] = _payload(name, content)
            elif _DICOM_PART.fullmatch(name):
                series.append(_payload(name, content))
            elif name not in (PART, PREVIOUS_STAGE):
                if name.casefold().startswith(_DICOM_PREFIX[:-1]):  # it may be a file's name, and that a patient's
                    msg = (
                        f"the name of a field {_DICOM_PREFIX}… has other characters than letters, digits, '.', '_' and "
                    )
                    msg += "'-', or is empty or longer than 100; any such name will do: dicom_0000, dicom_0001, …"
                    raise Malformed(msg)
                fields = f"image or image_0000, image_0001, …, dicom_… of one series, {PREVIOUS_STAGE}, and {PART}"
                msg = f"unknown field {ascii(name)[:80]}; fields are {fields}"
                raise Malformed(msg)
        return whole + ([tuple(series)] if series else []), numbered

    @property
    def fields(self) -> int:
        """How many there are, without the files of a DICOM series."""
        return sum(not _DICOM_PART.fullmatch(name) for name in self.parts)

    def previous_stage(self) -> Payload | None:
        """The labels of a cascade's first stage, where they were sent.

        Raises:
            UnknownFormat: the front end took them for a form, a text or JSON.
        """
        content = self.parts.get(PREVIOUS_STAGE)
        return None if content is None else _payload(PREVIOUS_STAGE, content)


def _payload(name: str, content: object) -> Payload:
    if isinstance(content, bytes | bytearray | memoryview):
        return content
    if name == PART and isinstance(content, str):
        return content.encode("utf-8", "surrogateescape")
    what = name if name == PREVIOUS_STAGE else "the image"
    msg = f"{what} came with a text or JSON content type; send it as application/octet-stream"
    raise UnknownFormat(msg)
