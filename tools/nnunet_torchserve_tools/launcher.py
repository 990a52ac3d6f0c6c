"""Start stock TorchServe for nnU-Net archives, wait until it can answer, and stop it again.

``start`` gives TorchServe a private temporary directory (its pid file, worker sockets and unpacked models would
collide with another server's), its own worker ports and working directory, no PYTHONPATH, a Java runtime and a heap.
The server's state lies in ``state_dir/server.json``; ``stop`` finds it there.

TorchServe runs in ``state_dir/work`` and is told of logs and settings by relative paths, so that whatever a state
directory is called, neither Java's properties nor log4j's patterns get to see it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import psutil

from nnunet_torchserve.draining import ORDERS, REPORTS
from nnunet_torchserve.environment import (
    CONTROL_DIR_VARIABLE,
    FAULTS_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    TESTING_VARIABLE,
    runtime_dir,
)
from nnunet_torchserve.limits import LIMITS_VARIABLE
from nnunet_torchserve.machine import THREADS_VARIABLE, memory_bytes, usable_threads

from .addresses import Addresses, AskedPorts, Ports, check_free, choose, free_ports
from .errors import ToolError, UsageError
from .java import java_home, utf8_environment
from .model_store import WORKERS_ON_CPU, WORKERS_PER_GPU, Archive, check_gpus, find_archives
from .properties import Properties
from .readiness import Tell, tail, wait_ready
from .server import STATE_FILE, Server, read_state, runs
from .sizing import Sizes, compute_sizes
from .temporary import make_private_dir

__all__ = [
    "Archive",
    "AskedPorts",
    "DeviceKind",
    "Ports",
    "ServeRequest",
    "Server",
    "find_archives",
    "free_ports",
    "read_state",
    "start",
    "stop",
    "wait",
]

logger = logging.getLogger(__name__)

STOPPING_FILE = "stopping"
"""Tells a ``serve`` in the foreground that its server ended on purpose."""

STOP_TIMEOUT_S = 60
_POLL_S = 0.2
_WORKER_PORTS = range(20000, 60000, 100)
_GIVEN_OTHERWISE = ("model_store", "load_models", "model_snapshot")
"""Keys that TorchServe takes from its command line instead, or that would load other models."""


class DeviceKind(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What to serve, and how.

    Attributes:
        model_store: folder with the archives.
        models: ``NAME=FILE.mar`` or ``FILE.mar`` each, or the one word ``all``.
        state_dir: where the server's state and logs go.
        ports: see :class:`AskedPorts`.
        host: an address or name of this machine for the inference port; ``None`` takes ``config``'s, else loopback.
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
    ports: Ports | AskedPorts = field(default_factory=AskedPorts)
    host: str | None = None
    workers: int | None = None
    queue: int | None = None
    device: DeviceKind = DeviceKind.AUTO
    body_limit: int | None = None
    heap: int | None = None
    config: Path | None = None
    testing: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is decided before anything is written or started.

    Attributes:
        archives: to serve.
        addresses: to listen at.
        gpus: to use.
        workers: of each archive, in all.
        default_workers: as many as TorchServe starts for an archive that does not say.
        queue: waiting requests a model.
        waiting_cases: that an engine may hold.
        sizes: of the heap and of bodies.
        config: the file to start from.
        java: the Java runtime.
        store, state_dir, runtime: real paths.
        locale: environment variables that make them readable.
    """

    archives: Sequence[Archive]
    addresses: Addresses
    gpus: int
    workers: Mapping[Archive, int]
    default_workers: int
    queue: int
    waiting_cases: int
    sizes: Sizes
    config: Properties
    java: Path
    store: Path
    state_dir: Path
    runtime: Path
    locale: Mapping[str, str]


def start(request: ServeRequest, warn: Tell = logger.warning, tell: Tell = logger.info) -> Server:
    """Start TorchServe and return when every worker of every model is READY.

    Args:
        request: what, and how.
        warn: is told what a person should know although it goes on.
        tell: is told how far it is.

    Raises:
        UsageError: a missing archive or model store, sizes that do not fit, a server that runs already, an archive for
            a GPU that is not there, an address that this machine does not have, a path that nothing can be made of.
        ToolError: a taken port, no Java, CUDA without a GPU, a model that does not load.
    """
    if not request.testing and os.environ.get(FAULTS_VARIABLE):
        msg = f"{FAULTS_VARIABLE} is set, which is for tests only: unset it"
        raise UsageError(msg)
    if (running := read_state(request.state_dir)) and running.process():
        msg = f"a server of this state directory runs already at {running.inference_url}; stop it first"
        raise UsageError(msg)
    stop(request.state_dir)  # what a server that ended by itself left
    plan = _plan(request)
    if plan.addresses.is_open:
        warn(
            f"the inference port is open to other machines at {plan.addresses.host} and nothing authenticates them: "
            "put a TLS proxy with authentication in front"
        )
    server = _prepare(plan, warn)
    _configure(plan, request.config, warn)
    environment = _environment(plan, server)
    if request.testing:
        environment[TESTING_VARIABLE] = "1"
    (plan.state_dir / STOPPING_FILE).unlink(missing_ok=True)
    server.write(plan.state_dir)  # before there is anything that would have to be found again
    try:
        tell("starting TorchServe")
        _launch(plan, environment)
        wait_ready(server, plan.workers, {a: a.workers or plan.default_workers for a in plan.archives}, warn, tell)
    except BaseException:
        stop(plan.state_dir)
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
    for folder in (server.temp_dir, *server.made):
        shutil.rmtree(folder, ignore_errors=True)
    (state_dir / STATE_FILE).unlink(missing_ok=True)
    return process is not None


def wait(server: Server, state_dir: Path) -> bool:
    """Block until the server is gone; returns whether it was stopped on purpose."""
    process = server.process()
    while process is not None and runs(process):
        time.sleep(_POLL_S)
    return (state_dir / STOPPING_FILE).exists()


def _plan(request: ServeRequest) -> _Plan:
    gpus = _gpus(request.device)
    config = _base_config(request.config)
    archives = find_archives(request.model_store, request.models)
    check_gpus(archives, gpus)
    workers = {archive: archive.workers_on(gpus, request.workers) for archive in archives}
    queue = request.queue or 2 * max(workers.values())
    held = sum(workers.values()) + queue * len(archives)
    sizes = compute_sizes(memory_bytes(), held, heap=request.heap, body_limit=request.body_limit)
    addresses = choose(config, request.host, request.ports)
    check_free(addresses)
    paths = [request.model_store.resolve(), request.state_dir.resolve(), runtime_dir()]
    return _Plan(
        archives=archives,
        addresses=addresses,
        gpus=gpus,
        workers=workers,
        default_workers=(request.workers or (WORKERS_PER_GPU if gpus else WORKERS_ON_CPU)) * max(1, gpus),
        queue=queue,
        waiting_cases=max(archive.workers_on_one(gpus, request.workers) for archive in archives),
        sizes=sizes,
        config=config,
        java=java_home(),
        store=paths[0],
        state_dir=paths[1],
        runtime=paths[2],
        locale=_locale([*paths, *(Path(archive.file) for archive in archives), Path(sys.executable)]),
    )


def _locale(paths: Sequence[Path]) -> dict[str, str]:
    """The locale in which Java and the workers can open such paths."""
    for path in paths:
        try:
            os.fsencode(path).decode("utf-8")
        except UnicodeDecodeError as error:
            msg = f"the path {path!r} is not UTF-8, which Java cannot open: rename it"
            raise UsageError(msg) from error
    locale = utf8_environment()
    if locale is None and any(not str(path).isascii() for path in paths):
        odd = next(path for path in paths if not str(path).isascii())
        msg = f"Java needs a UTF-8 locale for the path {odd}, and this system has none: install C.UTF-8, or rename it"
        raise ToolError(msg)
    return locale or {}


def _prepare(plan: _Plan, warn: Tell) -> Server:
    """The directories of a server."""
    log_dir, work_dir = plan.state_dir / "logs", plan.state_dir / "work"
    if log_dir.exists():  # the last server's log may be what somebody looks for
        previous = plan.state_dir / "logs.previous"
        shutil.rmtree(previous, ignore_errors=True)
        log_dir.rename(previous)
    for folder in (log_dir, work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    control_dir = _new_control_dir(plan.state_dir)
    private = make_private_dir(warn)
    return Server(
        temp_dir=str(private.path),
        inference_url=plan.addresses.inference_url,
        management_url=plan.addresses.management_url,
        metrics_url=plan.addresses.metrics_url,
        models=sorted({archive.name for archive in plan.archives}),
        log_dir=str(log_dir),
        control_dir=str(control_dir),
        several=sorted(name for name, versions in Counter(a.name for a in plan.archives).items() if versions > 1),
        made=[str(folder) for folder in private.made],
    )


def _settings(plan: _Plan) -> dict[str, object]:
    """The keys of config.properties that are not left to the file; ``None`` where a key must not be there."""
    heap = plan.sizes.heap // 1024**2
    return plan.addresses.settings() | {
        "allowed_urls": _allowed_urls(plan.store),
        "job_queue_size": plan.queue,
        "max_request_size": plan.sizes.front_end_limit,
        "max_response_size": plan.sizes.front_end_limit,
        "vmargs": f"-Xmx{heap}m -XX:MaxDirectMemorySize={heap}m -XX:+ExitOnOutOfMemoryError",
        "initial_worker_port": _worker_ports(),
        "number_of_gpu": plan.gpus,
        "default_workers_per_model": plan.default_workers,
        "enable_envvars_config": "false",  # TS_INFERENCE_ADDRESS and others would replace all this unseen
        **dict.fromkeys(_GIVEN_OTHERWISE),
    }


def _allowed_urls(store: Path) -> str:
    """The patterns of URLs below the model store: as its path is written, and percent-encoded."""
    path = os.fsencode(store).decode("utf-8")
    spellings = dict.fromkeys((path, quote(path)))
    return ",".join(
        f"file://{re.escape(each)}/.*".replace(",", r"\x2c") for each in spellings
    )  # a comma ends a pattern


def _configure(plan: _Plan, given: Path | None, warn: Tell) -> None:
    """Write config.properties and metrics.yaml; say which settings of somebody's own file do not hold."""
    settings = _settings(plan)
    (plan.state_dir / "metrics.yaml").write_bytes(_packaged("metrics.yaml"))
    if plan.config.get("metrics_config") is None:
        settings["metrics_config"] = "../metrics.yaml"
    text, replaced = plan.config.merge(settings)
    file = plan.state_dir / "config.properties"
    file.write_text(text, encoding="ascii")
    if given is not None and replaced:
        warn(f"{given}: serve sets {', '.join(replaced)} by itself; {file} has what holds")


def _base_config(config: Path | None) -> Properties:
    if config is None:
        return Properties.parse(_packaged("config.properties"))
    try:
        return Properties.parse(config.read_bytes(), str(config))
    except OSError as error:
        msg = f"cannot read {config}: {error.strerror}"
        raise UsageError(msg) from error


def _packaged(name: str) -> bytes:
    packaged = resources.files(__package__) / name
    if packaged.is_file():
        return packaged.read_bytes()
    return (Path(__file__).parents[2] / name).read_bytes()  # a source checkout


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


def _environment(plan: _Plan, server: Server) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TS_CONFIG_FILE")}
    search = [str(Path(sys.executable).parent), str(plan.java / "bin"), environment.get("PATH", "")]
    # threads that spin while they wait keep each other off busy cores: a request took up to ten times as long
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # libraries look at the host's processors when they are loaded, not at a container's quota
    environment[THREADS_VARIABLE] = str(usable_threads())
    body_limit = plan.sizes.body_limit
    limits = {"body_bytes": body_limit, "response_bytes": body_limit, "waiting_cases": plan.waiting_cases}
    return (
        environment
        | dict(plan.locale)
        | {
            "PATH": os.pathsep.join(search),
            "JAVA_HOME": str(plan.java),
            "TEMP": server.temp_dir,
            "TMPDIR": server.temp_dir,
            "LOG_LOCATION": "../logs",
            "METRICS_LOCATION": "../logs",
            CONTROL_DIR_VARIABLE: server.control_dir,
            RUNTIME_DIR_VARIABLE: str(plan.runtime),  # not below the private TMPDIR: servers share devices and memory
            LIMITS_VARIABLE: json.dumps(limits),
        }
    )


def _launch(plan: _Plan, environment: Mapping[str, str]) -> None:
    """Run TorchServe's own starter, which leaves the JVM running and writes its pid."""
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs", "--ts-config", "../config.properties"]
    command += ["--model-store", str(plan.store), "--models", *(f"{a.name}={a.file}" for a in plan.archives)]
    output_file = plan.state_dir / "logs" / "torchserve.out"
    with output_file.open("wb") as output:
        starter = subprocess.run(
            command,
            env=environment,
            cwd=plan.state_dir / "work",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    if starter.returncode != 0:
        msg = f"TorchServe did not start:\n{tail(output_file)}"
        raise ToolError(msg)
