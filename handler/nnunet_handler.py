"""TorchServe's entry point of an nnU-Net model archive: the only file that knows TorchServe.

TorchServe imports this module from the directory that it unpacked the archive to, makes one object of the class and
calls ``initialize`` once and ``handle`` for each request. An ImportError at the top of this file would be swallowed
and reported as a missing ``ts.torch_handler``; so everything else is imported in ``initialize``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOAD_FAILED = "NNUNET_TORCHSERVE_LOAD_FAILED"
"""What a worker that cannot serve writes to its log; ``nnunet-torchserve serve`` looks for it."""

_FIRST_ERROR_STATUS = 400
_DEFAULT_RESPONSE_TIMEOUT_S = 1200
_MARGIN_S = 10
"""Our deadline passes this much before TorchServe's, which kills the worker."""

_PARENT_POLL_S = 0.5

_STREAM_NEXT = "ts_stream_next"
"""TorchServe's word for "another message follows". Without it a good answer to gRPC's StreamPredictions ends the
worker; over HTTP it would cut the answer's headers off."""

_SEQUENCE_HEADER = "ts_request_sequence_"
"""What TorchServe's gRPC side adds to a request of StreamPredictions2, and to no other."""

_NO_BIDIRECTIONAL_STREAM = (
    b'{"type": "about:blank", "title": "Not Implemented", "status": 501, "code": "not_served", '
    b'"detail": "StreamPredictions2 is not served; call Predictions"}'
)
"""The answer to every request of StreamPredictions2. An error raised there ends the worker for good, so that a mask
and a problem would both be plain messages: there are no masks."""


class NnunetHandler:
    """One TorchServe worker's view of one model."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def initialize(self, context: Any) -> None:
        """Load the archive and connect to the engine that has its networks on the worker's device.

        Raises:
            Exception: anything that keeps this worker from serving; the reason is logged in one line first.
        """
        try:
            _end_with_the_front_end()
            model_dir = Path(context.system_properties["model_dir"]).resolve()
            _check_core(model_dir)
            from nnunet_torchserve.startup import loading

            with loading():
                self._pipeline = _load(context, model_dir)
        except Exception as error:
            reason = " ".join(str(error).split())
            logger.exception("%s %s: %s", LOAD_FAILED, type(error).__name__, reason)
            raise

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch, which has one request: batchSize above 1 is refused at load."""
        return [self._answer(parts, context, index) for index, parts in enumerate(data)]

    def _answer(self, parts: dict[str, Any], context: Any, index: int) -> bytes:
        from nnunet_torchserve.request import Request

        raw_headers = context.get_all_request_header(index) or {}
        headers = {name: value for name, value in raw_headers.items() if isinstance(value, str)}
        is_grpc = _is_grpc(headers)
        if headers and is_grpc:
            return _NO_BIDIRECTIONAL_STREAM
        send = None if is_grpc else partial(_send_part, context=context, index=index)  # gRPC would take one for a mask
        response = self._pipeline.answer(Request(parts, headers, context.get_request_id(index)), send)
        if is_grpc:
            if response.status >= _FIRST_ERROR_STATUS:
                # gRPC has no place for a status, and would hand the problem over as if it were a mask
                from ts.utils.util import PredictionException

                raise PredictionException(response.body.decode(), int(response.status))
            context.set_response_header(index, _STREAM_NEXT, "false")
        _set_head(response, context, index)
        body: bytes = response.body
        return body


def _send_part(part: Any, context: Any, index: int) -> None:
    """Send a part of a response before ``handle`` returns the last one, as a message of its own to the front end.

    TorchServe marks it with ``_STREAM_NEXT: true``, and then the last one, by itself, with ``false``. The front end
    sends what it gets at once, keeps it for a client that reads slowly, and drops it for one that has left: the worker
    notices neither. Its response timeout begins anew with each part.
    """
    from ts.handler_utils.utils import send_intermediate_predict_response

    _set_head(part, context, index)
    send_intermediate_predict_response({index: part.body}, context.request_ids, "Progress", 200, context)


def _set_head(response: Any, context: Any, index: int) -> None:
    """Status, content type and headers of a response."""
    context.set_response_status(int(response.status), response.status.phrase, index)
    context.set_response_content_type(index, response.content_type)
    for name, value in response.headers.items():
        context.set_response_header(index, name, value)


def _is_grpc(headers: dict[str, str]) -> bool:
    """Whether a request came by gRPC, which has no headers: those of HTTP hold at least TorchServe's own url_path."""
    return all(name.startswith(_SEQUENCE_HEADER) for name in headers)


def _check_core(model_dir: Path) -> None:
    """Refuse another serving core than the archive's."""
    import nnunet_torchserve

    core = Path(nnunet_torchserve.__file__).resolve()
    if model_dir not in core.parents:
        msg = f"the serving core was imported from {core.parent}, not from the archive; unset PYTHONPATH"
        raise RuntimeError(msg)


def _load(context: Any, model_dir: Path) -> Any:
    from nnunet_torchserve.extras import how_to_install

    try:
        import torch

        from nnunet_torchserve.backend import AUTO, wanted_backend
        from nnunet_torchserve.bundle import ModelBundle
        from nnunet_torchserve.draining import Gate
        from nnunet_torchserve.engine.keeper import Keeper
        from nnunet_torchserve.engine.remote import RemoteEngine
        from nnunet_torchserve.engine.roster import Used, note_engine
        from nnunet_torchserve.environment import control_dir, refuse_faults_outside_tests
        from nnunet_torchserve.limits import Limits
        from nnunet_torchserve.machine import torch_threads
        from nnunet_torchserve.measured_here import backend_here
        from nnunet_torchserve.pipeline import Pipeline
        from nnunet_torchserve.relay import Relay
        from nnunet_torchserve.served import read_served
        from nnunet_torchserve.settings import HandlerSettings
        from nnunet_torchserve.telemetry import Counts
    except ImportError as error:
        msg = f"{error}; install the server's packages: {how_to_install('server')}"
        raise RuntimeError(msg) from error

    config = context.model_yaml_config or {}
    batch_size = int(context.system_properties.get("batch_size") or 1)
    if batch_size != 1:
        msg = f"batchSize is {batch_size}; it must be 1: patches are batched by the engine, not requests by TorchServe"
        raise RuntimeError(msg)
    refuse_faults_outside_tests()
    torch.set_num_threads(torch_threads())
    settings = HandlerSettings.read(config.get("handler"))
    bundle = ModelBundle(model_dir)
    device = _device(context.system_properties.get("gpu_id"), torch)
    timeout_s = float(config.get("responseTimeout") or _DEFAULT_RESPONSE_TIMEOUT_S)
    limits = Limits.from_settings(settings.limits).for_model(bundle.lead.channels)
    gate = Gate(control_dir(), context.model_name, str(context.manifest["model"]["modelVersion"]))
    stored, batch = bundle.description.backend, settings.max_patch_batch
    wanted = wanted_backend(stored, settings.backend)
    backend, bundle.accuracy = backend_here(wanted, stored, bundle.accuracy, device.type, batch)
    counts, sink, model = Counts(), _metrics(context), (bundle.description.name, bundle.description.version)
    relay = Relay(sink, counts, model, device) if sink is not None else None
    engine = RemoteEngine(
        bundle,
        device,
        batch,
        settings.policy,
        limits,
        golden_interval_s=settings.golden_interval_s,
        cache_bytes=settings.cache_bytes,
        unload_after_s=settings.unload_after_s,
        counts=counts,
        on_tally=relay.watch if relay else None,
        backend=backend,
        only_if_faster=wanted == AUTO,
    )
    if engine.backend is not backend:
        logger.log(
            logging.INFO if wanted == AUTO else logging.WARNING,
            "%s runs the networks, not %s; the engine's log says why",
            engine.backend,
            backend,
        )
    pipeline = Pipeline(
        bundle=bundle,
        engine=engine,
        limits=limits,
        time_limit_s=max(timeout_s - _MARGIN_S, timeout_s / 2),
        refuse=gate.refuse,
        counts=counts,
        settings=settings,
        served=partial(read_served, control_dir()),
        backend=wanted,
    )
    pipeline.dry_run()
    note_engine(control_dir(), Used(str(engine.folder), str(device)))
    gate.report(_waits_for_a_request)
    Keeper(engine).start()
    if relay is not None:
        relay.start()
    return pipeline


def _metrics(context: Any) -> Any:
    """What emits a metric through TorchServe, as a line on stdout that the front end reads; TorchServe takes one class.

    ``None`` if its metrics_config does not have our metrics: the front end would drop them.
    """
    from ts.metrics.metric_cache_errors import MetricsCacheKeyError
    from ts.metrics.metric_type_enum import MetricTypes

    from nnunet_torchserve.telemetry import METRICS

    try:
        known = {each.name: context.metrics.get_metric(each.name, MetricTypes(str(each.kind))) for each in METRICS}
    except (AttributeError, MetricsCacheKeyError) as error:
        logger.warning("this model has no metrics: metrics_config is not the metrics.yaml of this package: %s", error)
        return None

    def emit(metric: Any, value: float, labels: Sequence[str]) -> None:
        known[metric.name].add_or_update(value, list(labels))

    return emit


def _device(gpu_id: Any, torch: Any) -> Any:
    """``cuda:<gpu_id>`` as TorchServe assigned it, else the CPU; TorchServe does not set CUDA_VISIBLE_DEVICES."""
    from nnunet_torchserve.engine.faults import stand_in_device

    if gpu_id is None or int(gpu_id) < 0:
        return torch.device("cpu")
    if (stand_in := stand_in_device(int(gpu_id))) is not None:
        return stand_in
    if not torch.cuda.is_available() or int(gpu_id) >= torch.cuda.device_count():
        msg = f"TorchServe assigned GPU {gpu_id}, but this PyTorch sees {torch.cuda.device_count()}; use --device cpu"
        raise RuntimeError(msg)
    return torch.device(f"cuda:{int(gpu_id)}")


def _waits_for_a_request() -> bool:
    """Whether TorchServe's loop, in the main thread, waits for the first byte of a request.

    Its ``retrieve_msg`` reads that byte by ``_retrieve_buffer`` itself, and all others through helpers. There is no
    hook that says when an answer has been handed over.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 (there is no other way)
    calls = [each.f_code.co_name for each in (frame, frame.f_back) if each is not None] if frame else []
    return calls == ["_retrieve_buffer", "retrieve_msg"]


def _end_with_the_front_end() -> None:
    """Watch the JVM from a thread: a killed JVM's workers would otherwise finish cases that nobody waits for."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="front-end-watch", daemon=True).start()
