"""What a request asks for: labels, and probabilities if it wants them, of one model or of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..options import Options, ProbabilityType
from ..volume import Geometry, LabelMap
from .ensemble import Predicted, labels_and_mean
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
        BadOption: the model knows no other export than ``exact``.
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    one, is_ensemble = predicted[0], len(predicted) > 1
    if not is_ensemble and not options.save_probabilities:
        return LabelMap(label_map(one.model, one.logits, one.properties, options.export, deadline), geometry)
    chosen: tuple[int, ...] = ()
    if options.save_probabilities:
        every = tuple(range(len(one.logits)))
        chosen = every if options.probability_channels is None else options.probability_channels
    dtype = np.float16 if options.probability_dtype is ProbabilityType.FLOAT16 else np.float32
    if is_ensemble:
        labels, found = labels_and_mean(predicted, chosen, dtype, deadline)
    else:
        labels, found = label_map_and_probabilities(one.model, one.logits, one.properties, chosen, dtype, deadline)
    return LabelMap(labels, geometry, found if chosen else None, chosen)
