"""How volumes change hands: memory that a worker and the engine have mapped, by a descriptor that is sent.

Each is a memfd: bounded by no /dev/shm, gone with the last process that has it, and sealed against shrinking, because a
shrunk file under a reader's map is a SIGBUS. A receiver believes neither size nor shape without looking.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
from collections.abc import Sequence

import torch

from .channel import ChannelError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FROZEN = _SEALS | fcntl.F_SEAL_WRITE


def share(shape: Sequence[int], dtype: torch.dtype, name: str) -> tuple[torch.Tensor, int]:
    """A zeroed tensor in shared memory, and the descriptor to send; the tensor lives as long as it is referenced."""
    size = math.prod(shape) * dtype.itemsize
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        memory = mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)), descriptor


def freeze(descriptor: int) -> bool:
    """Seal shared memory against writing, by anybody; whether that could be done: nobody may have it mapped."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError:
        return False
    return True


def is_frozen(descriptor: int, size: int) -> bool:
    """Whether a descriptor is a memfd of exactly this size that nobody can change."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _FROZEN == _FROZEN and os.fstat(descriptor).st_size == size
    except OSError:
        return False


def attach(descriptor: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor behind a received descriptor; writing to it does not reach the sender. Closes the descriptor.

    Raises:
        ChannelError: it is no sealed memfd of exactly this size.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        actual = os.fstat(descriptor).st_size
        if min(shape) < 1 or not sealed or actual != size:
            msg = f"shared memory of {actual} bytes (sealed: {sealed}) for shape {tuple(shape)}, {size} bytes expected"
            raise ChannelError(msg)
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        msg = "the descriptor is no sealed memfd"
        raise ChannelError(msg) from error
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
