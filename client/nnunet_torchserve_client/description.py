"""What a served model is, as the server says it (docs/http.md, "What a model is")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .answers import Answer
from .errors import BadAnswer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and version that a server was started with, by TorchServe's names.

    Attributes:
        name, version: in the URL of a prediction.
        dataset, trainer, plans, configuration: nnU-Net's names; ``trainer`` is the checkpoints' word.
        folds: numbers, or ``"all"``.
        checkpoint: file name that the weights came from.
        digest: of the archive.
        recipe: how one answer is made of the archive's members; the names above are those of its last stage, and of an
            ensemble's first model. ``None`` if the server does not say it.
        folder_trainer: the trainer that nnU-Net's folder was named after; empty if the server does not say it.
    """

    name: str
    version: str
    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: tuple[int | str, ...]
    checkpoint: str
    digest: str
    recipe: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    folder_trainer: str = ""

    @property
    def trained_by(self) -> str:
        """The trainer that nnU-Net's commands mean by ``-tr``: that of the folder's name."""
        return self.folder_trainer or self.trainer

    def is_of_trainer(self, name: str) -> bool:
        """Whether this is the trainer of its folder or of its checkpoints, which is whose network they hold."""
        return name in (self.trained_by, self.trainer)

    @property
    def model_folder(self) -> str:
        """The name of nnU-Net's folder, ``TRAINER__PLANS__CONFIGURATION``."""
        return f"{self.trained_by}__{self.plans}__{self.configuration}"

    @property
    def is_ensemble(self) -> bool:
        """Whether it is the mean of several models, as ``nnUNetv2_ensemble`` makes one."""
        return (self.recipe or {}).get("kind") == "ensemble"

    @property
    def made_of(self) -> str:
        """For people: the name of its folder, or which models it is the mean of."""
        return recipe_in_words(self.recipe or {}) if self.is_ensemble else self.model_folder


def _served(document: Mapping[str, Any]) -> ServedModel:
    names = ("name", "version", "dataset", "trainer", "plans", "configuration", "checkpoint", "digest")
    return ServedModel(
        **{name: str(document.get(name, "")) for name in names},
        folder_trainer=str(document.get("folder_trainer") or ""),
        folds=tuple(document.get("folds") or ()),
        recipe=document.get("recipe"),
    )


@dataclass(frozen=True, slots=True)
class Description:
    """A model, described by the server that serves it.

    Attributes:
        raw: the whole answer.
        model: its own names; ``name`` is the archive's, which need not be the one in the URL.
        served: every model and version that the server was started with; ``None`` if it does not know.
    """

    raw: Mapping[str, Any] = field(repr=False)
    model: ServedModel
    served: tuple[ServedModel, ...] | None

    @property
    def digest(self) -> str:
        """Of weights and code; each answer names it too."""
        return self.model.digest

    @property
    def body_bytes(self) -> int | None:
        """The server's limit for the images of a request."""
        limit = self.raw.get("limits", {}).get("body_bytes")
        return limit if isinstance(limit, int) else None

    @property
    def dataset_json(self) -> Json:
        """nnU-Net's dataset.json, keys in its order."""
        return self._document("dataset_json")

    @property
    def plans_json(self) -> Json:
        """nnU-Net's plans.json, keys in its order."""
        return self._document("plans_json")

    @property
    def file_ending(self) -> str:
        """Of the dataset's images, as ``.nii.gz``."""
        return str(self.dataset_json["file_ending"])

    @property
    def reader(self) -> str:
        """nnU-Net's reader that the plans name."""
        return str(self.raw.get("reader", ""))

    @property
    def channels(self) -> Mapping[str, str]:
        """Number -> name of each image channel."""
        channels: Mapping[str, str] = self.raw.get("channels", {})
        return channels

    @property
    def input_orientation(self) -> str | None:
        """nnU-Net's reorienting readers, and an archive that asks for it, turn images into this; else ``None``."""
        letters = self.raw.get("input_orientation")
        return letters if isinstance(letters, str) else None

    @property
    def mirroring_axes(self) -> tuple[int, ...] | None:
        """Along which the first fold's checkpoint allows mirroring; ``None`` if along none."""
        axes = self.raw.get("mirroring_axes", {})
        first = axes.get(str(self.model.folds[0])) if self.model.folds else None
        return tuple(int(axis) for axis in first) if first else None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How one answer is made of the archive's members; servers that do not say it have one member each."""
        return self.model.recipe or {"kind": "single", "member": self.model.configuration}

    @property
    def takes_previous_stage(self) -> bool:
        """Whether the labels of a cascade's first stage may come with a case."""
        return self.recipe.get("kind") == "cascade"

    @property
    def needs_previous_stage(self) -> bool:
        """Whether they must come, because the archive cannot make them."""
        return self.takes_previous_stage and self.recipe.get("first") is None

    @property
    def folds_differ(self) -> bool:
        """Whether members have other folds than each other, so that no list of folds means all of each."""
        members = self.raw.get("members") or {}
        return len({tuple(map(str, member.get("folds") or ())) for member in members.values()}) > 1

    @property
    def postprocesses(self) -> bool:
        """Whether labels are postprocessed unless a request says otherwise."""
        return self.raw.get("postprocessing") is not None and "postprocess" in self.option_names

    @property
    def option_names(self) -> frozenset[str]:
        """The options that the server knows."""
        return frozenset(self.raw.get("options", {}).get("properties", {}))

    def _document(self, name: str) -> Json:
        document = self.raw.get(name)
        if not isinstance(document, dict):
            msg = f"the server's description of the model has no {name}; it is older than this client"
            raise BadAnswer(msg)
        return document


def recipe_in_words(recipe: Mapping[str, Any]) -> str:
    """For people, as ``ensemble of 3d_fullres and (3d_lowres, then 3d_cascade_fullres)``.

    Args:
        recipe: of a description.
    """
    kind = recipe.get("kind")
    if kind == "ensemble":
        each = [recipe_in_words(model) for model in recipe.get("of") or ()]
        each = [f"({words})" if ", " in words else words for words in each]
        return f"ensemble of {', '.join(each[:-1])} and {each[-1]}" if each else "ensemble"
    member = str(recipe.get("member"))
    if kind == "cascade":
        first = recipe.get("first")
        return f"{'labels that a request brings' if first is None else recipe_in_words(first)}, then {member}"
    return member


def read_description(answer: Answer) -> Description:
    """The description that a server sent.

    Raises:
        BadAnswer: it is none.
    """
    try:
        document = json.loads(answer.content)
        served = document["served"]
        return Description(document, _served(document), None if served is None else tuple(map(_served, served)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = "what came is no description of a model"
        raise BadAnswer(msg, request_id=answer.request_id, server=answer.server) from error
