"""What a model says of itself: for TorchServe's describe API, and in the head of each answer."""

from __future__ import annotations

from dataclasses import asdict

from . import __version__
from .bundle import ModelBundle
from .limits import Limits
from .options import Options
from .settings import HandlerSettings


def describe(bundle: ModelBundle, limits: Limits, settings: HandlerSettings, time_limit_s: float) -> dict[str, object]:
    """What a client needs to know of a model.

    Args:
        bundle: the model.
        limits: what a request may ask for.
        settings: what the archive says to the handler.
        time_limit_s: seconds that a request may take.

    Returns:
        A JSON object.
    """
    description = bundle.description
    return {
        "name": description.name,
        "version": description.version,
        "digest": f"sha256:{bundle.digest}",
        "dataset": description.dataset,
        "trainer": description.trainer,
        "plans": description.plans,
        "configuration": description.configuration,
        "folds": list(bundle.folds),
        "mirroring_axes": {str(fold.fold): list(fold.mirroring_axes or ()) for fold in description.folds},
        "channels": bundle.channel_names,
        "labels": bundle.dataset["labels"],
        "regions_class_order": bundle.dataset.get("regions_class_order") if bundle.labels.has_regions else None,
        "classes": bundle.classes,
        "probability_channels": bundle.output_names,
        "patch_size": list(bundle.patch_size),
        "spacing": [float(size) for size in bundle.configuration.spacing],
        "reader": bundle.reader,
        "input_orientation": bundle.input_orientation,
        "axis_order": "patch_size and spacing (mm) in the plan's axis order",
        "settings": settings.model_dump(mode="json", exclude={"limits"}),
        "limits": asdict(limits) | {"timeout_s": time_limit_s},
        "options": Options.model_json_schema(),
        "serving_core": __version__,
        "built_with": description.built_with,
    }


def model_header(bundle: ModelBundle) -> str:
    """The value of ``X-Nnunet-Model``."""
    description = bundle.description
    return f"name={description.name}; version={description.version}; digest=sha256:{bundle.digest}"
