"""Where ``torch.compile`` keeps what it makes for a machine: it takes a minute, and no engine is to do it again.

It is in the runtime directory: one folder for each archive, device and library, shared by all engines and left where it
is when they end. PyTorch would take ``/tmp``, and Triton the home directory. What is in there is run, so the folder is
its user's alone.

An archive that is gone, and a library that was replaced, leave a folder that nobody asks for again. So whoever asks for
one removes those that were not asked for in a month, and the oldest ones if there are too many. One that networks hold
stays: the engine that follows theirs, should it die, is to find it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from ...environment import runtime_dir
from ...errors import BundleError
from ...machine import processor_name
from ..folder import private

FOLDER = "compiled"
"""Of the runtime directory."""

_LOCK = "lock"
"""Held by the process that compiles; its time says when the folder was asked for last."""

_IN_USE = "in_use"
"""Held by all whose networks are loaded."""

_LONGEST_WAIT_S = 150.0
"""For another process that compiles: an engine has 300 s to be ready, and eager must load in the rest."""

_POLL_S = 0.2

_UNUSED_S = 30 * 86400.0
"""A folder that nobody has asked for in so long is removed."""

_MOST_FOLDERS = 32
"""Those that were asked for last are kept: more archives than a machine compiles for."""

_LIBRARIES = ("torch", "triton")
_PLACES = {"TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": "triton"}
"""Variables that PyTorch and Triton read, and what they get of the folder."""


def compile_cache(digest: str, device: torch.device) -> Path:
    """The folder of an archive on a kind of device; it is made, and those that nobody uses any more are removed.

    Args:
        digest: of the archive.
        device: where its networks are.

    Raises:
        BundleError: it cannot be written to, or is not this user's alone.
    """
    what = "\n".join([digest, _kind(device), *(f"{name}={_version(name)}" for name in _LIBRARIES)])
    try:
        folder = private(private(private(runtime_dir()) / FOLDER) / hashlib.sha256(what.encode()).hexdigest()[:16])
        (folder / _LOCK).touch(mode=0o600)
    except OSError as error:
        msg = f"what torch.compile makes cannot be kept in {runtime_dir() / FOLDER}: {error.strerror}"
        raise BundleError(msg) from error
    with suppress(OSError):  # others may be removing them
        _remove_unused(folder)
    return folder


def hold(folder: Path) -> int:
    """Keep the folder from being removed.

    Returns:
        A descriptor: to be closed when the folder is not needed any more; the end of the process closes it too.

    Raises:
        OSError: there is none, or it cannot be written to.
    """
    held = _opened(folder / _IN_USE)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
    except BaseException:
        os.close(held)
        raise
    return held


def _remove_unused(used: Path) -> None:
    """Remove the folders beside one that is used which nobody has asked for in a long time, and the oldest of many."""
    others = [each for each in used.parent.iterdir() if each != used and each.is_dir() and not each.is_symlink()]
    last_used = {each: _last_used(each) for each in others}
    latest_first = sorted(last_used, key=lambda each: -last_used[each])
    for place, folder in enumerate(latest_first, start=1):
        if place >= _MOST_FOLDERS or time.time() - last_used[folder] > _UNUSED_S:
            _remove(folder, last_used[folder])


def _last_used(folder: Path) -> float:
    """When somebody asked for it last, in seconds since the epoch."""
    lock = folder / _LOCK
    return (lock if lock.exists() else folder).stat().st_mtime


def _remove(folder: Path, last_used: float) -> None:
    """Unless somebody compiles, has it in use, or has asked for it meanwhile."""
    with ExitStack() as opened, suppress(BlockingIOError):
        if _last_used(folder) != last_used:
            return
        for name in (_LOCK, _IN_USE):
            descriptor = _opened(folder / name)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _opened(file: Path) -> int:
    """A file to be locked; it is made."""
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """Compile in here, into the folder: one process at a time, so that the next one finds it done.

    This process compiles into that folder from now on. Headers are not precompiled: PyTorch would take them from a
    folder in ``/tmp`` that anybody may have made. Where compiling fails, nothing of it is kept: the disk may be full.

    Raises:
        BundleError: another process compiles for too long.
        OSError: the folder's lock cannot be taken.
    """
    lock = _opened(private(folder) / _LOCK)  # where many start at once, one that is not compiled into yet may be gone
    try:
        _wait_for(lock)
        os.environ.update({name: str(folder / part) for name, part in _PLACES.items()})

        import torch._inductor.config as inductor
        from torch._inductor.async_compile import shutdown_compile_workers

        try:
            with inductor.patch(cpp_cache_precompile_headers=False):
                yield
        except Exception:
            _empty(folder)
            raise
        finally:
            with suppress(Exception):  # processes that compiled for us, and would stay
                shutdown_compile_workers()
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                msg = f"another process has been compiling for more than {_LONGEST_WAIT_S:.0f} s"
                raise BundleError(msg) from error
            time.sleep(_POLL_S)
        else:
            return


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name not in (_LOCK, _IN_USE):
            each.unlink(missing_ok=True)


def _kind(device: torch.device) -> str:
    """What code is made for: all GPUs of a kind are the same."""
    if device.type != "cuda":
        return f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}"
    of_device = torch.cuda.get_device_properties(device)
    return f"{of_device.name} {of_device.major}.{of_device.minor}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
