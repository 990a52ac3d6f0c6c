"""The images on which a backend is compared with eager, as nnU-Net names them, and somebody's labels of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_torchserve.member import Member
from nnunet_torchserve.request import RAW_BODY
from nnunet_torchserve_client.cases import case_name, files_in, placement
from nnunet_torchserve_client.errors import ClientError

from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What may be lost, in Dice, by whoever asks: see :class:`~nnunet_torchserve.accuracy.DiceLimits`."""

    mean: float
    structure: float


@dataclass(frozen=True, slots=True)
class Validation:
    """What a backend is to be compared on.

    Attributes:
        images: folders of images in nnU-Net's naming, or files of one case each.
        labels: folder with the labels of all these cases; ``None`` compares with eager's answers alone.
        tolerance: what may be lost; ``None`` takes the defaults.
    """

    images: tuple[Path, ...]
    labels: Path | None = None
    tolerance: Tolerance | None = None

    def check(self) -> None:
        """Raise :class:`UsageError` where something is not there, before anything that takes long."""
        for path in (*self.images, *([] if self.labels is None else [self.labels])):
            if not path.exists():
                msg = f"{path} does not exist; name a folder of images, or an image"
                raise UsageError(msg)


@dataclass(frozen=True, slots=True)
class ValidationCase:
    """One case.

    Attributes:
        name: nnU-Net's, of its files.
        files: one for each channel, or one that holds all.
        labels: somebody's, if they are to be compared.
    """

    name: str
    files: tuple[Path, ...]
    labels: Path | None

    def parts(self) -> dict[str, bytes]:
        """The fields of the request.

        Raises:
            UsageError: a file cannot be read.
        """
        contents = [read_bytes(file) for file in self.files]
        if len(contents) == 1:
            return {RAW_BODY: contents[0]}
        return {f"image_{number:04d}": content for number, content in enumerate(contents)}

    def digests(self) -> tuple[str, ...]:
        """The sha256 of each file.

        Raises:
            UsageError: a file cannot be read.
        """
        return tuple(hashlib.sha256(read_bytes(file)).hexdigest() for file in self.files)

    def options(self, reader: str) -> dict[str, Any]:
        """Where the images lie, if the files cannot say it.

        Raises:
            UsageError: the file beside them that says it is damaged.
        """
        try:
            return dict(placement(reader, self.files))
        except ClientError as error:
            raise UsageError(str(error)) from error


def read_bytes(file: Path) -> bytes:
    """A file's content.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror}"
        raise UsageError(msg) from error


def digests_of(cases: Sequence[ValidationCase]) -> dict[str, tuple[str, ...]]:
    """Name of each case -> sha256 of each of its files.

    Raises:
        UsageError: a file cannot be read, or two cases are of the same images: they would count twice.
    """
    names: dict[tuple[str, ...], str] = {}
    for case in cases:
        digests = case.digests()
        if digests in names:
            msg = f"the cases {names[digests]} and {case.name} are of the same image; name each image once"
            raise UsageError(msg)
        names[digests] = case.name
    return {name: digests for digests, name in names.items()}


def cases_of(asked: Validation, lead: Member) -> list[ValidationCase]:
    """All cases, those of a folder by their names.

    Args:
        asked: folders and files.
        lead: the member whose channels and files the model has.

    Raises:
        UsageError: there is none, two have one name, one lacks a channel, or one lacks its labels.
    """
    ending, channels = str(lead.dataset["file_ending"]), lead.channels
    found: dict[str, ValidationCase] = {}
    for source in asked.images:
        for name, files in _files(source, ending, channels):
            if name in found:
                msg = f"{source}: there is a case {name} already; name each image once"
                raise UsageError(msg)
            labels = None if asked.labels is None else asked.labels / f"{name}{ending}"
            if labels is not None and not labels.is_file():
                msg = f"case {name} has no labels: {labels} does not exist"
                raise UsageError(msg)
            found[name] = ValidationCase(name, files, labels)
    if not found:
        msg = "there is no image to compare answers on"
        raise UsageError(msg)
    return list(found.values())


def _files(source: Path, ending: str, channels: int) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Name and files of each case in a folder, or of the one that a file belongs to."""
    if not source.is_dir():
        yield _case_of(source, ending, channels)
        return
    try:
        cases = files_in(source, ending)
    except ClientError as error:
        raise UsageError(str(error)) from error
    if not cases:
        msg = f"{source} has no image that ends in {ending}, as the model's training images do"
        raise UsageError(msg)
    for files in cases:
        name = case_name(files, ending)
        if len(files) not in (1, channels):  # one file may hold all channels, which the server sees
            msg = f"case {name} of {source} has {len(files)} files, and the model {channels} channels"
            raise UsageError(msg)
        yield name, tuple(map(Path, files))


def _case_of(file: Path, ending: str, channels: int) -> tuple[str, tuple[Path, ...]]:
    """A file is a whole case; but one that is named as a case's first channel has the others beside it."""
    match = re.fullmatch(r"(.+)_0000" + re.escape(ending), file.name)
    if match is None:
        return file.name.removesuffix(ending), (file,)
    beside = tuple(file.with_name(f"{match[1]}_{number:04d}{ending}") for number in range(channels))
    present = [each for each in beside if each.is_file()]
    return match[1], beside if len(present) == channels else (file,)
