"""Start stock TorchServe for nnU-Net archives, wait until it can answer, and stop it again.

``start`` gives TorchServe a private temporary directory (its pid file, worker sockets and unpacked models would
collide with another server's), its own worker ports and working directory, no PYTHONPATH, a Java runtime and a heap.
The server's state lies in ``state_dir/server.json``; ``stop`` finds it there.

TorchServe runs in ``state_dir/work`` and is told of logs and settings by relative paths, so that whatever a state
directory is called, neither Java's properties nor log4j's patterns get to see it.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nnunet_torchserve.draining import ORDERS, REPORTS
from nnunet_torchserve.engine.roster import ENGINES
from nnunet_torchserve.environment import FAULTS_VARIABLE, TESTING_VARIABLE
from nnunet_torchserve.served import write_served

from .addresses import AskedPorts, Hosts, Ports, free_ports
from .configuration import configure, environment
from .ending import STOPPING_FILE, stop
from .errors import ToolError, UsageError
from .model_store import Archive, find_archives, missed_backend
from .plan import DeviceKind, Plan, ServeRequest, make_plan
from .readiness import Tell, tail, wait_ready
from .server import STATE_DIR, Server, read_state
from .temporary import make_private_dir
from .tokens import KEY_FILE, WORK_DIR

__all__ = [
    "Archive",
    "AskedPorts",
    "DeviceKind",
    "Hosts",
    "Ports",
    "ServeRequest",
    "Server",
    "find_archives",
    "free_ports",
    "read_state",
    "start",
    "stop",
]

logger = logging.getLogger(__name__)


def start(
    request: ServeRequest, warn: Tell = logger.warning, tell: Tell = logger.info, health_url: str | None = None
) -> Server:
    """Start TorchServe and return when every worker of every model is READY.

    Args:
        request: what, and how.
        health_url: where this process answers for the server's health, if it does.
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
    _refuse_second(request.state_dir)
    stop(request.state_dir)  # what a server that ended by itself left
    plan = make_plan(request)
    if plan.addresses.is_open:
        warn(
            f"the inference port is open to other machines at {plan.addresses.host} and nothing authenticates them: "
            "put a TLS proxy with authentication in front"
        )
    for archive in plan.archives:
        if archive.code:
            files = ", ".join(archive.code)
            warn(f"{archive.file} brings code of its own, which this server will run: {files}; 'describe' says more")
    for archive in plan.archives:
        if (missed := missed_backend(archive, plan.backend, plan.gpus)) is not None:
            warn(missed)
    server = replace(_prepare(plan, warn), health_url=health_url)
    configure(plan, request.config, warn)
    variables = environment(plan, server)
    if request.testing:
        variables[TESTING_VARIABLE] = "1"
    (plan.state_dir / STOPPING_FILE).unlink(missing_ok=True)
    server.write(plan.state_dir)  # before there is anything that would have to be found again
    try:
        tell("starting TorchServe")
        _launch(plan, variables)
        asked = {a: a.workers or plan.default_workers for a in plan.archives}
        wait_ready(server, plan.workers, asked, warn, tell, request.ready_timeout_s)
        server = replace(server, ready=True)
        server.write(plan.state_dir)
    except BaseException:
        stop(plan.state_dir)
        raise
    return server


def _refuse_second(state_dir: Path) -> None:
    """There is one server of a state directory."""
    if (running := read_state(state_dir)) and running.process():
        stop_first = "nnunet-torchserve stop"
        if state_dir != STATE_DIR:
            stop_first += f" --state-dir {shlex.quote(str(state_dir))}"
        msg = f"a server of this state directory runs already at {running.inference_url}; stop it first: {stop_first}"
        raise UsageError(msg)


def _prepare(plan: Plan, warn: Tell) -> Server:
    """The directories of a server."""
    log_dir, work_dir = plan.state_dir / "logs", plan.state_dir / WORK_DIR
    if log_dir.exists():  # the last server's log may be what somebody looks for
        previous = plan.state_dir / "logs.previous"
        shutil.rmtree(previous, ignore_errors=True)
        log_dir.rename(previous)
    for folder in (log_dir, work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    (work_dir / KEY_FILE).unlink(missing_ok=True)  # the last server's tokens
    control_dir = _new_control_dir(plan.state_dir)
    write_served(control_dir, [archive.model for archive in plan.archives])
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
        response_timeout_s=max(archive.response_timeout_s for archive in plan.archives),
    )


def _new_control_dir(state_dir: Path) -> Path:
    """An empty directory for orders and reports; the last server's do not stand."""
    control = state_dir / "control"
    shutil.rmtree(control, ignore_errors=True)
    for folder in (control, control / ORDERS, control / REPORTS, control / ENGINES):
        folder.mkdir(mode=0o700)
    return control


def _launch(plan: Plan, variables: Mapping[str, str]) -> None:
    """Run TorchServe's own starter, which leaves the JVM running and writes its pid."""
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs", "--ts-config", "../config.properties"]
    command += ["--model-store", str(plan.store), "--models", *(f"{a.name}={a.file}" for a in plan.archives)]
    output_file = plan.state_dir / "logs" / "torchserve.out"
    with output_file.open("wb") as output:
        starter = subprocess.run(
            command,
            env=variables,
            cwd=plan.state_dir / WORK_DIR,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    if starter.returncode != 0:
        msg = f"TorchServe did not start:\n{tail(output_file)}"
        raise ToolError(msg)
