"""What TorchServe's log says of workers that die before they have loaded their model.

TorchServe starts a dead worker again, less and less often, and tells nobody: its API calls such a worker UNLOADED,
like one that loads. Its log has each change of a worker's state, and among them what the workers themselves wrote. A
death is what counts here, not time: a worker that loads for minutes is slow, and not dead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nnunet_handler import LOAD_FAILED

_RECORD = re.compile(r"\S+ \[\w+ *\] (?P<thread>\S+) (?P<logger>\S+) - (?P<message>.*)")
_WORKER = re.compile(r"W-[0-9]+-(?P<model>.+?)(?P<stream>-stdout|-stderr)?")
_CHANGE = re.compile(r"\S+ State change (?P<before>\w+) -> (?P<after>\w+)")
_FIRST_WORDS = "s_name_part0="
"""What a worker writes first."""

_CHATTER = re.compile(
    r"s_name_part0=|Listening on |Successfully loaded |\[PID\]|Torch worker started|Python runtime: "
    r"|Connection accepted|model_name: |Backend worker process died\.|\s*$"
)
_TRACEBACK = "Traceback (most recent call last):"
_LAST_WORDS = re.compile(r"Fatal Python error|\S*python\S*: |\S+: error: |Backend worker did not receive connection")
"""What Python, its command line and TorchServe's worker write when they end without a traceback."""

_NO_REASON = re.compile(r".*Backend stream closed\.")
_LONGEST_REASON = 600


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that died before its model was loaded.

    Attributes:
        worker: in words.
        count: how often it has died so.
        reason: what it said itself when it ended; empty if it said nothing.
        hint: else what it or TorchServe said last; may be empty.
    """

    worker: str
    count: int
    reason: str
    hint: str


@dataclass(slots=True)
class _Worker:
    """What has been read of one worker."""

    loaded: bool = False
    deaths: int = 0
    words: list[str] = field(default_factory=list)
    reason: str = ""
    errors: list[str] = field(default_factory=list)


def load_failure(lines: Iterable[str]) -> str | None:
    """Why a handler could not load its model, as it says itself."""
    return next((line.partition(LOAD_FAILED)[2].strip() for line in lines if LOAD_FAILED in line), None)


def early_deaths(lines: Iterable[str]) -> list[Death]:
    """Each worker that has died while it loaded, and does not serve by now, with its last death.

    Args:
        lines: of ts_log.log, as far as it is written.
    """
    workers: dict[str, _Worker] = {}
    for thread, logger, message in _records(lines):
        match = _WORKER.fullmatch(thread)
        if match is None:
            continue
        worker = workers.setdefault(thread.removesuffix(match["stream"] or ""), _Worker())
        if logger == "MODEL_LOG":
            if message.startswith(_FIRST_WORDS):
                worker.reason = _reason(worker.words) or worker.reason
                worker.words.clear()
            worker.words.append(message)
        elif change := _CHANGE.match(message):
            _follow(worker, change["before"], change["after"])
        elif message.startswith("Backend worker error\n"):
            worker.errors = message.split("\n")[1:]
    return [
        Death(_in_words(name), worker.deaths, _reason(worker.words) or worker.reason, _hint(worker))
        for name, worker in workers.items()
        if worker.deaths and not worker.loaded
    ]


def _in_words(name: str) -> str:
    """TorchServe's name of a worker, taken apart.

    >>> _in_words("W-20000-brain_tissue_1.0")
    'worker 20000 of brain_tissue 1.0'
    """
    _, number, model = name.split("-", 2)
    return f"worker {number} of {' '.join(model.rsplit('_', 1))}"


def _follow(worker: _Worker, before: str, after: str) -> None:
    if after == "WORKER_MODEL_LOADED":
        worker.loaded, worker.deaths, worker.reason = True, 0, ""
        worker.words.clear()
    elif after == "WORKER_STOPPED" and before != "WORKER_SCALED_DOWN":
        worker.deaths += not worker.loaded
        worker.loaded = False


def _records(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Thread, logger and message of each record, which TorchServe writes twice.

    Lines without a head, of an exception, belong to the record before them.
    """
    last: dict[str, str] = {}
    record: list[str] = []
    for line in lines:
        match = _RECORD.fullmatch(line)
        if match is None:
            if record:
                record[2] += f"\n{line}"
            continue
        if record:
            yield record[0], record[1], record[2]
        is_new = last.get(match["thread"]) != line
        last[match["thread"]] = line
        record = [match["thread"], match["logger"], match["message"]] if is_new else []
    if record:
        yield record[0], record[1], record[2]


def _reason(words: list[str]) -> str:
    """The end of the last traceback, or what Python writes in the place of one."""
    if _TRACEBACK in words:
        start = len(words) - words[::-1].index(_TRACEBACK)
        ends = [number for number, line in enumerate(words[start:], start) if line and not line[0].isspace()]
        return _shortened(words[ends[0] :] if ends else words[start:])
    return next((_shortened([line]) for line in reversed(words) if _LAST_WORDS.match(line)), "")


def _hint(worker: _Worker) -> str:
    causes = [line for line in worker.errors if not line.startswith(("\t", " ")) and not _NO_REASON.match(line)]
    if causes:
        return _shortened([causes[-1].removeprefix("Caused by: ")])
    return next((_shortened([line]) for line in reversed(worker.words) if not _CHATTER.match(line)), "")


def _shortened(lines: list[str]) -> str:
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"
