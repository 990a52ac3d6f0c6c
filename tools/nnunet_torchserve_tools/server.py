"""A server that was started, as its state directory remembers it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

STATE_DIR = Path(".nnunet-torchserve")
"""Where serve and stop look, unless they are told another place."""

STATE_FILE = "server.json"
DEFAULT_RESPONSE_TIMEOUT_S = 1200.0
"""Of a model that does not say."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, as ``server.json`` holds it. Its private temporary directory names its JVM beyond doubt.

    Attributes:
        temp_dir: as TorchServe is told, which may be a link.
        inference_url, management_url, metrics_url: what clients on this machine call.
        models: TorchServe's names.
        log_dir: TorchServe's logs.
        control_dir: for draining.
        several: the models of which it was started with more than one version.
        made: further directories that are to be removed in the end.
        response_timeout_s: the longest of its models: what a request may take.
        health_url: where ``serve --foreground`` answers for its health; ``None`` without.
        ready: whether every worker has been READY.
    """

    temp_dir: str
    inference_url: str
    management_url: str
    metrics_url: str
    models: list[str]
    log_dir: str
    control_dir: str
    several: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    response_timeout_s: float = DEFAULT_RESPONSE_TIMEOUT_S
    health_url: str | None = None
    ready: bool = False

    def process(self) -> psutil.Process | None:
        """The JVM, ``None`` if it is not there."""
        mark = f"-Djava.io.tmpdir={self.temp_dir}"
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if mark in process.cmdline() and runs(process):
                    return process
        return None

    def write(self, state_dir: Path) -> None:
        """Remember it, in one step."""
        unfinished = state_dir / f".{STATE_FILE}"
        unfinished.write_text(json.dumps(asdict(self), indent=2))
        unfinished.replace(state_dir / STATE_FILE)


def read_state(state_dir: Path) -> Server | None:
    """The server that ``state_dir`` names, running or not."""
    try:
        return Server(**json.loads((state_dir / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def runs(process: psutil.Process) -> bool:
    """Whether a process is still that process, and more than a zombie.

    One that was killed looks like a zombie as soon as its first thread has ended. Until its last one has, it still has
    its ports and its files.
    """
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
