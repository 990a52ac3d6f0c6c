"""What TorchServe and its workers are told: config.properties, metrics.yaml, and environment variables."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from nnunet_torchserve.backend import BACKEND_VARIABLE
from nnunet_torchserve.environment import CONTROL_DIR_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve.limits import LIMITS_VARIABLE
from nnunet_torchserve.machine import THREADS_VARIABLE, usable_threads

from .openmp import let_threads_sleep
from .plan import Plan, packaged
from .readiness import Tell
from .server import Server

_WORKER_PORTS = range(20000, 60000, 100)
_GIVEN_OTHERWISE = ("model_store", "load_models", "model_snapshot")
"""Keys that TorchServe takes from its command line instead, or that would load other models."""


def configure(plan: Plan, given: Path | None, warn: Tell) -> None:
    """Write config.properties and metrics.yaml; say which settings of somebody's own file do not hold."""
    keys = settings(plan)
    (plan.state_dir / "metrics.yaml").write_bytes(packaged("metrics.yaml"))
    if plan.config.get("metrics_config") is None:
        keys["metrics_config"] = "../metrics.yaml"
    text, replaced = plan.config.merge(keys)
    file = plan.state_dir / "config.properties"
    file.write_text(text, encoding="ascii")
    if given is not None and replaced:
        warn(f"{given}: serve sets {', '.join(replaced)} by itself; {file} has what holds")


def settings(plan: Plan) -> dict[str, object]:
    """The keys of config.properties that are not left to the file; ``None`` where a key must not be there."""
    heap = plan.sizes.heap // 1024**2
    return plan.addresses.settings() | {
        "disable_token_authorization": str(not plan.tokens).lower(),
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


def _worker_ports() -> int:
    """The first of a hundred port numbers for workers, spread by process so that two servers differ."""
    return _WORKER_PORTS[os.getpid() % len(_WORKER_PORTS)]


def _homes(server: Server) -> dict[str, str]:
    """A name and a home for a user who has none, as in a container that is run as any number, or in a read-only one.

    Libraries ask for both when they are imported, to name the directories of their caches, and fail without.
    """
    homes = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        homes["USER"] = str(os.getuid())
    try:
        usable = os.access(Path.home(), os.W_OK | os.X_OK)
    except RuntimeError:
        usable = False
    return homes if usable else homes | {"HOME": server.temp_dir}


def environment(plan: Plan, server: Server) -> dict[str, str]:
    """The environment of TorchServe and its workers."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TS_CONFIG_FILE")}
    search = [str(Path(sys.executable).parent), str(plan.java / "bin"), variables.get("PATH", "")]
    let_threads_sleep(variables)
    # libraries look at the host's processors when they are loaded, not at a container's quota
    variables[THREADS_VARIABLE] = str(usable_threads())
    variables |= _homes(server)
    variables.pop(BACKEND_VARIABLE, None)
    if plan.backend is not None:
        variables[BACKEND_VARIABLE] = plan.backend
    body_limit = plan.sizes.body_limit
    limits = {"body_bytes": body_limit, "response_bytes": body_limit, "waiting_cases": plan.waiting_cases}
    return (
        variables
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
