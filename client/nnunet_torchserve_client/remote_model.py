"""What ``nnUNetPredictor`` knows of its model, known of a server's.

The server is asked once, and anew after another model has answered. Whoever has a trained model folder may have the
served model held against it, then and whenever it is another one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

from .cases import Path_
from .client import Client
from .description import Description, Json
from .errors import NotServed, WrongModel
from .model_folder import Folds, ModelFolder, as_folds
from .stopping import Stop


class RemoteModel:
    """A model on a server, with the names of ``nnUNetPredictor``'s attributes.

    Attributes:
        client: the plain client below.
        use_folds: the folds that are averaged; ``None`` is all that are served.
    """

    def __init__(self, client: Client, use_folds: Folds | None) -> None:
        self.client, self.use_folds = client, use_folds
        self._stop: Stop | None = None
        self._folder: tuple[ModelFolder, str] | None = None

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

    @property
    def description(self) -> Description:
        """What the server says of the model; asked for once, and anew after a call in which another one answered.

        Raises:
            WrongModel: it is not that of the folder that was given (:meth:`initialize_from_trained_model_folder`).
            ClientError: the server does not say it.
        """
        description = self.client.describe(stop=self._stop)
        if self._folder is not None:
            self._check(description, *self._folder, self.use_folds)
        return description

    def _check(self, description: Description, folder: ModelFolder, checkpoint_name: str, folds: Folds | None) -> None:
        """Raise unless the served model is that of a folder; if it is not, it may be so next time."""
        try:
            folder.check(description, checkpoint_name, folds)
        except WrongModel:
            self.client.forget(description)
            raise

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
        self._check(self.client.describe(stop=self._stop), found, checkpoint_name, folds)
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
