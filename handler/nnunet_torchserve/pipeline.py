"""One request from bytes to bytes: the whole story on one page.

``Pipeline.answer`` never raises and keeps nothing: whatever a request does, the next one finds the worker as it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from . import codecs
from .accuracy import AccuracyReport
from .backend import Backend, Choice, names_of
from .bundle import ModelBundle
from .cases import Settings, is_default, settings_of
from .description import describe, model_header, with_model_files
from .engine.prediction import NO_KEYS, Engine, Keys, SharedAnswer
from .errors import BundleError, NonFiniteLogits, OutOfMemory, ServingError
from .events import UNWATCHED, EventStream, Send
from .export import export, postprocess
from .intake import Asked, read_headers
from .limits import Limits
from .options import HEADER, Options, parse_options
from .predicting import CaseInHand, check_time
from .properties import properties_document
from .provenance import provenance_of
from .request import Request
from .responses import Response, ResponseMaker, last_resort
from .reuse import answer_note, keys_of, read_answer_note
from .settings import HandlerSettings
from .telemetry import SHARED_ANSWERS, Counts, RequestRecord, Reused, Stage
from .trial import trial_options, trial_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Answers requests for one model, one at a time.

    Attributes:
        bundle: the model.
        engine: turns patches into logits.
        limits: what a request may ask for.
        time_limit_s: seconds until the server's own deadline; TorchServe kills the worker a little later.
        refuse: raises a :class:`ServingError` while no requests are taken.
        counts: where requests are counted.
        settings: what the archive says to the handler: what requests may reuse.
        served: the models that the server was started with, ``None`` if nobody knows.
        backend: that was asked for; the engine says which one runs.
    """

    bundle: ModelBundle
    engine: Engine
    limits: Limits
    time_limit_s: float
    refuse: Callable[[], None] = field(default=lambda: None)
    counts: Counts = field(default_factory=Counts)
    settings: HandlerSettings = field(default_factory=HandlerSettings)
    served: Callable[[], Sequence[dict[str, Any]] | None] = field(default=lambda: None)
    backend: Choice = Backend.EAGER

    def answer(self, request: Request, send: Send | None = None) -> Response:
        """The response to a request; errors are responses too, whatever raises them.

        Args:
            request: what came.
            send: sends what goes to the client before the response, which is then the last part of a stream; ``None``
                where nothing can, so that ``stream`` is refused.
        """
        request_id = "-"
        try:
            request_id = request.id
            responses, record = self._responses(), self._record(request_id)
            if request.is_describe:
                return self._or_problem(lambda: responses.json(self._description(), request_id), record, responses)
            stream = EventStream(send, responses.events(request_id))
            response = self._or_problem(lambda: self._reply(request, record, responses, stream), record, responses)
            self._note(record, response.status, is_trial=request.is_trial)
            return stream.end(response)
        except Exception:
            logger.exception("request %s: unexpected error outside of its own work", json.dumps(request_id))
            return last_resort(request_id)

    def _or_problem(self, produce: Callable[[], Response], record: RequestRecord, responses: ResponseMaker) -> Response:
        """What ``produce`` returns, or the problem that it raises."""
        try:
            return produce()
        except ServingError as error:
            record.code = error.code
            return responses.problem(error, record.request_id)
        except MemoryError:
            record.code = OutOfMemory.code
            msg = "this server's memory does not hold the case; try again later, or send a smaller volume"
            return responses.problem(OutOfMemory(msg), record.request_id)
        except Exception:
            record.code = ServingError.code
            logger.exception("request %s: unexpected error", json.dumps(record.request_id))
            msg = "an unexpected error; the server's log has it under this request_id"
            return responses.problem(ServingError(msg), record.request_id)

    def _responses(self) -> ResponseMaker:
        return ResponseMaker(model_header(self.bundle), self.limits.response_bytes)

    def _description(self) -> dict[str, object]:
        runs = {"asked": str(self.backend), "runs": self.engine.backend and str(self.engine.backend)}
        return describe(self.bundle, self.limits, self.settings, self.time_limit_s, runs)

    def _record(self, request_id: str) -> RequestRecord:
        return RequestRecord(request_id, f"{self.bundle.description.name}/{self.bundle.description.version}")

    def _note(self, record: RequestRecord, status: HTTPStatus, *, is_trial: bool) -> None:
        """Log and count an answered request; whether that works is not the request's business."""
        try:
            record.status = int(status)
            logger.info("request %s", record.line())
            if not is_trial and not record.is_description:
                self.counts.add_request(record)
        except Exception:
            logger.exception("request %s was answered but cannot be counted", json.dumps(record.request_id))

    def _reply(
        self, request: Request, record: RequestRecord, responses: ResponseMaker, stream: EventStream
    ) -> Response:
        """What the options ask for: a description, or a segmentation."""
        options = parse_options(request.options_text())
        if options.describe:
            whole = with_model_files(self._description(), self.bundle, self.served())
            response = responses.json(whole, record.request_id)
            record.is_description = True
            return response
        if not request.is_trial:
            self.refuse()
        return self._segment(request, options, record, responses, stream)

    def _segment(
        self,
        request: Request,
        options: Options,
        record: RequestRecord,
        responses: ResponseMaker,
        stream: EventStream,
    ) -> Response:
        clock, record.priority = record.clock, options.priority
        started = time.monotonic()
        deadline = started + min(self.time_limit_s, options.timeout_s or self.time_limit_s)
        settings = settings_of(self.bundle, options)
        progress = stream.watched(deadline) if options.stream else UNWATCHED

        with clock.stage(Stage.DECODE):
            asked = read_headers(self.bundle, self.limits, request, record, options, settings)
            keys = self._keys(request, options)
            measured = self._measured(options, settings, asked)

        clock.begin(Stage.QUEUE)
        reservation = self.engine.reserve(
            asked.price,
            deadline,
            guaranteed=request.is_trial,
            watcher=progress.watcher,
            answer_key=keys.answer,
            priority=options.priority,
        )
        with reservation as reserved:
            clock.add(Stage.QUEUE, reserved.waited_s)
            if reserved.answer is not None:
                return self._take_over(reserved.answer, record, responses, measured)

            shared = (self.bundle, self.engine, self.limits, self.counts)
            case = CaseInHand(*shared, asked, options, settings, keys, reserved, deadline, record, progress)
            predicted = case.predict()
            properties, backends = predicted[0].properties, case.backends
            del case

            check_time(deadline - asked.price.export_s, "the network")
            with clock.stage(Stage.EXPORT), progress.stage(Stage.EXPORT):
                answer = export(predicted, asked.geometry, options, deadline)
                del predicted
                answer = asked.turns[0].turn_back(answer)

            check_time(deadline, "the export")
            steps = self.bundle.description.postprocessing
            if steps is not None and options.postprocess is not False:
                with clock.stage(Stage.POSTPROCESS), progress.stage(Stage.POSTPROCESS):
                    answer = replace(answer, array=postprocess(steps, answer.array, deadline))

            with clock.stage(Stage.ENCODE):
                lead, image, turn = self.bundle.lead, asked.images[0], asked.turns[0]
                also = properties_document(lead, image, turn, properties) if options.properties else None
                file = codecs.encode(answer, asked.form, self._about(request, options, asked, backends), also)
                del answer

            timing = clock.server_timing(record.reused)
            response = responses.result(
                file.body,
                file.content_type,
                record.request_id,
                timing,
                asked.warnings,
                backends=backends,
                measured=measured,
            )
            record.backend = names_of(backends)
            if keys.answer is not None:
                reserved.share(response.body, answer_note(file.content_type, asked.warnings, backends))
        return response

    def _keys(self, request: Request, options: Options) -> Keys:
        """What the request may have in common with others."""
        if request.is_trial:
            return NO_KEYS
        recipe = self.bundle.description.recipe if self.settings.cache_bytes > 0 else None
        answers, previous = self.settings.single_flight, request.previous_stage()
        return keys_of(request.images(), options, recipe, answers=answers, previous=previous)

    def _about(self, request: Request, options: Options, asked: Asked, backends: Collection[Backend]) -> codecs.About:
        """What the answer's files say beside the voxels."""
        provenance = None
        if asked.form.says_where_from:
            pairs = zip(asked.images, request.images(), strict=True)
            images = [codecs.digest_of(image, body) for image, body in pairs]
            labels = request.previous_stage()
            previous = None if labels is None else hashlib.sha256(labels).hexdigest()
            provenance = provenance_of(self.bundle, options, images, previous, backends)
        painting, codes = self.bundle.lead.painting, self.bundle.codes
        return codecs.About(asked.images, painting, codes, provenance, self.limits.response_bytes)

    def _measured(self, options: Options, settings: Mapping[str, Settings], asked: Asked) -> AccuracyReport | None:
        """What the archive knows of such answers: its report is of images alone, and of requests without options."""
        as_measured = asked.previous is None and is_default(self.bundle, options, settings)
        return self.bundle.accuracy if as_measured else None

    def _take_over(
        self,
        shared: SharedAnswer,
        record: RequestRecord,
        responses: ResponseMaker,
        measured: AccuracyReport | None,
    ) -> Response:
        """The answer of an equal request as this one's own."""
        record.reused, record.passes = Reused.ANSWER, 0
        self.counts.add(SHARED_ANSWERS, 1)
        note, timing = read_answer_note(shared.note), record.clock.server_timing(record.reused)
        response = responses.result(
            shared.body,
            note.content_type,
            record.request_id,
            timing,
            note.warnings,
            backends=note.backends,
            measured=measured,
        )
        record.backend = names_of(note.backends)
        return response

    def dry_run(self) -> str | None:
        """Answer one small made-up case, so that the first real one finds everything loaded.

        Returns:
            What should be known of a model that is served all the same, if anything.

        Raises:
            BundleError: it could not be answered; then no request could. The message names the stage and the reason.
        """
        headers = {HEADER: json.dumps(trial_options(self.bundle))}
        request = Request(trial_parts(self.bundle), headers, "dry-run", is_trial=True)
        record, responses = self._record(request.id), self._responses()
        try:
            self._reply(request, record, responses, EventStream(None, responses.events(request.id)))
        except NonFiniteLogits as error:
            record.code = error.code
            self._note(record, error.status, is_trial=True)
            warning = "the dry run's logits are not finite; real images may have finite ones, or be refused like it"
            logger.warning(warning)
            return warning
        except Exception as error:
            reason = str(error) if isinstance(error, ServingError) else f"{type(error).__name__} {error}"
            msg = f"the dry run failed in the stage {record.clock.latest or Stage.DECODE}: {reason}"
            raise BundleError(msg) from error
        self._note(record, HTTPStatus.OK, is_trial=True)
        return None
