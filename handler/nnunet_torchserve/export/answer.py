"""What a request asks for: labels, and probabilities if it wants them, of one model or of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..options import Options, ProbabilityType
from ..volume import Geometry, LabelMap
from . import ensemble
from .ensemble import Predicted
from .labels import label_map, label_map_and_probabilities


def export(
    predicted: Sequence[Predicted], geometry: Geometry, options: Options, deadline: float | None = None
) -> LabelMap:
    """The answer to a request.

    Args:
        predicted: the model's logits, or those of each model of an ensemble.
        geometry: of the image.
        options: of the request.
        deadline: ``time.monotonic()`` after which it is given up.

    Raises:
        BadOption: the model, or an ensemble, knows no other export than ``exact``.
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    if len(predicted) > 1:
        return ensemble.export(predicted, geometry, options, deadline)
    [(model, logits, properties)] = [(each.model, each.logits, each.properties) for each in predicted]
    if not options.save_probabilities:
        return LabelMap(label_map(model, logits, properties, options.export, deadline), geometry)
    dtype = np.float16 if options.probability_dtype is ProbabilityType.FLOAT16 else np.float32
    chosen = options.probability_channels
    labels, probability = label_map_and_probabilities(model, logits, properties, chosen, dtype, deadline)
    return LabelMap(labels, geometry, probability, tuple(range(len(logits))) if chosen is None else chosen)
