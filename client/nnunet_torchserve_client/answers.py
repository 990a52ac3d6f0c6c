"""What a server answered."""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array
from .errors import BadAnswer, ClientError, WrongModel

ZIP = "application/zip"

_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(RuntimeError, OSError, ValueError, KeyError, AttributeError),
)
"""What zipfile and NumPy raise of bytes that are not what they should be; RuntimeError also of encryption and of
unknown ways to pack."""

EAGER = "eager"
"""The server's word for nnU-Net's own modules, run as nnU-Net runs them."""

_DICE = re.compile(r"(?:^|;)\s*dice=([01]\.\d+)\s*(?:;|$)")
_TIMING = re.compile(r"([\w-]+);dur=(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a case.

    Attributes:
        case: its name.
        content: the body, as docs/formats.md has it.
        content_type: of the body.
        headers: of the answer, names in lower case.
        request_id: the server's.
        server: base URL of the server that answered.
        seconds: from the first request to the last byte, with everything that was tried in vain.
        tries: requests that were sent.
    """

    case: str
    content: bytes = field(repr=False)
    content_type: str
    headers: Mapping[str, str] = field(repr=False)
    request_id: str
    server: str
    seconds: float = 0.0
    tries: int = 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the server wants to be looked at, as ``constant_image``."""
        return tuple(filter(None, (each.strip() for each in self.headers.get("x-nnunet-warning", "").split(","))))

    @property
    def other_backend(self) -> str | None:
        """What ran the networks if it was not ``eager``: then the answer's bits need not be nnU-Net's own."""
        backend = self._backend[0]
        return None if backend == EAGER else backend

    @property
    def measured_dice(self) -> float | None:
        """The mean Dice of that backend's answers to nnU-Net's own, where the model's owner has measured it.

        Of such answers as this one, not of this one. It flatters where the header ``x-nnunet-backend`` says
        ``images=calibration`` or ``images=partly-calibration``.
        """
        found = _DICE.search(self._backend[1])
        return None if found is None else float(found[1])

    @property
    def _backend(self) -> tuple[str, str]:
        """What ran the networks, and what is said of it."""
        name, _, said = self.headers.get("x-nnunet-backend", EAGER).partition(";")
        return name.strip(), said

    @property
    def timing(self) -> dict[str, float]:
        """Seconds that the server spent in each stage, in its order."""
        return {name: float(ms) / 1000 for name, ms in _TIMING.findall(self.headers.get("server-timing", ""))}

    @property
    def model(self) -> dict[str, str]:
        """``name``, ``version`` and ``digest`` of the model that answered."""
        pairs = (each.partition("=") for each in self.headers.get("x-nnunet-model", "").split(";"))
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}

    def check_model(self, digest: str) -> None:
        """Raise unless the model that was described has answered.

        Args:
            digest: of its archive.

        Raises:
            WrongModel: another one did. An answer that does not say which is taken.
        """
        if self.model.get("digest") not in (None, digest):
            msg = (
                "another version of the model answered than the one that was described: the server has changed. "
                "The next call asks it anew what it is"
            )
            raise WrongModel(msg, case=self.case, request_id=self.request_id, server=self.server)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within the block errors get what is known of this answer: its case, request and server."""
        try:
            yield
        except ClientError as error:
            for name in ("case", "request_id", "server"):
                setattr(error, name, getattr(error, name) or getattr(self, name))
            raise

    def parts(self) -> dict[str, bytes]:
        """The files of a zip by name; of any other answer the body, without a name.

        Raises:
            BadAnswer: the zip is damaged.
        """
        if self.content_type != ZIP:
            return {"": self.content}
        try:
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
        except _DAMAGED as error:
            msg = "the zip of the answer is damaged"
            raise BadAnswer(msg, case=self.case, request_id=self.request_id, server=self.server) from error

    def arrays(self) -> dict[str, Array]:
        """The arrays of an npz by name: ``labels`` (Z, Y, X), ``probabilities`` (C, Z, Y, X), ``spacing`` and others.

        Raises:
            BadAnswer: it is no npz, or a damaged one.
        """
        return arrays_of(self.content, self)


def arrays_of(content: bytes, answer: Answer) -> dict[str, Array]:
    """The arrays of an npz of an answer; nothing is unpickled.

    Raises:
        BadAnswer: it is no npz, or a damaged one.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _DAMAGED as error:
        msg = "the arrays of the answer are damaged"
        raise BadAnswer(msg, case=answer.case, request_id=answer.request_id, server=answer.server) from error
