"""Where a redirect leads, and what may be sent there: an image, if it stays encrypted, and no credentials."""

from __future__ import annotations

from http import HTTPStatus

import httpx

from .connection import check_host
from .errors import BadAnswer, NotServed

_KEPT = {HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.PERMANENT_REDIRECT}
"""Redirects that keep method and body."""


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    """Whom credentials are for: scheme, host and port."""
    return url.scheme, url.host, url.port


def shown(url: httpx.URL) -> str:
    """A URL's origin, for messages."""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace').rpartition('@')[2]}"


def redirected(target: httpx.URL, response: httpx.Response) -> httpx.URL:
    """Where an answer sends the request.

    Args:
        target: where it was sent.
        response: a redirect.

    Raises:
        BadAnswer: nowhere, or without the image.
        NotServed: to where nothing is encrypted.
    """
    status = response.status_code
    try:
        where = target.join(response.headers["location"])
        check_host(where)
    except (httpx.InvalidURL, ValueError, KeyError) as error:
        msg = f"HTTP {status} redirects to nowhere"
        raise BadAnswer(msg, status=status) from error
    if status not in _KEPT:
        msg = f"HTTP {status} redirects to {shown(where)} and drops the image; give that address as the server's"
        raise BadAnswer(msg, status=status)
    if where.scheme not in ("http", "https") or (target.scheme == "https" and where.scheme == "http"):
        msg = f"HTTP {status} redirects to {shown(where)}, where nothing is encrypted; an image is not sent there"
        raise NotServed(msg, status=status)
    return where.copy_with(userinfo=b"", fragment=None)
