"""A real TorchServe on free ports of this machine."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from nnunet_torchserve.backend import Choice
from nnunet_torchserve_tools import launcher

from . import warm
from .ports import free_ports

SERVED = ("five_folds", "flat", "regions")
"""The test models that the session's server has."""


@dataclass(frozen=True)
class LiveServer:
    """A running server."""

    server: launcher.Server
    state_dir: Path

    def predict(
        self,
        model: str,
        body: bytes | None = None,
        *,
        options: str | None = None,
        files: dict[str, bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One prediction request; ``options`` go to the header, ``files`` make it multipart."""
        sent = dict(headers or {})
        if options is not None:
            sent["X-Nnunet-Options"] = options
        parts = None if files is None else {name: (name, content) for name, content in files.items()}
        url = f"{self.server.inference_url}/predictions/{model}"
        with httpx.Client(timeout=600, trust_env=False) as client:
            return client.post(url, content=body, files=parts, headers=sent)

    def describe(self, model: str) -> dict[str, object]:
        """TorchServe's description of a model, the handler's own included."""
        url = f"{self.server.management_url}/models/{model}"
        answer = httpx.get(url, params={"customized": "true"}, timeout=300, trust_env=False)
        answer.raise_for_status()
        description: dict[str, object] = answer.json()[0]
        return description

    def workers(self, model: str) -> list[psutil.Process]:
        """The worker processes of a model."""
        workers: list[dict[str, object]] = self.describe(model)["workers"]  # type: ignore[assignment]
        return [psutil.Process(int(str(worker["pid"]))) for worker in workers]

    def request_lines(self) -> list[dict[str, Any]]:
        """The log's line of every request so far."""
        text = (Path(self.server.log_dir) / "model_log.log").read_text()
        return [json.loads(line) for line in re.findall(r"request (\{.*\})$", text, re.MULTILINE)]

    def logs(self, text: str, within_s: float = 120) -> bool:
        """Whether ``text`` is in the workers' log, which TorchServe writes a little after it answers."""
        deadline = time.monotonic() + within_s
        while text not in (Path(self.server.log_dir) / "model_log.log").read_text():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def running(
    model_store: Path,
    state_dir: Path,
    *,
    models: Sequence[str] = ("all",),
    workers: int = 1,
    body_limit: int | None = None,
    testing: bool = False,
    device: launcher.DeviceKind = launcher.DeviceKind.CPU,
    backend: Choice | None = None,
    cold_workers: bool = False,
) -> Iterator[LiveServer]:
    """Start a server, whose engines and, unless they are to be cold, workers are :mod:`.warm`; stop it in the end."""
    request = launcher.ServeRequest(
        model_store,
        models,
        state_dir,
        free_ports(),
        device=device,
        backend=backend,
        workers=workers,
        body_limit=body_limit,
        heap=1024**3,
        testing=testing,
    )
    with pytest.MonkeyPatch.context() as interpreter:
        interpreter.setattr(sys, "executable", str(warm.python() if cold_workers else warm.python_of_workers()))
        server = launcher.start(request)
    try:
        yield LiveServer(server, state_dir)
    finally:
        launcher.stop(state_dir)
