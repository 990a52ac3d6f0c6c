"""What proves to a server, or to a proxy before it, that the client may ask; and where it may be shown: nowhere.

A credential is in no ``repr``, message, log line or file, and goes to no other host than the one it is meant for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import WrongUse

TOKEN_VARIABLE = "NNUNET_TORCHSERVE_TOKEN"  # noqa: S105 (a variable's name)

_VISIBLE = re.compile(r"[\x21-\x7e]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110: what a token, a header's value and a header's name may hold."""

_OURS = frozenset({
    "accept", "accept-encoding", "connection", "content-length", "content-type", "host", "transfer-encoding",
    "x-nnunet-options", "x-request-id",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credentials:
    """Headers that only the server itself may see.

    Attributes:
        headers: name -> value, ``Authorization`` among them if there is a token.
        verify: whether the server's certificate is checked; or the file of the authorities that may sign it.
    """

    headers: Mapping[str, str] = field(repr=False)
    verify: bool | str = True


def credentials(
    token: str | None = None, headers: Mapping[str, str] | None = None, verify: bool | str | Path = True
) -> Credentials:
    """Check what the caller gave; without a token take the environment's.

    Args:
        token: sent as ``Authorization: Bearer``; ``None`` takes ``NNUNET_TORCHSERVE_TOKEN``, if it is set.
        headers: further headers of every request, which may be secret too.
        verify: ``False`` trusts any certificate; a path names a file of authorities (PEM).

    Raises:
        WrongUse: a header cannot have this name or value; the file of authorities is not there. The message does not
            hold the value.
    """
    given = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
    secret: dict[str, str] = {}
    for name, value in (headers or {}).items():
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            msg = f"{ascii(name)[:80]} is no header that may be set"
            raise WrongUse(msg)
        if not _VALUE.fullmatch(value.strip()):
            msg = f"the header {name} has a value with characters that no header may hold"
            raise WrongUse(msg)
        secret[name] = value.strip()
    if bearer := given.strip():
        if not _VISIBLE.fullmatch(bearer):
            msg = "the token holds a space, a line break or a letter that is not ASCII: it is no bearer token"
            raise WrongUse(msg)
        if any(name.lower() == "authorization" for name in secret):
            msg = "give either a token or a header Authorization"
            if token is not None:
                raise WrongUse(msg)
        else:
            secret["Authorization"] = f"Bearer {bearer}"
    if isinstance(verify, bool):
        return Credentials(secret, verify)
    if not Path(verify).is_file():
        msg = f"verify: no file of certificate authorities at {verify}"
        raise WrongUse(msg)
    return Credentials(secret, str(verify))
