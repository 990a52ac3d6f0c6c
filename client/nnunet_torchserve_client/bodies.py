"""What is sent of a case: files as they are, bytes, or an array; streamed, and from the start again for another try.

Nothing of an image is kept beyond what the caller holds anyway: a file is read while it is sent. No file name leaves
this machine, for it may be a patient's.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import npy_header, smallest
from .errors import UnreadableFile, WrongUse

CHUNK_BYTES = 64 * 1024
"""What is handed to the connection at a time: below what malloc maps apart, so that memory does not grow with cases."""

Image = str | os.PathLike[str] | bytes | npt.NDArray[Any]
"""A file, its content, or an array (C, Z, Y, X), (Z, Y, X) or (Y, X)."""


class Body(Protocol):
    """What is sent."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def image_bytes(self) -> int:
        """Those of the images alone, which the server's limit is for."""

    @property
    def content_type(self) -> str:
        """As HTTP names it."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes; may be asked for again."""


_BINARY = "application/octet-stream"


class FileBody:
    """A file of this machine, as it is."""

    content_type = _BINARY

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take its size.

        Raises:
            UnreadableFile: it is no file, or it is empty.
        """
        self._path = Path(path)
        try:
            found = self._path.stat()
            is_file = self._path.is_file()
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if not is_file or not found.st_size:
            msg = (
                f"{self._path} is empty"
                if is_file
                else f"{self._path} is no file; a DICOM series is sent as a zip of it"
            )
            raise UnreadableFile(msg)
        self.length = self.image_bytes = found.st_size

    def chunks(self) -> Iterator[bytes]:
        """See :class:`Body`.

        Raises:
            UnreadableFile: it cannot be read, or has another size than it had.
        """
        left = self.length
        try:
            with self._path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        break
                    yield chunk
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if left:
            msg = f"{self._path} changed while it was sent"
            raise UnreadableFile(msg)


class BytesBody:
    """What is in memory already: pieces that follow each other."""

    content_type = _BINARY

    def __init__(self, *pieces: bytes | memoryview) -> None:
        self._pieces = [_as_bytes(piece) for piece in pieces]
        self.length = self.image_bytes = sum(piece.nbytes for piece in self._pieces)

    def chunks(self) -> Iterator[memoryview]:
        """See :class:`Body`."""
        for piece in self._pieces:
            for start in range(0, piece.nbytes, CHUNK_BYTES):
                yield piece[start : start + CHUNK_BYTES]


def _as_bytes(piece: bytes | bytearray | memoryview) -> memoryview:
    """A view whose items are the bytes; a copy where the caller's own has other items, or gaps."""
    view = memoryview(piece)
    plain = view.ndim == 1 and view.itemsize == 1 and view.c_contiguous
    return view if plain else memoryview(view.tobytes())


class MultipartBody:
    """A form with a field for each image."""

    def __init__(self, fields: Mapping[str, Body]) -> None:
        """Take them as they are.

        Args:
            fields: name of a field -> what is sent in it.
        """
        boundary = secrets.token_hex(16)
        self._parts = [(_head(boundary, name), body) for name, body in fields.items()]
        self._end = f"--{boundary}--\r\n".encode()
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.image_bytes = sum(body.length for body in fields.values())
        self.length = self.image_bytes + sum(len(head) + len(_NEWLINE) for head, _ in self._parts) + len(self._end)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """See :class:`Body`."""
        for head, body in self._parts:
            yield head
            yield from body.chunks()
            yield _NEWLINE
        yield self._end


_NEWLINE = b"\r\n"


def _head(boundary: str, name: str) -> bytes:
    lines = [
        f"--{boundary}",
        f'Content-Disposition: form-data; name="{name}"; filename="{name}"',
        f"Content-Type: {_BINARY}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


EMPTY: Body = BytesBody()

_WHOLE = "image"
"""The field of an image that has all channels; alone it is sent as the raw body."""

PREVIOUS_STAGE = "previous_stage"
"""The field of the labels of a cascade's first stage."""

_NO_IMAGE = "an image is a file's path, bytes, an array (C, Z, Y, X), or a list of files, one for each channel"


def body_of(image: Image | Sequence[Image], previous_stage: Image | None = None) -> Body:
    """What is to be sent of a case.

    Args:
        image: a file, its content, an array; or a list of files or contents, one a channel.
        previous_stage: labels of a cascade's first stage: a file, its content, an array.

    Raises:
        UnreadableFile: a file that cannot be read.
        WrongUse: it is none of these.
    """
    fields = _image_fields(image)
    if previous_stage is not None:
        fields[PREVIOUS_STAGE] = _single(previous_stage)
    return fields[_WHOLE] if list(fields) == [_WHOLE] else MultipartBody(fields)


def _image_fields(image: Image | Sequence[Image]) -> dict[str, Body]:
    if not isinstance(image, list | tuple):
        return {_WHOLE: _single(image)}
    if len(image) == 1:
        return {_WHOLE: _single(image[0])}
    if any(isinstance(each, np.ndarray) for each in image):
        msg = "several arrays for one case; stack the channels into one: (C, Z, Y, X)"
        raise WrongUse(msg)
    if not image:
        raise WrongUse(_NO_IMAGE)
    return {f"{_WHOLE}_{channel:04d}": _single(each) for channel, each in enumerate(image)}


def _single(image: object) -> Body:
    if isinstance(image, str | os.PathLike):
        return FileBody(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return BytesBody(memoryview(image))
    if isinstance(image, np.ndarray):
        return _array_body(image)
    raise WrongUse(_NO_IMAGE)


def _array_body(array: npt.NDArray[Any]) -> Body:
    sent = smallest(array)
    return BytesBody(npy_header(sent), sent.reshape(-1).view(np.uint8).data)


def _unreadable(path: Path, error: OSError) -> UnreadableFile:
    return UnreadableFile(f"{path} cannot be read: {error.strerror or type(error).__name__}")
