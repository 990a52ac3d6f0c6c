"""One request from bytes to bytes: the whole story on one page.

``Pipeline.answer`` never raises and keeps nothing: whatever a request does, the next one finds the worker as it was.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus

import numpy as np

from . import __version__, codecs
from .bundle import REORIENTING_READERS, ModelBundle
from .cases import Price, Settings, affordable, forward_passes, price, settings_for
from .codecs import ImageSource
from .codecs.inflate import Payload
from .engine.prediction import NO_KEYS, Engine, Keys, Reservation, SharedAnswer
from .errors import (
    BundleError,
    ChannelsDisagree,
    Deadline,
    Malformed,
    NonFinite,
    NonFiniteLogits,
    OutOfMemory,
    ResponseTooLarge,
    ServingError,
    TooLarge,
    UnknownFormat,
)
from .events import UNWATCHED, EventStream, Progress, Send
from .export import export
from .limits import Limits
from .options import HEADER, PART, Options, parse_options
from .orientation import Turn, turn_towards
from .preprocess import PreprocessedCase, preprocess
from .responses import (
    CLIENT_REQUEST_ID,
    Response,
    ResponseMaker,
    Warnings,
    last_resort,
    too_large_message,
    usable_request_id,
)
from .reuse import answer_note, keys_of, note_of, read_answer_note, recall
from .settings import HandlerSettings
from .telemetry import CACHE_LOOKUPS, HIT, MISS, SHARED_ANSWERS, Counts, RequestRecord, Reused, Stage
from .trial import trial_image
from .volume import Geometry, Volume

RAW_BODY = "body"
"""TorchServe's name for a body that is not multipart."""

_ALIGNED_MM, _ALIGNED_DIRECTION = 1e-2, 1e-3

_IMAGE_PART = re.compile(r"image(?:_([0-9]{4}))?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, free of TorchServe.

    Attributes:
        parts: multipart field -> content, or ``{"body": content}``. A content that is not bytes was parsed by the
            front end because of its content type.
        headers: HTTP headers as sent; looked up without regard to case.
        server_id: the front end's id of this request.
        is_trial: a worker's own, made while it loads.
    """

    parts: Mapping[str, object]
    headers: Mapping[str, str]
    server_id: str | None = None
    is_trial: bool = False

    def header(self, name: str) -> str | None:
        """A header's value, ``None`` if it was not sent."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), None)

    @property
    def is_describe(self) -> bool:
        """Whether TorchServe's describe API asks; a client's header of that name on a real request does not count."""
        return self.headers.get("describe") == "True" and not any(self.parts.values())

    @property
    def id(self) -> str:
        """The client's id if it can stand in a header, else the front end's."""
        return usable_request_id(self.header(CLIENT_REQUEST_ID)) or usable_request_id(self.server_id) or "-"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request whose headers were read.

    Attributes:
        images: one, or one a channel.
        turns: how each of them becomes what the model sees.
        geometry: of that.
        price: what the case costs.
        form: of the answer.
        warnings: of :class:`~.responses.Warnings`, as far as headers give cause.
    """

    images: Sequence[ImageSource]
    turns: Sequence[Turn]
    geometry: Geometry
    price: Price
    form: codecs.AnswerForm
    warnings: list[str]

    def decode(self) -> tuple[Volume, bool]:
        """All channels as the model sees them, and whether every voxel has one value.

        Raises:
            NonFinite: a voxel is NaN or infinite, which its smallest or largest value then is too.
        """
        channels = [turn.turn(image.read()) for image, turn in zip(self.images, self.turns, strict=True)]
        array = channels[0] if len(channels) == 1 else np.concatenate(channels)
        low, high = array.min(), array.max()
        if not np.isfinite(low) or not np.isfinite(high):
            msg = "the image holds NaN or infinite voxels; replace them by a number that means background"
            raise NonFinite(msg)
        return Volume(array, self.geometry), bool(low == high)


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
    """

    bundle: ModelBundle
    engine: Engine
    limits: Limits
    time_limit_s: float
    refuse: Callable[[], None] = field(default=lambda: None)
    counts: Counts = field(default_factory=Counts)
    settings: HandlerSettings = field(default_factory=HandlerSettings)

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
                return self._or_problem(lambda: responses.json(self.describe(), request_id), record, responses)
            stream = EventStream(send, responses.events(request_id))
            response = self._or_problem(lambda: self._segment(request, record, responses, stream), record, responses)
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
        return ResponseMaker(self.model_header(), self.limits.response_bytes)

    def _record(self, request_id: str) -> RequestRecord:
        return RequestRecord(request_id, f"{self.bundle.description.name}/{self.bundle.description.version}")

    def _note(self, record: RequestRecord, status: HTTPStatus, *, is_trial: bool) -> None:
        """Log and count an answered request; whether that works is not the request's business."""
        try:
            record.status = int(status)
            logger.info("request %s", record.line())
            if not is_trial:
                self.counts.add_request(record)
        except Exception:
            logger.exception("request %s was answered but cannot be counted", json.dumps(record.request_id))

    def _segment(
        self, request: Request, record: RequestRecord, responses: ResponseMaker, stream: EventStream
    ) -> Response:
        if not request.is_trial:
            self.refuse()
        clock = record.clock
        started = time.monotonic()
        options = parse_options(self._options_text(request))
        deadline = started + min(self.time_limit_s, options.timeout_s or self.time_limit_s)
        settings = settings_for(self.bundle, options)
        progress = stream.watched(deadline) if options.stream else UNWATCHED

        with clock.stage(Stage.DECODE):
            asked = self._read_headers(request, record, options, settings)
            keys = self._keys(request, options)

        clock.begin(Stage.QUEUE)
        reservation = self.engine.reserve(
            asked.price, deadline, guaranteed=request.is_trial, watcher=progress.watcher, keys=keys
        )
        with reservation as reserved:
            clock.add(Stage.QUEUE, reserved.waited_s)
            if reserved.answer is not None:
                return self._take_over(reserved.answer, record, responses)

            case, constant = self._prepare(asked, reserved, record, options, deadline, keys, progress)
            if asked.price.is_guess:
                self._price_again(asked, case, record, options, settings)

            _check(deadline - asked.price.export_s, "preprocessing")
            clock.begin(Stage.NETWORK)
            with progress.stage(Stage.NETWORK, forward_passes(self.bundle, case.data.shape[1:], settings)):
                note = note_of(case, keys, constant=constant)
                prediction = self.engine.predict(case.data, settings, deadline, progress.watcher, note)
            clock.add(Stage.QUEUE, prediction.queue_s)
            clock.add(Stage.NETWORK, prediction.network_s)
            properties = case.properties
            del case

            _check(deadline - asked.price.export_s, "the network")
            with clock.stage(Stage.EXPORT), progress.stage(Stage.EXPORT):
                answer = export(self.bundle, prediction.logits, properties, asked.geometry, options, deadline)
                del prediction
                answer = asked.turns[0].turn_back(answer)

            _check(deadline, "the export")
            with clock.stage(Stage.ENCODE):
                file = codecs.encode(answer, asked.form, asked.images[0], self.bundle.painting)
                del answer

            timing = clock.server_timing(record.reused)
            response = responses.result(file.body, file.content_type, record.request_id, timing, asked.warnings)
            if keys.answer is not None:
                reserved.share(response.body, answer_note(file.content_type, asked.warnings))
        return response

    def _prepare(
        self,
        asked: _Asked,
        reserved: Reservation,
        record: RequestRecord,
        options: Options,
        deadline: float,
        keys: Keys,
        progress: Progress,
    ) -> tuple[PreprocessedCase, bool]:
        """The case on the network's grid, and whether its image is constant; from the cache, if it is there."""
        recalled = recall(reserved.take_volume(), keys)
        if keys.volume is not None:
            self.counts.add(CACHE_LOOKUPS, 1, MISS if recalled is None else HIT)
        if recalled is not None:
            case, constant = recalled
            record.reused = Reused.VOLUME
        else:
            with record.clock.stage(Stage.DECODE):
                volume, constant = asked.decode()

            _check(deadline - asked.price.preprocess_s, "decoding the volume")
            with record.clock.stage(Stage.PREPROCESS), progress.stage(Stage.PREPROCESS):
                case = preprocess(self.bundle, volume, options.preprocess)
        if constant:
            asked.warnings.append(Warnings.CONSTANT_IMAGE)
        return case, constant

    def _keys(self, request: Request, options: Options) -> Keys:
        """What the request may have in common with others."""
        if request.is_trial:
            return NO_KEYS
        volumes, answers = self.settings.cache_bytes > 0, self.settings.single_flight
        return keys_of(_image_parts(request), options, volumes=volumes, answers=answers)

    def _take_over(self, shared: SharedAnswer, record: RequestRecord, responses: ResponseMaker) -> Response:
        """The answer of an equal request as this one's own."""
        record.reused, record.passes = Reused.ANSWER, 0
        self.counts.add(SHARED_ANSWERS, 1)
        content_type, warnings = read_answer_note(shared.note)
        timing = record.clock.server_timing(record.reused)
        return responses.result(shared.body, content_type, record.request_id, timing, warnings)

    def dry_run(self) -> str | None:
        """Answer one small made-up case, so that the first real one finds everything loaded.

        Returns:
            What should be known of a model that is served all the same, if anything.

        Raises:
            BundleError: it could not be answered; then no request could. The message names the stage and the reason.
        """
        options = {"folds": [self.bundle.folds[0]], "use_mirroring": False}
        headers = {HEADER: json.dumps(options)}
        request = Request({RAW_BODY: trial_image(self.bundle)}, headers, "dry-run", is_trial=True)
        record, responses = self._record(request.id), self._responses()
        try:
            self._segment(request, record, responses, EventStream(None, responses.events(request.id)))
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

    def describe(self) -> dict[str, object]:
        """What a client needs to know of the model, for TorchServe's describe API."""
        bundle, description = self.bundle, self.bundle.description
        labels = bundle.labels
        return {
            "name": description.name,
            "version": description.version,
            "digest": f"sha256:{bundle.digest}",
            "dataset": description.dataset,
            "trainer": description.trainer,
            "plans": description.plans,
            "configuration": description.configuration,
            "folds": list(bundle.folds),
            "mirroring_axes": {str(fold.fold): list(fold.mirroring_axes or ()) for fold in description.folds},
            "channels": bundle.channel_names,
            "labels": bundle.dataset["labels"],
            "regions_class_order": bundle.dataset.get("regions_class_order") if labels.has_regions else None,
            "classes": bundle.classes,
            "probability_channels": bundle.output_names,
            "patch_size": list(bundle.patch_size),
            "spacing": [float(size) for size in bundle.configuration.spacing],
            "reader": bundle.reader,
            "input_orientation": bundle.input_orientation,
            "axis_order": "patch_size and spacing (mm) in the plan's axis order",
            "settings": self.settings.model_dump(mode="json", exclude={"limits"}),
            "limits": asdict(self.limits) | {"timeout_s": self.time_limit_s},
            "options": Options.model_json_schema(),
            "serving_core": __version__,
            "built_with": description.built_with,
        }

    def model_header(self) -> str:
        """The value of ``X-Nnunet-Model``."""
        description = self.bundle.description
        return f"name={description.name}; version={description.version}; digest=sha256:{self.bundle.digest}"

    def _options_text(self, request: Request) -> bytes | None:
        part, header = request.parts.get(PART), request.header(HEADER)
        if part is not None and header is not None:
            msg = f"options came twice: in the field {PART} and in the header {HEADER}; send one of them"
            raise Malformed(msg)
        if header is not None:
            return header.encode("utf-8", "surrogateescape")
        if part is None:
            return None
        if isinstance(part, dict):  # TorchServe parses a part that says it is JSON
            return json.dumps(part).encode()
        return bytes(_payload(PART, part))

    def _read_headers(self, request: Request, record: RequestRecord, options: Options, settings: Settings) -> _Asked:
        """Everything that can be known, and refused, before a voxel is decoded."""
        images = self._open_images(request, options)
        codecs.check_channels(images, list(self.bundle.channel_names.values()))
        turns = [self._turn(image) for image in images]
        geometry = _common_geometry([turn.after for turn in turns])
        record.shape = images[0].geometry.shape
        warnings = _warnings([turn.after for turn in turns], len(self.bundle.patch_size))
        channels = sum(image.channels for image in images)
        case_price = price(self.bundle, geometry, channels, settings, options)
        record.patches, record.passes = case_price.patches, case_price.passes
        case_price = affordable(case_price, self.limits, geometry)
        form = codecs.answer_form(options, images[0].native_format, images[0].geometry)
        self._check_answer_fits(geometry, form, options)
        return _Asked(images, turns, geometry, case_price, form, warnings)

    def _price_again(
        self, asked: _Asked, case: PreprocessedCase, record: RequestRecord, options: Options, settings: Settings
    ) -> None:
        """Refuse by the grid that there is what could not be refused by a guess."""
        channels, first, second, third = case.data.shape
        true = price(self.bundle, asked.geometry, channels, settings, options, (first, second, third))
        record.patches, record.passes = true.patches, true.passes
        affordable(true, self.limits, asked.geometry)

    def _open_images(self, request: Request, options: Options) -> Sequence[ImageSource]:
        if len(request.parts) > self.limits.parts:
            msg = f"the request has {len(request.parts)} fields, this server takes at most {self.limits.parts}"
            raise TooLarge(msg)
        bodies = _image_parts(request)
        size = sum(len(body) for body in bodies)
        if size > self.limits.body_bytes:
            msg = f"the images have {size} bytes, this server takes at most {self.limits.body_bytes}"
            raise TooLarge(msg)
        reader, placement = self.bundle.reader, options.placement
        return [codecs.open_image(body, self.limits, reader, placement) for body in bodies]

    def _turn(self, image: ImageSource) -> Turn:
        as_itk = self.bundle.reader.startswith("SimpleITK") and self.bundle.reader in REORIENTING_READERS
        return turn_towards(image.geometry, self.bundle.input_orientation, as_itk=as_itk)

    def _check_answer_fits(self, geometry: Geometry, form: codecs.AnswerForm, options: Options) -> None:
        size = codecs.smallest_answer(geometry, form, options.probability_bytes(self.bundle.classes))
        if size > self.limits.response_bytes:
            raise ResponseTooLarge(too_large_message(size, self.limits.response_bytes))


def _common_geometry(geometries: Sequence[Geometry]) -> Geometry:
    """The first image's; shapes and spacings must agree, as nnU-Net's readers demand."""
    first = geometries[0]
    for number, other in enumerate(geometries[1:], start=1):
        if other.shape != first.shape or not np.allclose(other.spacing_zyx, first.spacing_zyx):
            pictures = first.assumed and other.assumed
            right = "send pictures of one size" if pictures else "resample them to one grid"
            msg = f"channel {number} has {_extent(other)}, channel 0 has {_extent(first)}; {right}"
            raise ChannelsDisagree(msg)
    return first


def _extent(geometry: Geometry) -> str:
    """An image's size in words; of a picture nobody knows the spacing, and of a plane there is none between slices."""
    axes = slice(1, None) if geometry.is_flat else slice(None)
    names = "(y, x)" if geometry.is_flat else "(z, y, x)"
    if geometry.assumed:
        return f"{geometry.shape[axes]} pixels {names}"
    return f"shape {geometry.shape[axes]} and spacing {geometry.spacing_zyx[axes]} mm {names}"


def _warnings(geometries: Sequence[Geometry], dimensions: int) -> list[str]:
    """What stock would print a warning for, or should, from the headers."""
    first = geometries[0]
    aligned = all(
        np.allclose(other.origin, first.origin, atol=_ALIGNED_MM)
        and np.allclose(other.direction, first.direction, atol=_ALIGNED_DIRECTION)
        for other in geometries
    )
    warnings = [] if aligned else [Warnings.CHANNELS_MISALIGNED]
    if first.ndim < dimensions:
        warnings.append(Warnings.SINGLE_SLICE)
    if first.assumed:
        warnings.append(Warnings.SPACING_ASSUMED)
    return [str(warning) for warning in warnings]


def _image_parts(request: Request) -> list[Payload]:
    """The images of a request in channel order."""
    parts = request.parts
    if (request.header("Content-Type") or "").startswith("application/x-www-form-urlencoded"):
        msg = "the image came as a form; send it with curl -T, not --data-binary, or as application/octet-stream"
        raise UnknownFormat(msg)
    if not parts:
        msg = "the request has no body; send the image as the raw body or as multipart field image"
        raise Malformed(msg)
    numbered: dict[int, Payload] = {}
    whole: list[Payload] = []
    for name, content in parts.items():
        match = _IMAGE_PART.fullmatch(name)
        if name in (RAW_BODY, "image"):
            whole.append(_payload(name, content))
        elif match:
            numbered[int(match[1])] = _payload(name, content)
        elif name != PART:
            msg = f"unknown field {ascii(name)[:80]}; fields are image or image_0000, image_0001, …, and options"
            raise Malformed(msg)
    if len(whole) + bool(numbered) != 1:
        msg = "send either one image, or image_0000, image_0001, … with one channel each"
        raise Malformed(msg)
    if whole:
        return whole
    if sorted(numbered) != list(range(len(numbered))):
        msg = f"the channels must be numbered 0000, 0001, … without a gap; got {sorted(numbered)}"
        raise Malformed(msg)
    return [numbered[channel] for channel in sorted(numbered)]


def _payload(name: str, content: object) -> Payload:
    if isinstance(content, bytes | bytearray | memoryview):
        return content
    if name == PART and isinstance(content, str):
        return content.encode("utf-8", "surrogateescape")
    msg = "the image came with a text or JSON content type; send it as application/octet-stream"
    raise UnknownFormat(msg)


def _check(latest: float, done: str) -> None:
    if time.monotonic() >= latest:
        msg = f"the time for this request ran out: after {done} there is too little left for the next stage"
        raise Deadline(msg)
