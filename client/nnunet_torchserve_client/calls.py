"""One call of the predictor: several cases become results in their order, and failures together.

Threads: ``finish`` is called in the threads of the cases (:mod:`.flight`); everything else in the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .answers import Answer
from .client import Case, Client
from .description import Description
from .errors import CasesFailed, ClientError
from .flight import Finish, Outcome
from .progress import shown
from .stopping import Stop

Prediction = Any
"""Labels (Z, Y, X), an array; or those and probabilities (C, Z, Y, X); or ``None``, because they were written."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """What the cases of a call have in common.

    Attributes:
        client: asks.
        description: of the model that is to answer.
        options: of docs/http.md; a case's own come on top.
        finish: writes a result, or returns it.
        stop: gives the call up; ``None`` if nobody will.
        shows: whether progress is shown on a terminal.
    """

    client: Client
    description: Description
    options: Mapping[str, object]
    finish: Finish[Case, Prediction]
    stop: Stop | None
    shows: bool

    def one(self, case: Case) -> Prediction:
        """Predict one case, in the caller's thread.

        Raises:
            ClientError: it failed.
        """
        with shown("predicting", 1, wanted=self.shows) as progress:
            answer = self.client.predict(case, self.options, progress.event, self.stop)
            return self._finished(case, answer)

    def in_turn(self, cases: Iterable[Case]) -> list[Prediction]:
        """Predict one case after the other.

        Raises:
            ClientError: the first that failed; ``results`` are those before it.
        """
        results: list[Prediction] = []
        for case in cases:
            try:
                results.append(self.one(case))
            except ClientError as error:
                error.results = results
                raise
        return results

    def several(self, cases: Iterable[Case], total: int | None) -> list[Prediction]:
        """Predict several cases at a time.

        Args:
            cases: are taken when they are needed.
            total: how many, if that is known.

        Raises:
            ClientError: the only case failed, or further ones would; ``results`` is what there was by then.
            CasesFailed: some of several cases failed; the others were predicted.
        """
        results: dict[int, Prediction] = {}
        failures: dict[int, ClientError] = {}
        with shown("predicting", total, wanted=self.shows) as progress:
            outcomes: Generator[Outcome[Case, Prediction], None, None] = self.client.predict_many(
                cases, self.options, finish=self._finished, ordered=False, on_event=progress.event, stop=self.stop
            )
            with closing(outcomes):  # else cases would go on, and write files, after an error was raised
                for outcome in outcomes:
                    progress.one_done()
                    results[outcome.index] = outcome.value
                    if outcome.error is not None:
                        if outcome.error.of_all_cases:
                            outcome.error.results = [results.get(index) for index in range(max(results) + 1)]
                            for earlier in failures.values():
                                outcome.error.add_note(f"before it: {earlier}")
                            raise outcome.error
                        failures[outcome.index] = outcome.error
        in_order = [results[index] for index in range(len(results))]
        if failures and len(results) == 1:
            raise failures[0]
        if failures:
            raise CasesFailed([failures[index] for index in sorted(failures)], in_order)
        return in_order

    def _finished(self, case: Case, answer: Answer) -> Prediction:
        """``finish``, for answers of the model that was described and of no other, unless the call is given up."""
        if self.stop is not None:
            self.stop.check()
        with answer.naming():
            self.client.check(answer, self.description)
            for warning in answer.warnings:
                logger.warning("%s: the server warns of %s", case.name, warning)
            if answer.other_backend is not None:
                logger.warning("%s: %s ran the network, so that a voxel may differ", case.name, answer.other_backend)
            return self.finish(case, answer)
