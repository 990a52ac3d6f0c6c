"""A live server of the working tree, and a client that times what it answers."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import httpx
import psutil

from benchmarks.harness.material import FOLD, USUAL_OPTIONS, Material
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.options import HEADER, FoldName
from nnunet_torchserve.telemetry import SERVER_TIMING
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.chaos import ChaosServer, family, wait_for
from support.server import LiveServer

MODEL = "benchmark"
"""The name that every served model gets."""

_REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Answer:
    """One request.

    Attributes:
        seconds: from before the image file is read until the answer is written.
        stages_ms: the server's own account (Server-Timing), milliseconds.
    """

    seconds: float
    stages_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Client:
    """Sends image files over kept connections, as many as there are threads that use it.

    Attributes:
        live: the server.
        http: to its inference address.
        runtime: where its engines have their directories.
    """

    live: LiveServer
    http: httpx.Client
    runtime: Path

    @property
    def processes(self) -> ChaosServer:
        """The server's processes, and what may be done to them."""
        return ChaosServer(self.live, self.runtime)

    def segment(self, image: Path, answer: Path, options: Mapping[str, object] = USUAL_OPTIONS) -> Answer:
        """Send ``image`` as the raw body and write what comes back to ``answer``.

        Raises:
            RuntimeError: the server did not answer 200.
        """
        started = time.perf_counter()
        response = self.post(image.read_bytes(), options)
        answer.write_bytes(response.content)
        seconds = time.perf_counter() - started
        if response.status_code != httpx.codes.OK:
            msg = f"the server answered {response.status_code}: {response.text[:500]}"
            raise RuntimeError(msg)
        return Answer(seconds, _stages(response.headers[SERVER_TIMING]))

    def status(self, body: bytes) -> int:
        """The HTTP status of the answer to ``body``."""
        return self.post(body).status_code

    def workers(self) -> list[psutil.Process]:
        """The processes that serve the model, without one that TorchServe still names although it is gone."""
        found = []
        for pid in self.processes.workers(MODEL):
            with suppress(psutil.NoSuchProcess, ValueError):
                found.append(psutil.Process(pid))
        return found

    def post(self, body: bytes, options: Mapping[str, object] = USUAL_OPTIONS) -> httpx.Response:
        """The answer to ``body``, whatever it is."""
        return self.http.post(f"/predictions/{MODEL}", content=body, headers={HEADER: json.dumps(options)})


@contextmanager
def serving(
    model: Material | Path,
    scratch: Path,
    *,
    folds: tuple[FoldName, ...] | None = (FOLD,),
    others: tuple[Path, ...] = (),
    previous_stages: tuple[Path, ...] = (),
    trainer_files: tuple[Path, ...] = (),
    workers: int | None = None,
    settings: ServingSettings | None = None,
    config: Path | None = None,
    body_limit: int | None = None,
    input_orientation: str | None = None,
    made: Path | None = None,
) -> Iterator[Client]:
    """A live server of a model, made from the working tree, whose engines share nothing with other servers.

    Args:
        model: what to serve, or its trained model folder.
        scratch: for the archive and the server's state; another one for each server that runs at the same time.
        folds: ``None`` takes all.
        others: trained model folders that are an ensemble with the model.
        previous_stages: the folders of first stages.
        trainer_files: somebody's own code, which they need.
        workers: ``None`` takes the launcher's own number.
        settings: what the archive says of serving.
        config: another config.properties to start from.
        body_limit: bytes of a request; ``None`` takes the launcher's own number.
        input_orientation: that the model was trained in, in nibabel's letters; ``None`` leaves it open.
        made: a folder with the archive, which is then served as it is, whatever else is said of it here.
    """
    folder = model.model_folder if isinstance(model, Material) else model
    store, state_dir, runtime = made or scratch / "model_store", scratch / "server", scratch / "engines"
    archive = ArchiveRequest(
        folder,
        store,
        others=others,
        previous_stages=previous_stages,
        trainer_files=trainer_files,
        input_orientation=input_orientation,
        folds=folds,
        name=MODEL,
        serving=settings or ServingSettings(),
    )
    if made is None:
        make_archives(archive)
    request = launcher.ServeRequest(
        store,
        state_dir=state_dir,
        ports=launcher.free_ports(),
        device=launcher.DeviceKind.CPU,
        workers=workers,
        config=config,
        body_limit=body_limit,
    )
    with mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: str(runtime)}):
        server = launcher.start(request)
        try:
            with httpx.Client(base_url=server.inference_url, timeout=_REQUEST_TIMEOUT_S, trust_env=False) as http:
                yield Client(LiveServer(server, state_dir), http, runtime)
        finally:
            launcher.stop(state_dir)
            wait_for(lambda: not family(runtime))  # an engine leaves some seconds after its last worker


def stage_medians(answers: Sequence[Answer]) -> dict[str, float]:
    """The median of each stage, and of what no stage accounts for: TorchServe, HTTP and the client; milliseconds."""
    medians = {stage: statistics.median(a.stages_ms[stage] for a in answers) for stage in answers[0].stages_ms}
    outside = statistics.median(a.seconds * 1000 - sum(a.stages_ms.values()) for a in answers)
    return {name: round(value, 1) for name, value in (medians | {"outside_stages": outside}).items()}


def _stages(server_timing: str) -> dict[str, float]:
    return {name: float(duration) for name, duration in re.findall(r"(\w+);dur=([0-9.]+)", server_timing)}
