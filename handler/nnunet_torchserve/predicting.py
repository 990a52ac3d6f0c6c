"""From the image to the logits of every member that the recipe needs: what a recipe does, step by step.

A *single* member is preprocessed and predicted. A *cascade* does that with its first stage, makes labels of the logits,
and gives them to its last stage as another input. An *ensemble* does all that for each of its models, one after the
other; the mean is made afterwards, by the export. The case holds one reservation all the time, which is amended where
the price was a guess. A member that a recipe names twice, as the first stage of a cascade beside it, is predicted once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .backend import Backend
from .bundle import ModelBundle
from .cases import Price, Settings, forward_passes
from .engine.prediction import Engine, Keys, Reservation
from .errors import Deadline
from .events import Progress
from .export import Predicted, label_map
from .intake import Asked
from .limits import Limits
from .member import Member
from .options import ExportMethod, Options
from .preprocess import PreprocessedCase, preprocess
from .pricing import affordable_case, price_of, whole_price
from .recipe import Cascade, Ensemble, Single, models_of
from .responses import Warnings
from .reuse import keep_of, recalled
from .telemetry import CACHE_LOOKUPS, HIT, MISS, Counts, RequestRecord, Reused, Stage
from .volume import LabelArray, Volume


@dataclass(slots=True)
class CaseInHand:
    """One request's case, from its reservation to its logits.

    Attributes:
        bundle: the model.
        engine: has its networks.
        limits: what a request may ask for.
        counts: where requests are counted.
        asked: the request.
        options: of the request.
        settings: of each member.
        keys: what it has in common with others.
        reserved: what it got.
        deadline: ``time.monotonic()`` after which it is given up.
        record: is told where the time goes.
        progress: is told how far it is.
        backends: what ran the networks of the members that were predicted.
    """

    bundle: ModelBundle
    engine: Engine
    limits: Limits
    counts: Counts
    asked: Asked
    options: Options
    settings: Mapping[str, Settings]
    keys: Keys
    reserved: Reservation
    deadline: float
    record: RequestRecord
    progress: Progress
    _image: Volume | None = field(default=None, init=False)
    _constant: bool = field(default=False, init=False)
    _predicted: dict[str, Predicted] = field(default_factory=dict, init=False)
    _labels: dict[str, LabelArray] = field(default_factory=dict, init=False)
    _known: dict[str, Price] = field(default_factory=dict, init=False)
    _ahead: dict[str, Price] = field(default_factory=dict, init=False)
    backends: set[Backend] = field(default_factory=set, init=False)

    def predict(self) -> list[Predicted]:
        """The logits of each model of an ensemble, or of the one model."""
        recipe = self.bundle.description.recipe
        models = recipe.of if isinstance(recipe, Ensemble) else (recipe,)
        self._known, self._ahead = dict(self.asked.prices), dict(self.asked.prices)
        predicted = [self._model(model) for model in models]
        if self._constant:
            self.asked.warnings.append(Warnings.CONSTANT_IMAGE)
        for unneeded in self._ahead.values():  # first stages whose labels were not needed
            self._recount(-unneeded.patches, -unneeded.passes)
        return predicted

    def _model(self, model: Single | Cascade) -> Predicted:
        if isinstance(model, Single):
            return self._member(model.member)
        return self._member(model.member, lambda: self._first_stage(model))

    def _first_stage(self, cascade: Cascade) -> LabelArray:
        """The labels that the last stage sees: the client's, or those of the first stage's logits."""
        if self.asked.previous is not None:
            with self.record.clock.stage(Stage.DECODE):
                return self.asked.previous.decode()
        if cascade.first is None:
            msg = "a cascade has a first stage"  # the intake has seen to it
            raise ValueError(msg)
        name = cascade.first.member
        if name in self._labels:
            return self._labels[name]
        stage = self._member(name)
        with self.record.clock.stage(Stage.EXPORT):
            labels = label_map(stage.model, stage.logits, stage.properties, ExportMethod.EXACT, self.deadline)
        self._labels[name] = labels
        if name not in models_of(self.bundle.description.recipe):
            del self._predicted[name]  # nobody needs its logits any more
        return labels

    def _member(self, name: str, first_stage: Callable[[], LabelArray] | None = None) -> Predicted:
        """Preprocess the case for a member, and predict it.

        Args:
            name: the member.
            first_stage: makes the labels that it sees, if it sees any.
        """
        if name in self._predicted:
            return self._predicted[name]
        member, cost = self.bundle.members[name], self._ahead[name]
        case = self._preprocessed(member, first_stage)
        if cost.is_guess:
            self._price_again(name, case)

        self._check(cost.export_s, "preprocessing")
        clock, settings = self.record.clock, self.settings[name]
        clock.begin(Stage.NETWORK)
        del self._ahead[name]
        passes = forward_passes(member, case.data.shape[1:], settings)
        with self.progress.stage(Stage.NETWORK, passes, self._spoken(name)):
            keep = keep_of(case, self.keys.volumes.get(name), constant=self._constant, backends=self.backends)
            later = sum(price.passes for price in self._ahead.values())
            watcher = self.progress.watcher
            prediction = self.engine.predict(case.data, settings, self.deadline, watcher, keep, later)
        clock.add(Stage.QUEUE, prediction.queue_s)
        clock.add(Stage.NETWORK, prediction.network_s)
        self.backends.add(prediction.backend)
        found = self._predicted[name] = Predicted(member, prediction.logits, case.properties)
        return found

    def _preprocessed(self, member: Member, first_stage: Callable[[], LabelArray] | None) -> PreprocessedCase:
        """The case on a member's grid; from the cache, if it is there, and then without its first stage."""
        kept = self._recalled(member.name)
        if kept is not None:
            return kept
        previous = None if first_stage is None else first_stage()
        image = self._decoded(member.name)
        done = f"the network of {', '.join(self._predicted)}" if self._predicted else "decoding the volume"
        self._check(self.asked.prices[member.name].preprocess_s, done)
        spoken = self._spoken(member.name)
        with self.record.clock.stage(Stage.PREPROCESS), self.progress.stage(Stage.PREPROCESS, member=spoken):
            return preprocess(member, image, self.options.preprocess, previous)

    def _recalled(self, member: str) -> PreprocessedCase | None:
        """The case on a member's grid, if an earlier one left it in the cache."""
        key = self.keys.volumes.get(member)
        if key is None:
            return None
        found = recalled(self.reserved.recall(key), key)
        self.counts.add(CACHE_LOOKUPS, 1, MISS if found is None else HIT)
        if found is None:
            return None
        case, self._constant = found.case, found.constant
        self.backends |= found.backends
        self.record.reused = Reused.VOLUME
        return case

    def _decoded(self, member: str) -> Volume:
        """The image, for one member to use up; the last one gets the array that was decoded."""
        with self.record.clock.stage(Stage.DECODE):
            if self._image is None:
                self._image, self._constant = self.asked.decode()
            image = self._image
            if member == list(self.asked.prices)[-1]:
                self._image = None
                return image
            return replace(image, array=image.array.copy())

    def _spoken(self, member: str) -> str | None:
        """What a client is told of which member is at work: nothing where there is one."""
        return member if len(self.asked.prices) > 1 else None

    def _price_again(self, name: str, case: PreprocessedCase) -> None:
        """By the grid that there is, refuse what no guess could refuse, and charge what was charged by a guess."""
        geometry, old, images = self.asked.geometry, self._known[name], self.bundle.lead.channels
        _, first, second, third = case.data.shape
        grid = (first, second, third)
        true = price_of(self.bundle, name, geometry, images, self.settings[name], self.options, grid)
        self._recount(true.patches - old.patches, true.passes - old.passes)
        self._known[name] = true
        whole = whole_price(self.bundle, self._known, geometry, images, self.options, self.asked.making)
        whole = affordable_case(self._known, whole, self.limits, geometry)
        with self.record.clock.stage(Stage.QUEUE):
            self.reserved.amend(whole)

    def _recount(self, patches: int, passes: int) -> None:
        """Note so many more than were expected."""
        self.record.patches = (self.record.patches or 0) + patches
        self.record.passes = (self.record.passes or 0) + passes

    def _check(self, needed_s: float, done: str) -> None:
        check_time(self.deadline - needed_s, done)


def check_time(latest: float, done: str) -> None:
    """Raise :class:`Deadline` if ``latest`` has passed, in ``time.monotonic()``; ``done`` names the last stage."""
    if time.monotonic() >= latest:
        msg = f"the time for this request ran out: after {done} there is too little left for the next stage"
        raise Deadline(msg)
