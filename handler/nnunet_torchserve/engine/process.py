"""The engine in a process of its own: one for each model and device, shared by all workers. This is its life.

A worker starts it (:mod:`.remote`); it forks away from that worker, into a session of its own, with a log of its own.
It holds a lock on ``alive`` for as long as it lives, which the kernel frees however it dies. It listens before the
slow imports, so that racing workers queue up instead of starting more engines. It imports everything up front:
unregistering a model deletes the directory that it came from. It leaves some seconds after its last worker.

The main thread runs :mod:`.switchboard`, which owns the sockets; :mod:`.compute` has a thread of its own. Their
contract is written there.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..startup import loading
from .folder import LOG, SOCKET, bound_log, listen, still_ours, take_life_lock

if TYPE_CHECKING:
    from .switchboard import Switchboard

logger = logging.getLogger(__name__)

_LATEST_S = 1.0
"""For which an engine that cannot serve waits for somebody to tell: whoever comes later starts another, in vain."""


def _detach(folder: Path) -> None:
    """Fork away from the worker that started us, into a session of our own, with our own log."""
    if os.fork():
        os._exit(0)
    os.setsid()
    try:
        output = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    bound_log()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")


def main(folder: Path, model_dir: Path, settings: str) -> int:
    """Run an engine; returns when it is idle, or at once if another one lives."""
    _detach(folder)
    life = take_life_lock(folder)
    if life is None:
        return 0
    path = folder / SOCKET
    follows_a_death = path.exists()  # who leaves by itself takes it away
    listener = listen(path)
    try:
        with loading():
            switchboard = _load(folder, listener, model_dir, settings, life, restarts=int(follows_a_death))
    except Exception as error:
        logger.exception("the engine cannot serve")
        _refuse_everybody(listener, f"{type(error).__name__}: {error}")
        return 1
    try:
        switchboard.run()
        logger.info("the engine leaves")
    finally:
        if still_ours(folder, life):
            with suppress(FileNotFoundError):
                path.unlink()
    return 0


def _load(
    folder: Path, listener: socket.socket, model_dir: Path, settings_text: str, life: int, *, restarts: int
) -> Switchboard:
    import torch

    from ..bundle import ModelBundle
    from ..environment import refuse_faults_outside_tests
    from ..open_weights import OpenWeights
    from .compute import Compute
    from .core import EngineCore
    from .engine_settings import EngineSettings
    from .faults import Faults
    from .flight_record import FlightRecord
    from .golden import check_golden, load_networks_or_eager, read_golden
    from .ledger import Ledger
    from .network import device_name, peak_bytes, probe_batch
    from .scheduler import Policy
    from .switchboard import Switchboard, busy_limit_s
    from .tally import Tally, Total

    refuse_faults_outside_tests()
    settings = EngineSettings.model_validate_json(settings_text)
    bundle = ModelBundle(model_dir)
    faults = Faults.from_environment(settings.device)
    faults.before_load(follows_a_death=restarts > 0)
    asked = settings.max_patch_batch
    networks = load_networks_or_eager(
        bundle, torch.device(settings.device), settings.backend, asked, settings.only_if_faster
    )
    batch = probe_batch(networks) if asked == "auto" else asked
    record, record_fd = FlightRecord.create()
    policy = Policy(settings.policy)
    core = EngineCore(networks, batch, policy, record.write, faults)
    model = f"{bundle.description.name}/{bundle.description.version} sha256:{bundle.digest[:12]}"
    runs = f"{networks.backend} on {settings.device}"
    logger.info("ready: %s, %s, batches of %d, %s; %s", model, runs, batch, policy, settings_text)
    golden = read_golden(bundle)  # now: unregistering the model deletes the file, and those of the weights
    weights = None
    if settings.unload_after_s is not None:
        weights = OpenWeights(bundle.members.values(), bundle.description.files, networks.files)
    tally = Tally()
    tally.total(Total.RESTARTS, restarts)
    tally.runs(networks.backend)
    compute = Compute(
        core,
        Ledger(folder, device_name(networks.device)),
        peak_bytes(networks, batch),
        tally,
        lambda get_on: check_golden(networks, golden, get_on),
        settings.golden_interval_s,
        weights,
        settings.unload_after_s,
    )
    limit_s = faults.busy_limit_s or busy_limit_s(settings.device)
    return Switchboard(folder, listener, compute, settings, record_fd, life, tally, limit_s, networks.backend)


def _refuse_everybody(listener: socket.socket, reason: str) -> None:
    """Tell the workers why there will be no engine: those that wait, and the one that is about to ask."""
    from .channel import send
    from .messages import Refused

    listener.settimeout(_LATEST_S)
    with suppress(OSError):  # at the latest of a timeout
        while True:
            endpoint, _ = listener.accept()
            with suppress(OSError), endpoint:
                send(endpoint, Refused(reason=reason[:1000]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
