"""Where a server listens: what was asked for by flags and in config.properties, checked before anything starts.

The inference and the metrics port may be open to other machines, the management port only where TorchServe's tokens are
on: whoever reaches it can load models. gRPC stays on this machine.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .errors import ToolError, UsageError
from .properties import Properties

LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 (whoever asks for it is warned)

LARGEST_HTTP_PORT = 65534
"""TorchServe refuses 65535 (its ``Connector.parse``)."""

LARGEST_PORT = 65535
_HTTP_PORTS = ("inference", "management", "metrics")
_STANDARD_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://(\[[^/]*\]|[^:/\s]+)(?::([0-9]{1,5}))?/?", re.IGNORECASE)
_KEY_FILES = ("keystore", "private_key_file", "certificate_file")


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of a server."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071


@dataclass(frozen=True, slots=True)
class AskedPorts:
    """Ports that were asked for; ``None`` takes the one in config.properties, else that of :class:`Ports`."""

    inference: int | None = None
    management: int | None = None
    metrics: int | None = None
    grpc_inference: int | None = None
    grpc_management: int | None = None


@dataclass(frozen=True, slots=True)
class Hosts:
    """Addresses of this machine; ``None`` takes the one in config.properties, else loopback.

    Attributes:
        inference, management, metrics: of each port, an IPv4 address or a name.
    """

    inference: str | None = None
    management: str | None = None
    metrics: str | None = None


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens.

    Attributes:
        scheme: of the inference port, ``http`` or ``https``.
        host: of the inference port, an IPv4 address; gRPC's ports are on loopback.
        ports: see :class:`Ports`.
        management_host, metrics_host: of those ports.
    """

    scheme: str = "http"
    host: str = LOOPBACK
    ports: Ports = Ports()
    management_host: str = LOOPBACK
    metrics_host: str = LOOPBACK

    @property
    def inference_url(self) -> str:
        """What a client on this machine calls."""
        return f"{self.scheme}://{on_this_machine(self.host)}:{self.ports.inference}"

    @property
    def management_url(self) -> str:
        """Of the management API, for this machine."""
        return f"http://{on_this_machine(self.management_host)}:{self.ports.management}"

    @property
    def metrics_url(self) -> str:
        """Of the metrics API, for this machine."""
        return f"http://{on_this_machine(self.metrics_host)}:{self.ports.metrics}"

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach the inference port."""
        return _is_open(self.host)

    def host_of(self, port: str) -> str:
        """The address of a port, by its name in :class:`Ports`."""
        hosts = {"inference": self.host, "management": self.management_host, "metrics": self.metrics_host}
        return hosts.get(port, LOOPBACK)

    def settings(self) -> dict[str, object]:
        """The keys of config.properties that say all this."""
        return {
            "inference_address": f"{self.scheme}://{self.host}:{self.ports.inference}",
            "management_address": f"http://{self.management_host}:{self.ports.management}",
            "metrics_address": f"http://{self.metrics_host}:{self.ports.metrics}",
            "grpc_inference_address": LOOPBACK,
            "grpc_management_address": LOOPBACK,
            "grpc_inference_port": self.ports.grpc_inference,
            "grpc_management_port": self.ports.grpc_management,
        }


def choose(config: Properties, hosts: Hosts, asked: Ports | AskedPorts, *, tokens: bool = False) -> Addresses:
    """What holds: a flag before config.properties before the default, each for itself.

    Args:
        config: the file to start from.
        hosts: addresses or names of this machine.
        asked: ports.
        tokens: whether TorchServe asks for its tokens.

    Raises:
        UsageError: an address that cannot be meant, or that this machine does not have; a gRPC port that the file does
            not have on loopback; a management port open to other machines without tokens.
    """
    scheme, configured_host, inference = _inference(config)
    management_host, management = _plain(config, "management")
    metrics_host, metrics = _plain(config, "metrics")
    address = _host(hosts.inference, "--host", configured_host, config)
    management_address = _host(hosts.management, "--management-host", management_host, config)
    metrics_address = _host(hosts.metrics, "--metrics-host", metrics_host, config)
    if _is_open(management_address) and not tokens:
        msg = (
            f"the management port at {management_address} would let every machine that reaches it load models: give "
            f"--tokens, so that it asks for TorchServe's own, or leave it on {LOOPBACK}"
        )
        raise UsageError(msg)
    configured = AskedPorts(
        inference,
        management,
        metrics,
        _grpc(config, "inference"),
        _grpc(config, "management"),
    )
    chosen = asdict(Ports())
    for source in (configured, asked):
        chosen |= {name: port for name, port in asdict(source).items() if port is not None}
    ports = Ports(**chosen)
    for name, port in chosen.items():
        largest = LARGEST_HTTP_PORT if name in _HTTP_PORTS else LARGEST_PORT
        if not 1 <= port <= largest:
            msg = f"the {name.replace('_', '-')} port {port} should be from 1 to {largest}"
            raise UsageError(msg)
    return Addresses(scheme, address, ports, management_address, metrics_address)


def check_free(addresses: Addresses) -> None:
    """Try each address that will be bound.

    Raises:
        UsageError: two ports are one, or this machine does not have the address.
        ToolError: a port is taken, or this user may not have it.
    """
    numbers = asdict(addresses.ports)
    if len(set(numbers.values())) != len(numbers):
        msg = f"every port must be another number; got {numbers}"
        raise UsageError(msg)
    taken = []
    for name, port in numbers.items():
        host = addresses.host_of(name)
        flag = f"--{name.replace('_', '-')}-port"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    msg = f"{host} is no address of this machine; it has {', '.join(_own_addresses())}"
                    raise UsageError(msg) from error
                state = "is taken" if error.errno == errno.EADDRINUSE else "cannot be had"
                taken.append(f"port {port} {state} ({error.strerror}): choose another with {flag}")
    if taken:
        raise ToolError("; ".join(taken))


def free_ports() -> Ports:
    """Ports that nothing listens on at this moment."""
    probes = [socket.create_server((LOOPBACK, 0)) for _ in range(5)]
    numbers = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return Ports(*numbers)


def _inference(config: Properties) -> tuple[str, str | None, int | None]:
    """Scheme, host and port that a file has for the inference port, ``None`` what it has not."""
    value = config.get("inference_address")
    if value is None:
        return "http", None, None
    scheme, host, port = _split(config, "inference_address", value)
    if scheme == "https":
        _check_keys(config)
    return scheme, host, port


def _split(config: Properties, key: str, value: str) -> tuple[str, str, int]:
    if value.lower().startswith("unix:"):
        msg = f"{config.name}: {key}={value}: unix sockets are not served; use http://ADDRESS:PORT"
        raise UsageError(msg)
    match = _URL.fullmatch(value)
    if match is None:
        msg = f"{config.name}: {key}={value} should be http://ADDRESS:PORT"
        raise UsageError(msg)
    scheme = match[1].lower()
    return scheme, match[2], int(match[3]) if match[3] else _STANDARD_PORTS[scheme]


def _check_keys(config: Properties) -> None:
    """TLS needs a keystore, or a key with its certificate; TorchServe would make up a certificate."""
    files = {key: config.get(key) for key in _KEY_FILES}
    if not (files["keystore"] or (files["private_key_file"] and files["certificate_file"])):
        msg = (
            f"{config.name}: inference_address is https, which needs keystore, or private_key_file and "
            "certificate_file; or use http and end TLS in a proxy"
        )
        raise UsageError(msg)
    for key, file in files.items():
        if file and not (Path(file).is_absolute() and Path(file).is_file()):
            msg = f"{config.name}: {key}={file} should be the absolute path of a file"
            raise UsageError(msg)


def _plain(config: Properties, name: str) -> tuple[str | None, int | None]:
    """Host and port that a file has for an API without TLS, ``None`` what it has not."""
    key = f"{name}_address"
    value = config.get(key)
    if value is None:
        return None, None
    scheme, host, port = _split(config, key, value)
    if scheme != "http":
        msg = f"{config.name}: {key}={value} should be http; end TLS in a proxy"
        raise UsageError(msg)
    return host, port


def _host(asked: str | None, flag: str, configured: str | None, config: Properties) -> str:
    """The IPv4 address that holds for a port."""
    if asked is not None:
        return _resolve(asked, f"{flag} {asked}")
    return LOOPBACK if configured is None else _resolve(configured, config.name)


def _grpc(config: Properties, name: str) -> int | None:
    """The port that a file has for a gRPC API."""
    address, port = f"grpc_{name}_address", f"grpc_{name}_port"
    host = config.get(address)
    if host is not None and not _is_loopback(host):
        msg = (
            f"{config.name}: {address}={host}: serve opens no gRPC port to other machines, so write {LOOPBACK}, and "
            "put a proxy with authentication in front if need be"
        )
        raise UsageError(msg)
    value = config.get(port)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", value):
        msg = f"{config.name}: {port}={value} should be a number from 1 to {LARGEST_PORT}"
        raise UsageError(msg)
    return int(value)


def _is_loopback(host: str) -> bool:
    return host.lower() in (LOOPBACK, "localhost")


def _is_open(host: str) -> bool:
    """Whether other machines may reach an address."""
    return not ipaddress.IPv4Address(host).is_loopback


def on_this_machine(host: str) -> str:
    """Where a client on this machine finds who listens at an address."""
    return LOOPBACK if host == EVERY_ADDRESS else host


def _resolve(host: str, source: str) -> str:
    """The IPv4 address of an address or a name.

    Raises:
        UsageError: there is none, or nobody can listen at it.
    """
    bare = host.removeprefix("[").removesuffix("]")
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(bare)
    except ValueError:
        address = ipaddress.IPv4Address(_looked_up(host, source))
    if isinstance(address, ipaddress.IPv6Address):
        msg = f"{source}: TorchServe cannot be given an IPv6 address; use an IPv4 address, or a proxy in front"
        raise UsageError(msg)
    everybodys = {each.broadcast for addresses in psutil.net_if_addrs().values() for each in addresses}
    if address.is_multicast or str(address) in everybodys | {"255.255.255.255"}:
        msg = f"{source}: {address} is no address that a server can have"
        raise UsageError(msg)
    return str(address)


def _looked_up(name: str, source: str) -> str:
    """An IPv4 address of a name, one of this machine if there are several."""
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", name) or re.fullmatch(r"[0-9.]*", name):
        msg = f"{source}: an address as {LOOPBACK}, or a name of this machine, was expected"
        raise UsageError(msg)
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        msg = f"{source}: the name {name} is not known here ({error.strerror})"
        raise UsageError(msg) from error
    addresses = [str(each[4][0]) for each in found if each[0] == socket.AF_INET]
    if not addresses:
        msg = f"{source}: {name} has IPv6 addresses only, and TorchServe cannot be given one"
        raise UsageError(msg)
    own = set(_own_addresses())
    return next((address for address in addresses if address in own), addresses[0])


def _own_addresses() -> list[str]:
    """This machine's IPv4 addresses."""
    interfaces = psutil.net_if_addrs().values()
    return [each.address for addresses in interfaces for each in addresses if each.family == socket.AF_INET]
