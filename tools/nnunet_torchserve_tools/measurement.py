"""A backend's answers compared with eager's: the same images through the whole pipeline, with one and with the other.

What is compared is what a client would get: decoded, preprocessed, predicted, exported and postprocessed as a worker
does it, by a request without options. Both engines run in this process on the CPU, and neither falls back: on a machine
that cannot run the backend nothing is measured.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
import torch

from nnunet_torchserve.accuracy import (
    REPORT_VERSION,
    AccuracyReport,
    CaseAccuracy,
    DiceLimits,
    deciding_files,
)
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.machine import processor_name
from nnunet_torchserve.measured_here import patches_at_once
from nnunet_torchserve.options import HEADER
from nnunet_torchserve.painting import integers
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.recipe import Cascade
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import BACKEND, WARNING
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve.structure_accuracy import LabelVoxels, StructureAccuracy
from nnunet_torchserve.volume import LabelArray

from .case_labels import read_labels
from .errors import ToolError, UsageError
from .label_comparison import Mask, counts, mask_of, surface_distance_95
from .validation_cases import ValidationCase, digests_of

_TIME_LIMIT_S = 7 * 86400.0
_IGNORE = "ignore"
_CPU = torch.device("cpu")
_PACKAGES = ("nnunet-torchserve", "nnunetv2", "torch")


@dataclass(frozen=True, slots=True)
class _Structure:
    """How one is found.

    Attributes:
        painted: its values in an answer.
        labelled: its values in labels of the training's kind.
    """

    painted: tuple[int, ...]
    labelled: tuple[int, ...]


def measure(
    bundle: ModelBundle,
    settings: HandlerSettings,
    cases: Sequence[ValidationCase],
    limits: DiceLimits,
    tell: Callable[[str], None],
    calibrated_on: tuple[str, ...] | None = None,
) -> AccuracyReport:
    """Predict each case by eager and by the archive's backend, and count.

    Args:
        bundle: an archive that was made for another backend.
        settings: what it says to the handler.
        cases: at least one; all have labels, or none.
        limits: what may be lost; they are noted, and held by :mod:`.accuracy_gate`.
        tell: hears a line for each case, and what its answer warns of.
        calibrated_on: sha256 of the files that the backend was calibrated on.

    Raises:
        UsageError: the archive has no other backend, or is the last stage of a cascade alone; or one image came as two
            cases.
        ToolError: this machine cannot run the backend, a case is refused, or a structure cannot be told from another.
    """
    stored = bundle.description.backend
    if stored is None:
        msg = "the archive is made for eager, which others are compared with; make it with 'archive --backend'"
        raise UsageError(msg)
    structures = _structures(bundle)
    images = digests_of(cases)
    batch = patches_at_once(settings.max_patch_batch)
    # eager takes one patch in a pass, whatever the archive says, as stock does
    limits_here = Limits.from_settings(settings.limits, {}).for_model(bundle.lead.channels)
    engines = [_engine(bundle, settings, limits_here, *how) for how in ((Backend.EAGER, 1), (stored.backend, batch))]
    slow, fast = (Pipeline(bundle, each, limits_here, _TIME_LIMIT_S, backend=each.backend) for each in engines)
    measured = []
    for number, case in enumerate(cases, start=1):
        tell(f"comparing {case.name} ({number} of {len(cases)})")
        measured.append(_compare(case, images[case.name], structures, slow, fast, tell))
    return AccuracyReport(
        report_version=REPORT_VERSION,
        backend=stored.backend,
        files=deciding_files(bundle.description.files),
        processor=processor_name(),
        software={package: importlib.metadata.version(package) for package in (*_PACKAGES, *stored.requires)},
        max_patch_batch=batch,
        precisions=dict(sorted(engines[1].networks.precisions.items())) or None,
        calibrated_on=calibrated_on,
        limits=limits,
        cases=tuple(measured),
    )


def _structures(bundle: ModelBundle) -> dict[str, _Structure]:
    """Name -> how it is found; of a model that answers images alone.

    Raises:
        UsageError: it wants labels with each image.
        ToolError: a structure cannot be told from another.
    """
    recipe, lead = bundle.description.recipe, bundle.lead
    if isinstance(recipe, Cascade) and recipe.first is None:
        msg = (
            f"{recipe.member} needs a first stage's labels with each image; make the archive with --previous-stage, so "
            "that its answers can be compared"
        )
        raise UsageError(msg)
    found = {}
    for name, painted in lead.painting.structures.items():
        if painted is None:
            msg = f"{name} cannot be told from other structures in a label map: not measured. "
            raise ToolError(msg + " ".join(lead.painting.remarks))
        found[name] = _Structure(painted, tuple(integers(lead.dataset["labels"][name])))
    if not found:
        msg = "the model has no structure that could be compared"
        raise ToolError(msg)
    return found


def _engine(
    bundle: ModelBundle, settings: HandlerSettings, limits: Limits, backend: Backend, batch: int
) -> LocalEngine:
    """What a worker's engine computes, in this process."""
    try:
        return LocalEngine(bundle, _CPU, batch, settings.policy, limits, backend)
    except BundleError as error:
        raise ToolError(not_measured(backend, str(error))) from error


def not_measured(backend: str, reason: str) -> str:
    """The one sentence of a machine that cannot run a backend."""
    return f"{backend} was not measured here: {reason}"


def _compare(
    case: ValidationCase,
    images: tuple[str, ...],
    structures: Mapping[str, _Structure],
    slow: Pipeline,
    fast: Pipeline,
    tell: Callable[[str], None],
) -> CaseAccuracy:
    parts, lead = case.parts(), slow.bundle.lead
    labels = None if case.labels is None else read_labels(case, parts, lead, slow.limits)
    eager, spacing, warning = _answer(case, parts, slow)
    other, _, _ = _answer(case, parts, fast)
    if warning:
        tell(f"{case.name}: the answer warns of {warning}")
    ignored = integers(lead.dataset["labels"].get(_IGNORE, []))
    found = {}
    for name, structure in structures.items():
        first, second = (mask_of(each, structure.painted) for each in (eager, other))
        voxels, others, common = counts(first, second)
        found[name] = StructureAccuracy(
            eager=voxels,
            backend=others,
            common=common,
            surface_distance_95_mm=surface_distance_95(first, second, spacing),
            labels=None if labels is None else _to_labels(labels, structure.labelled, ignored, first, second),
        )
    return CaseAccuracy(
        name=case.name,
        images=images,
        voxels=eager.size,
        different=int(np.count_nonzero(eager != other)),
        structures=found,
    )


def _to_labels(
    labels: LabelArray, values: Sequence[int], ignored: Sequence[int], eager: Mask, other: Mask
) -> LabelVoxels:
    told, truth = ~mask_of(labels, ignored), mask_of(labels, values)
    voxels, of_eager, eager_common = counts(truth, eager & told)
    _, of_other, other_common = counts(truth, other & told)
    return LabelVoxels(
        voxels=voxels, eager=of_eager, backend=of_other, eager_common=eager_common, backend_common=other_common
    )


def _answer(
    case: ValidationCase, parts: Mapping[str, object], pipeline: Pipeline
) -> tuple[LabelArray, tuple[float, ...], str]:
    """The labels (Z, Y, X) that a client would get, the spacing in mm along z, y, x, and what the answer warns of.

    Raises:
        ToolError: an error was answered, or by another backend.
    """
    options = {"output_format": "npz"} | case.options(pipeline.bundle.lead.reader)
    response = pipeline.answer(Request(parts, {HEADER: json.dumps(options)}))
    if response.status != HTTPStatus.OK:
        msg = f"case {case.name}, {pipeline.backend}: {json.loads(response.body)['detail']}"
        raise ToolError(msg)
    if (ran := response.headers[BACKEND].partition(";")[0]) != pipeline.backend:
        raise ToolError(not_measured(pipeline.backend, f"{ran} ran in its place"))
    with np.load(io.BytesIO(response.body), allow_pickle=False) as arrays:
        labels, spacing = arrays["labels"], [float(size) for size in arrays["spacing"]]
    warning = response.headers.get(WARNING, "")
    return labels.reshape((-1, *labels.shape[-2:])), tuple([*spacing, 1.0][2::-1]), warning
