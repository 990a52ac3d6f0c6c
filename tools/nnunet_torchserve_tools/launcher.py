"""Start stock TorchServe for nnU-Net archives, wait until it can answer, and stop it again.

``start`` gives TorchServe a private temporary directory (its pid file, worker sockets and unpacked models would
collide with another server's), its own worker ports and working directory, no PYTHONPATH, a Java runtime and a heap.
The server's state lies in ``state_dir/server.json``; ``stop`` finds it there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from nnunet_handler import LOAD_FAILED
from nnunet_torchserve.bundle import BUNDLE_FILE
from nnunet_torchserve.draining import ORDERS, REPORTS
from nnunet_torchserve.environment import (
    CONTROL_DIR_VARIABLE,
    FAULTS_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    TESTING_VARIABLE,
    runtime_dir,
)
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import LIMITS_VARIABLE
from nnunet_torchserve.machine import THREADS_VARIABLE, memory_bytes, usable_threads
from nnunet_torchserve.settings import HandlerSettings

from .archive import MANIFEST_FILE, MODEL_CONFIG_FILE, MODEL_NAME, check_device_ids
from .errors import ToolError, UsageError
from .java import java_home
from .sizing import compute_sizes

STATE_FILE = "server.json"
STOPPING_FILE = "stopping"
"""Tells a ``serve`` in the foreground that its server ended on purpose."""

WORKERS_ON_CPU, WORKERS_PER_GPU = 4, 8
"""A worker is one case in flight: the engine chooses among as many."""

READY_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
_POLL_S = 0.2
_LOG_TAIL_LINES = 15
_WORKER_PORTS = range(20000, 60000, 100)


class DeviceKind(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on loopback."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What to serve, and how.

    Attributes:
        model_store: folder with the archives.
        models: ``NAME=FILE.mar`` or ``FILE.mar`` each, or the one word ``all``.
        state_dir: where the server's state and logs go.
        ports: see :class:`Ports`.
        workers: per device and model; ``None`` takes the archive's number, else 4 on a CPU and 8 a GPU.
        queue: waiting requests a model; ``None`` is twice its workers.
        device: see :class:`DeviceKind`.
        body_limit, heap: bytes set by hand, or ``None``.
        config: another config.properties to start from.
        testing: faults may be ordered through the environment.
    """

    model_store: Path
    models: Sequence[str] = ("all",)
    state_dir: Path = Path(".nnunet-torchserve")
    ports: Ports = Ports()
    workers: int | None = None
    queue: int | None = None
    device: DeviceKind = DeviceKind.AUTO
    body_limit: int | None = None
    heap: int | None = None
    config: Path | None = None
    testing: bool = False


@dataclass(frozen=True, slots=True)
class Archive:
    """What the launcher needs of a .mar file.

    Attributes:
        name, version: TorchServe's.
        file: in the model store.
        workers: in all; ``None`` if it does not say.
        device_ids: the GPUs that serve it; empty for all.
    """

    name: str
    version: str
    file: str
    workers: int | None
    device_ids: tuple[int, ...] = ()

    def gpus_of(self, gpus: int) -> int:
        """How many of so many GPUs serve it."""
        return min(gpus, len(self.device_ids) or gpus)

    def workers_on(self, gpus: int, asked: int | None) -> int:
        """TorchServe workers on that many GPUs, or on the CPU."""
        gpus = self.gpus_of(gpus)
        if asked is not None:
            return asked * max(1, gpus)
        if self.workers is not None:
            return max(self.workers, gpus)
        return WORKERS_PER_GPU * gpus or WORKERS_ON_CPU

    def workers_on_one(self, gpus: int, asked: int | None) -> int:
        """The workers that share an engine, at most."""
        return -(-self.workers_on(gpus, asked) // max(1, self.gpus_of(gpus)))


@dataclass(frozen=True, slots=True)
class Server:
    """A server, as ``server.json`` holds it. Its private temporary directory names its JVM beyond doubt.

    ``several`` are the models of which it was started with more than one version.
    """

    temp_dir: str
    inference_url: str
    management_url: str
    metrics_url: str
    models: list[str]
    log_dir: str
    control_dir: str
    several: list[str] = field(default_factory=list)

    def process(self) -> psutil.Process | None:
        """The JVM, ``None`` if it is not there."""
        mark = f"-Djava.io.tmpdir={self.temp_dir}"
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if mark in process.cmdline() and _runs(process):
                    return process
        return None


def _runs(process: psutil.Process) -> bool:
    """Whether a process is still that process and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(request: ServeRequest) -> Server:
    """Start TorchServe and return when every worker of every model is READY.

    Raises:
        UsageError: a missing archive or model store, sizes that do not fit, a server that runs already, an archive for
            a GPU that is not there.
        ToolError: a taken port, no Java, CUDA without a GPU, a model that does not load.
    """
    if not request.testing and os.environ.get(FAULTS_VARIABLE):
        msg = f"{FAULTS_VARIABLE} is set, which is for tests only: unset it"
        raise UsageError(msg)
    if (running := read_state(request.state_dir)) and running.process():
        msg = f"a server of this state directory runs already at {running.inference_url}; stop it first"
        raise UsageError(msg)
    stop(request.state_dir)  # what a server that ended by itself left
    gpus = _gpus(request.device)
    base_config = _base_config(request.config)
    archives = find_archives(request.model_store, request.models)
    _check_gpus(archives, gpus)
    workers = {archive: archive.workers_on(gpus, request.workers) for archive in archives}
    default_workers = (request.workers or (WORKERS_PER_GPU if gpus else WORKERS_ON_CPU)) * max(1, gpus)
    queue = request.queue or 2 * max(workers.values())
    held = sum(workers.values()) + queue * len(archives)
    sizes = compute_sizes(memory_bytes(), held, heap=request.heap, body_limit=request.body_limit)
    _check_ports(request.ports)
    java = java_home()

    state_dir = request.state_dir.resolve()
    log_dir, work_dir = state_dir / "logs", state_dir / "work"
    if log_dir.exists():  # the last server's log may be what somebody looks for
        previous = state_dir / "logs.previous"
        shutil.rmtree(previous, ignore_errors=True)
        log_dir.rename(previous)
    for folder in (log_dir, work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    control_dir = _new_control_dir(state_dir)
    temp_dir = Path(tempfile.mkdtemp(prefix="nnunet-ts-"))
    store, heap = request.model_store.resolve(), sizes.heap // 1024**2
    server = Server(
        temp_dir=str(temp_dir),
        inference_url=f"http://127.0.0.1:{request.ports.inference}",
        management_url=f"http://127.0.0.1:{request.ports.management}",
        metrics_url=f"http://127.0.0.1:{request.ports.metrics}",
        models=sorted({archive.name for archive in archives}),
        log_dir=str(log_dir),
        control_dir=str(control_dir),
        several=sorted(name for name, versions in Counter(a.name for a in archives).items() if versions > 1),
    )
    settings = {
        "inference_address": server.inference_url,
        "management_address": server.management_url,
        "metrics_address": server.metrics_url,
        "grpc_inference_port": request.ports.grpc_inference,
        "grpc_management_port": request.ports.grpc_management,
        "allowed_urls": f"file://{re.escape(str(store))}/.*".replace("\\", "\\\\"),
        "job_queue_size": queue,
        "max_request_size": sizes.front_end_limit,
        "max_response_size": sizes.front_end_limit,
        "vmargs": f"-Xmx{heap}m -XX:MaxDirectMemorySize={heap}m -XX:+ExitOnOutOfMemoryError",
        "initial_worker_port": _worker_ports(),
        "number_of_gpu": gpus,
        "default_workers_per_model": default_workers,
    }
    metrics = state_dir / "metrics.yaml"
    metrics.write_text(_packaged("metrics.yaml"))
    if not re.search(r"^\s*metrics_config\s*=", base_config, re.MULTILINE):
        settings["metrics_config"] = metrics
    config = state_dir / "config.properties"
    config.write_text(merge_properties(base_config, settings))
    waiting_cases = max(archive.workers_on_one(gpus, request.workers) for archive in archives)
    limits = {"body_bytes": sizes.body_limit, "response_bytes": sizes.body_limit, "waiting_cases": waiting_cases}
    environment = _environment(java, temp_dir, log_dir, control_dir) | {LIMITS_VARIABLE: json.dumps(limits)}
    if request.testing:
        environment[TESTING_VARIABLE] = "1"
    (state_dir / STOPPING_FILE).unlink(missing_ok=True)
    _write_state(state_dir, server)  # before there is anything that would have to be found again
    try:
        _launch(config, store, archives, environment, work_dir, log_dir)
        _wait_ready(server, workers, {a: a.workers or default_workers for a in archives})
    except BaseException:
        stop(state_dir)
        raise
    return server


def stop(state_dir: Path, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the server of a state directory and remove its temporary files.

    Returns:
        Whether one was running.

    Raises:
        ToolError: it did not end in time.
    """
    server = read_state(state_dir)
    if server is None:
        return False
    (state_dir / STOPPING_FILE).touch()
    process = server.process()
    if process is not None:
        family = [process]
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=timeout_s)
        for leftover in alive:
            with suppress(psutil.NoSuchProcess):
                leftover.kill()
        if psutil.wait_procs(alive, timeout=5)[1]:
            msg = f"TorchServe (process {process.pid}) did not end"
            raise ToolError(msg)
    shutil.rmtree(server.temp_dir, ignore_errors=True)
    (state_dir / STATE_FILE).unlink(missing_ok=True)
    return process is not None


def wait(server: Server, state_dir: Path) -> bool:
    """Block until the server is gone; returns whether it was stopped on purpose."""
    process = server.process()
    while process is not None and _runs(process):
        time.sleep(_POLL_S)
    return (state_dir / STOPPING_FILE).exists()


def read_state(state_dir: Path) -> Server | None:
    """The server that ``state_dir`` names, running or not."""
    try:
        return Server(**json.loads((state_dir / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_archives(model_store: Path, models: Sequence[str]) -> list[Archive]:
    """The archives to serve.

    Raises:
        UsageError: no such folder or file, or a file that 'nnunet-torchserve archive' did not make.
    """
    if not model_store.is_dir():
        msg = f"the model store {model_store.resolve()} does not exist; first: nnunet-torchserve archive MODEL_FOLDER"
        raise UsageError(msg)
    if list(models) == ["all"]:
        wanted: list[tuple[str | None, str]] = [(None, file.name) for file in sorted(model_store.glob("*.mar"))]
        if not wanted:
            msg = f"{model_store.resolve()} has no archive (*.mar); first: nnunet-torchserve archive MODEL_FOLDER"
            raise UsageError(msg)
    else:
        wanted = [(name or None, file) for name, _, file in (model.rpartition("=") for model in models)]
    archives = [_read_archive(model_store, name, file) for name, file in wanted]
    for number, archive in enumerate(archives):
        for other in archives[:number]:
            if (other.name, other.version) == (archive.name, archive.version):
                msg = f"{other.file} and {archive.file} are both {archive.name} {archive.version}; serve one of them"
                raise UsageError(msg)
    return archives


def _read_archive(model_store: Path, name: str | None, file: str) -> Archive:
    if name is not None and not MODEL_NAME.fullmatch(name):
        msg = f"{name!r} is no model name; use --models NAME=FILE.mar, once for each model"
        raise UsageError(msg)
    if "/" in file or not (model_store / file).is_file():
        found = ", ".join(sorted(f.name for f in model_store.glob("*.mar"))) or "none"
        msg = f"the model store {model_store.resolve()} has no archive {file}; it has: {found}"
        raise UsageError(msg)
    try:
        with zipfile.ZipFile(model_store / file) as archive:
            archive.getinfo(BUNDLE_FILE)
            model = json.loads(archive.read(MANIFEST_FILE))["model"]
            config = yaml.safe_load(archive.read(MODEL_CONFIG_FILE)) or {}
        if not isinstance(config, dict):
            msg = f"{MODEL_CONFIG_FILE} should be a mapping of settings"
            raise UsageError(msg)
        HandlerSettings.read(config.get("handler"))
        workers = config.get("minWorkers")
        if workers is not None and (type(workers) is not int or workers < 1):
            msg = f"minWorkers: {workers!r} should be a number from 1"
            raise UsageError(msg)
        ids = check_device_ids(config.get("deviceIds"))
        return Archive(name or model["modelName"], model["modelVersion"], file, workers, ids)
    except (UsageError, BundleError) as error:
        msg = f"{file}: {error}"
        raise UsageError(msg) from error
    except (zipfile.BadZipFile, KeyError, ValueError, yaml.YAMLError) as error:
        msg = f"{file} is damaged or was not made by 'nnunet-torchserve archive'"
        raise UsageError(msg) from error


def merge_properties(base: str, settings: Mapping[str, object]) -> str:
    """``base`` with the given keys replaced in place, and those that it lacks added at the end."""
    left = dict(settings)
    lines = []
    for line in base.splitlines():
        key = line.partition("=")[0].strip()
        lines.append(f"{key}={left.pop(key)}" if key in left and not line.lstrip().startswith("#") else line)
    return "\n".join([*lines, *(f"{key}={value}" for key, value in left.items())]) + "\n"


def _base_config(config: Path | None) -> str:
    if config is not None:
        try:
            return config.read_text()
        except OSError as error:
            msg = f"cannot read {config}: {error.strerror}"
            raise UsageError(msg) from error
    return _packaged("config.properties")


def _packaged(name: str) -> str:
    packaged = resources.files(__package__) / name
    if packaged.is_file():
        return packaged.read_text()
    return (Path(__file__).parents[2] / name).read_text()  # a source checkout


def _gpus(device: DeviceKind) -> int:
    """GPUs to use, as ``nvidia-smi`` counts them; TorchServe counts them so too."""
    if device is DeviceKind.CPU:
        return 0
    listing = ""
    if nvidia_smi := shutil.which("nvidia-smi"):
        answer = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, check=False, timeout=60)
        listing = answer.stdout if answer.returncode == 0 else ""
    gpus = sum(line.startswith("GPU ") for line in listing.splitlines())
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # the workers' PyTorch sees only these
        gpus = min(gpus, len([each for each in visible.split(",") if each.strip() not in ("", "-1")]))
    if gpus == 0 and device is DeviceKind.CUDA:
        msg = "--device cuda was asked for, but no GPU is visible; use --device cpu or check the driver"
        raise ToolError(msg)
    return gpus


def _check_gpus(archives: Sequence[Archive], gpus: int) -> None:
    """Refuse what TorchServe would serve on every GPU; on a CPU there is nothing to choose from."""
    for archive in archives:
        if gpus and max(archive.device_ids, default=0) >= gpus:
            wanted = ", ".join(map(str, archive.device_ids))
            msg = f"{archive.file} is for the GPUs {wanted} (deviceIds), and there are {gpus}, numbered from 0"
            raise UsageError(msg)


def free_ports() -> Ports:
    """Ports that nothing listens on at this moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    numbers = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return Ports(*numbers)


def _check_ports(ports: Ports) -> None:
    numbers = asdict(ports)
    if len(set(numbers.values())) != len(numbers):
        msg = f"every port must be another number; got {numbers}"
        raise UsageError(msg)
    taken = []
    for name, port in numbers.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                taken.append(
                    f"port {port} is taken ({error.strerror}): choose another with --{name.replace('_', '-')}-port"
                )
    if taken:
        raise ToolError("; ".join(taken))


def _new_control_dir(state_dir: Path) -> Path:
    """An empty directory for draining; the last server's orders do not stand."""
    control = state_dir / "control"
    shutil.rmtree(control, ignore_errors=True)
    for folder in (control, control / ORDERS, control / REPORTS):
        folder.mkdir(mode=0o700)
    return control


def _worker_ports() -> int:
    """The first of a hundred port numbers for workers, spread by process so that two servers differ."""
    return _WORKER_PORTS[os.getpid() % len(_WORKER_PORTS)]


def _environment(java: Path, temp_dir: Path, log_dir: Path, control_dir: Path) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TS_CONFIG_FILE")}
    search = [str(Path(sys.executable).parent), str(java / "bin"), environment.get("PATH", "")]
    # threads that spin while they wait keep each other off busy cores: a request took up to ten times as long
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # libraries look at the host's processors when they are loaded, not at a container's quota
    environment.setdefault(THREADS_VARIABLE, str(usable_threads()))
    return environment | {
        "PATH": os.pathsep.join(search),
        "JAVA_HOME": str(java),
        "TEMP": str(temp_dir),
        "TMPDIR": str(temp_dir),
        "LOG_LOCATION": str(log_dir),
        "METRICS_LOCATION": str(log_dir),
        CONTROL_DIR_VARIABLE: str(control_dir),
        RUNTIME_DIR_VARIABLE: str(runtime_dir()),  # not below the private TMPDIR: servers share devices and memory
    }


def _launch(
    config: Path, store: Path, archives: Sequence[Archive], environment: dict[str, str], work_dir: Path, log_dir: Path
) -> None:
    """Run TorchServe's own starter, which leaves the JVM running and writes its pid."""
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs", "--ts-config", str(config)]
    command += ["--model-store", str(store), "--models", *(f"{a.name}={a.file}" for a in archives)]
    with (log_dir / "torchserve.out").open("wb") as output:
        starter = subprocess.run(
            command,
            env=environment,
            cwd=work_dir,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    if starter.returncode != 0:
        msg = f"TorchServe did not start:\n{_tail(log_dir / 'torchserve.out')}"
        raise ToolError(msg)


def _write_state(state_dir: Path, server: Server) -> None:
    unfinished = state_dir / f".{STATE_FILE}"
    unfinished.write_text(json.dumps(asdict(server), indent=2))
    unfinished.replace(state_dir / STATE_FILE)


def _wait_ready(server: Server, workers: Mapping[Archive, int], started: Mapping[Archive, int]) -> None:
    """Poll the management API: ``/ping`` says Healthy before a worker can answer.

    Args:
        server: the one that was started.
        workers: as many as there shall be.
        started: as many as TorchServe starts by itself.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    waiting = dict(workers)
    resized: set[Archive] = set()
    with httpx.Client(base_url=server.management_url, timeout=10, trust_env=False) as management:
        while waiting:
            for archive, count in list(waiting.items()):
                state = _model_state(management, archive)
                if state is None:
                    continue
                if not state:
                    msg = f"TorchServe refused {archive.file}: {_load_warning(Path(server.log_dir), archive.file)}"
                    raise ToolError(msg)
                if count != started[archive] and archive not in resized:
                    path = f"/models/{archive.name}/{archive.version}"
                    scaled = management.put(path, params={"min_worker": count, "max_worker": count})
                    if scaled.is_error:
                        msg = f"TorchServe would not start {count} workers of {archive.name}: {scaled.text}"
                        raise ToolError(msg)
                    resized.add(archive)
                statuses = [worker["status"] for worker in state["workers"]]
                if len(statuses) == count and set(statuses) == {"READY"}:
                    del waiting[archive]
            if not waiting:
                return
            _check_progress(server, waiting, deadline)
            time.sleep(_POLL_S)


def _model_state(management: httpx.Client, archive: Archive) -> dict[str, Any] | None:
    """A model as the management API describes it.

    ``None`` while the API does not answer; empty if there is no such model. TorchServe unpacks the archives of its
    command line before it opens its ports, so what is missing then was refused.
    """
    try:
        answer = management.get(f"/models/{archive.name}/{archive.version}")
    except httpx.TransportError:
        return None
    if answer.status_code == httpx.codes.NOT_FOUND:
        return {}
    if answer.status_code != httpx.codes.OK:
        return None
    state: dict[str, Any] = answer.json()[0]
    return state


def _check_progress(server: Server, waiting: Mapping[Archive, int], deadline: float) -> None:
    log_dir = Path(server.log_dir)
    if server.process() is None:
        msg = f"TorchServe ended while it started:\n{_tail(log_dir / 'torchserve.out')}"
        raise ToolError(msg)
    with suppress(OSError):
        for line in (log_dir / "model_log.log").read_text(errors="replace").splitlines():
            if LOAD_FAILED in line:
                msg = f"a model cannot be served: {line.partition(LOAD_FAILED)[2].strip()}"
                raise ToolError(msg)
    if time.monotonic() > deadline:
        names = ", ".join(archive.name for archive in waiting)
        msg = f"not every worker of {names} was ready after {READY_TIMEOUT_S} s; see {log_dir}"
        raise ToolError(msg)


def _load_warning(log_dir: Path, file: str) -> str:
    """TorchServe's own reason for refusing an archive."""
    with suppress(OSError):
        lines = (log_dir / "ts_log.log").read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            if file in line and "Failed to load model" in line:
                return " ".join(lines[number : number + 2]).partition("Failed to load model: ")[2]
    return f"see {log_dir}"


def _tail(file: Path) -> str:
    with suppress(OSError):
        return "\n".join(file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    return "(no log)"
