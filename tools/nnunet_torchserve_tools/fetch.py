"""``nnunet-torchserve fetch``: an archive from an https address into a model store, whole and checked, or not at all.

An archive is code. So it comes over https only, its sha256 is known beforehand, and it has a largest size; it is
written beside its place and renamed once it is what it should be. A pod's init container runs this; nothing here is
special to one, and a second call finds the file and loads nothing.

An address may be a credential (one that is signed for a while), and there may be a bearer token: both come from the
environment if need be, and no message shows a query or a token.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from .errors import ToolError, UsageError

URL_VARIABLE = "NNUNET_TORCHSERVE_FETCH_URL"
TOKEN_VARIABLE = "NNUNET_TORCHSERVE_FETCH_TOKEN"  # noqa: S105 (a variable's name)

TRIES = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_SILENCE_S = 60.0
"""Without a byte, after which a try has failed."""

_REDIRECTS = 5
_BLOCK = 1024**2
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_TEMPORARY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_SERVERS_OWN = 500


class _TryAgainError(ToolError):
    """What another try may mend."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that shall be there.

    Attributes:
        url: https; of its query no message tells.
        sha256: of the file's bytes, in hexadecimal.
        max_bytes: the largest file that is taken.
        into: folder, which is made if it is not there.
        name: of the file; ``None`` is the last part of the address.
        authorities: file (PEM) of who may sign the server's certificate; ``None`` is the system's.
        token: sent as ``Authorization: Bearer``, to the address's own host only.
    """

    url: str = field(repr=False)
    sha256: str
    max_bytes: int
    into: Path
    name: str | None = None
    authorities: Path | None = None
    token: str | None = field(default=None, repr=False)


def wanted_url(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The address of the command line, else of the environment.

    Raises:
        UsageError: neither has one.
    """
    url = given or environ.get(URL_VARIABLE, "")
    if not url:
        msg = f"which file? Give its https address, or set {URL_VARIABLE}"
        raise UsageError(msg)
    return url


def given_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """The bearer token of the environment, if there is one."""
    return environ.get(TOKEN_VARIABLE) or None


def fetch(wanted: Wanted, *, tell: Callable[[str], None], pause_s: float = _FIRST_PAUSE_S) -> Path:
    """Have the file in its folder.

    Args:
        wanted: see :class:`Wanted`.
        tell: is told when a try has failed and another one follows.
        pause_s: before the second try; each further one is twice as long.

    Returns:
        Where it is.

    Raises:
        UsageError: what is wanted cannot be meant.
        ToolError: it cannot be had, is too large, or is another file than the one with this sha256. What was there
            under the name is as it was.
    """
    url, name = _checked(wanted)
    target = wanted.into / name
    try:
        wanted.into.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(f".{name}.part")) as file:
            if target.is_file() and _is_right(_digest(target), wanted):
                Path(file.name).unlink()
                return target
            _load(wanted, url, file, tell, pause_s)
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(target)
    except OSError as error:
        msg = f"{name} cannot be written to {wanted.into}: {error.strerror}"
        raise ToolError(msg) from error
    return target


def _checked(wanted: Wanted) -> tuple[httpx.URL, str]:
    """The address and the file's name."""
    try:
        url = httpx.URL(wanted.url)
    except httpx.InvalidURL as error:
        msg = "the address is none"
        raise UsageError(msg) from error
    if url.scheme != "https" or not url.host:
        msg = f"an archive is code, and comes over https only: https://HOST/PATH was expected, not {_shown(url)}"
        raise UsageError(msg)
    if url.userinfo:
        msg = f"leave user and password out of the address; a bearer token goes to {TOKEN_VARIABLE}"
        raise UsageError(msg)
    if not _SHA256.fullmatch(wanted.sha256):
        msg = f"--sha256 {wanted.sha256!r}: 64 hexadecimal digits were expected (sha256sum FILE.mar)"
        raise UsageError(msg)
    name = wanted.name if wanted.name is not None else PurePosixPath(unquote(url.path)).name
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        msg = f"{name!r} is no name for a file of a model store: give one with --name, as brain.mar"
        raise UsageError(msg)
    if wanted.authorities is not None and not wanted.authorities.is_file():
        msg = f"--verify {wanted.authorities}: no such file"
        raise UsageError(msg)
    return url, name


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The unfinished file, empty, for this process alone: another one that fetches it is waited for."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_ours = os.path.samestat(os.fstat(file.fileno()), part.stat())
            except FileNotFoundError:
                is_ours = False
            if not is_ours:  # whoever had it has renamed or removed it meanwhile
                continue
            file.truncate(0)
            try:
                yield file
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return


def _load(wanted: Wanted, url: httpx.URL, file: BinaryIO, tell: Callable[[str], None], pause_s: float) -> None:
    """The bytes, into ``file``, checked."""

    def again(state: object) -> None:
        error = state.outcome.exception()  # type: ignore[attr-defined]
        tell(f"{error}; trying again")

    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(multiplier=pause_s, max=_LONGEST_PAUSE_S),
        retry=retry_if_exception_type(_TryAgainError),
        before_sleep=again,
        reraise=True,
    )
    tries(_try, wanted, url, file)


def _try(wanted: Wanted, url: httpx.URL, file: BinaryIO) -> None:
    file.truncate(0)
    digest, size = hashlib.sha256(), 0
    with _client(wanted) as client, _answer(client, url, wanted) as answer:
        announced = answer.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > wanted.max_bytes:
            raise _too_large(url, wanted)
        try:
            for block in answer.iter_raw(_BLOCK):
                size += len(block)
                if size > wanted.max_bytes:
                    raise _too_large(url, wanted)
                digest.update(block)
                file.write(block)
        except httpx.TransportError as error:
            msg = f"{_shown(url)}: the connection ended after {size} bytes ({type(error).__name__})"
            raise _TryAgainError(msg) from error
    file.flush()
    if not _is_right(digest.hexdigest(), wanted):
        msg = (
            f"{_shown(url)} is another file: its {size} bytes have the sha256 {digest.hexdigest()}, "
            f"not {wanted.sha256.lower()}; nothing was kept of it"
        )
        raise ToolError(msg)


def _client(wanted: Wanted) -> httpx.Client:
    try:
        verify = ssl.create_default_context(cafile=wanted.authorities) if wanted.authorities else True
    except ssl.SSLError as error:
        msg = f"--verify {wanted.authorities}: certificates in PEM form were expected"
        raise UsageError(msg) from error
    return httpx.Client(verify=verify, timeout=_SILENCE_S)


@contextmanager
def _answer(client: httpx.Client, url: httpx.URL, wanted: Wanted) -> Iterator[httpx.Response]:
    """The answer that has the file, at the end of at most so many redirects, each of them https."""
    here = url
    for _ in range(_REDIRECTS + 1):
        headers = {"Accept-Encoding": "identity"}
        if wanted.token and (here.host, here.port) == (url.host, url.port):
            headers["Authorization"] = f"Bearer {wanted.token}"
        try:
            answer = client.send(client.build_request("GET", here, headers=headers), stream=True)
        except httpx.TransportError as error:
            if _is_distrust(error):
                msg = f"{_shown(here)}: the server's certificate is not to be trusted (--verify names authorities)"
                raise ToolError(msg) from error
            msg = f"{_shown(here)} cannot be reached ({type(error).__name__})"
            raise _TryAgainError(msg) from error
        try:
            if answer.next_request is None:
                _refuse_failure(answer, here)
                yield answer
                return
            here = answer.next_request.url
        finally:
            answer.close()
        if here.scheme != "https":
            msg = f"{_shown(url)} leads to {_shown(here)}, which is not https"
            raise ToolError(msg)
    msg = f"{_shown(url)} leads from one address to the next more than {_REDIRECTS} times"
    raise ToolError(msg)


def _refuse_failure(answer: httpx.Response, url: httpx.URL) -> None:
    status = answer.status_code
    if status == HTTPStatus.OK:
        return
    msg = f"{_shown(url)} is answered with {status}"
    if status in _TEMPORARY or status >= _SERVERS_OWN:
        raise _TryAgainError(msg)
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        msg += f": a token goes to {TOKEN_VARIABLE}; an address that is signed may be too old"
    raise ToolError(msg)


def _is_distrust(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _too_large(url: httpx.URL, wanted: Wanted) -> ToolError:
    msg = f"{_shown(url)} is larger than {wanted.max_bytes} bytes (--max-bytes); nothing was kept of it"
    return ToolError(msg)


def _shown(url: httpx.URL) -> str:
    """An address without what may be secret in it."""
    return str(url.copy_with(query=None, fragment=None, username=None, password=None))


def _is_right(digest: str, wanted: Wanted) -> bool:
    return hmac.compare_digest(digest, wanted.sha256.lower())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
