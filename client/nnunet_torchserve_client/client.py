"""The plain client: cases in, answers out, whatever happens to servers meanwhile.

Threads: a :class:`Client` may be used by any number of threads. It keeps nothing of a case.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from .answers import Answer
from .bodies import EMPTY, Body, Image, body_of
from .credentials import credentials
from .description import Description
from .errors import BodyTooLarge, ClientError, WrongModel, WrongUse
from .events import Event, Kind, Listener
from .flight import Finish, Given, Outcome, Seat, fly
from .known_description import KnownDescription
from .retrying import Patience, Retries, Trial
from .server import Server
from .servers import Servers, Wish
from .stopping import Stop

SILENCE_S = 60.0
"""Seconds without a byte after which a server that has begun to answer is taken for dead: its heart beats every 5."""

URL_VARIABLE = "NNUNET_TORCHSERVE_URL"

Options = Mapping[str, object]

_LONGEST_S = 10_000_000
"""Four months; locks and sockets take no time without end."""

_SHORTEST_TIMEOUT_S = 0.001
"""The server wants a number above 0."""


@dataclass(frozen=True, slots=True)
class Case:
    """A case to be predicted.

    Attributes:
        name: by which events and errors call it; it is not sent.
        image: a file's path, its content, or an array (C, Z, Y, X) with option ``spacing`` (mm, x, y, z); or a list of
            files or contents, one for each channel.
        options: of docs/http.md, for this case only.
        note: for the caller; it is not sent.
        fault: why it cannot be sent. It fails with that in its turn, and others are predicted.
        previous_stage: labels of a cascade's first stage on the image's grid, as a file's path, its content or an
            array; ``None`` if the server makes them, or the model is no cascade.
    """

    name: str
    image: Image | Sequence[Image] = field(repr=False)
    options: Options = field(default_factory=dict)
    note: Any = field(default=None, repr=False)
    fault: ClientError | None = field(default=None, repr=False)
    previous_stage: Image | None = field(default=None, repr=False)


def _as_it_is(_: Case, answer: Answer) -> Any:
    return answer


class Client:
    """Asks one server, or several that serve the same model."""

    def __init__(
        self,
        url: str | Sequence[str] | None,
        model: str,
        version: str | None = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str | Path = True,
        deadline_s: float = 3600.0,
        first_contact_s: float = 20.0,
        pause_s: float = 1.0,
        silence_s: float = SILENCE_S,
        use_proxies: bool = True,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: base URL of the inference port, or several, over which cases are spread; ``None`` takes
                ``NNUNET_TORCHSERVE_URL``, where several are separated by spaces or commas.
            model: its name on the server.
            version: ``None`` is the server's default version.
            token: sent as bearer token; ``None`` takes ``NNUNET_TORCHSERVE_TOKEN``.
            headers: further headers of every request, to this server only.
            verify: ``False`` trusts any certificate; a path names a file of authorities (PEM).
            deadline_s: seconds from the first try of a case until it is given up, waiting and tries included.
            first_contact_s: seconds for which a server that has never answered is tried.
            pause_s: before a second try; longer before each further one.
            silence_s: without a byte, after which a server that has begun to answer is taken for dead.
            use_proxies: whether ``HTTPS_PROXY`` and its kin hold; they never do for this machine's own addresses.

        Raises:
            WrongUse: something of this cannot be meant so.
        """
        from .connection import checked_url, connections  # brings httpx, half of what the package takes to be imported

        urls = list(dict.fromkeys(checked_url(each) for each in _given_urls(url)))
        if not _is_name(model) or not (version is None or _is_name(version)):
            msg = (
                f"a model is given by its name on the server and a version, not as {model!r} and {version!r}: "
                "letters without accents, digits, and _ - ."
            )
            raise WrongUse(msg)
        if not all(0 < each <= _LONGEST_S for each in (deadline_s, first_contact_s, pause_s, silence_s)):
            msg = f"deadline_s, first_contact_s, pause_s and silence_s are seconds, above 0 and at most {_LONGEST_S}"
            raise WrongUse(msg)
        self.model, self.version = model, version
        self._path = f"/predictions/{model}" + (f"/{version}" if version else "")
        self._credentials = credentials(token, headers, verify)
        self._patience = Patience(deadline_s, first_contact_s, pause_s)
        self._silence_s = silence_s
        self._servers = Servers(
            [Server(each, connections(each, self._credentials, use_proxies=use_proxies), pause_s) for each in urls]
        )
        self._known = KnownDescription(model)
        self._telling = threading.RLock()
        self._closed = Stop()

    def __repr__(self) -> str:
        version = f", version={self.version!r}" if self.version else ""
        return f"{type(self).__name__}({self.urls!r}, {self.model!r}{version})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; cases in flight fail, and no answer is given to ``finish`` any more."""
        self._closed.set()
        self._servers.close()

    @property
    def urls(self) -> list[str]:
        """Base URLs of the servers."""
        return self._servers.urls

    @property
    def deadline_s(self) -> float:
        """Seconds that a case may take, all tries included."""
        return self._patience.deadline_s

    def describe(self, on_event: Listener | None = None, stop: Stop | None = None) -> Description:
        """What the model is; asked for once, until it is forgotten.

        The question may wait in TorchServe's queue behind cases, for every request does. If it waits for longer than a
        few seconds, a warning is logged.

        Args:
            on_event: is told what happens meanwhile.
            stop: gives it up.

        Raises:
            ClientError: the server cannot be reached, does not have the model, or does not describe it.
        """
        return self._describe(self._teller(on_event), stop or Stop())

    def _describe(self, tell: Listener, stop: Stop) -> Description:
        def ask(told: Listener) -> Answer:
            return self._ask(self.model, EMPTY, {"describe": True}, told, stop, streams=False)

        return self._known.get(ask, tell, stop)

    def check(self, answer: Answer, description: Description) -> None:
        """Raise unless the model that was described has answered; if it has not, the description is forgotten.

        So what ends one call does not end the next one, which asks anew what the model is.

        Args:
            answer: of a prediction.
            description: that the prediction relied on.

        Raises:
            WrongModel: another model has answered.
        """
        try:
            answer.check_model(description.digest)
        except WrongModel:
            self.forget(description)
            raise

    def forget(self, description: Description) -> None:
        """Let whoever wants a description next ask the server anew, unless somebody has done so already."""
        self._known.forget(description)

    def predict(
        self, case: Case, options: Options | None = None, on_event: Listener | None = None, stop: Stop | None = None
    ) -> Answer:
        """The answer to one case.

        Args:
            case: what is to be predicted.
            options: of docs/http.md; the case's own come on top.
            on_event: is told what happens to it.
            stop: gives it up.

        Raises:
            ClientError: see :mod:`.errors`.
        """
        return self._predict(case, options or {}, self._teller(on_event), stop or Stop(), None)

    @overload
    def predict_many(
        self,
        cases: Iterable[Case],
        options: Options | None = None,
        *,
        ordered: bool = True,
        on_event: Listener | None = None,
        stop: Stop | None = None,
    ) -> Generator[Outcome[Case, Answer], None, None]: ...

    @overload
    def predict_many(
        self,
        cases: Iterable[Case],
        options: Options | None = None,
        *,
        finish: Finish[Case, Given],
        ordered: bool = True,
        on_event: Listener | None = None,
        stop: Stop | None = None,
    ) -> Generator[Outcome[Case, Given], None, None]: ...

    def predict_many(
        self,
        cases: Iterable[Case],
        options: Options | None = None,
        *,
        finish: Finish[Case, Any] = _as_it_is,
        ordered: bool = True,
        on_event: Listener | None = None,
        stop: Stop | None = None,
    ) -> Generator[Outcome[Case, Any], None, None]:
        """The answers to many cases, several of which are in flight.

        As many are in flight as the servers take (:mod:`.server`). What is kept at any time is what is in flight, one
        case more, and a few answers that wait to be taken.

        Args:
            cases: are taken one after the other, when they are needed, by a thread of their own.
            options: for all of them; a case's own come on top.
            finish: what is to become of a case and its answer, called in the case's own thread: writes or unpacks it.
                What it returns is the outcome's ``value``; by default the answer itself. It is not called once the
                call is given up or the client closed.
            ordered: outcomes come in the order of the cases; else as they are completed.
            on_event: is told what happens to all of them.
            stop: gives all of them up.

        Yields:
            The outcome of each case: what ``finish`` returned, or the error.

        Raises:
            ClientError: the server cannot be reached or does not have the model; of single cases, nothing.
        """
        whole, tell = stop or Stop(), self._teller(on_event)
        self.describe(on_event, whole)
        common = dict(options or {})

        def ask(case: Case, stop: Stop, seat: Seat) -> Answer:
            return self._predict(case, common, tell, stop, seat)

        def finished(case: Case, answer: Answer) -> Any:
            whole.check()
            self._closed.check()
            with answer.naming():
                return finish(case, answer)

        return fly(ask, cases, finished, ordered=ordered, stop=whole)

    def _predict(self, case: Case, options: Options, tell: Listener, stop: Stop, seat: Seat | None) -> Answer:
        try:
            if case.fault is not None:
                raise case.fault
            body = self._body(case, tell, stop)
            answer = self._ask(case.name, body, {**options, **case.options}, tell, stop, seat)
        except ClientError as error:
            error.case = error.case or case.name
            tell(Event(case.name, Kind.FAILED, error.server, reason=error.reason))
            raise
        tell(Event(case.name, Kind.ANSWERED, answer.server, done=len(answer.content), total=len(answer.content)))
        return answer

    def _body(self, case: Case, tell: Listener, stop: Stop) -> Body:
        """What is sent of a case, if the server takes that much."""
        body = body_of(case.image, case.previous_stage)
        description = self._describe(tell, stop)
        if _is_above(description.body_bytes, body):
            self.forget(description)  # it may have been started anew since, with more memory
            description = self._describe(tell, stop)
        if _is_above(description.body_bytes, body):
            limit = description.body_bytes
            msg = f"the image has {body.image_bytes} bytes, the server takes at most {limit}; nothing was sent"
            raise BodyTooLarge(msg)
        return body

    def _ask(
        self,
        case: str,
        body: Body,
        options: Options,
        tell: Listener,
        stop: Stop,
        seat: Seat | None = None,
        *,
        streams: bool = True,
    ) -> Answer:
        """Ask until there is an answer, or no use in asking again."""
        from .transport import Asked, Exchange

        batch = options.get("priority") == "batch"

        def once(trial: Trial) -> Answer:
            is_first = trial.tries == 1
            wish = Wish(trial.started, trial.deadline, batch, trial.must_be_alone, trial.beside, is_first)
            with self._servers.place(wish, stop) as place:
                if is_first:
                    trial.deadline = time.monotonic() + self._patience.deadline_s
                if seat is not None:
                    seat.placed()
                exchange = Exchange(
                    place.server.http,
                    place.server.url,
                    self._credentials,
                    tell,
                    stop,
                    trial.deadline,
                    self._silence_s,
                    place.taken_up,
                )
                asked = Asked(case, self._path, body, _with_timeout(options, trial.deadline), streams)
                answer = exchange.answer(asked)
            return replace(answer, seconds=trial.seconds, tries=trial.tries)

        def again(error: ClientError, rest_s: float, pause_s: float) -> None:
            if seat is not None:
                seat.put_back(rests=rest_s > 0)
            tell(Event(case, Kind.RETRY, error.server, reason=error.reason, pause_s=max(rest_s, pause_s)))

        if self._closed.is_set:
            msg = "this client is closed"
            raise WrongUse(msg)
        with self._closed.telling(stop.set):
            return Retries(self._patience, self._servers, again, stop).run(once)

    def _teller(self, on_event: Listener | None) -> Listener:
        """Tells one event at a time."""

        def tell(event: Event) -> None:
            if on_event is not None:
                with self._telling:
                    on_event(event)

        return tell


def _is_above(limit: int | None, body: Body) -> bool:
    return limit is not None and body.image_bytes > limit


def _is_name(text: str) -> bool:
    """Whether it may be a part of a path as it is, and no other path: the letters that TorchServe's archiver takes."""
    return re.fullmatch(r"[A-Za-z0-9_.-]+", text) is not None and text not in (".", "..")


def _given_urls(url: str | Sequence[str] | None) -> list[str]:
    if url is None:
        url = os.environ.get(URL_VARIABLE, "")
    urls = url.replace(",", " ").split() if isinstance(url, str) else list(url)
    if not urls:
        msg = f"no server was given: its URL, as in http://127.0.0.1:8080, or {URL_VARIABLE}"
        raise WrongUse(msg)
    return urls


def _with_timeout(options: Options, deadline: float) -> dict[str, object]:
    """The options, with the seconds after which nobody waits any more."""
    left = max(_SHORTEST_TIMEOUT_S, round(deadline - time.monotonic(), 3))
    wanted = options.get("timeout_s")
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, Real)):
        return dict(options)  # the server says what is wrong with it
    return {**options, "timeout_s": left if wanted is None else min(float(wanted), left)}
