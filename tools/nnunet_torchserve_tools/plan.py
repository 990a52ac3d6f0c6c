"""What ``serve`` decides before it writes or starts anything: models, workers, sizes, addresses, Java, paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path

from nnunet_torchserve.backend import Choice
from nnunet_torchserve.environment import runtime_dir
from nnunet_torchserve.machine import memory_bytes

from .addresses import Addresses, AskedPorts, Hosts, Ports, check_free, choose
from .errors import ToolError, UsageError
from .java import java_home, utf8_environment
from .model_store import WORKERS_ON_CPU, WORKERS_PER_GPU, Archive, check_gpus, find_archives
from .properties import Properties
from .readiness import READY_TIMEOUT_S
from .server import STATE_DIR
from .sizing import Sizes, compute_sizes


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
        hosts: see :class:`Hosts`.
        tokens: whether TorchServe shall ask for its tokens; they are on too where ``config`` has them on.
        workers: per device and model; ``None`` takes the archive's number, else 4 on a CPU and 8 a GPU.
        queue: waiting requests a model; ``None`` is twice its workers.
        device: see :class:`DeviceKind`.
        backend: for all models; ``None`` leaves it to each archive.
        body_limit, heap: bytes set by hand, or ``None``.
        config: another config.properties to start from.
        ready_timeout_s: for every worker to be ready.
        testing: faults may be ordered through the environment.
    """

    model_store: Path
    models: Sequence[str] = ("all",)
    state_dir: Path = STATE_DIR
    ports: Ports | AskedPorts = field(default_factory=AskedPorts)
    hosts: Hosts = field(default_factory=Hosts)
    tokens: bool = False
    workers: int | None = None
    queue: int | None = None
    device: DeviceKind = DeviceKind.AUTO
    backend: Choice | None = None
    body_limit: int | None = None
    heap: int | None = None
    config: Path | None = None
    ready_timeout_s: float = READY_TIMEOUT_S
    testing: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before anything is written or started.

    Attributes:
        archives: to serve.
        addresses: to listen at.
        tokens: whether TorchServe asks for its tokens.
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
        backend: what the workers are told; ``None``: nothing.
    """

    archives: Sequence[Archive]
    addresses: Addresses
    tokens: bool
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
    backend: Choice | None


def make_plan(request: ServeRequest) -> Plan:
    """Decide everything.

    Raises:
        UsageError: a missing archive or model store, sizes that do not fit, an archive for a GPU that is not there, an
            address that this machine does not have, a path that nothing can be made of.
        ToolError: a taken port, no Java, CUDA without a GPU.
    """
    gpus = _gpus(request.device)
    config = _base_config(request.config)
    archives = find_archives(request.model_store, request.models)
    check_gpus(archives, gpus)
    workers = {archive: archive.workers_on(gpus, request.workers) for archive in archives}
    queue = request.queue or 2 * max(workers.values())
    held = sum(workers.values()) + queue * len(archives)
    sizes = compute_sizes(memory_bytes(), held, heap=request.heap, body_limit=request.body_limit)
    tokens = request.tokens or (config.get("disable_token_authorization") or "").lower() == "false"
    addresses = choose(config, request.hosts, request.ports, tokens=tokens)
    check_free(addresses)
    paths = [request.model_store.resolve(), request.state_dir.resolve(), runtime_dir()]
    return Plan(
        archives=archives,
        addresses=addresses,
        tokens=tokens,
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
        backend=request.backend,
    )


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


def _base_config(config: Path | None) -> Properties:
    if config is None:
        return Properties.parse(packaged("config.properties"))
    try:
        return Properties.parse(config.read_bytes(), str(config))
    except OSError as error:
        msg = f"cannot read {config}: {error.strerror}"
        raise UsageError(msg) from error


def packaged(name: str) -> bytes:
    """A file that the package carries: ``config.properties`` or ``metrics.yaml``."""
    file = resources.files(__package__) / name
    if file.is_file():
        return file.read_bytes()
    return (Path(__file__).parents[2] / name).read_bytes()  # a source checkout


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
