"""Where soft targets lie: a teacher's probabilities for each preprocessed case of a dataset, on that case's grid.

They lie in a folder of their own within that of the cases, ``DATASET/DATA_IDENTIFIER/soft_targets``, in nnU-Net's own
array format, of which a patch is read without the rest. All plans that share preprocessed cases share them, and
``nnUNetv2_preprocess`` removes them with the cases that they belong to. A file is written aside and then renamed, so
that one that is there is whole. ``teacher.json`` says whose they are: a folder never holds those of two teachers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import blosc2
import numpy as np
import numpy.typing as npt
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

FOLDER, RECORD = "soft_targets", "teacher.json"

_SCHEMA = 2
_ENDING = ".b2nd"
_DTYPE = np.dtype(np.float16)

_MAPPED: Mapping[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}
"""As stock opens its cases: Windows does not get on with mapped ones (MIC-DKFZ/nnUNet#2723)."""

Json = dict[str, Any]


class SoftTargetError(RuntimeError):
    """Soft targets that are missing, or that do not belong to what they are wanted for."""


@dataclass(frozen=True, slots=True)
class Channel:
    """What a probability is of.

    Attributes:
        name: of dataset.json.
        labels: a label, or those of a region.
    """

    name: str
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Teacher:
    """Whose probabilities they are.

    Attributes:
        name: of the model, for people: one that was renamed is the same.
        digest: of its weights and plans; another digest is another teacher.
        folds: whose mean it is.
        use_mirroring: whether it is the mean over mirrored patches too.
        has_regions: whether each channel is a probability of its own; else all of a voxel's add up to 1.
        channels: in order.
        reader: nnU-Net's image reader, by which it reads images; empty if it does not name one.
    """

    name: str = field(compare=False)
    digest: str
    folds: tuple[int | str, ...]
    use_mirroring: bool
    has_regions: bool
    channels: tuple[Channel, ...]
    reader: str

    def as_json(self) -> Json:
        """What the file holds."""
        return {
            "schema": _SCHEMA,
            "name": self.name,
            "digest": self.digest,
            "folds": list(self.folds),
            "use_mirroring": self.use_mirroring,
            "has_regions": self.has_regions,
            "channels": [{"name": each.name, "labels": list(each.labels)} for each in self.channels],
            "image_reader_writer": self.reader,
        }

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """What such a file says.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        if document["schema"] != _SCHEMA:
            msg = f"schema {document['schema']}, not {_SCHEMA}"
            raise ValueError(msg)
        channels = tuple(Channel(str(each["name"]), tuple(map(int, each["labels"]))) for each in document["channels"])
        return cls(
            str(document["name"]), str(document["digest"]), tuple(document["folds"]),
            bool(document["use_mirroring"]), bool(document["has_regions"]), channels,
            str(document["image_reader_writer"]),
        )  # fmt: skip

    def __str__(self) -> str:
        folds = ", ".join(map(str, self.folds))
        mirrored = "mirrored" if self.use_mirroring else "not mirrored"
        return f"{self.name} (folds {folds}, {mirrored}, {self.digest[:19]}…)"


def channels_of(label_manager: Any) -> tuple[Channel, ...]:
    """The channels of a network's output.

    Args:
        label_manager: nnU-Net's, of a dataset.
    """
    names = {_labels(value): name for name, value in label_manager.label_dict.items() if name != "ignore"}
    outputs = label_manager.foreground_regions if label_manager.has_regions else label_manager.all_labels
    return tuple(Channel(names.get(_labels(each), ""), _labels(each)) for each in outputs)


def _labels(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(each) for each in np.atleast_1d(np.asarray(value)))


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Those of one folder of preprocessed cases.

    Attributes:
        folder: where they lie.
    """

    folder: Path

    @classmethod
    def beside(cls, cases: Path) -> Self:
        """Those of the cases in this folder."""
        return cls(cases / FOLDER)

    def teacher(self) -> Teacher | None:
        """Whose they are; ``None`` if there are none.

        Raises:
            SoftTargetError: the file that says it is damaged.
        """
        file = self.folder / RECORD
        try:
            return Teacher.of_json(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{file} does not say whose soft targets these are ({error}): remove the folder, and make them anew"
            raise SoftTargetError(msg) from error

    def begin(self, teacher: Teacher) -> None:
        """From here on, what is saved is this teacher's.

        A record without soft targets is replaced: its teacher failed at the first case.

        Raises:
            SoftTargetError: there are another one's already.
        """
        there, is_empty = self.teacher(), not self._has_any()
        if there == teacher:
            return
        if there is not None and not is_empty:
            msg = f"{self.folder} holds what {there} gives, not what {teacher} gives: remove it to change the teacher"
            raise SoftTargetError(msg)
        if not is_empty:
            msg = f"{self.folder} has no {RECORD}, so nobody knows whose soft targets these are: remove it"
            raise SoftTargetError(msg)
        self.folder.mkdir(exist_ok=True)
        aside = self.folder / f".{RECORD}"
        aside.write_text(json.dumps(teacher.as_json(), indent=4), encoding="utf-8")
        aside.replace(self.folder / RECORD)

    def save(self, case: str, probabilities: npt.NDArray[np.float16], patch_size: Sequence[int]) -> None:
        """Write those of a case, (C, Z, Y, X).

        Args:
            case: its name.
            probabilities: between 0 and 1.
            patch_size: how much of it is read at a time, as nnU-Net's plans have it.
        """
        blocks, chunks = comp_blosc2_params(probabilities.shape, tuple(patch_size), probabilities.itemsize)
        aside = self.folder / f".{case}"
        content = np.ascontiguousarray(probabilities)
        nnUNetDatasetBlosc2.save_seg(content, str(aside), chunks_seg=chunks, blocks_seg=blocks)
        aside.with_name(f"{aside.name}{_ENDING}").replace(self._file(case))

    def load(self, case: str) -> blosc2.NDArray:
        """Those of a case, (C, Z, Y, X), float16, of which only what is indexed is read."""
        return blosc2.open(urlpath=str(self._file(case)), mode="r", dparams={"nthreads": 1}, **_MAPPED)

    def has(self, case: str, shape: Sequence[int]) -> bool:
        """Whether those of a case are there.

        Args:
            case: its name.
            shape: (C, Z, Y, X) that they must have.

        Raises:
            SoftTargetError: they are of another shape, or no such file.
        """
        if not self._file(case).is_file():
            return False
        try:
            found = self.load(case)
        except (RuntimeError, ValueError, OSError) as error:
            msg = f"{self._file(case)} cannot be read: remove it, and make it anew"
            raise SoftTargetError(msg) from error
        if tuple(found.shape) != tuple(shape) or found.dtype != _DTYPE:
            msg = (
                f"{self._file(case)} holds {found.dtype} of shape {tuple(found.shape)}; the preprocessed case needs "
                f"{_DTYPE} of {tuple(shape)}: remove {self.folder}, and make it anew"
            )
            raise SoftTargetError(msg)
        return True

    def _has_any(self) -> bool:
        """Whether a case's are there; what begins with a dot was not written to its end."""
        return any(not file.name.startswith(".") for file in self.folder.glob(f"*{_ENDING}"))

    def _file(self, case: str) -> Path:
        return self.folder / f"{case}{_ENDING}"
