"""An engine's own directory: how it is found, and how its life shows. Imports nothing slow."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from ..errors import BundleError

SOCKET, LOG = "engine.sock", "engine.log"
LOCK = "lock"
"""Held by the worker that starts an engine."""

ALIVE = "alive"
"""Held by an engine for as long as it lives; the kernel frees it however the engine dies."""

WORKERS = "workers"
"""How many an engine has, for the one that takes its place when it dies."""

_BACKLOG = 128
_WORKERS_BYTES = 8
_MAX_LOG_BYTES = 4 * 1024**2


def private(folder: Path) -> Path:
    """Make a directory that is ours alone.

    Raises:
        BundleError: it exists and belongs to somebody else, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
        msg = f"the runtime directory {folder} must belong to user {os.getuid()} and be writable by nobody else"
        raise BundleError(msg)
    return folder


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, which it takes over from a dead engine."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with suppress(FileNotFoundError):
        path.unlink()
    # a path may have 107 bytes: go through the directory's descriptor
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def bound_log() -> None:
    """Start the log over when it is too long."""
    with suppress(OSError):
        if os.fstat(2).st_size > _MAX_LOG_BYTES:
            os.ftruncate(2, 0)


def note_workers(folder: Path, count: int) -> None:
    """Say how many workers an engine has.

    Raises:
        OSError: it cannot be written.
    """
    file = os.open(folder / WORKERS, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(file, f"{count:<{_WORKERS_BYTES}}".encode(), 0)  # in place: it is never seen empty
    finally:
        os.close(file)


def workers_of(folder: Path) -> int:
    """How many workers an engine has or, killed, had; one that left by itself had none."""
    try:
        return int((folder / WORKERS).read_text())
    except (OSError, ValueError):
        return 0


def take_life_lock(folder: Path) -> int | None:
    """Hold ``alive`` until this process ends.

    Returns:
        The file's inode, ``None`` if another engine holds it (a reader's look lasts microseconds).
    """
    alive = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(20):
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(alive, 0)
            os.pwrite(alive, str(os.getpid()).encode(), 0)
            return os.fstat(alive).st_ino
        except BlockingIOError:
            time.sleep(0.01)
    os.close(alive)
    return None


def still_ours(folder: Path, life: int) -> bool:
    """Whether the file that shows our life is still in its place: another engine may start without it."""
    try:
        return (folder / ALIVE).stat().st_ino == life
    except OSError:
        return False


def is_alive(folder: Path) -> bool:
    """Whether an engine holds the lock of its life in this directory."""
    try:
        alive = os.open(folder / ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(alive)
    return False


def living(folder: Path) -> int | None:
    """The process id of the engine that holds the lock of its life in this directory; ``None`` if none does."""
    try:
        return int((folder / ALIVE).read_text()) if is_alive(folder) else None
    except (OSError, ValueError):
        return None


def kill_engine(folder: Path) -> None:
    """Kill the engine that holds the lock of its life in this directory, whether it still answers or not."""
    with suppress(OSError, ValueError):
        process = os.pidfd_open(int((folder / ALIVE).read_text()))
        try:
            if is_alive(folder) and _names(folder, process):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _names(folder: Path, process: int) -> bool:
    """Whether ``alive`` names the process of a pidfd now that the lock is known to be held."""
    information = Path(f"/proc/self/fdinfo/{process}").read_text()
    return f"Pid:\t{int((folder / ALIVE).read_text())}\n" in information
