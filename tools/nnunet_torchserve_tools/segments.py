"""``nnunet-torchserve segments`` and ``archive --segments``: what a model's structures are, in codes.

Only names that say exactly what a concept of the standard is called get a proposal, with or without a side; whoever
knows the model reads it before it goes into an archive. The concepts are those that DICOM lists for segments (PS3.16,
CID 7191 to 7194, 7197 and 7198), as pydicom carries them: no table of our own could be as right.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_torchserve.extras import how_to_install
from nnunet_torchserve.segments import Code, Codes, SegmentCodes, read_segments

from .errors import ToolError, UsageError

_DATASET = "dataset.json"
_CONTEXTS = {
    7192: "AnatomicalStructure",
    7191: "Tissue",
    7194: "MorphologicallyAbnormalStructure",
    7193: "PhysicalObject",
    7197: "BodySubstance",
    7198: "Substance",
}
"""Context group -> the category (CID 7150) of its concepts."""

_SIDES = {"left": "Left", "right": "Right"}
_SAME_WORDS = {
    "vertebrae": "vertebra",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "grey": "gray",
    "haemorrhage": "hemorrhage",
    "oedema": "edema",
    "oesophagus": "esophagus",
}
"""Other forms and spellings of words in the concepts."""

_SAYS_NOTHING = frozenset({"of", "the", "structure"})
_IGNORE = "ignore"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])[0-9]*|[0-9]+")


@dataclass(frozen=True, slots=True)
class Proposal:
    """What is known of a model's structures.

    Attributes:
        codes: name -> its codes.
        unknown: names of which nothing is known.
        source: where the codes come from.
    """

    codes: Codes
    unknown: Sequence[str]
    source: str

    def as_json(self) -> str:
        """A ``segments.json`` of what is known."""
        known = {name: codes.model_dump(mode="json", exclude_none=True) for name, codes in self.codes.items()}
        return json.dumps(known, indent=2, ensure_ascii=False)

    def lines(self) -> Iterator[str]:
        """For whoever reads it over."""
        for name, codes in self.codes.items():
            side = f", {codes.laterality.meaning}" if codes.laterality else ""
            code = f"{codes.type.scheme} {codes.type.value}"
            yield f"{name}: {codes.type.meaning}{side} ({code}), {codes.category.meaning}"
        for name in self.unknown:
            yield f"{name}: not known; write it into the file if you know a code of it"
        yield f"source: {self.source}. Read it over: a name may mean something else in this model"


def propose(model: Path) -> Proposal:
    """Codes for the names in a model's dataset.json that are those of concepts.

    Args:
        model: its folder, or that file.

    Raises:
        UsageError: there is none.
        ToolError: it has no labels, or pydicom is not installed.
    """
    concepts, category_of, sides = _concepts()
    names = structure_names(model)
    found: dict[str, SegmentCodes] = {}
    for name in names:
        words = _words(name)
        side = next((word for word in words if word in _SIDES), None)
        bare = [word for word in words if word != side]
        for key, laterality in ((_key(words), None), (_key(bare), side)):
            if (concept := concepts.get(key)) is not None:
                found[name] = SegmentCodes(
                    category=category_of[key],
                    type=concept,
                    laterality=None if laterality is None else sides[laterality],
                )
                break
    source = f"DICOM PS3.16, CID 7191 to 7194, 7197 and 7198, as in pydicom {importlib.metadata.version('pydicom')}"
    return Proposal(found, [name for name in names if name not in found], source)


def structure_names(model: Path) -> list[str]:
    """The structures in a model's dataset.json, without background.

    Raises:
        UsageError: there is no such file.
        ToolError: it has no labels.
    """
    file = model / _DATASET if model.is_dir() else model
    try:
        return structures_of(json.loads(file.read_bytes()))
    except OSError as error:
        msg = f"{file.name} cannot be read: {error.strerror}; name a trained model's folder, or its dataset.json"
        raise UsageError(msg) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        msg = f"{file.name} is no nnU-Net dataset.json: it has no labels"
        raise ToolError(msg) from error


def structures_of(dataset: Mapping[str, Any]) -> list[str]:
    """The names of a dataset.json's labels, without background."""
    return [str(name) for name, value in dataset["labels"].items() if name != _IGNORE and value not in (0, [0])]


def checked_segments(file: Path, structures: Sequence[str]) -> tuple[bytes, list[str]]:
    """A file for ``archive --segments``, as the archive keeps it, and the structures that it leaves out.

    Args:
        file: JSON, name -> codes.
        structures: of the model.

    Raises:
        UsageError: there is none, or it is none, or names what the model has not.
    """
    try:
        codes = read_segments(file.read_bytes())
    except OSError as error:
        msg = f"--segments {file}: {error.strerror}"
        raise UsageError(msg) from error
    except ValueError as error:
        msg = f"--segments {file}: {error}"
        raise UsageError(msg) from error
    if unknown := [name for name in codes if name not in structures]:
        msg = f"--segments {file}: {unknown[0]!r} is no structure of the model; it has {', '.join(structures)}"
        raise UsageError(msg)
    kept = {name: codes[name].model_dump(mode="json", exclude_none=True) for name in structures if name in codes}
    content = json.dumps(kept, indent=1, ensure_ascii=True).encode("ascii")
    return content, [name for name in structures if name not in codes]


_Key = tuple[str, ...]


def _concepts() -> tuple[Mapping[_Key, Code], Mapping[_Key, Code], Mapping[str, Code]]:
    """Words -> the one concept that they are, and its category; side -> its code."""
    try:
        from pydicom.sr.codedict import codes
    except ModuleNotFoundError as error:
        msg = f"this command needs nnunet-torchserve[dicom]: {how_to_install('dicom')}"
        raise ToolError(msg) from error
    found: dict[_Key, Code | None] = {}
    categories: dict[_Key, Code] = {}
    for context, category in _CONTEXTS.items():
        for concept in getattr(codes, f"cid{context}").concepts.values():
            code, key = _code(concept), _key(_words(concept.meaning))
            before = found.setdefault(key, code)
            if before is None or before.value != code.value:
                found[key] = None  # two concepts of one name: nobody knows which
            categories.setdefault(key, _code(getattr(codes.cid7150, category)))
    known = {key: code for key, code in found.items() if code is not None}
    return known, categories, {side: _code(getattr(codes.cid244, name)) for side, name in _SIDES.items()}


def _code(concept: Any) -> Code:
    return Code(value=concept.value, scheme=concept.scheme_designator, meaning=concept.meaning)


def _words(name: str) -> list[str]:
    """``kidney_right``, ``rightKidney`` and ``Right Kidney`` are the same two words."""
    words = [word.lower() for word in _WORD.findall(name)]
    return [_SAME_WORDS.get(word, word) for word in words if word not in _SAYS_NOTHING]


def _key(words: Sequence[str]) -> _Key:
    return tuple(sorted(words))
