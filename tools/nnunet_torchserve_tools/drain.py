"""``nnunet-torchserve drain`` and ``resume``: no new work for a model, and nothing left in flight.

What is in flight is what TorchServe's queue holds and what its workers work on. The queue is asked of the management
API; the workers say themselves, in the server's private directory (:mod:`nnunet_torchserve.draining`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from nnunet_torchserve.draining import DEFAULT_RETRY_AFTER_S, EVERY_MODEL, ORDERS, order_name
from nnunet_torchserve.environment import CONTROL_DIR_VARIABLE

from .errors import ToolError, UsageError
from .orders import Target, give_order, reports, versions
from .server import read_state

DEFAULT_TIMEOUT_S = 1260.0
"""Above the response timeout of an archive that was made without another."""

_POLL_S = 0.1
_QUIET_POLLS = 5
"""So often in a row nothing may be in flight: TorchServe holds a request for an instant between its queue and a
worker."""


def find_target(state_dir: Path, management_url: str | None, model: str | None, *, served: bool = True) -> Target:
    """The server of a state directory, or the one of this machine that listens at ``management_url``.

    Args:
        state_dir: where ``serve`` was started, unless there is a URL.
        management_url: of a server of this machine and user.
        model: ``NAME`` or ``NAME/VERSION``; ``None`` is every model.
        served: whether the model must be there; an order outlives the version that it was for.

    Raises:
        UsageError: no such server, or no such model.
    """
    control: Path | None
    if management_url is None:
        server = read_state(state_dir)
        if server is None or server.process() is None:
            msg = f"no server of {state_dir.resolve()} is running; name it with --state-dir or --management-url"
            raise UsageError(msg)
        management_url, control = server.management_url, Path(server.control_dir)
    else:
        control = _control_of(management_url)
    name, _, version = (model or "").partition("/")
    target = Target(management_url, control, name or None, version or None)
    if model is not None and served:
        versions(target)
    return target


def drain(target: Target, timeout_s: float = DEFAULT_TIMEOUT_S, retry_after_s: int = DEFAULT_RETRY_AFTER_S) -> None:
    """Order it, and wait until nothing is in flight. The order stands until ``resume``, or until the server ends.

    Args:
        target: what.
        timeout_s: to wait at most.
        retry_after_s: what refused clients are told. Change the server within that time: a worker that is scaled away
            while it refuses a request loses that request.

    Raises:
        ToolError: something was still in flight at the end; the order stands.
    """
    give_order(target, {"retry_after_s": retry_after_s})
    deadline = time.monotonic() + timeout_s
    first = {pid: report.number for pid, report in reports(target.control).items()}
    quiet = 0
    while quiet < _QUIET_POLLS:
        time.sleep(_POLL_S)
        busy = _in_flight(target, first)
        quiet = 0 if busy else quiet + 1
        if busy and time.monotonic() > deadline:
            msg = (
                f"{target.name} still has {busy} after {timeout_s:g} s and takes no new requests; "
                "drain again to wait longer, or resume"
            )
            raise ToolError(msg)


def resume(target: Target) -> list[str]:
    """Take the order back, and those for the versions of the model; without a model all of them.

    Returns:
        The orders that stood, by name.
    """
    orders = target.control / ORDERS
    if target.model is None:
        standing = [order for order in orders.iterdir() if not order.name.startswith(".")]
    elif target.version is None:
        standing = [target.order, *orders.glob(f"{target.model}@*")]
    else:
        standing = [target.order]
    lifted = sorted(order.name for order in standing if order.exists())
    for order in standing:
        order.unlink(missing_ok=True)
    return lifted


def others_standing(target: Target) -> list[str]:
    """Orders that keep the target drained although its own was taken back."""
    orders = target.control / ORDERS
    wider = [EVERY_MODEL, *([order_name(target.model)] if target.version is not None else [])]
    return [name for name in wider if target.model is not None and (orders / name).exists()]


def _in_flight(target: Target, first: Mapping[int, int]) -> str:
    """What there is, in words; nothing if the model is drained.

    Args:
        target: what is drained.
        first: numbers of reports from before the order: they say nothing.
    """
    reported = reports(target.control)
    for state in versions(target):
        name = f"{state['modelName']}/{state['modelVersion']}"
        if pending := int((state.get("jobQueueStatus") or {}).get("pendingRequests", 0)):
            return f"{pending} requests of {name} in the queue"
        for worker in state["workers"]:
            pid = int(worker["pid"])
            if worker["status"] != "READY" or not psutil.pid_exists(pid):
                continue  # it takes no requests
            report = reported.get(pid)
            if report is None or report.number == first.get(pid) or not report.idle:
                return f"a request of {name} with worker {pid}"
    return ""


def _control_of(management_url: str) -> Path:
    """The private directory of the server of this machine that listens there."""
    port = urlsplit(management_url).port
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        if listens and connection.pid:
            try:
                control = psutil.Process(connection.pid).environ().get(CONTROL_DIR_VARIABLE)
            except psutil.Error:
                continue
            if control:
                return Path(control)
    msg = f"no server of this machine and user listens at {management_url} that 'nnunet-torchserve serve' started"
    raise UsageError(msg)
