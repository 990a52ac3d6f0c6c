"""What a model says of itself: to the management port, to whoever may predict, and in the head of each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from . import __version__
from .bundle import ModelBundle
from .intensities import value_range
from .limits import Limits
from .member import Member
from .member_description import FoldDescription
from .options import Options
from .own_code import CODE_FOLDER
from .recipe import in_words
from .settings import HandlerSettings


def describe(
    bundle: ModelBundle,
    limits: Limits,
    settings: HandlerSettings,
    time_limit_s: float,
    backend: Mapping[str, str | None] | None = None,
) -> dict[str, object]:
    """What a client needs to know of a model.

    Args:
        bundle: the model.
        limits: what a request may ask for.
        settings: what the archive says to the handler.
        time_limit_s: seconds that a request may take.
        backend: which one was ``asked`` for and which one ``runs``, of a model that is served.

    Returns:
        A JSON object.
    """
    description, lead = bundle.description, bundle.lead
    return {
        "name": description.name,
        "version": description.version,
        "digest": f"sha256:{bundle.digest}",
        **_trained(lead),
        "channels": lead.channel_names,
        "channel_values": {number: list(value_range(lead, int(number))) for number in lead.channel_names},
        "labels": lead.dataset["labels"],
        "regions_class_order": lead.dataset.get("regions_class_order") if lead.labels.has_regions else None,
        "classes": lead.classes,
        "probability_channels": lead.output_names,
        "reader": lead.reader,
        "input_orientation": lead.input_orientation,
        "axis_order": "patch_size and spacing (mm) in the plan's axis order",
        "members": {name: _trained(member) | _stored(bundle, member) for name, member in bundle.members.items()},
        "recipe": description.recipe.model_dump(mode="json"),
        "recipe_in_words": in_words(description.recipe),
        "postprocessing": description.postprocessing and description.postprocessing.model_dump(mode="json"),
        "segments": {name: codes.model_dump(mode="json", exclude_none=True) for name, codes in bundle.codes.items()},
        "code": _own_code(bundle),
        "backend": {"archive": _stored_backend(bundle), "accuracy": _accuracy(bundle), **(backend or {})},
        "settings": settings.model_dump(mode="json", exclude={"limits"}),
        "limits": asdict(limits) | {"timeout_s": time_limit_s},
        "options": Options.model_json_schema(),
        "serving_core": __version__,
        "built_with": description.built_with,
    }


def _stored_backend(bundle: ModelBundle) -> dict[str, object] | None:
    """What the archive holds for another backend than eager."""
    stored = bundle.description.backend
    return None if stored is None else stored.model_dump(mode="json")


def _accuracy(bundle: ModelBundle) -> dict[str, object] | None:
    """How far that backend's answers are from eager's, where it was measured."""
    return None if bundle.accuracy is None else bundle.accuracy.summary()


def _own_code(bundle: ModelBundle) -> dict[str, object] | None:
    """Somebody's own code that the archive brings along: its files, what is taken from each, what it needs."""
    code, checksums = bundle.description.code, bundle.description.files
    if code is None:
        return None
    return {
        "files": [
            {
                "file": file,
                "sha256": checksums.get(f"{CODE_FOLDER}/{file}"),
                "names": [{"kind": str(own.kind), "name": own.name} for own in code.names if own.file == file],
            }
            for file in code.files
        ],
        "requires": code.requires,
    }


def _trained(member: Member) -> dict[str, object]:
    """What one member is. Of a model of several members the last stage of the first stands for all."""
    description = member.description
    return {
        "dataset": description.dataset,
        "trainer": description.trainer,
        "folder_trainer": description.folder_trainer,
        "plans": description.plans,
        "configuration": description.configuration,
        "folds": list(member.folds),
        "checkpoint": description.source.get("checkpoint"),
        "mirroring_axes": {str(fold.fold): list(fold.mirroring_axes or ()) for fold in description.folds},
        "patch_size": list(member.patch_size),
        "spacing": [float(size) for size in member.configuration.spacing],
    }


def _stored(bundle: ModelBundle, member: Member) -> dict[str, object]:
    """What is kept of a member's weights: which checkpoints they came from, by fold, and their files."""
    folds = member.description.folds
    return {
        "checkpoint_digests": {str(fold.fold): f"sha256:{fold.checkpoint_sha256}" for fold in folds},
        "weights_digests": {str(fold.fold): f"sha256:{_checksum(bundle, member, fold)}" for fold in folds},
        "weights_bytes": _weights_bytes(member),
    }


def _checksum(bundle: ModelBundle, member: Member, fold: FoldDescription) -> str:
    return bundle.description.files[f"{member.description.folder}/{fold.weights_file}"]


def _weights_bytes(member: Member) -> int | None:
    """Of all folds; ``None`` if the files are not there: TorchServe deletes those of a model that it no longer has."""
    try:
        return sum((member.folder / fold.weights_file).stat().st_size for fold in member.description.folds)
    except OSError:
        return None


def with_model_files(
    description: dict[str, object], bundle: ModelBundle, served: Sequence[dict[str, Any]] | None
) -> dict[str, object]:
    """A description for clients that cannot look into the model's folder or ask the management port.

    TorchServe changes numbers of a JSON document that passes through its describe API; here nothing does.

    Args:
        description: of :func:`describe`.
        bundle: the model.
        served: the models that this server was started with; ``None`` where nobody wrote them down.

    Returns:
        A JSON object. NaN in nnU-Net's files stays what Python makes of it.
    """
    files = {"dataset_json": bundle.lead.dataset, "plans_json": bundle.lead.plans.plans}
    return description | files | {"served": None if served is None else list(served)}


def model_header(bundle: ModelBundle) -> str:
    """The value of ``X-Nnunet-Model``."""
    description = bundle.description
    return f"name={description.name}; version={description.version}; digest=sha256:{bundle.digest}"
