"""``nnUNetPredictor``, with the network on a server.

Names, arguments, axis orders, types and files are those of nnU-Net's ``predict_from_raw_data.py`` (2.8.1), so that a
script changes the line that makes its predictor and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from .array_cases import array_case, finish_array, raw_items
from .arrays import Array
from .calls import Call, Prediction
from .cases import Path_, check_part
from .client import Case, Client
from .description import Description, Json
from .errors import WrongUse
from .file_cases import file_case, finish_files, image_files, wanted_of, with_previous_stage
from .model_folder import as_folds
from .outputs import options_for, postprocess_option, write_side_files
from .remote_model import RemoteModel

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


class RemotePredictor(RemoteModel):
    """Predicts like ``nnUNetPredictor``, on a server."""

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
        postprocess: bool = False,
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
            postprocess: whether labels are postprocessed, where the archive has that; nnU-Net's predictor never does.
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
        self.postprocess = postprocess
        self._with_probabilities = bool(options.pop("save_probabilities", False))
        self._given = {name: value for name, value in options.items() if not name.startswith("probability_")}
        self._of_probabilities = {name: value for name, value in options.items() if name.startswith("probability_")}
        folds = as_folds(use_folds)
        client = Client(
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
        super().__init__(client, folds)

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
            folder_with_segs_from_prev_stage: a folder with the labels of a cascade's first stage, ``CASE.nii.gz`` and
                so on. ``None`` leaves them to the server, if its archive has that stage.
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
        call, cases = self._of_files(arguments, num_parts, part_id)
        return call.several(cases, len(cases)) if cases else None

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
        call, cases = self._of_files(arguments, 1, 0)
        if not cases:
            return None
        results = call.in_turn(cases)
        return [result for case, result in zip(cases, results, strict=True) if case.note.target is None]

    def _of_files(self, arguments: Mapping[str, Any], num_parts: int, part_id: int) -> tuple[Call, list[Case]]:
        """A call with files, and its cases; writes the files beside the predictions."""
        source = arguments["list_of_lists_or_source_folder"]
        output = arguments["output_folder_or_list_of_truncated_output_files"]
        check_part(num_parts, part_id, one_more=True)
        if part_id == num_parts:
            logger.warning(
                "part_id %d of %d parts: nnU-Net counts them from 0, and takes this number as well, for the cases of "
                "part 0 without its first",
                part_id,
                num_parts,
            )
        description, with_probabilities = self.description, self._probabilities(arguments["save_probabilities"])
        ending = description.file_ending
        folder, files = image_files(source, output, ending)
        files = with_previous_stage(files, arguments["folder_with_segs_from_prev_stage"], description)
        if folder is not None:
            options_for(ending, with_probabilities=with_probabilities)  # refuse before anything is written
            write_side_files(folder, description.dataset_json, description.plans_json, arguments)
        overwrite = arguments["overwrite"]
        wanted, _ = wanted_of(
            files, num_parts, part_id, ending, overwrite=overwrite, with_probabilities=with_probabilities
        )
        cases = (file_case(each, description, with_probabilities=with_probabilities) for each in wanted)
        call = self._call(finish_files, description, with_probabilities=with_probabilities)
        return call, [self._asking(case, with_probabilities=with_probabilities) for case in cases]

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
            segs_from_prev_stage_or_list_of_segs_from_prev_stage: labels (1, Z, Y, X) of a cascade's first stage, as
                nnU-Net's ``read_seg`` gives them; ``None`` leaves them to the server, if its archive has that stage.
            properties_or_list_of_properties: with ``spacing`` (mm, z, y, x) each.
            truncated_ofname: paths without ending; ``None`` returns the results.
            num_processes: means nothing here.

        Yields:
            For each image a dict with ``data`` (the image as it is: a server preprocesses), ``data_properties``,
            ``ofile`` and ``previous_stage``.

        Raises:
            WrongUse: lists of different lengths.
        """
        return raw_items(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
        )

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
                without ending, or ``None``. ``previous_stage``, labels (1, Z, Y, X) of a cascade's first stage, may be
                there too.
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
            self._array_case(number, item, description, with_probabilities=with_probabilities)
            for number, item in enumerate(data_iterator)
        )
        return self._call(finish_array, description, with_probabilities=with_probabilities).several(cases, None)

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
            segmentation_previous_stage: labels (1, Z, Y, X) of a cascade's first stage, as nnU-Net's ``read_seg`` gives
                them; ``None`` leaves them to the server, if its archive has that stage.
            output_file_truncated: path without ending; ``None`` returns the result.
            save_or_return_probabilities: also write ``.npz`` and ``.pkl``, or return probabilities too.

        Returns:
            Labels (Z, Y, X), or labels and probabilities (C, Z, Y, X), or ``None`` if they were written.

        Raises:
            ClientError: see :mod:`.errors`.
        """
        with_probabilities, description = self._probabilities(save_or_return_probabilities), self.description
        [item] = raw_items([input_image], [segmentation_previous_stage], [image_properties], [output_file_truncated])
        case = self._array_case(0, item, description, with_probabilities=with_probabilities)
        return self._call(finish_array, description, with_probabilities=with_probabilities).one(case)

    def _array_case(
        self, number: int, item: Mapping[str, Any], description: Description, *, with_probabilities: bool
    ) -> Case:
        case = array_case(number, item, description, with_probabilities=with_probabilities)
        return self._asking(case, with_probabilities=with_probabilities)

    # --- Both --------------------------------------------------------------------------------------------------------

    def _options(self, description: Description) -> dict[str, object]:
        ours: dict[str, object] = {
            "tile_step_size": self.tile_step_size,
            "use_gaussian": self.use_gaussian,
            "use_mirroring": self.use_mirroring,
        }
        if self.use_folds is not None:
            ours["folds"] = list(self.use_folds)
        ours |= postprocess_option(description, wanted=self.postprocess)
        return {**ours, **self._given}

    def _asking(self, case: Case, *, with_probabilities: bool) -> Case:
        """The case with the options of probabilities, which are refused where none are asked for."""
        return replace(case, options={**self._of_probabilities, **case.options}) if with_probabilities else case

    def _probabilities(self, asked: bool) -> bool:
        return bool(asked or self._with_probabilities)

    def _call(self, finish: Callable[..., Prediction], description: Description, *, with_probabilities: bool) -> Call:
        """A call whose answers become files or arrays by ``finish``."""
        finished = partial(finish, description=description, with_probabilities=with_probabilities)
        return Call(self.client, description, self._options(description), finished, self._stop, self.allow_tqdm)
