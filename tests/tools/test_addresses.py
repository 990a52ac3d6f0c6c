"""Where a server listens: flags, config.properties, defaults, and what is refused."""

from __future__ import annotations

import socket
from dataclasses import replace

import psutil
import pytest

from nnunet_torchserve_tools.addresses import Addresses, AskedPorts, Hosts, Ports, check_free, choose, free_ports
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.properties import Properties


def chosen(lines: str = "", host: str | None = None, ports: Ports | AskedPorts | None = None) -> Addresses:
    return choose(Properties.parse(lines.encode(), "my.properties"), Hosts(host), ports or AskedPorts())


@pytest.mark.parametrize(
    ("lines", "host", "port", "expected"),
    [
        ("", None, None, "http://127.0.0.1:8080"),
        ("inference_address=http://0.0.0.0:9000", None, None, "http://0.0.0.0:9000"),
        ("inference_address : HTTP://0.0.0.0:9000 ", None, None, "http://0.0.0.0:9000"),
        ("inference_address=http://0.0.0.0:9000", None, 7000, "http://0.0.0.0:7000"),
        ("inference_address=http://0.0.0.0:9000", "127.0.0.2", None, "http://127.0.0.2:9000"),
        ("inference_address=http://0.0.0.0:9000", "localhost", 7000, "http://127.0.0.1:7000"),
        ("inference_address=http://localhost", None, None, "http://127.0.0.1:80"),
        ("", "0.0.0.0", None, "http://0.0.0.0:8080"),
        ("", "0.0.0.0", 7000, "http://0.0.0.0:7000"),
    ],
)
def test_a_flag_goes_before_the_file_and_the_file_before_the_default(
    lines: str, host: str | None, port: int | None, expected: str
) -> None:
    assert chosen(lines, host, AskedPorts(inference=port)).settings()["inference_address"] == expected


def test_every_port_of_the_file_is_honoured_unless_a_flag_says_otherwise() -> None:
    lines = (
        "inference_address=http://127.0.0.1:1001\nmanagement_address=http://localhost:1002\n"
        "metrics_address=http://127.0.0.1:1003\ngrpc_inference_port=1004\ngrpc_management_port=1005"
    )
    assert chosen(lines).ports == Ports(1001, 1002, 1003, 1004, 1005)
    assert chosen(lines, ports=AskedPorts(metrics=9, grpc_inference=8)).ports == Ports(1001, 1002, 9, 8, 1005)
    assert chosen(lines, ports=Ports()).ports == Ports()


def test_the_url_is_one_that_a_client_here_can_call() -> None:
    assert chosen(host="0.0.0.0").inference_url == "http://127.0.0.1:8080"
    assert chosen(host="127.0.0.2").inference_url == "http://127.0.0.2:8080"


def test_what_is_open_to_others_is_known() -> None:
    assert [chosen(host=host).is_open for host in ("127.0.0.1", "127.9.9.9", "localhost", "0.0.0.0", "10.1.2.3")] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("", "an address as 127"),
        ("http://127.0.0.1", "an address as 127"),
        ("127.0.0.1:8080", "an address as 127"),
        ("127.1", "an address as 127"),
        ("8080", "an address as 127"),
        ("two words", "an address as 127"),
        ("::1", "IPv6"),
        ("[::]", "IPv6"),
        ("no-such-machine.invalid", "not known"),
        ("224.0.0.1", "no address that a server can have"),
        ("255.255.255.255", "no address that a server can have"),
    ],
)
def test_a_host_that_makes_no_sense_is_refused(host: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"--host .*{reason}"):
        chosen(host=host)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("inference_address=unix:/tmp/x.sock", "unix sockets are not served"),
        ("inference_address=127.0.0.1:8080", "should be http://ADDRESS:PORT"),
        ("inference_address=ftp://127.0.0.1:8080", "should be http://ADDRESS:PORT"),
        ("inference_address=http://127.0.0.1:8080/predict", "should be http://ADDRESS:PORT"),
        ("inference_address=http://[::1]:8080", "IPv6"),
        ("inference_address=", "should be http://ADDRESS:PORT"),
        ("inference_address=https://127.0.0.1:8443", "needs keystore"),
        ("inference_address=https://127.0.0.1:8443\nkeystore=keys.p12", "absolute path of a file"),
        ("inference_address=http://no-such-machine.invalid:8080", "not known"),
        ("management_address=https://127.0.0.1:8444", "should be http; end TLS in a proxy"),
        ("metrics_address=https://127.0.0.1:8444", "should be http; end TLS in a proxy"),
        ("grpc_inference_address=0.0.0.0", "no gRPC port to other machines.* write 127.0.0.1"),
        ("grpc_management_address=::", "no gRPC port to other machines"),
        ("grpc_inference_port=many", "should be a number"),
    ],
)
def test_an_address_of_the_file_that_cannot_be_honoured_is_refused(line: str, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"my\.properties: .*{reason}"):
        chosen(line)


@pytest.mark.parametrize("lines", ["", "management_address=http://0.0.0.0:8081"])
def test_a_management_port_is_open_to_others_with_tokens_only(lines: str) -> None:
    config = Properties.parse(lines.encode(), "my.properties")
    hosts = Hosts(management=None if lines else "0.0.0.0")
    with pytest.raises(UsageError, match=r"management port at 0\.0\.0\.0 .* --tokens"):
        choose(config, hosts, AskedPorts())
    chosen = choose(config, hosts, AskedPorts(), tokens=True)
    assert chosen.settings()["management_address"] == "http://0.0.0.0:8081"
    assert chosen.management_url == "http://127.0.0.1:8081"


def test_each_port_has_an_address_of_its_own() -> None:
    config = Properties.parse(b"metrics_address=http://0.0.0.0:9002", "my.properties")
    settings = choose(config, Hosts(management="127.0.0.2"), AskedPorts()).settings()
    addresses = [settings[f"{name}_address"] for name in ("inference", "management", "metrics")]
    assert addresses == ["http://127.0.0.1:8080", "http://127.0.0.2:8081", "http://0.0.0.0:9002"]
    assert choose(config, Hosts(metrics="127.0.0.3"), AskedPorts()).metrics_url == "http://127.0.0.3:9002"


@pytest.mark.parametrize("port", [0, 65535, 99999])
def test_a_port_that_torchserve_does_not_take_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match=f"inference port {port} should be from 1 to 65534"):
        chosen(f"inference_address=http://127.0.0.1:{port}")


def test_a_foreign_address_is_refused_with_those_that_there_are() -> None:
    own = next(a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET)
    with pytest.raises(UsageError, match=f"198.51.100.99 is no address of this machine; it has .*{own}"):
        check_free(replace(chosen(ports=free_ports()), host="198.51.100.99"))


@pytest.mark.parametrize(("listener", "host"), [("127.0.0.2", "127.0.0.2"), ("127.0.0.1", "0.0.0.0")])
def test_the_address_that_will_be_bound_is_tried(listener: str, host: str) -> None:
    with socket.create_server((listener, 0)) as taken:
        port = taken.getsockname()[1]
        wanted = Addresses(host=host, ports=replace(free_ports(), inference=port))
        with pytest.raises(ToolError, match=f"port {port} is taken .*--inference-port"):
            check_free(wanted)
        if listener == "127.0.0.2":
            check_free(replace(wanted, host="127.0.0.1"))
