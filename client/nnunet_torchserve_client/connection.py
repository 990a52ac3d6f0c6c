"""The way to a server: its address, whom it must prove to be, what kept a request from coming there."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from functools import cache
from urllib.request import getproxies

import httpx

from .credentials import Credentials
from .errors import ClientError, CutOff, Unreachable, Untrusted, WrongUse

_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]
"""A request may wait in a queue without a byte for long: that a machine is gone is noticed all the same."""

_HIGHEST_PORT = 65535

_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"}
"""OpenSSL's reasons where what answers is no TLS."""


def connections(url: str, credentials: Credentials, *, use_proxies: bool) -> httpx.Client:
    """The connections to one server.

    Args:
        url: its base URL.
        credentials: how its certificate is checked.
        use_proxies: whether the environment's proxies are used; never for this machine's own addresses.

    Raises:
        WrongUse: the URL is none.
    """
    verify = _trust(credentials.verify)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    if use_proxies and getproxies() and not _is_loopback(httpx.URL(url).host):
        return _through_proxies(verify, limits)
    transport = httpx.HTTPTransport(verify=verify, limits=limits, socket_options=_KEEPALIVE)
    return httpx.Client(transport=transport, trust_env=False)


def _through_proxies(verify: ssl.SSLContext | bool, limits: httpx.Limits) -> httpx.Client:
    try:
        return httpx.Client(verify=verify, limits=limits)
    except (ImportError, ValueError, httpx.InvalidURL):
        named = ", ".join(sorted(name for name in os.environ if name.lower().endswith("_proxy") and os.environ[name]))
        msg = (
            f"{named} cannot be used: a proxy is http://HOST:PORT or https://HOST:PORT, or SOCKS where httpx[socks] is "
            "installed. To do without: the server's host in NO_PROXY, or use_proxies=False"
        )
    raise WrongUse(msg)  # not from the error: it may hold a password


@cache
def _trust(verify: bool | str) -> ssl.SSLContext | bool:
    """Which certificates are taken; made once, for a list of authorities takes a while to read."""
    if not isinstance(verify, str):
        return verify and httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        msg = f"verify: {verify} holds no certificates in PEM form"
        raise WrongUse(msg) from error


def checked_url(url: str) -> str:
    """A base URL without a slash at the end.

    Raises:
        WrongUse: it is none, or holds credentials. The message does not hold it then.
    """
    try:
        parsed = httpx.URL(url)
        check_host(parsed)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        msg = "a server is given as http://HOST:PORT or https://HOST, with a path if a proxy has one"
        raise WrongUse(msg) from error
    if parsed.userinfo:
        msg = "the URL holds a user or a password; give credentials as token or headers"
        raise WrongUse(msg)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        shown = "this" if {"@", "?"} & set(url) else repr(url)  # a password or a token may be in it
        msg = f"{shown} is no server; give http://HOST:PORT or https://HOST, with a path if a proxy has one"
        raise WrongUse(msg)
    if "predictions" in parsed.path.split("/"):
        msg = f"{url!r}: a server's address is what comes before /predictions; the model is named by itself"
        raise WrongUse(msg)
    return str(parsed).rstrip("/")


def check_host(url: httpx.URL) -> None:
    """Raise :class:`ValueError` unless a name server can be asked for its host, and it has a port."""
    url.raw_host.decode("ascii").encode("idna")  # as sockets do
    if not url.host.isprintable() or not 0 < (1 if url.port is None else url.port) <= _HIGHEST_PORT:
        msg = "no host and port"
        raise ValueError(msg)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def no_connection(error: httpx.TransportError, *, begun: bool) -> ClientError:
    """What a connection's failure means; ``begun``: whether an answer had begun to come."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Untrusted(f"the server's certificate is not to be trusted: {cause.verify_message}")
    if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
        return WrongUse("the request could not be made as HTTP")
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        reason = next(filter(None, map(_of_the_system, causes)), str(error) or type(error).__name__)
        return Unreachable(f"no connection to the server: {reason}")
    if begun:
        return CutOff("the connection ended before the answer did")
    return Unreachable("the connection ended before the answer began")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_the_system(error: BaseException) -> str | None:
    """What the operating system or TLS says of a connection, with what may be wrong; ``None`` of other errors."""
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS at this port: is it http, not https?" if error.reason in _NO_TLS else error.reason
    if isinstance(error, socket.gaierror):
        return f"{error.strerror}: is the host's name right?"
    if isinstance(error, ConnectionRefusedError):
        return f"{error.strerror}: does it run, and at this port?"
    return error.strerror if isinstance(error, OSError) else None
