"""What a request can take over from another one: its preprocessed volume, or its whole answer.

Both are off unless the archive says otherwise, because they tell one caller that another has sent the same image. The
engine holds what is taken over (:mod:`.engine.cache`, :mod:`.engine.flights`) under the keys that are made here; its
own identity has the model's digest. A key is the sha256 of everything that the result depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from .backend import Backend
from .codecs.inflate import Body, Payload
from .engine.prediction import Keep, KeptVolume, Keys
from .options import Options
from .preprocess import PreprocessedCase
from .recipe import Recipe, is_second_stage, members_of

_DECIDES_NOTHING = frozenset({"timeout_s", "stream", "describe"})
_DECIDES_NO_LABELS = _DECIDES_NOTHING | {
    *("output_format", "seg_type", "export", "postprocess", "properties"),
    *("save_probabilities", "probability_channels", "probability_dtype", "probability_format"),
    "priority",  # it is in an answer's key: what interactive cases wait for shall not be a batch case
}
_DECIDES_NO_VOLUME = _DECIDES_NO_LABELS | {*("folds", "use_mirroring", "tile_step_size", "use_gaussian", "accumulate")}
"""Options; one that is not named here is in the key. A stage that sees the labels of another depends on those too."""


def keys_of(
    images: Sequence[Body],
    options: Options,
    recipe: Recipe | None,
    *,
    answers: bool,
    previous: Payload | None = None,
) -> Keys:
    """The keys of a request.

    Args:
        images: the bodies, in channel order.
        options: of the request.
        recipe: whose members' preprocessed volumes are kept; ``None`` keeps none.
        answers: whether equal requests share one answer.
        previous: the labels of a cascade's first stage, if they came.
    """
    if recipe is None and not answers:
        return Keys()
    content = hashlib.sha256()
    for image in images:
        content.update(len(image).to_bytes(8, "big"))
        for file in image:
            content.update(len(file).to_bytes(8, "big"))
            content.update(file)
    with_previous = content.copy()
    if previous is not None:
        with_previous.update(b"previous stage")  # not to be taken for one more image
        with_previous.update(previous)

    def volume_key(member: str, *, is_second: bool) -> str:
        key = (with_previous if is_second else content).copy()
        excluded = _DECIDES_NO_LABELS if is_second and previous is None else _DECIDES_NO_VOLUME
        key.update(f"{member} {options.model_dump_json(exclude=set(excluded))}".encode())
        return key.hexdigest()

    members = {} if recipe is None else {name: is_second_stage(recipe, name) for name in members_of(recipe)}
    answer = with_previous.copy()
    answer.update(options.model_dump_json(exclude=set(_DECIDES_NOTHING)).encode())
    return Keys(
        {name: volume_key(name, is_second=is_second) for name, is_second in members.items()},
        answer.hexdigest() if answers else None,
    )


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _VolumeNote(_Note):
    """What the export needs of a case beside its logits: ``DefaultPreprocessor``'s properties, by its names.

    And the key under which it is kept: whoever gets another one's by mistake must notice. ``backends`` ran what the
    volume depends on: a first stage's networks.
    """

    spacing: tuple[float, ...]
    shape_before_cropping: tuple[int, ...]
    bbox_used_for_cropping: tuple[tuple[int, int], ...]
    shape_after_cropping_and_before_resampling: tuple[int, ...]
    constant: bool
    key: str
    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class KeptCase:
    """A case whose volume was kept.

    Attributes:
        case: as it was preprocessed.
        constant: every voxel of the image has one value.
        backends: what ran the networks that the volume depends on.
    """

    case: PreprocessedCase
    constant: bool
    backends: frozenset[Backend]


def keep_of(
    case: PreprocessedCase, key: str | None, *, constant: bool, backends: Collection[Backend] = ()
) -> Keep | None:
    """How a case's volume is kept; ``None`` if it is not to be kept.

    Nor is it if a preprocessor of the model's own has more to say of a case than we know.

    Args:
        case: the case.
        key: of its volume, if it is to be kept.
        constant: every voxel of the image has one value.
        backends: what has run networks for this case so far.
    """
    ours = {"constant": constant, "key": key, "backends": sorted(backends)}
    if key is None or set(case.properties) | set(ours) != set(_VolumeNote.model_fields):
        return None
    try:
        note = _VolumeNote.model_validate_json(json.dumps(case.properties | ours, default=_plain))
    except (TypeError, ValueError):  # properties of other kinds than nnU-Net's
        return None
    return Keep(key, note.model_dump_json())


def recalled(kept: KeptVolume | None, key: str) -> KeptCase | None:
    """The case of a kept volume; ``None`` if there is none.

    Raises:
        RuntimeError: the volume is another key's.
    """
    if kept is None:
        return None
    note = _VolumeNote.model_validate_json(kept.note)
    if note.key != key:
        msg = "the engine gave another request's volume"
        raise RuntimeError(msg)
    properties = note.model_dump(exclude={"constant", "key", "backends"})
    return KeptCase(PreprocessedCase(kept.data, properties), note.constant, frozenset(note.backends))


class AnswerNote(_Note):
    """What belongs to the body of an answer.

    Attributes:
        content_type: of the body.
        warnings: see :class:`~.responses.Warnings`.
        backends: what ran the networks.
    """

    content_type: str
    warnings: tuple[str, ...]
    backends: tuple[Backend, ...]


def answer_note(content_type: str, warnings: Sequence[str], backends: Collection[Backend]) -> str:
    """What belongs to the body of an answer."""
    note = AnswerNote(content_type=content_type, warnings=tuple(warnings), backends=tuple(sorted(backends)))
    return note.model_dump_json()


def read_answer_note(note: str) -> AnswerNote:
    """What :func:`answer_note` wrote."""
    return AnswerNote.model_validate_json(note)


def _plain(number: Any) -> Any:
    """NumPy's numbers, and arrays of them, as Python's."""
    if not isinstance(number, np.ndarray | np.generic):
        msg = f"no {type(number).__name__} can be noted"
        raise TypeError(msg)
    return number.tolist()
