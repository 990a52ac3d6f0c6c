"""A server's private temporary directory, under a path that TorchServe can use.

TorchServe puts its pid file, worker sockets and unpacked models there. The name of a socket may have 107 bytes, and the
path of a model travels in PYTHONPATH, which separates by colons. Where TMPDIR is no such path, the directory lies there
all the same, with the room that TMPDIR was chosen for, and a link in a short place of our own leads to it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ToolError

_LONGEST_SOCKET = 107
_SOCKET = "/.ts.sock.65535"
LONGEST_PATH = _LONGEST_SOCKET - len(_SOCKET)
"""Bytes of the directory's path."""

_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/user/{uid}")  # noqa: S108 (mkdtemp's own directory is made there)
_PREFIX = "nnunet-ts-"


@dataclass(frozen=True, slots=True)
class PrivateDir:
    """A new directory of ours alone.

    Attributes:
        path: as TorchServe is told.
        made: what is to be removed in the end.
    """

    path: Path
    made: tuple[Path, ...]


def make_private_dir(warn: Callable[[str], None], places: tuple[str, ...] = _SHORT_PLACES) -> PrivateDir:
    """Make it, with mode 0700.

    Args:
        warn: is told when TMPDIR cannot be used.
        places: where a short path may be had.

    Raises:
        ToolError: nowhere.
    """
    try:
        base = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    except OSError as error:
        msg = f"there is no directory for temporary files ({error.strerror}); name a writable one in TMPDIR"
        raise ToolError(msg) from error
    wanted = os.environ.get("TMPDIR")
    if wanted and os.path.realpath(wanted) != os.path.realpath(base):
        warn(f"nothing can be written to TMPDIR ({wanted}); temporary files go to {base}")
    if _usable(folder):
        return PrivateDir(folder, (folder,))
    for place in places:
        try:
            short = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place.format(uid=os.getuid())))
        except OSError:
            continue
        link = short / "tmp"
        link.symlink_to(folder)
        if _usable(link):
            return PrivateDir(link, (folder, short))
        link.unlink()
        short.rmdir()
    folder.rmdir()
    msg = (
        f"the directory for temporary files, {base}, cannot be used: worker sockets below it may have {LONGEST_PATH} "
        "bytes and no colon; name another in TMPDIR"
    )
    raise ToolError(msg)


def _usable(folder: Path) -> bool:
    try:
        path = os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(path.encode()) <= LONGEST_PATH and ":" not in path
