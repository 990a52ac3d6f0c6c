"""Every way a call to a server can fail, for callers to tell them apart.

::

    ClientError                         also a RuntimeError, as what nnU-Net raises when a case fails
    ├── WrongUse                        also a ValueError: the call is wrong, whatever the server says
    │   ├── MissingProperty             also a KeyError, as nnU-Net's
    │   ├── WrongPart                   also an AssertionError, as nnU-Net's
    │   ├── WrongPreviousStage          also an AssertionError, as nnU-Net's
    │   ├── PreprocessedInput           what nnU-Net has preprocessed already
    │   ├── NotServed                   what a server cannot do: logits, a file format
    │   └── BodyTooLarge                above the server's limit; nothing was sent
    ├── UnreadableFile                  also an OSError: an image on this side
    ├── UnwritableFile                  also an OSError: a result on this side
    ├── WrongModel                      the server has another model than the one that was asked for
    ├── Untrusted                       the server's certificate is not to be trusted
    ├── Refused                         the server's 4xx: the same request will fail again
    │   ├── Unauthorized                401, 403
    │   ├── UnknownModel                404
    │   ├── Malformed, UnknownOption, BadOption                                         400
    │   ├── TooLarge, ResponseTooLarge                                                  413
    │   ├── UnknownFormat                                                               415
    │   └── WrongChannels, ChannelsDisagree, NonFinite, WrongRange, TooThin, BadSpacing, UnknownFold     422
    ├── Failed                          the server tried, and another try would not help
    │   ├── CaseFailed                  500 case_failed
    │   ├── ServerError                 500 of any other kind
    │   ├── Deadline                    504
    │   ├── OutOfMemory                 507 out_of_memory
    │   └── WorkerDied                  each worker that took the case died
    ├── Unavailable                     tried again until the client's own deadline, in vain
    │   ├── Busy                        429, 503, TorchServe's queue or memory is full
    │   │   └── Draining                503 draining
    │   ├── Unreachable                 no connection, or it ended before the answer began
    │   ├── CutOff                      the answer began and ended early: most likely its worker was killed
    │   ├── Silent                      no byte for longer than a server that works is silent
    │   └── TooLate                     the client's deadline passed while the server had the case
    ├── BadAnswer                       no answer of this protocol
    ├── Cancelled                       the caller gave the case up
    └── CasesFailed                     some cases of several; has the error of each

Names and codes are the server's (docs/http.md). Each error names its case, the server's request id and the server. A
message never holds a credential.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

_NAMED = 3
"""Failures that a message has in full."""

_OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
}  # fmt: skip
"""What the next file that is written would meet too."""


class ClientError(RuntimeError):
    """A call failed.

    Attributes:
        reason: what was wrong, without the case's name.
        case: the name of the case, ``None`` if there is none.
        request_id: the server's id of the request, by which its log is searched; ``None`` if none was answered.
        server: base URL of the server that was asked last.
        status: HTTP status, ``None`` without an answer.
        code: the server's code of the problem, as ``"wrong_channels"``.
        retry_after_s: seconds after which the server wants to be asked again.
        tries: requests that were sent for the case.
        results: where it ended a call of several cases, what the call had by then, ``None`` for each case that it had
            not.
    """

    @property
    def of_all_cases(self) -> bool:
        """Whether another case would fail too, so that there is no use in going on with the others."""
        return False

    def __init__(
        self,
        reason: str,
        *,
        case: str | None = None,
        request_id: str | None = None,
        server: str | None = None,
        status: int | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.case = case
        self.request_id = request_id
        self.server = server
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.tries = 0
        self.results: list[Any] = []

    def __str__(self) -> str:
        """The reason, with the case before it and the request id after it, as far as they are known."""
        before = f"{self.case}: " if self.case else ""
        known = [str(self.status)] if self.status else []
        known += [self.code] if self.code else []
        known += [f"request {self.request_id}"] if self.request_id else []
        known += [f"{self.tries} tries"] if self.tries > 1 else []
        return f"{before}{self.reason}" + (f" ({', '.join(known)})" if known else "")

    def as_json(self) -> dict[str, Any]:
        """For a program: everything but the traceback."""
        names = ("case", "reason", "status", "code", "request_id", "server", "tries")
        return {"error": type(self).__name__} | {name: getattr(self, name) for name in names}


class WrongUse(ClientError, ValueError):
    """The call cannot be meant so."""


class MissingProperty(WrongUse, KeyError):
    """An array, or an item of an iterator, that does not say what it must: its voxel spacing, for example."""


class WrongPart(WrongUse, AssertionError):
    """``part_id`` and ``num_parts`` that name no part."""


class WrongPreviousStage(WrongUse, AssertionError):
    """Labels of a cascade's first stage that are missing, do not fit the image, or that the model does not take."""


class PreprocessedInput(WrongUse):
    """What nnU-Net has cropped, normalised and resampled already: a server does that itself."""


class NotServed(WrongUse):
    """Something that stock does and a server does not."""


class BodyTooLarge(WrongUse):
    """More bytes than the server takes; nothing was sent."""


class UnreadableFile(ClientError, OSError):
    """An image of this machine that cannot be read, or that changed while it was sent."""


class UnwritableFile(ClientError, OSError):
    """A result that cannot be written on this machine."""

    @property
    def of_all_cases(self) -> bool:
        """Whether it is the disk, and not this file or its folder alone."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno in _OF_THE_DISK


class WrongModel(ClientError):
    """The served model is not the one that was asked for."""

    of_all_cases = True


class Untrusted(ClientError):
    """The server's certificate is not signed by an authority that is trusted here, or is for another host."""

    of_all_cases = True


class Refused(ClientError):
    """The server will refuse the same request again."""


class Unauthorized(Refused):
    """The server, or what stands before it, wants other credentials."""

    of_all_cases = True


class UnknownModel(Refused):
    """The server has no such model, or no such version of it."""

    of_all_cases = True


class Malformed(Refused):
    """Bytes that break their own format, or fields that make no request."""


class UnknownOption(Refused):
    """An option that this server does not have."""

    of_all_cases = True


class BadOption(Refused):
    """A known option with a value that it cannot have."""


class TooLarge(Refused):
    """Above a limit of the server."""


class ResponseTooLarge(Refused):
    """The answer would be above a limit of the server."""


class UnknownFormat(Refused):
    """The bytes are no image format that the server reads."""


class WrongChannels(Refused):
    """Another number of channels than the model was trained with."""


class ChannelsDisagree(Refused):
    """Channels of one case with different shapes or spacings."""


class NonFinite(Refused):
    """NaN or infinite voxels."""


class WrongRange(Refused):
    """Voxels with values that the model's normalisation cannot take."""


class TooThin(Refused):
    """No voxel would be left on the network's grid."""


class BadSpacing(Refused):
    """A voxel spacing that is none."""


class UnknownFold(Refused):
    """A fold that the archive does not hold."""

    of_all_cases = True


class Failed(ClientError):
    """The server tried, and another try would end the same way."""


class CaseFailed(Failed):
    """The network gave no usable answer for the case."""


class ServerError(Failed):
    """An error of the server; its log has it under the request id."""


class Deadline(Failed):
    """The server's time for the case ran out."""


class OutOfMemory(Failed):
    """More than the server's memory holds."""


class WorkerDied(Failed):
    """The worker that had the case died, each time that it was tried."""


class Unavailable(ClientError):
    """No server could take the case before the client's deadline."""


class Busy(Unavailable):
    """The server has enough to do."""


class Draining(Busy):
    """The server takes no new requests for now."""


class Unreachable(Unavailable):
    """There is no connection, or it ended before the answer began."""

    of_all_cases = True


class CutOff(Unavailable):
    """The answer began and ended early: that is how a killed worker shows, once events have come from it."""


class Silent(Unavailable):
    """The server said nothing for longer than one that works ever does."""


class TooLate(Unavailable):
    """The client's deadline passed before the server had answered."""


class BadAnswer(ClientError):
    """An answer that does not follow docs/http.md: another server, or something between it and the client."""


class Cancelled(ClientError):
    """The caller gave the case up."""


class CasesFailed(ClientError):
    """Some of several cases failed.

    Attributes:
        failures: the error of each, in the order of the cases.
        results: what the call would have returned, ``None`` for each case that failed.
    """

    def __init__(self, failures: Sequence[ClientError], results: Sequence[Any]) -> None:
        first = "; ".join(str(failure) for failure in failures[:_NAMED])
        more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
        super().__init__(f"{len(failures)} of {len(results)} cases failed: {first}{more}")
        self.failures = list(failures)
        self.results = list(results)

    def __reduce__(self) -> tuple[type[CasesFailed], tuple[list[ClientError], list[Any]]]:
        """It may come from another process."""
        return type(self), (self.failures, self.results)


_OF_CODE: Mapping[str, type[ClientError]] = {
    "malformed": Malformed,
    "unknown_option": UnknownOption,
    "bad_option": BadOption,
    "too_large": TooLarge,
    "response_too_large": ResponseTooLarge,
    "unknown_format": UnknownFormat,
    "wrong_channels": WrongChannels,
    "channels_disagree": ChannelsDisagree,
    "non_finite": NonFinite,
    "wrong_range": WrongRange,
    "too_thin": TooThin,
    "bad_spacing": BadSpacing,
    "unknown_fold": UnknownFold,
    "busy": Busy,
    "draining": Draining,
    "case_failed": CaseFailed,
    "deadline": Deadline,
    "out_of_memory": OutOfMemory,
}
"""The server's codes. ``internal`` is told by its status."""

_OF_STATUS: Mapping[int, type[ClientError]] = {
    HTTPStatus.BAD_REQUEST: Malformed,
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.FORBIDDEN: Unauthorized,
    HTTPStatus.NOT_FOUND: UnknownModel,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: TooLarge,
    HTTPStatus.TOO_MANY_REQUESTS: Busy,
    HTTPStatus.BAD_GATEWAY: Unreachable,
    HTTPStatus.SERVICE_UNAVAILABLE: Busy,
    HTTPStatus.GATEWAY_TIMEOUT: Deadline,
}
"""For answers without a code of the server's: TorchServe's own, and a proxy's."""


def error_class(status: int, code: str | None) -> type[ClientError]:
    """The class of a problem.

    Args:
        status: HTTP status, at least 400.
        code: of the problem document, ``None`` if there was none.
    """
    known = _OF_CODE.get(code or "") or _OF_STATUS.get(status)
    if known is not None:
        return known
    return Refused if status < HTTPStatus.INTERNAL_SERVER_ERROR else ServerError


OF_ONE_SERVER = (Unauthorized, UnknownModel, Untrusted, BadAnswer, ServerError)
"""What may be the fault of one server among several, and is tried once at each of them."""
