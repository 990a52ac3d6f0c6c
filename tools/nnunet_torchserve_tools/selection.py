"""What an archive shall be made of: folders, zips, or what nnU-Net recommends. In the end all of it is folders.

What comes in a zip is unpacked for as long as it is needed, first without its weights, to know what is needed of it.
Messages call those private folders by the zip's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_torchserve.options import FoldName

from .errors import ToolError, UsageError
from .model_folders import NO_SOURCE
from .recommendation import check_complete, read_recommendation
from .results_folder import datasets_in, find_dataset, results_folder
from .trained import previous_stage_of
from .zip_source import UnzippedModels, WantedWeights, ZippedModel, chosen, is_zip, models_in, unzipped


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for.

    Attributes:
        sources: ``TRAINER__PLANS__CONFIGURATION`` folders, and zips of nnU-Net's.
        dataset: name or number of the one whose recommended models are taken: from the results folder, or from the zip
            that is the only source.
        configurations: which of a zip's models; see :func:`~.zip_source.chosen`.
        ensemble: the models are one, the mean of their probabilities.
        previous_stages: folders or zips with the first stages of cascades.
        postprocessing: nnU-Net's file; ``"auto"``: what nnU-Net determined for exactly these models and folds;
            ``None``: what nnU-Net recommends with a dataset, otherwise none.
        folds: ``None`` takes what nnU-Net recommends with a dataset, otherwise every numbered fold.
        checkpoint: file name within each fold's folder.
    """

    sources: tuple[Path, ...] = ()
    dataset: str | None = None
    configurations: tuple[str, ...] = ()
    ensemble: bool = False
    previous_stages: tuple[Path, ...] = ()
    postprocessing: Path | Literal["auto", "none"] | None = None
    folds: tuple[FoldName, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"

    @property
    def weights(self) -> WantedWeights:
        """What is needed of a zip's."""
        return WantedWeights(self.folds, self.checkpoint)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was found, as :class:`~.archive_request.ArchiveRequest` takes it, for as long as the ``with`` block lasts.

    Attributes:
        models: folders: one, or those of an ensemble.
        previous_stages: folders of the cascades' first stages.
        postprocessing, postprocessing_folds, folds: see there.
        remarks: what was decided that nobody has asked for by name; lines for people.
    """

    models: tuple[Path, ...]
    previous_stages: tuple[Path, ...] = ()
    postprocessing: Path | Literal["auto"] | None = None
    postprocessing_folds: tuple[FoldName, ...] | None = None
    folds: tuple[FoldName, ...] | None = None
    remarks: tuple[str, ...] = ()


class _Unpacked:
    """The zips that are unpacked, and what their private folders are called."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Path] = {}

    def unpack(self, file: Path, models: Sequence[ZippedModel], weights: WantedWeights) -> UnzippedModels:
        """With these weights."""
        found = self._stack.enter_context(unzipped(file, [model.path for model in models], weights=weights))
        self._files[found.results] = file
        return found

    @contextmanager
    def described(self, file: Path) -> Iterator[UnzippedModels]:
        """All models, for a moment, without their weights."""
        with unzipped(file, weights=False) as found:
            self._files[found.results] = file
            yield found

    def public(self, text: str) -> str:
        """A message without private folders."""
        for folder, file in self._files.items():
            for spelling in (folder.resolve(), folder):
                text = text.replace(str(spelling), str(file))
        return text


@contextmanager
def selected(choice: Choice) -> Iterator[Selection]:
    """Find what was asked for.

    Raises:
        UsageError: something is not there, or cannot be meant.
        ToolError: something is damaged, or refused; also from within the ``with`` block, without private folders.
    """
    with ExitStack() as stack:
        zips = _Unpacked(stack)
        try:
            yield _named(choice, zips) if choice.dataset is None else _recommended(choice, choice.dataset, zips)
        except ToolError as error:
            raise type(error)(zips.public(str(error))) from error


def _named(choice: Choice, zips: _Unpacked) -> Selection:
    """Folders, and some of the models of zips."""
    if not choice.sources:
        raise UsageError(NO_SOURCE)
    zipped = [source for source in choice.sources if _is_zip(source)]
    if choice.configurations and not zipped:
        msg = "--configuration chooses from a zip; a folder is one configuration"
        raise UsageError(msg)
    if len({file.resolve() for file in zipped}) != len(zipped):
        msg = "a zip is named twice; name it once, and with --configuration each of its models"
        raise UsageError(msg)
    of_zips = {file: _chosen_of(file, choice) for file in zipped}
    count = sum(len(of_zips.get(source, (source,))) for source in choice.sources)
    if count > 1 and not choice.ensemble:
        msg = "several models make one archive only as an ensemble: add --ensemble, or package them one by one"
        raise UsageError(msg)
    if count == 1 and choice.ensemble:
        msg = "--ensemble: name the folders of two models or more, or two configurations or more of a zip"
        raise UsageError(msg)
    models: list[Path] = []
    first_stages: list[Path] = []
    remarks: list[str] = []
    for source in choice.sources:
        if source not in of_zips:
            models.append(source)
            continue
        wanted = of_zips[source]
        first_of = {} if choice.previous_stages else _first_stages_in(source, wanted, zips)
        needed = tuple(dict.fromkeys([*wanted, *first_of.values()]))
        unpacked = zips.unpack(source, needed, choice.weights)
        models += [unpacked.results / model.path for model in wanted]
        first_stages += [unpacked.results / first.path for first in dict.fromkeys(first_of.values())]
        remarks += [
            f"{source}: {model.configuration} is the second stage of a cascade; its first, {first.configuration}, is "
            "taken from the zip too"
            for model, first in first_of.items()
        ]
    first_stages += _given_first_stages(choice, models, zips)
    postprocessing = None if choice.postprocessing == "none" else choice.postprocessing
    return Selection(tuple(models), tuple(first_stages), postprocessing, folds=choice.folds, remarks=tuple(remarks))


def _is_zip(source: Path) -> bool:
    return not source.is_dir() and (is_zip(source) or source.suffix.lower() == ".zip")


def _chosen_of(file: Path, choice: Choice) -> tuple[ZippedModel, ...]:
    models = models_in(file)
    if not choice.configurations and len(models) > 1:
        paths = {model.configuration: model.path for model in models}
        names = ", ".join(paths if len(paths) == len(models) else [model.path for model in models])
        several = "; several are one model with --ensemble" if not choice.ensemble else ""
        msg = f"{file} holds {len(models)} models; choose with --configuration: {names}{several}"
        raise UsageError(msg)
    return chosen(file, models, choice.configurations or None)


def _first_stages_in(file: Path, models: Sequence[ZippedModel], zips: _Unpacked) -> dict[ZippedModel, ZippedModel]:
    """Cascade -> its first stage, where the zip has it."""
    with zips.described(file) as described:
        there = {described.results / model.path: model for model in described.models}
        first_of = {model: previous_stage_of(described.results / model.path) for model in models}
        return {model: there[first] for model, first in first_of.items() if first in there}


def _given_first_stages(choice: Choice, models: Sequence[Path], zips: _Unpacked) -> list[Path]:
    """The folders that were named; of a zip the models that the cascades' plans name."""
    found: list[Path] = []
    for source in choice.previous_stages:
        if not _is_zip(source):
            found.append(source)
            continue
        there = models_in(source)
        if len(there) > 1:
            names = {first.name for model in models if (first := previous_stage_of(model)) is not None}
            there = tuple(model for model in there if model.folder_name in names)
        if not there:
            msg = f"--previous-stage {source}: it has no model that the plans name as previous stage"
            raise UsageError(msg)
        found += zips.unpack(source, there, choice.weights).folders
    return found


def _recommended(choice: Choice, wanted: str, zips: _Unpacked) -> Selection:
    """What nnU-Net recommends for a dataset."""
    given = {
        "--configuration": choice.configurations,
        "--ensemble": choice.ensemble,
        "--previous-stage": choice.previous_stages,
        "--folds": choice.folds,
    }
    if others := [flag for flag, value in given.items() if value]:
        msg = f"--dataset takes what nnU-Net recommends, {', '.join(others)} something else; name folders for that"
        raise UsageError(msg)
    if not choice.sources:
        results = results_folder()
        return _complete(choice, results, find_dataset(wanted, datasets_in(results), str(results)), None)
    [file, *more] = choice.sources
    if more or not _is_zip(file):
        msg = "--dataset looks below nnUNet_results, or in one zip that is named; without it, folders are packaged"
        raise UsageError(msg)
    with zips.described(file) as described:
        dataset = find_dataset(wanted, {model.dataset for model in described.models}, str(file))
        recommendation = read_recommendation(described.results / dataset)
        names = {*recommendation.models, *recommendation.first_stages(described.results).values()}
        needed = [model for model in described.models if model.dataset == dataset and model.folder_name in names]
        if not needed:
            check_complete(described.results, recommendation, choice.checkpoint, str(file))
    weights = WantedWeights(recommendation.folds, choice.checkpoint)
    return _complete(choice, zips.unpack(file, needed, weights).results, dataset, str(file))


def _complete(choice: Choice, results: Path, dataset: str, zipped: str | None) -> Selection:
    recommendation = read_recommendation(results / dataset)
    check_complete(results, recommendation, choice.checkpoint, zipped)
    first_of = recommendation.first_stages(results)
    file, is_recommended = choice.postprocessing, choice.postprocessing in {None, "auto"}
    if is_recommended:
        file = recommendation.postprocessing(results).file
    left_out = file == "none"
    return Selection(
        models=tuple(results / dataset / name for name in recommendation.models),
        previous_stages=tuple(results / dataset / name for name in dict.fromkeys(first_of.values())),
        postprocessing=file if isinstance(file, Path) else None,
        postprocessing_folds=recommendation.folds if is_recommended else None,
        folds=recommendation.folds,
        remarks=recommendation.lines(first_of, choice.checkpoint, leaves_out_postprocessing=left_out),
    )
