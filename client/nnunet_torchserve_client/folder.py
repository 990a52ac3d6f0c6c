"""A folder of images in, a folder of label maps out: what nnU-Net's commands do, with the network on a server.

Every case stands for itself: one that fails is noted, and the others go on. What would fail for each further case ends
the call: wrong credentials, a full disk. Files appear whole (:mod:`.outputs`), so that a call that was interrupted is
continued by another one.

Several calls may share a folder, each with a part of the cases. No two of them write the same file: parts have no case
in common, their lists of failures have names of their own, and of the files beside the predictions the first one stays.

Threads: answers are written by the threads of their cases; one lock guards what is noted.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from .answers import Answer
from .cases import ImageFiles, check_part, output_format
from .client import Case, Client
from .description import Description
from .errors import ClientError, UnreadableFile, UnwritableFile, WrongChannels, WrongUse
from .events import Event
from .file_cases import file_case, finish_files, image_files, wanted_of, with_previous_stage
from .flight import Outcome
from .folder_call import FolderCall
from .outputs import ARGUMENTS_FILE, DATASET_FILE, PLANS_FILE, write_json, write_side_files
from .progress import Watcher
from .stages import WRITE, Waits, listed_stages
from .summary import Summary

_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR)
"""The folder has gone, which is that of all cases here."""

_NO_ENDING = "without an ending"
_MOST_ENDINGS = 5  # of DICOM files that are named by UIDs each has another one
_DICOM_ENDINGS = (".dcm", ".ima", ".zip")


def cases_of(call: FolderCall, description: Description) -> tuple[list[ImageFiles], int]:
    """The cases of this part that are to be predicted, in the order of their names.

    Returns:
        The cases; and how many besides are left out, because they are there already.

    Raises:
        MissingFolder: there is no such folder.
        UnreadableFile: it cannot be read.
        WrongUse: there is no image in it, or one without a channel in its name, or no such part.
        WrongPreviousStage: labels of a first stage for a model that takes none, or none for one that needs them.
    """
    check_part(call.num_parts, call.part_id)
    ending = description.file_ending
    output_format(ending)
    _, files = image_files(call.source, call.output, ending)
    if not files:
        msg = f"{call.source} has no file that ends in {ending}, as the images of {description.model.dataset} do"
        others = Counter("".join(file.suffixes[-2:]) for file in Path(call.source).iterdir() if file.is_file())
        if others:
            named = [f"{count} {name or _NO_ENDING}" for name, count in others.most_common(_MOST_ENDINGS)]
            msg += f"; it has {', '.join(named)}{', …' if len(others) > _MOST_ENDINGS else ''}"
        if any(name.lower().endswith(_DICOM_ENDINGS) for name in others):
            msg += "; a DICOM series is sent as a zip of it, by curl or the plain client"
        raise WrongUse(msg)
    return wanted_of(
        with_previous_stage(files, call.previous_stage, description),
        call.num_parts,
        call.part_id,
        ending,
        overwrite=call.overwrite,
        with_probabilities=call.save_probabilities,
    )


def predict_folder(
    client: Client,
    call: FolderCall,
    options: Mapping[str, object],
    watcher: Watcher,
    cases: Sequence[ImageFiles],
    there: int = 0,
    processes: tuple[int, int] = (3, 3),
) -> Summary:
    """Predict the cases of a folder, several at a time.

    Args:
        client: of the server.
        call: what is asked for.
        options: of docs/http.md, for every case.
        watcher: is told what happens.
        cases: to be predicted; see :func:`cases_of`.
        there: how many are left out.
        processes: that nnU-Net would have used; written beside the predictions.

    Returns:
        What became of them; also when the caller interrupted it.

    Raises:
        UnwritableFile: the folder for the predictions cannot be made or written.
    """
    return _Run(client, call, options, watcher).run(cases, there, processes)


class _Run:
    """One call."""

    def __init__(self, client: Client, call: FolderCall, options: Mapping[str, object], watcher: Watcher) -> None:
        self._client, self._call, self._options, self._watcher = client, call, options, watcher
        self._description = client.describe()
        self._lock = threading.Lock()
        self._waits = Waits()

    def run(self, cases: Sequence[ImageFiles], there: int, processes: tuple[int, int]) -> Summary:
        started = time.monotonic()
        self._write_side_files(processes)
        self._summary = Summary(len(cases) + there, there)
        try:
            outcomes = self._client.predict_many(
                self._cases(cases), self._options, finish=self._finish, ordered=False, on_event=self._event
            )
            with closing(outcomes):  # which waits for those in flight: some may be writing
                for outcome in outcomes:
                    if not self._note(outcome):
                        break
        except KeyboardInterrupt:
            self._summary.interrupted = True
        return self._ended(cases, started)

    def _ended(self, cases: Sequence[ImageFiles], started: float) -> Summary:
        with self._lock:
            summary = self._summary
            known = {*summary.done, *(error.case for error in summary.failed)}
            summary.left = [each.name for each in cases if each.name not in known]
            summary.seconds = time.monotonic() - started
        self._list_failures(summary)
        return summary

    def _cases(self, cases: Sequence[ImageFiles]) -> Iterator[Case]:
        """What is sent, and what cannot be."""
        for files in cases:
            try:
                self._check_channels(files)
            except UnreadableFile as error:
                yield Case(files.name, list(files.files), note=files, fault=error)
            else:
                yield file_case(files, self._description, with_probabilities=self._call.save_probabilities)

    def _check_channels(self, files: ImageFiles) -> None:
        """One file may hold all channels; any other number of files is that of the channels."""
        channels = len(self._description.channels)
        if channels and len(files.files) not in (1, channels):
            raise UnreadableFile(self._channels_missing(files))

    def _channels_missing(self, files: ImageFiles) -> str:
        there = [Path(file).name for file in files.files]
        ending = self._description.file_ending
        missing = [
            f"{name} ({channel})"
            for number, channel in self._description.channels.items()
            if (name := f"{files.name}_{int(number):04d}{ending}") not in there
        ]
        channels = len(self._description.channels)
        takes = f"{channels} channel{'s' if channels > 1 else ''}"
        msg = f"the model takes {takes}, and the folder has {len(there)} of this case"
        return msg + (f"; missing: {', '.join(missing)}" if missing else f": {', '.join(there)}")

    def _finish(self, case: Case, answer: Answer) -> dict[str, float]:
        """Write the files of a case; where its time went. Called in its own thread."""
        self._client.check(answer, self._description)
        started = time.monotonic()
        finish_files(case, answer, self._description, with_probabilities=self._call.save_probabilities)
        stages = self._waits.stages(case.name, answer)
        stages[WRITE] = time.monotonic() - started
        with self._lock:
            self._summary.done.append(case.name)
            for name, seconds in stages.items():
                self._summary.stages[name] = self._summary.stages.get(name, 0.0) + seconds
            if answer.warnings:
                self._summary.warnings[case.name] = list(answer.warnings)
            if (other := answer.other_backend) is not None:
                self._summary.other_backends[other] = self._summary.other_backends.get(other, 0) + 1
        return stages

    def _event(self, event: Event) -> None:
        self._waits.event(event)
        self._watcher.event(event)

    def _note(self, outcome: Outcome[Case, dict[str, float]]) -> bool:
        """Note what became of a case; whether the others are worth trying."""
        error = outcome.error
        if error is None:
            self._watcher.one_done()
            if outcome.answer is not None and outcome.value is not None:
                told = f" ({listed_stages(outcome.value)})" if self._call.verbose else ""
                told += f", the server warns of {', '.join(outcome.answer.warnings)}" if outcome.answer.warnings else ""
                self._watcher.line(f"{outcome.case.name}: done after {outcome.answer.seconds:.1f} s{told}")
            return True
        files: ImageFiles = outcome.case.note
        if isinstance(error, WrongChannels) and len(files.files) < len(self._description.channels):
            error.reason = f"{error.reason} ({self._channels_missing(files)})"
        self._fail(error)
        cause = error.__cause__
        is_gone = isinstance(error, UnwritableFile) and isinstance(cause, OSError) and cause.errno in _NO_FOLDER
        return not error.of_all_cases and not is_gone

    def _fail(self, error: ClientError) -> None:
        with self._lock:
            self._summary.failed.append(error)
        self._watcher.one_done()
        self._watcher.line(f"FAILED {error}")

    def _list_failures(self, summary: Summary) -> None:
        """Leave a list of what is missing, or take an earlier one away."""
        try:
            if summary.is_whole:
                self._call.failed_file.unlink(missing_ok=True)
            else:
                write_json(self._call.failed_file, summary.as_json(), sort_keys=False)
        except (OSError, UnwritableFile) as error:
            self._watcher.line(f"{self._call.failed_file.name} cannot be written: {error}")

    def _write_side_files(self, processes: tuple[int, int]) -> None:
        """What nnU-Net puts beside its predictions; another part's are left as they are."""
        description, arguments = self._description, self._call.arguments(processes)
        folder = Path(self._call.output)
        if self._call.num_parts == 1:
            write_side_files(folder, description.dataset_json, description.plans_json, arguments)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the folder {folder} cannot be made: {error.strerror}"
            raise UnwritableFile(msg) from error
        documents: dict[str, Mapping[str, object]] = {
            ARGUMENTS_FILE: arguments,
            DATASET_FILE: description.dataset_json,
            PLANS_FILE: description.plans_json,
        }
        for name, document in documents.items():
            _write_unless_there(folder / name, document, sort_keys=name == ARGUMENTS_FILE)


def _write_unless_there(path: Path, document: Mapping[str, object], *, sort_keys: bool) -> None:
    """Write a JSON file that several parts have in common; one that says the same is left.

    The first of several parts that begin at once wins; what another call left there, with other arguments, is replaced.
    """
    try:
        there = json.loads(path.read_text())
    except FileNotFoundError:
        write_json(path, document, sort_keys=sort_keys, replace=False)
        return
    except (OSError, ValueError):
        there = None
    ours = json.loads(json.dumps(document))
    if not isinstance(there, dict) or {**there, "part_id": 0} != {**ours, "part_id": 0}:
        write_json(path, document, sort_keys=sort_keys)
