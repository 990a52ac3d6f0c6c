"""An archive's weights for an engine that drops its networks when it is idle, and loads them again."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import BundleError
from .member import Member
from .options import FoldName
from .stored_tensors import read_tensors

if TYPE_CHECKING:
    import torch

_HASH_CHUNK_BYTES = 1024**2


class OpenWeights:
    """The weights of an archive's members, readable while this process lives, also when the archive's folder is gone.

    The files are kept open and not mapped: that takes no memory, and whoever deletes them only takes their names away
    (the disk has the space again when this process ends). What is read is a copy that nobody else can change, and its
    checksum is that of the archive: a file that was cut or overwritten in its place is an error, where a map of it
    would end the process or, worse, change weights in use. Not thread-safe: one thread reads.
    """

    def __init__(self, members: Iterable[Member], checksums: Mapping[str, str], others: Iterable[str] = ()) -> None:
        """Open every fold's file.

        Args:
            members: of one archive.
            checksums: file of the archive -> sha256.
            others: further files, by their names in the archive.

        Raises:
            BundleError: one cannot be opened.
        """
        self._weights: dict[tuple[str, FoldName], str] = {}
        self._files: dict[str, tuple[int, str]] = {}
        folder = None
        for member in members:
            folder = member.archive
            for fold in member.description.folds:
                name = f"{member.description.folder}/{fold.weights_file}"
                self._weights[member.name, fold.fold] = name
                self._open(folder, name, checksums)
        for name in others:
            if folder is not None:
                self._open(folder, name, checksums)

    def _open(self, folder: Path, name: str, checksums: Mapping[str, str]) -> None:
        try:
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            msg = f"{name} cannot be opened"
            raise BundleError(msg) from error
        self._files[name] = (descriptor, checksums[name])

    def read(self, member: str, fold: FoldName) -> dict[str, torch.Tensor]:
        """As :meth:`.member.Member.weights`; while the result is in use it takes as much memory as the file is long.

        Raises:
            BundleError: the file is no longer what the archive held.
            MemoryError: there is no memory for it.
            OSError: it cannot be read.
        """
        name = self._weights[member, fold]
        with os.fdopen(os.memfd_create("nnunet-weights", os.MFD_CLOEXEC), "wb") as copy:
            self._copy(name, copy)
            copy.flush()
            try:
                return read_tensors(Path(f"/proc/self/fd/{copy.fileno()}"))
            except BundleError as error:  # the checksum says that nothing is wrong with it
                msg = f"no memory to read {name}"
                raise MemoryError(msg) from error

    def content(self, file: str) -> bytes:
        """One of the further files; raises what :meth:`read` raises."""
        copy = io.BytesIO()
        self._copy(file, copy)
        return copy.getvalue()

    def _copy(self, name: str, target: BinaryIO) -> None:
        """Copy a file, and compare what was copied with the archive's checksum."""
        descriptor, expected = self._files[name]
        digest, position = hashlib.sha256(), 0
        while chunk := os.pread(descriptor, _HASH_CHUNK_BYTES, position):
            digest.update(chunk)
            target.write(chunk)
            position += len(chunk)
        if digest.hexdigest() != expected:
            msg = f"{name} has changed since this process started"
            raise BundleError(msg)
