"""``nnunet-torchserve orientation``: in which orientation training images are stored, and whether all in the same.

Why: nnU-Net predicts an array as it is stored, so a model knows bodies only as its training images lay. A DICOM series
lies otherwise; it can be turned to where they lay if the archive says so (``archive --input-orientation``).
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib

from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.errors import BadSpacing, RequestError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.volume import RAS_TO_LPS

from .errors import UsageError

_READERS = ("SimpleITKIO", "NibabelIO")
"""The two kinds of nnU-Net's readers of volumes: what they make of one NIfTI may differ."""

_WORDS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Found:
    """What an image is.

    Attributes:
        name: of its file.
        letters: nibabel's letters, what x, y and z run towards; ``None`` if it has no orientation.
        remark: why it has none, or why it is not sure.
    """

    name: str
    letters: str | None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """What several images are.

    Attributes:
        images: each of them.
    """

    images: Sequence[Found]

    @property
    def counts(self) -> dict[str, int]:
        """Orientation -> images that have it, the most common first."""
        return dict(Counter(each.letters for each in self.images if each.letters is not None).most_common())

    @property
    def without(self) -> list[Found]:
        """Images that have none, or an unsure one."""
        return [each for each in self.images if each.letters is None]

    @property
    def agreed(self) -> str | None:
        """The orientation that all images have; ``None`` if there is no such."""
        return next(iter(self.counts)) if len(self.counts) == 1 and not self.without else None

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        images = [{"image": each.name, "orientation": each.letters, "remark": each.remark} for each in self.images]
        return {"agreed": self.agreed, "orientations": self.counts, "images": images}

    def lines(self) -> Iterator[str]:
        """For people."""
        for letters, count in self.counts.items():
            named = [each.name for each in self.images if each.letters == letters]
            names = ", ".join(named[:_MOST_NAMED]) + (", …" if count > _MOST_NAMED else "")
            yield f"{letters}  {count} image{'' if count == 1 else 's'}" + (
                f": {names}" if len(self.counts) > 1 else f": {in_words(letters)}"
            )
        for each in self.without:
            yield f"-    {each.name}: {each.remark}"
        if self.agreed is not None:
            yield f"record it with: nnunet-torchserve archive MODEL_FOLDER --input-orientation {self.agreed}"


def survey(paths: Sequence[Path]) -> Survey:
    """Read images' headers.

    Args:
        paths: files, or folders of them as imagesTr is.

    Raises:
        UsageError: there is none.
    """
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.is_file() or file in paths]
    if not files:
        msg = "there are no images; name training images, or the folder imagesTr"
        raise UsageError(msg)
    return Survey([look_at(file) for file in files])


def look_at(file: Path) -> Found:
    """One image's orientation, as each kind of reader has it."""
    try:
        with file.open("rb") as opened:
            content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        both = [_letters(content, reader) for reader in _READERS]
    except BadSpacing:
        return Found(file.name, None, "says nothing of how it lies")
    except RequestError as error:
        return Found(file.name, None, str(error))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        return Found(file.name, None, error.strerror or "cannot be read" if isinstance(error, OSError) else "is empty")
    if both[0] != both[1]:
        return Found(file.name, None, f"{both[0]} for SimpleITK, {both[1]} for nibabel: its sform and qform disagree")
    return Found(file.name, both[0], "" if both[0] else "is a 2-D image, which has no orientation in the patient")


def in_words(letters: str) -> str:
    """``RAS`` -> where each axis runs."""
    towards = zip("xyz", letters, strict=True)
    return ", ".join(f"{axis} runs to {_WORDS[letter]}" for axis, letter in towards)


def _letters(content: memoryview, reader: str) -> str | None:
    geometry = open_image(content, Limits(), reader).geometry
    if geometry.is_flat or geometry.assumed:
        return None
    return "".join(nib.aff2axcodes(RAS_TO_LPS @ geometry.affine))
