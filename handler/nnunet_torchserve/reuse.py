"""What a request can take over from another one: its preprocessed volume, or its whole answer.

Both are off unless the archive says otherwise, because they tell one caller that another has sent the same image. The
engine holds what is taken over (:mod:`.engine.cache`, :mod:`.engine.flights`) under the keys that are made here; its
own identity has the model's digest. A key is the sha256 of everything that the result depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from .codecs.inflate import Payload
from .engine.prediction import KeptVolume, Keys
from .options import Options
from .preprocess import PreprocessedCase

_DECIDES_NOTHING = frozenset({"timeout_s", "stream", "describe"})
_DECIDES_NO_VOLUME = _DECIDES_NOTHING | {
    *("folds", "use_mirroring", "tile_step_size", "use_gaussian", "accumulate", "export", "output_format"),
    "postprocess",
    *("save_probabilities", "probability_channels", "probability_dtype", "probability_format", "properties"),
    "priority",  # it is in an answer's key: what interactive cases wait for shall not be a batch case
}
"""Options; one that is not named here is in the key."""


def keys_of(
    images: Sequence[Payload], options: Options, *, volumes: bool, answers: bool, previous: Payload | None = None
) -> Keys:
    """The keys of a request.

    Args:
        images: the bodies, in channel order.
        options: of the request.
        volumes: whether preprocessed volumes are kept.
        answers: whether equal requests share one answer.
        previous: the labels of a cascade's first stage, if they came.
    """
    if not volumes and not answers:
        return Keys()
    content = hashlib.sha256()
    for image in images:
        content.update(len(image).to_bytes(8, "big"))
        content.update(image)
    if previous is not None:
        content.update(b"previous stage")  # not to be taken for one more image
        content.update(previous)
    volume = content.copy()
    volume.update(options.model_dump_json(exclude=set(_DECIDES_NO_VOLUME)).encode())
    answer = content.copy()
    answer.update(options.model_dump_json(exclude=set(_DECIDES_NOTHING)).encode())
    return Keys(volume.hexdigest() if volumes else None, answer.hexdigest() if answers else None)


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _VolumeNote(_Note):
    """What the export needs of a case beside its logits: ``DefaultPreprocessor``'s properties, by its names.

    And the key under which it is kept: whoever gets another one's by mistake must notice.
    """

    spacing: tuple[float, ...]
    shape_before_cropping: tuple[int, ...]
    bbox_used_for_cropping: tuple[tuple[int, int], ...]
    shape_after_cropping_and_before_resampling: tuple[int, ...]
    constant: bool
    key: str


def note_of(case: PreprocessedCase, keys: Keys, *, constant: bool) -> str | None:
    """What is kept with a case's volume; ``None`` if it is not to be kept.

    Nor is it if a preprocessor of the model's own has more to say of a case than we know.

    Args:
        case: the case.
        keys: of its request.
        constant: every voxel of the image has one value.
    """
    ours = {"constant": constant, "key": keys.volume}
    if keys.volume is None or set(case.properties) | set(ours) != set(_VolumeNote.model_fields):
        return None
    return _VolumeNote.model_validate_json(json.dumps(case.properties | ours, default=_plain)).model_dump_json()


def recall(kept: KeptVolume | None, keys: Keys) -> tuple[PreprocessedCase, bool] | None:
    """The case of a kept volume, and whether its image is constant; ``None`` if there is none.

    Raises:
        RuntimeError: the volume is another request's.
    """
    if kept is None:
        return None
    note = _VolumeNote.model_validate_json(kept.note)
    if note.key != keys.volume:
        msg = "the engine gave another request's volume"
        raise RuntimeError(msg)
    return PreprocessedCase(kept.data, note.model_dump(exclude={"constant", "key"})), note.constant


class _AnswerNote(_Note):
    content_type: str
    warnings: tuple[str, ...]


def answer_note(content_type: str, warnings: Sequence[str]) -> str:
    """What belongs to the body of an answer."""
    return _AnswerNote(content_type=content_type, warnings=tuple(warnings)).model_dump_json()


def read_answer_note(note: str) -> tuple[str, Sequence[str]]:
    """Content type and warnings."""
    answer = _AnswerNote.model_validate_json(note)
    return answer.content_type, answer.warnings


def _plain(number: Any) -> Any:
    """NumPy's numbers as Python's."""
    return number.item()
