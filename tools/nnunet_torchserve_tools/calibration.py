"""Patches that int8 is calibrated on: what the networks of an archive see of given images when they are served.

The images go through the whole pipeline, decoded and preprocessed as a worker does it; the engine below it writes down
some of the patches that it would be asked for, of the sliding window's own grid, some of them mirrored as requests
mirror them. A cascade's first stage is really predicted, by eager, so that its second one sees true labels; nothing
else is predicted. Which patches are taken depends on the images and their order only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.accumulator import Layout, new_accumulator
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.prediction import Keep, Prediction, Watcher
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import HEADER
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.recipe import Cascade, Ensemble, Recipe
from nnunet_torchserve.request import Request
from nnunet_torchserve.settings import HandlerSettings

from .errors import ToolError, UsageError
from .validation_cases import ValidationCase

LEAST_PATCHES = 32
"""Fewer say too little of the ranges of activations."""

MOST_PATCHES = 64
"""NNCF's own default is 300 images; 40 patches of one case left the Dice of a model of brain tissue to its labels as it
was. Each is run once through the float32 graph of each fold."""

_SEED = 20261129
_TIME_LIMIT_S = 7 * 86400.0
_CPU = torch.device("cpu")


class _Listening(LocalEngine):
    """Eager, which writes patches down and predicts first stages only; what else it answers is zeros.

    Attributes:
        wanted: patches of each member that the next case should give.
    """

    def __init__(self, bundle: ModelBundle, limits: Limits) -> None:
        super().__init__(bundle, _CPU, limits=limits)
        self.wanted = 0
        self.taken: dict[str, list[torch.Tensor]] = {name: [] for name in bundle.members}
        self._first_stages = first_stages(bundle.description.recipe)
        self._random = np.random.default_rng(_SEED)

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None = None,
        watcher: Watcher | None = None,
        keep: Keep | None = None,
        passes_after: int = 0,
    ) -> Prediction:
        """See :meth:`~nnunet_torchserve.engine.prediction.Engine.predict`."""
        networks = self.networks.of(settings.member)
        self._take(data, settings, Layout(networks.classes, networks.patch_size, _CPU))
        if settings.member in self._first_stages:
            return super().predict(data, settings, deadline, watcher, keep, passes_after)
        logits = torch.zeros((networks.classes, *data.shape[1:]), dtype=torch.half)
        return Prediction(logits, 0.0, 0.0, self.backend)

    def _take(self, data: torch.Tensor, settings: Settings, layout: Layout) -> None:
        """As many of the case's windows as are wanted, none twice, each as one of its passes sees it."""
        case = new_accumulator(data, settings, layout)
        passes: dict[int, list[int]] = {}
        for number in range(len(case)):
            passes.setdefault(case.unit(number).number, []).append(number)
        taken = self.taken[settings.member]
        for window in self._random.permutation(len(passes))[: min(self.wanted, MOST_PATCHES - len(taken))]:
            chosen = case.unit(int(self._random.choice(passes[int(window)])))
            taken.append(case.patch(chosen).clone())


def spread(cases: Sequence[ValidationCase]) -> list[ValidationCase]:
    """As many of the cases as there are patches to be taken, evenly over all."""
    return [cases[number] for number in np.linspace(0, len(cases) - 1, min(len(cases), MOST_PATCHES)).astype(int)]


def calibration_patches(
    bundle: ModelBundle, settings: HandlerSettings, cases: Sequence[ValidationCase], tell: Callable[[str], None]
) -> dict[str, npt.NDArray[np.float32]]:
    """Patches for each member.

    Args:
        bundle: the archive, complete but for the graphs.
        settings: its own, to the handler.
        cases: whose images are taken; no more than :func:`spread` leaves.
        tell: hears a line.

    Returns:
        Name of a member -> float32 (N, 1, C, *patch).

    Raises:
        UsageError: it is the last stage of a cascade without its first; or the images give too few patches.
        ToolError: an image is refused.
    """
    recipe = bundle.description.recipe
    if isinstance(recipe, Cascade) and recipe.first is None:
        msg = (
            f"{recipe.member} needs a first stage's labels with each image, and cannot be calibrated on images alone: "
            "make the archive with --previous-stage"
        )
        raise UsageError(msg)
    limits = Limits.from_settings(settings.limits, {}).for_model(bundle.lead.channels)
    engine = _Listening(bundle, limits)
    pipeline = Pipeline(bundle, engine, limits, _TIME_LIMIT_S)
    for number, case in enumerate(cases):
        left = MOST_PATCHES - min(map(len, engine.taken.values()))
        engine.wanted = -(-left // (len(cases) - number))
        _ask(pipeline, case)
    if too_few := {name: found for name, found in engine.taken.items() if len(found) < LEAST_PATCHES}:
        msg = (
            f"int8 is calibrated on at least {LEAST_PATCHES} patches, and the images of --calibrate have "
            f"{_counted(too_few)}: name more images, or larger ones"
        )
        raise UsageError(msg)
    tell(f"calibrated on {_counted(engine.taken)} of {len(cases)} {'image' if len(cases) == 1 else 'images'}")
    return {name: np.stack([patch[None].numpy() for patch in found]) for name, found in engine.taken.items()}


def first_stages(recipe: Recipe) -> frozenset[str]:
    """The members whose labels others see."""
    models = recipe.of if isinstance(recipe, Ensemble) else (recipe,)
    return frozenset(model.first.member for model in models if isinstance(model, Cascade) and model.first is not None)


def _ask(pipeline: Pipeline, case: ValidationCase) -> None:
    options: dict[str, Any] = {"output_format": "npz"} | case.options(pipeline.bundle.lead.reader)
    response = pipeline.answer(Request(case.parts(), {HEADER: json.dumps(options)}))
    if response.status != HTTPStatus.OK:
        msg = f"--calibrate: case {case.name}: {json.loads(response.body)['detail']}"
        raise ToolError(msg)


def _counted(patches: Mapping[str, Sequence[object]]) -> str:
    return ", ".join(f"{len(found)} patches ({name})" for name, found in patches.items())
