"""The labels of a cascade's first stage, where the caller gives them instead of leaving them to the server."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array
from .description import Description, recipe_in_words
from .errors import WrongPreviousStage


def check_previous_stage(description: Description, *, given: bool) -> None:
    """Refuse labels for a model that takes none, and a call without them for one that needs them.

    nnU-Net asserts the second, and fails in the network of the first, which has no channels for them.

    Args:
        description: of the model.
        given: whether the caller has labels.

    Raises:
        WrongPreviousStage: it is so.
    """
    if given and not description.takes_previous_stage:
        msg = (
            f"the model is no cascade ({recipe_in_words(description.recipe)}) and takes no labels of a previous stage; "
            "leave them out"
        )
        raise WrongPreviousStage(msg)
    if not given and description.needs_previous_stage:
        msg = (
            f"the model is the second stage of a cascade ({recipe_in_words(description.recipe)}): give the labels of "
            "the first stage too, or serve an archive that was made with --previous-stage"
        )
        raise WrongPreviousStage(msg)


def checked_labels(labels: Any, image: Array) -> Array:
    """Labels as nnU-Net's ``read_seg`` gives them, on the image's grid.

    Args:
        labels: (1, Z, Y, X), an array or a tensor.
        image: (C, Z, Y, X).

    Returns:
        The same array.

    Raises:
        WrongPreviousStage: it has another shape.
    """
    if hasattr(labels, "detach"):
        labels = labels.detach().cpu().numpy()  # a tensor; PyTorch is loaded already
    expected = (1, *image.shape[1:])
    if not isinstance(labels, np.ndarray) or labels.shape != expected:
        shape = f"of shape {labels.shape}" if isinstance(labels, np.ndarray) else f"a {type(labels).__name__}"
        msg = (
            f"labels of a previous stage are an array (1, Z, Y, X) on the image's grid, here {expected}; "
            f"this is {shape}"
        )
        raise WrongPreviousStage(msg)
    return labels
