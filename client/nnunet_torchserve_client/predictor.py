"""``nnUNetPredictor``, with the network on a server.

Names, arguments, axis orders, types and files are those of nnU-Net's ``predict_from_raw_data.py`` (2.8.1), so that a
script changes the line that makes its predictor and no other.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import numpy.typing as npt

from .answers import Answer
from .array_cases import array_case, finish_array, result_arrays
from .cases import ImageFiles, Path_, case_name, check_part, files_in, is_there, part, placement, tiff_spacing
from .client import Case, Client
from .description import Description, Json
from .errors import CasesFailed, ClientError, NotServed, WrongUse
from .flight import Outcome
from .model_folder import Folds, ModelFolder
from .outputs import PREPROCESSED, options_for, write_prediction, write_side_files
from .progress import shown
from .stopping import Stop

Array = npt.NDArray[Any]
Prediction = Any
"""Labels (Z, Y, X), an array; or those and probabilities (C, Z, Y, X); or ``None``, because they were written."""

PROCESSES = 8
"""nnU-Net's ``default_num_processes``; it means nothing here."""

_DECIDED_HERE = {
    "describe": "ask client.describe()",
    "stream": "this client always asks for events",
    "properties": "save_probabilities brings them, as nnU-Net's .pkl",
    "output_format": "files get the dataset's file ending, arrays are returned as arrays; use Client for other formats",
    "probability_format": "probabilities are arrays, or nnU-Net's .npz; use Client for other formats",
}
"""Options that the methods set."""

logger = logging.getLogger(__name__)


class RemotePredictor:
    """Predicts like ``nnUNetPredictor``, on a server.

    Attributes:
        client: the plain client below.
        use_folds: the folds that are averaged; ``None`` is all that are served.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None,
        model: str,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: object = None,
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        use_folds: int | str | Sequence[int | str] | None = None,
        version: str | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str | Path = True,
        deadline_s: float = 3600.0,
        first_contact_s: float = 20.0,
        use_proxies: bool = True,
        **options: object,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: of the server, or of several; see :class:`~.client.Client`, here and wherever nothing else is said.
            model: its name on the server.
            tile_step_size: as in nnU-Net.
            use_gaussian: as in nnU-Net.
            use_mirroring: as in nnU-Net.
            perform_everything_on_device: means nothing here: the server decides.
            device: likewise.
            verbose: likewise.
            verbose_preprocessing: likewise.
            allow_tqdm: show progress on stderr, if that is a terminal.
            use_folds: as in ``initialize_from_trained_model_folder``; ``None`` is all that are served. The server's own
                name for them, ``folds``, is taken too.
            version: of the model.
            token: bearer token.
            headers: of every request.
            verify: how the certificate is checked.
            deadline_s: for a case, all tries included.
            first_contact_s: for a server that has never answered.
            use_proxies: whether the environment's proxies hold.
            **options: further options of docs/http.md.

        Raises:
            WrongUse: something of this cannot be meant so.
        """
        for name, reason in _DECIDED_HERE.items():
            if name in options:
                msg = f"option {name} is not for the predictor: {reason}"
                raise WrongUse(msg)
        if "folds" in options:
            if use_folds is not None:
                msg = "use_folds and folds are one option with two names: give one of them"
                raise WrongUse(msg)
            use_folds = cast("int | str | Sequence[int | str] | None", options.pop("folds"))
        self.tile_step_size = tile_step_size
        self.use_gaussian = use_gaussian
        self.use_mirroring = use_mirroring
        self.perform_everything_on_device = perform_everything_on_device
        self.device = device
        self.verbose = verbose
        self.verbose_preprocessing = verbose_preprocessing
        self.allow_tqdm = allow_tqdm
        self._with_probabilities = bool(options.pop("save_probabilities", False))
        self._given = {name: value for name, value in options.items() if not name.startswith("probability_")}
        self._of_probabilities = {name: value for name, value in options.items() if name.startswith("probability_")}
        self.use_folds = as_folds(use_folds)
        self._stop: Stop | None = None
        self._folder: tuple[ModelFolder, str] | None = None
        self.client = Client(
            url,
            model,
            version,
            token=token,
            headers=headers,
            verify=verify,
            deadline_s=deadline_s,
            first_contact_s=first_contact_s,
            use_proxies=use_proxies,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.client.urls!r}, {self.client.model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; calls in other threads fail."""
        self.client.close()

    # --- What the model is -------------------------------------------------------------------------------------------

    @property
    def description(self) -> Description:
        """What the server says of the model; asked for once, and anew after a call in which another one answered.

        Raises:
            WrongModel: it is not that of the folder that was given (:meth:`initialize_from_trained_model_folder`).
            ClientError: the server does not say it.
        """
        description = self.client.describe(stop=self._stop)
        if self._folder is not None:
            folder, checkpoint_name = self._folder
            folder.check(description, checkpoint_name, self.use_folds)
        return description

    @property
    def dataset_json(self) -> Json:
        """nnU-Net's dataset.json of the served model."""
        return self.description.dataset_json

    @property
    def plans(self) -> Json:
        """nnU-Net's plans.json of the served model."""
        return self.description.plans_json

    @property
    def trainer_name(self) -> str:
        """nnU-Net's name of the trainer."""
        return self.description.model.trainer

    @property
    def configuration_name(self) -> str:
        """nnU-Net's name of the configuration."""
        return self.description.model.configuration

    @property
    def allowed_mirroring_axes(self) -> tuple[int, ...] | None:
        """Axes along which the checkpoint allows mirroring."""
        return self.description.mirroring_axes

    @property
    def plans_manager(self) -> Any:
        """nnU-Net's own ``PlansManager`` of the served plans; needs nnunetv2 on this machine."""
        try:
            from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
        except ImportError as error:
            msg = "plans_manager is nnU-Net's own class: install nnunetv2, or use plans and dataset_json"
            raise NotServed(msg) from error
        return PlansManager(copy.deepcopy(self.plans))

    @property
    def configuration_manager(self) -> Any:
        """nnU-Net's own ``ConfigurationManager``; needs nnunetv2 on this machine."""
        return self.plans_manager.get_configuration(self.configuration_name)

    @property
    def label_manager(self) -> Any:
        """nnU-Net's own ``LabelManager``; needs nnunetv2 on this machine."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: Path_,
        use_folds: int | str | Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Check that the server has this model, now and whenever it has another one, and choose folds.

        Args:
            model_training_output_dir: nnU-Net's trained model folder on this machine. Its names are read, and no
                checkpoint is. Its own name has trainer and configuration: they are not checked if it was renamed.
            use_folds: which are averaged; ``None`` takes those of the folder that have the checkpoint, or all that are
                served if none is there.
            checkpoint_name: must be the one that the archive was made of.

        Raises:
            MissingFolder: also a FileNotFoundError: no dataset.json or plans.json there.
            WrongModel: the server has another model under this name, or lacks a fold.
        """
        found = ModelFolder.read(model_training_output_dir, checkpoint_name)
        folds = as_folds(use_folds) or found.folds or None
        found.check(self.client.describe(stop=self._stop), checkpoint_name, folds)
        self.use_folds, self._folder = folds, (found, checkpoint_name)

    def stopped_by(self, stop: Stop) -> Self:
        """A view of this predictor, with the same connections, whose calls ``stop`` gives up."""
        view = copy.copy(self)
        view._stop = stop  # noqa: SLF001 (its own class)
        return view

    def agrees_with(self, other: Self) -> None:
        """Choose what another one, as of :meth:`stopped_by`, has chosen by a folder."""
        self.use_folds, self._folder = other.use_folds, other._folder

    @staticmethod
    def auto_detect_available_folds(model_training_output_dir: Path_, checkpoint_name: str) -> list[int | str]:
        """The numbered folds of a folder that have the checkpoint."""
        return list(ModelFolder.read(model_training_output_dir, checkpoint_name).folds)

    def manual_initialization(self, *_: object, **__: object) -> NoReturn:
        """A server has its own network.

        Raises:
            NotServed: always.
        """
        msg = "a server predicts with its own network: package this one with nnunet-torchserve archive"
        raise NotServed(msg)

    def predict_logits_from_preprocessed_data(self, *_: object, **__: object) -> NoReturn:
        """A server gives no logits.

        Raises:
            NotServed: always.
        """
        msg = "a server takes images and gives labels and probabilities: no preprocessed data, no logits"
        raise NotServed(msg)

    predict_sliding_window_return_logits = predict_logits_from_preprocessed_data

    # --- Files -------------------------------------------------------------------------------------------------------

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: Path_ | list[list[str]],
        output_folder_or_list_of_truncated_output_files: Path_ | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = PROCESSES,
        num_processes_segmentation_export: int = PROCESSES,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> list[Prediction] | None:
        """Predict files, several at a time.

        Args:
            list_of_lists_or_source_folder: a folder with ``CASE_0000.nii.gz`` and so on; or for each case its files,
                one for each channel.
            output_folder_or_list_of_truncated_output_files: a folder; or for each case a path without ending; ``None``
                returns the results.
            save_probabilities: also write ``.npz`` and ``.pkl``, or return probabilities too.
            overwrite: ``False`` leaves out what is there already.
            num_processes_preprocessing: means nothing here.
            num_processes_segmentation_export: means nothing here.
            folder_with_segs_from_prev_stage: is refused.
            num_parts: only every so many-th case is predicted,
            part_id: from this one on.

        Returns:
            For each case ``None`` if it was written, else labels (Z, Y, X), or labels and probabilities (C, Z, Y, X).
            ``None`` if there is no case.

        Raises:
            ClientError: nothing could be predicted, the only case failed, or further ones would (a full disk, a model
                that is another one now): ``results`` is what there was by then.
            CasesFailed: some of several cases failed; the others were predicted.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        cases = self._file_cases(arguments, num_parts, part_id)
        if not cases:
            return None
        return self._predict(cases, self._file_finish(save_probabilities), total=len(cases))

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: Path_ | list[list[str]],
        output_folder_or_list_of_truncated_output_files: Path_ | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> list[Prediction] | None:
        """Predict files, one after the other; see :meth:`predict_from_files`.

        Returns:
            The results that were not written.

        Raises:
            ClientError: the first case that failed; ``results`` is what there was by then.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        cases = self._file_cases(arguments, 1, 0)
        if not cases:
            return None
        finish = self._file_finish(save_probabilities)
        results: list[Prediction] = []
        for case in cases:
            try:
                results.append(self._one(case, finish))
            except ClientError as error:
                error.results = results
                raise
        return [result for case, result in zip(cases, results, strict=True) if case.note.target is None]

    def _file_cases(self, arguments: Mapping[str, Any], num_parts: int, part_id: int) -> list[Case]:
        """The cases of a call with files; writes the files beside the predictions."""
        source = arguments["list_of_lists_or_source_folder"]
        output = arguments["output_folder_or_list_of_truncated_output_files"]
        _refuse_previous_stage(arguments["folder_with_segs_from_prev_stage"])
        check_part(num_parts, part_id, one_more=True)
        if part_id == num_parts:
            logger.warning(
                "part_id %d of %d parts: nnU-Net counts them from 0, and takes this number as well, for the cases of "
                "part 0 without its first",
                part_id,
                num_parts,
            )
        description = self.description
        ending = description.file_ending
        is_folder = isinstance(source, str | os.PathLike)
        lists = files_in(source, ending) if is_folder else [[os.fspath(file) for file in files] for files in source]
        if not all(lists):
            msg = "a case without a file"
            raise WrongUse(msg)
        names = [case_name(files, ending) for files in lists]
        folder, targets = _places(output, names)
        with_probabilities = self._probabilities(arguments["save_probabilities"])
        if folder is not None:
            options_for(ending, with_probabilities=with_probabilities)  # refuse before anything is written
            write_side_files(folder, description.dataset_json, description.plans_json, arguments)
        files = part(
            [ImageFiles(*each) for each in zip(names, map(tuple, lists), targets, strict=True)], num_parts, part_id
        )
        if not arguments["overwrite"]:
            files = [
                each
                for each in files
                if each.target is None or not is_there(each.target, ending, with_probabilities=with_probabilities)
            ]
        return [self._file_case(each, with_probabilities=with_probabilities) for each in files]

    def _file_case(self, files: ImageFiles, *, with_probabilities: bool) -> Case:
        description = self.description
        try:
            options = placement(description.reader, files.files)
        except ClientError as error:
            return Case(files.name, list(files.files), note=files, fault=error)
        if files.target is not None:
            options |= options_for(description.file_ending, with_probabilities=with_probabilities)
        else:
            options |= {"output_format": "npz", "save_probabilities": with_probabilities}
            if description.reader.endswith("WithReorient"):
                options["properties"] = True
        case = Case(files.name, list(files.files), options, note=files)
        return self._asking(case, with_probabilities=with_probabilities)

    def _file_finish(self, save_probabilities: bool) -> Callable[[Case, Answer], Prediction]:
        description = self.description
        with_probabilities = self._probabilities(save_probabilities)

        def finish(case: Case, answer: Answer) -> Prediction:
            files: ImageFiles = case.note
            if files.target is None:
                return result_arrays(answer, with_probabilities=with_probabilities)
            write_prediction(
                answer,
                files.target,
                description.file_ending,
                with_probabilities=with_probabilities,
                reader=description.reader,
                spacing=tiff_spacing(files.files) if "spacing" in case.options else None,
            )
            return None

        return finish

    # --- Arrays ------------------------------------------------------------------------------------------------------

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: Array | list[Array],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Array | list[Array] | None,
        properties_or_list_of_properties: Json | list[Json],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,  # noqa: ARG002 (nnU-Net's)
    ) -> Iterator[Json]:
        """What :meth:`predict_from_data_iterator` takes, of arrays.

        Args:
            image_or_list_of_images: (C, Z, Y, X), as nnU-Net's readers give them.
            segs_from_prev_stage_or_list_of_segs_from_prev_stage: is refused.
            properties_or_list_of_properties: with ``spacing`` (mm, z, y, x) each.
            truncated_ofname: paths without ending; ``None`` returns the results.
            num_processes: means nothing here.

        Yields:
            For each image a dict with ``data`` (the image as it is: a server preprocesses), ``data_properties`` and
            ``ofile``.

        Raises:
            WrongUse: lists of different lengths.
            NotServed: a previous stage.
        """
        _refuse_previous_stage(segs_from_prev_stage_or_list_of_segs_from_prev_stage)
        images = _listed(image_or_list_of_images)
        properties = _listed(properties_or_list_of_properties)
        names: list[Any] = [None] * len(images) if truncated_ofname is None else _listed(truncated_ofname)
        if not len(images) == len(properties) == len(names):
            msg = (
                f"{len(images)} images, {len(properties)} properties and {len(names)} output files: one for each image"
            )
            raise WrongUse(msg)
        items = zip(images, properties, names, strict=True)
        return ({"data": image, "data_properties": _as_read(known), "ofile": name} for image, known, name in items)

    def predict_from_list_of_npy_arrays(
        self,
        image_or_list_of_images: Array | list[Array],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Array | list[Array] | None,
        properties_or_list_of_properties: Json | list[Json],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = PROCESSES,
    ) -> list[Prediction]:
        """Predict arrays, several at a time; see :meth:`get_data_iterator_from_raw_npy_data`.

        Returns:
            As :meth:`predict_from_files`.

        Raises:
            ClientError: as :meth:`predict_from_files`.
        """
        iterator = self.get_data_iterator_from_raw_npy_data(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
            num_processes,
        )
        return self.predict_from_data_iterator(iterator, save_probabilities, num_processes_segmentation_export)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Json],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = PROCESSES,  # noqa: ARG002 (nnU-Net's)
    ) -> list[Prediction]:
        """Predict what an iterator gives, several at a time; items are taken when they are needed.

        Args:
            data_iterator: dicts with ``data``, an image (C, Z, Y, X) as it was read, or the path of a .npy file with
                one, which is removed then; ``data_properties`` with ``spacing`` (mm, z, y, x); ``ofile``, a path
                without ending, or ``None``.
            save_probabilities: also write ``.npz`` and ``.pkl``, or return probabilities too.
            num_processes_segmentation_export: means nothing here.

        Returns:
            As :meth:`predict_from_files`.

        Raises:
            PreprocessedInput: an item that nnU-Net has preprocessed.
            ClientError: as :meth:`predict_from_files`.
        """
        with_probabilities, description = self._probabilities(save_probabilities), self.description
        cases = (
            self._asking(
                array_case(number, item, description, with_probabilities=with_probabilities),
                with_probabilities=with_probabilities,
            )
            for number, item in enumerate(data_iterator)
        )
        return self._predict(cases, self._array_finish(with_probabilities=with_probabilities), total=None)

    def predict_single_npy_array(
        self,
        input_image: Array,
        image_properties: Json,
        segmentation_previous_stage: Array | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Prediction:
        """Predict one array.

        Args:
            input_image: (C, Z, Y, X), as nnU-Net's readers give it.
            image_properties: with ``spacing`` (mm, z, y, x); to write a file also what the reader put in.
            segmentation_previous_stage: is refused.
            output_file_truncated: path without ending; ``None`` returns the result.
            save_or_return_probabilities: also write ``.npz`` and ``.pkl``, or return probabilities too.

        Returns:
            Labels (Z, Y, X), or labels and probabilities (C, Z, Y, X), or ``None`` if they were written.

        Raises:
            ClientError: see :mod:`.errors`.
        """
        _refuse_previous_stage(segmentation_previous_stage)
        with_probabilities = self._probabilities(save_or_return_probabilities)
        properties = _as_read(image_properties)
        item = {"data": input_image, "data_properties": properties, "ofile": output_file_truncated}
        case = array_case(0, item, self.description, with_probabilities=with_probabilities)
        asked = self._asking(case, with_probabilities=with_probabilities)
        return self._one(asked, self._array_finish(with_probabilities=with_probabilities))

    def _array_finish(self, *, with_probabilities: bool) -> Callable[[Case, Answer], Prediction]:
        description = self.description

        def finish(case: Case, answer: Answer) -> Prediction:
            return finish_array(case, answer, description, with_probabilities=with_probabilities)

        return finish

    # --- Both --------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, object]:
        ours: dict[str, object] = {
            "tile_step_size": self.tile_step_size,
            "use_gaussian": self.use_gaussian,
            "use_mirroring": self.use_mirroring,
        }
        if self.use_folds is not None:
            ours["folds"] = list(self.use_folds)
        return {**ours, **self._given}

    def _asking(self, case: Case, *, with_probabilities: bool) -> Case:
        """The case with the options of probabilities, which are refused where none are asked for."""
        return replace(case, options={**self._of_probabilities, **case.options}) if with_probabilities else case

    def _probabilities(self, asked: bool) -> bool:
        return bool(asked or self._with_probabilities)

    def _one(self, case: Case, finish: Callable[[Case, Answer], Prediction]) -> Prediction:
        with shown("predicting", 1, wanted=self.allow_tqdm) as progress:
            answer = self.client.predict(case, self._options(), progress.event, self._stop)
            return self._checked(finish)(case, answer)

    def _predict(
        self, cases: Iterable[Case], finish: Callable[[Case, Answer], Prediction], total: int | None
    ) -> list[Prediction]:
        results: dict[int, Prediction] = {}
        failures: dict[int, ClientError] = {}
        with shown("predicting", total, wanted=self.allow_tqdm) as progress:
            outcomes: Generator[Outcome[Case, Prediction], None, None] = self.client.predict_many(
                cases,
                self._options(),
                finish=self._checked(finish),
                ordered=False,
                on_event=progress.event,
                stop=self._stop,
            )
            with closing(outcomes):  # else cases would go on, and write files, after an error was raised
                for outcome in outcomes:
                    progress.one_done()
                    results[outcome.index] = outcome.value
                    if outcome.error is not None:
                        if outcome.error.of_all_cases:
                            outcome.error.results = [results.get(index) for index in range(max(results) + 1)]
                            raise outcome.error
                        failures[outcome.index] = outcome.error
        in_order = [results[index] for index in range(len(results))]
        if failures and len(results) == 1:
            raise failures[0]
        if failures:
            raise CasesFailed([failures[index] for index in sorted(failures)], in_order)
        return in_order

    def _checked(self, finish: Callable[[Case, Answer], Prediction]) -> Callable[[Case, Answer], Prediction]:
        """``finish``, for answers of the model that was described and of no other, unless the call is given up."""
        description = self.description

        def checked(case: Case, answer: Answer) -> Prediction:
            if self._stop is not None:
                self._stop.check()
            with answer.naming():
                self.client.check(answer, description)
                for warning in answer.warnings:
                    logger.warning("%s: the server warns of %s", case.name, warning)
                return finish(case, answer)

        return checked


def _places(output: Path_ | list[str] | None, names: Sequence[str]) -> tuple[str | None, list[str | None]]:
    """The folder for the files beside the predictions, and each case's path without ending.

    Args:
        output: a folder, a path for each case, or nothing.
        names: of the cases.
    """
    if output is None:
        return None, [None] * len(names)
    if isinstance(output, str | os.PathLike):
        folder = os.fspath(output)
        return folder, [os.path.join(folder, name) for name in names]  # noqa: PTH118 (strings, as nnU-Net's)
    if len(output) != len(names):
        msg = f"{len(output)} output files for {len(names)} cases"
        raise WrongUse(msg)
    paths = [os.fspath(each) for each in output]
    return (os.path.dirname(paths[0]) or os.curdir if paths else None), [*paths]  # noqa: PTH120


def as_folds(given: int | str | Sequence[int | str] | None) -> Folds | None:
    """As nnU-Net takes them: numbers, texts of numbers, ``"all"``, one of them or several."""
    if given is None:
        return None
    several = [given] if isinstance(given, int | str) else list(given)
    try:
        folds = tuple(fold if fold == "all" else int(fold) for fold in several)
    except (TypeError, ValueError) as error:
        msg = f"use_folds is numbers or 'all', not {given!r}"
        raise WrongUse(msg) from error
    return folds or None


def _as_read(properties: Mapping[str, Any]) -> Json:
    """Properties without what nnU-Net's preprocessing has put into the caller's own dict, in an earlier call of it."""
    return {name: value for name, value in properties.items() if name not in PREPROCESSED}


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _refuse_previous_stage(given: object) -> None:
    several = given if isinstance(given, list) else [given]
    if any(each is not None for each in several):
        msg = "segmentations of a previous stage: cascades are not served yet"
        raise NotServed(msg)
