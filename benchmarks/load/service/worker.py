"""One worker of TorchServe's without TorchServe; run by ``admission.py``.

``python worker.py MODEL_DIR METRICS_YAML served|bare`` loads the unpacked archive as TorchServe's worker does:
through the handler, with TorchServe's own context, metrics and logging. So its stdout is what the front end would read,
and answers to commands are lines that begin with ``ANSWER``. A ``bare`` worker differs in what admission and metrics
add: nothing is asked before a request, the engine reserves nothing for it, nothing is counted or passed on.

A case that was not reserved still has to be announced to the engine before its volume is handed over; a bare worker
asks for nothing then, and gets it at once. So the difference of the two workers lacks that one question: ``steps`` has
what it takes.

Threads: the handler's own; commands are obeyed by the main thread, one after the other.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

ANSWER = "ANSWER "
BARE = "bare"

logger = logging.getLogger(__name__)


class Unreserved:
    """The engine without its admission: everything is granted at once, and nothing is held."""

    def __init__(self, engine: Any) -> None:
        """Ask ``engine`` once, for nothing: what it says then is what every case is told."""
        self._engine = engine
        with ExitStack() as granted:
            self._grant = granted.enter_context(engine.reserve(_price(0), None, guaranteed=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @contextmanager
    def reserve(self, *_price: object, **_more: object) -> Iterator[Any]:
        """Grant without asking."""
        yield self._grant


def _price(size: int) -> Any:
    from nnunet_torchserve.cases import Price

    return Price(grid=(1, 1, 1), patches=1, passes=1, bytes=size, preprocess_s=0.0, export_s=0.0)


def load(model_dir: Path, metrics_yaml: Path, side: str) -> Any:
    """The pipeline of a worker."""
    from ts.context import Context
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    from nnunet_handler import NnunetHandler

    metrics = MetricsCacheYamlImpl(str(metrics_yaml))
    metrics.initialize_cache()
    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
    config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
    context = Context(
        manifest["model"]["modelName"],
        str(model_dir),
        manifest,
        1,
        None,
        "0.12.0",
        metrics=metrics if side != BARE else None,
        model_yaml_config=config,
    )
    handler = NnunetHandler()
    handler.initialize(context)
    pipeline: Any = handler._pipeline  # noqa: SLF001 (what TorchServe's messages would be made into is not meant)
    return without_admission_and_metrics(pipeline) if side == BARE else pipeline


def without_admission_and_metrics(pipeline: Any) -> Any:
    """The same pipeline, which asks nobody and counts nothing."""
    from nnunet_torchserve.telemetry import Counts

    class Uncounted(Counts):
        """Forgets what it is told."""

        def add_request(self, record: object) -> None:
            """Do nothing."""

    return replace(pipeline, engine=Unreserved(pipeline.engine), refuse=lambda: None, counts=Uncounted())


def requests(pipeline: Any, *, image: str, options: str, count: int, pause_s: float = 0.0) -> dict[str, Any]:
    """Answer an image ``count`` times.

    Returns:
        The seconds of each answer and its ``Server-Timing``, and the processor seconds of the thread that passes
        metrics on.
    """
    from nnunet_torchserve.options import HEADER
    from nnunet_torchserve.request import RAW_BODY, Request
    from nnunet_torchserve.telemetry import SERVER_TIMING

    request = Request({RAW_BODY: bytearray(Path(image).read_bytes())}, {HEADER: options}, "benchmark")
    seconds, timings, before = [], [], _relay_cpu_s()
    for _ in range(count):
        began = time.perf_counter()
        answer = pipeline.answer(request)
        seconds.append(time.perf_counter() - began)
        assert answer.status == HTTPStatus.OK, answer.body
        timings.append(answer.headers[SERVER_TIMING])
        time.sleep(pause_s)
    return {"seconds": seconds, "timings": timings, "relay_cpu_s": _relay_cpu_s() - before}


def steps(pipeline: Any, *, count: int) -> dict[str, list[float]]:
    """Seconds that each step takes by itself, again and again: what is done for a request, and nothing of it."""
    from nnunet_torchserve.telemetry import RequestRecord, Stage

    record = RequestRecord("benchmark", "benchmark/1.0", status=int(HTTPStatus.OK))
    for stage in Stage:
        record.clock.add(stage, 0.01)

    def reserve() -> None:
        with pipeline.engine.reserve(_price(2**20), None):
            pass

    return {
        "ask whether the model is drained": [_seconds(pipeline.refuse) for _ in range(count)],
        "reserve and release": [_seconds(reserve) for _ in range(count)],
        "count": [_seconds(lambda: pipeline.counts.add_request(record)) for _ in range(count)],
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _relay_cpu_s() -> float:
    """Processor seconds of the relay's thread so far; 0 where there is none (``proc(5)``: schedstat)."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == "metrics"]
    return sum(int(Path(f"/proc/self/task/{each}/schedstat").read_text().split()[0]) for each in threads) / 1e9


def main() -> int:
    """See the module."""
    model_dir, metrics_yaml, side = sys.argv[1:]
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)  # as TorchServe's worker does
    sys.path.insert(0, model_dir)
    pipeline = load(Path(model_dir), Path(metrics_yaml), side)
    commands: dict[str, Callable[..., dict[str, Any]]] = {"requests": requests, "steps": steps}
    logger.info(ANSWER + "{}")
    for line in sys.stdin:
        command = json.loads(line)
        logger.info(ANSWER + json.dumps(commands[command.pop("do")](pipeline, **command)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
