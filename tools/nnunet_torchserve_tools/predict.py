"""``nnunet-torchserve predict``: nnU-Net's two prediction commands, with the network on a server.

The arguments are those of ``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder`` (nnU-Net 2.8.1,
``predict_from_raw_data.py``) as they are spelt there, parsed as there, by argparse: ``-f`` takes several values. What
the server decides is mapped to a model that it has, or said to mean nothing, or refused. Needs no ``[server]``.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nnunet_torchserve_client import errors
from nnunet_torchserve_client.cases import MissingFolder
from nnunet_torchserve_client.choosing import (
    Folds,
    Wanted,
    check,
    choose,
    likely_names,
    listed_folds,
    wanted_of_folder,
)
from nnunet_torchserve_client.client import URL_VARIABLE, Client
from nnunet_torchserve_client.credentials import TOKEN_VARIABLE
from nnunet_torchserve_client.description import Description
from nnunet_torchserve_client.events import Event, Kind
from nnunet_torchserve_client.folder import cases_of, predict_folder
from nnunet_torchserve_client.folder_call import FolderCall
from nnunet_torchserve_client.progress import Nothing, Watcher, printable, watched
from nnunet_torchserve_client.stages import listed_stages
from nnunet_torchserve_client.summary import Summary

from .errors import ToolError, UsageError

if TYPE_CHECKING:
    from types import FrameType

DEFAULT_FOLDS = (0, 1, 2, 3, 4)
DEFAULT_CHECKPOINT, DEFAULT_PLANS, DEFAULT_TRAINER = "checkpoint_final.pth", "nnUNetPlans", "nnUNetTrainer"
DEFAULT_PROCESSES = 3

_STEP_SIZES = (0.05, 1.0)
"""The server's limits of ``tile_step_size``."""

_MEANINGLESS = {"npp": "-npp", "nps": "-nps", "device": "-device", "not_on_device": "--not_on_device"}
"""nnU-Net's arguments that say how this machine is used."""

_WRONG_USE = (
    errors.WrongUse, errors.WrongModel, errors.UnknownModel, errors.UnknownFold, errors.UnknownOption,
    errors.BadOption, MissingFolder,
)  # fmt: skip
"""Errors that another command line would mend."""


def run(arguments: Sequence[str]) -> None:
    """Predict a folder.

    Args:
        arguments: of the command line, after the verb.

    Raises:
        UsageError: what was asked for cannot be meant.
        ToolError: nothing, or not everything, could be predicted.
    """
    asked = parser().parse_args(arguments)
    notes = Console(stderr=True)
    try:
        with _terminated_as_interrupted():
            summary = _predict(asked, notes)
    except errors.ClientError as error:
        kind = UsageError if isinstance(error, _WRONG_USE) else ToolError
        raise kind(printable(str(error))) from error
    except KeyboardInterrupt:
        msg = "interrupted"
        raise ToolError(msg) from None
    if not summary.is_whole:
        raise ToolError(_what_is_missing(summary, asked))


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="nnunet-torchserve predict",
        description="Predict a folder of images on a server. The arguments of nnUNetv2_predict and of "
        "nnUNetv2_predict_from_modelfolder, and a few more.",
        epilog=f"A token for the server is taken from {TOKEN_VARIABLE}. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    )
    server = parser.add_argument_group("the server")
    add = server.add_argument
    add("--server", action="append", metavar="URL", help=f"as http://127.0.0.1:8080; repeatable. Or {URL_VARIABLE}")
    add("--model", metavar="NAME", help="name of the model on the server, instead of -d and -c, or -m")
    add("--version", metavar="VERSION", help="version of the model; default: the server's")
    add("--verify", metavar="FILE", help="authorities (PEM) that may sign the server's certificate")
    add("--deadline", type=float, default=3600.0, metavar="S", help="seconds per case, retries included; default: 3600")
    add("--first-contact", type=float, default=20.0, metavar="S",
        help="seconds to keep trying a server that has never answered; default: 20")  # fmt: skip

    add = parser.add_argument_group("of nnUNetv2_predict").add_argument
    add("-i", required=True, metavar="FOLDER", help="images, CASE_0000.nii.gz and so on, in the dataset's file format")
    add("-o", required=True, metavar="FOLDER", help="folder for the predictions; created if missing")
    add("-d", metavar="DATASET", help="name or number of the dataset that the model was trained on")
    add("-p", metavar="PLANS", help=f"plans of the model; default: {DEFAULT_PLANS}")
    add("-tr", metavar="TRAINER", help=f"trainer of the model; default: {DEFAULT_TRAINER}")
    add("-c", metavar="CONFIGURATION", help="configuration of the model, as 3d_fullres")
    add(
        "-m",
        metavar="FOLDER",
        help="the trained model folder, instead of -d, -tr, -p, -c; it need not be on this machine",
    )
    add("-f", nargs="+", metavar="FOLD", help="folds to average; default: 0 1 2 3 4, or all that are served")
    add("-step_size", type=float, default=0.5, help="step of the sliding window as a share of the patch; default: 0.5")
    add("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    add("--verbose", action="store_true", help="show where the time of each case went")
    add("--save_probabilities", action="store_true", help="also .npz and .pkl, for nnUNetv2_ensemble")
    add("--continue_prediction", "--c", action="store_true", help="skip cases that are predicted already")
    add("-chk", metavar="NAME", help=f"checkpoint that the model was made of; default: {DEFAULT_CHECKPOINT}")
    add("-npp", type=int, help="ignored: the server preprocesses")
    add("-nps", type=int, help="ignored: the server exports")
    add(
        "-prev_stage_predictions",
        metavar="FOLDER",
        help="labels of a cascade's first stage; default: the server predicts them, if its archive has that stage",
    )
    add("-num_parts", type=int, default=1, help="number of parts: predict every N-th case")
    add("-part_id", type=int, default=0, help="which part, from 0: the first case that is predicted")
    add("-device", choices=("cpu", "cuda", "mps"), help="ignored: the server decides")
    add("--not_on_device", action="store_true", help="ignored: the server decides")
    add("--disable_progress_bar", action="store_true", help="show nothing until the end")
    add(
        "--postprocess",
        action="store_true",
        help="postprocess the labels, if the archive has postprocessing; nnUNetv2_predict never does",
    )
    add("--json", action="store_true", help="the summary as JSON on stdout")
    return parser


def _predict(asked: argparse.Namespace, notes: Console) -> Summary:
    _check(asked)
    call = FolderCall(
        asked.i,
        asked.o,
        save_probabilities=asked.save_probabilities,
        overwrite=not asked.continue_prediction,
        num_parts=asked.num_parts,
        part_id=asked.part_id,
        verbose=asked.verbose,
        previous_stage=asked.prev_stage_predictions,
    )
    given = {field: getattr(asked, field) for field in _MEANINGLESS}
    if ignored := [_MEANINGLESS[field] for field, value in given.items() if value is not None and value is not False]:
        _tell(notes, f"note: {', '.join(ignored)}: the server decides; without meaning here")
    folds = _folds(asked.f)
    with _find(asked, folds, notes) as client:
        description = client.describe(_Contact(notes))
        options = _options(asked, folds, description, notes)
        cases, there = cases_of(call, description)
        where = "Predicting" if asked.num_parts == 1 else f"Predicting part {asked.part_id} of {asked.num_parts},"
        left_out = f" ({there} are there already)" if there else ""
        model = f"{client.model} {description.model.version} at {' '.join(client.urls)}"
        _tell(notes, f"{where} {len(cases)} cases{left_out} with {model}")
        with _watched(asked, len(cases), notes) as watcher:
            summary = predict_folder(client, call, options, watcher, cases, there, _processes(asked))
    out = Console(soft_wrap=True, highlight=False, markup=False)
    if asked.json:
        out.print(json.dumps(summary.as_json(), indent=2))
    else:
        for line in _summed_up(summary):
            out.print(printable(line))
    return summary


def _check(asked: argparse.Namespace) -> None:
    low, high = _STEP_SIZES
    if not low <= asked.step_size <= high:
        msg = f"-step_size {asked.step_size:g}: {low:g} to {high:g} was expected"
        raise UsageError(msg)
    if asked.d is not None and asked.m is not None:
        msg = "-d and -m both say which model: give one of them"
        raise UsageError(msg)
    if asked.d is None and asked.m is None and asked.model is None:
        msg = "which model? Give -d and -c, or -m, or --model with its name on the server"
        raise UsageError(msg)
    if asked.d is not None and asked.c is None and asked.model is None:
        msg = "-d needs -c: the configuration, as 3d_fullres"
        raise UsageError(msg)
    if asked.m is not None and any(each is not None for each in (asked.c, asked.tr, asked.p)):
        msg = "-m says trainer, plans and configuration: leave -tr, -p and -c out"
        raise UsageError(msg)


def _folds(given: Sequence[str] | None) -> Folds | None:
    try:
        return None if given is None else tuple(fold if fold == "all" else int(fold) for fold in given)
    except ValueError as error:
        msg = f"-f {' '.join(given or ())}: numbers, or all, were expected"
        raise UsageError(msg) from error


def _wanted(asked: argparse.Namespace) -> Wanted:
    """What the model must be made of; nnU-Net's defaults hold where nnU-Net's arguments name it."""
    if asked.m is not None:
        return wanted_of_folder(asked.m, asked.chk or DEFAULT_CHECKPOINT)
    if asked.d is not None:
        return Wanted(
            asked.d, asked.tr or DEFAULT_TRAINER, asked.p or DEFAULT_PLANS, asked.c, asked.chk or DEFAULT_CHECKPOINT
        )
    return Wanted(None, asked.tr, asked.p, asked.c, asked.chk)


@contextmanager
def _find(asked: argparse.Namespace, folds: Folds | None, notes: Console) -> Iterator[Client]:
    """A client of the model that is meant."""
    wanted, refusals = _wanted(asked), []
    names = [asked.model] if asked.model is not None else list(likely_names(wanted))
    for name in names:
        with _client(asked, name, asked.version) as client:
            try:
                description = client.describe(_Contact(notes))
            except errors.UnknownModel as error:
                if asked.model is not None:
                    raise
                refusals.append(error.reason)
                continue
            if asked.model is not None or description.served is None:  # chosen already, or it knows of no other
                check(wanted, folds, description)
                yield client
                return
        chosen = choose(wanted, folds, asked.version, description)
        with _client(asked, chosen.name, chosen.version) as client:
            yield client
        return
    tried = "; ".join(refusals) or f"nobody here knows the name of dataset {asked.d}"
    msg = f"no model of {wanted} was found ({tried}): give its name on the server with --model"
    raise errors.WrongModel(msg)


def _client(asked: argparse.Namespace, name: str, version: str | None) -> Client:
    urls = None if asked.server is None else " ".join(asked.server)
    verify = True if asked.verify is None else asked.verify
    return Client(urls, name, version, verify=verify, deadline_s=asked.deadline, first_contact_s=asked.first_contact)


def _options(
    asked: argparse.Namespace, folds: Folds | None, description: Description, notes: Console
) -> dict[str, object]:
    options: dict[str, object] = {
        "priority": "batch",
        "tile_step_size": asked.step_size,
        "use_mirroring": not asked.disable_tta,
    }
    if folds is None and description.folds_differ:
        _tell(notes, "note: without -f, all folds of each of the model's members, which have different ones")
    elif folds is None:
        served = description.model.folds
        numbered = tuple(fold for fold in served if fold != "all")
        folds = DEFAULT_FOLDS if set(DEFAULT_FOLDS) <= set(served) else numbered or served
        if folds != DEFAULT_FOLDS:
            _tell(notes, f"note: without -f, all folds that are served: {listed_folds(folds)}")
    if folds is not None:
        options["folds"] = list(folds)
    if asked.postprocess and not description.postprocesses:
        _tell(notes, "note: --postprocess: the served model has no postprocessing")
    elif description.postprocesses:
        options["postprocess"] = asked.postprocess
    return options


def _processes(asked: argparse.Namespace) -> tuple[int, int]:
    return (
        DEFAULT_PROCESSES if asked.npp is None else asked.npp,
        DEFAULT_PROCESSES if asked.nps is None else asked.nps,
    )


class _Contact:
    """Says once that a server does not answer yet."""

    def __init__(self, notes: Console) -> None:
        self._notes, self._told = notes, False

    def __call__(self, event: Event) -> None:
        if event.kind is Kind.RETRY and not self._told:
            self._told = True
            _tell(self._notes, f"{event.server or 'the server'}: {event.reason}; trying again")


@contextmanager
def _watched(asked: argparse.Namespace, total: int, notes: Console) -> Iterator[Watcher]:
    if asked.disable_progress_bar:
        yield Nothing()
        return
    with watched("all cases", total, notes) as watcher:
        yield watcher


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM, as batch systems send it before they kill, ends the call as Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summed_up(summary: Summary) -> Iterator[str]:
    """For people."""
    already = f", {summary.there} were there already" if summary.there else ""
    each = f", {summary.seconds / len(summary.done):.1f} s a case" if summary.done else ""
    yield f"{len(summary.done)} of {summary.cases} cases predicted in {summary.seconds:.1f} s{each}{already}"
    if summary.stages:
        parts = listed_stages(summary.stages)
        yield f"Where the time of the cases went, which were in flight together: {parts}"
    for case, warnings in summary.warnings.items():
        yield f"{case}: the server warns of {', '.join(warnings)}"
    for backend, count in summary.other_backends.items():
        yield f"{backend} ran the network of {count} cases: a voxel may differ from what nnU-Net's own command writes"


def _what_is_missing(summary: Summary, asked: argparse.Namespace) -> str:
    parts = []
    if summary.failed:
        parts.append(f"{len(summary.failed)} of {summary.cases} cases failed")
    if summary.left:
        parts.append(
            f"{len(summary.left)} were not predicted{', because of an interrupt' if summary.interrupted else ''}"
        )
    first = "".join(f"\n  {error}" for error in summary.failed)
    return printable_lines(f"{' and '.join(parts)}; --continue_prediction predicts what is missing in {asked.o}{first}")


def printable_lines(text: str) -> str:
    """Several lines without characters that a terminal obeys."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _tell(notes: Console, text: str) -> None:
    notes.print(printable(text), markup=False, highlight=False, soft_wrap=True)
