"""What this process may use of its machine: processors and memory; and what kind of processor that is.

A container sees all processors and all memory of its host; what it may use stands in its control groups (version 1 or
2, also those of its parents), in its processor affinity, and in ``OMP_NUM_THREADS`` where somebody has set it. Nobody
else in the project asks the machine.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

import psutil

MOST_THREADS = 16
"""Threads of one process: each holds scratch memory, and resampling waits for the memory long before it has as many."""

THREADS_VARIABLE = "OMP_NUM_THREADS"

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_PROCESSORS = Path("/proc/cpuinfo")


@cache
def usable_threads() -> int:
    """Threads that pricing, export, preprocessing, networks and BLAS of this process may have, from 1."""
    return count_threads(os.environ)


def torch_threads() -> int:
    """Threads that torch has in this thread, but no more than this process may have."""
    import torch  # the command line does without

    return min(torch.get_num_threads(), usable_threads())


def count_threads(environ: Mapping[str, str], quota: float | None = None) -> int:
    """As many threads as processors that may be used, at most :data:`MOST_THREADS`.

    Args:
        environ: may hold ``OMP_NUM_THREADS``: a number, or a list of which the first one counts.
        quota: processors that control groups allow; ``None`` asks for them.
    """
    allowed = cpu_quota() if quota is None else quota
    bounds = [MOST_THREADS, len(os.sched_getaffinity(0)), math.inf if math.isinf(allowed) else math.ceil(allowed)]
    with suppress(ValueError):
        bounds.append(int(environ.get(THREADS_VARIABLE, "").split(",")[0]))
    return max(1, int(min(bound for bound in bounds if bound > 0)))


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = _PROCESSORS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def processor_flags() -> frozenset[str]:
    """What the processor's instructions are called by Linux; empty where it does not say."""
    try:
        lines = _PROCESSORS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    listed = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, []))


def memory_bytes() -> int:
    """Bytes of memory of this machine or, if smaller, of the control groups that this process is in."""
    limits = (_number(text) for text in _read_all("memory", "memory.max", "memory.limit_in_bytes"))
    return int(min([float(psutil.virtual_memory().total), *limits]))


def cpu_quota(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> float:
    """Processors that the control groups of this process may use, in fractions; infinite without a quota.

    Args:
        membership: this process's groups, as cgroups(7) has it.
        mount: where the hierarchies are mounted.
    """
    quotas = [math.inf]
    for text in _read_all(
        "cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", membership=membership, mount=mount
    ):
        quota, _, period = text.partition(" ")
        if (limit := _number(quota)) > 0 and (length := _number(period)) > 0:
            quotas.append(limit / length)
    return min(quotas)


def _read_all(
    controller: str, second: str, *first: str, membership: Path = _MEMBERSHIP, mount: Path = _MOUNT
) -> Iterator[str]:
    """A controller's files in every group that this process is in, and in that group's parents.

    Args:
        controller: its name in version 1.
        second: the file of version 2.
        first: the files of version 1; what they hold is joined by spaces.
        membership: see :func:`cpu_quota`.
        mount: see :func:`cpu_quota`.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not path:
            continue
        if not names:
            mounts, files = [mount, mount / "unified"], [second]
        elif controller in names.split(","):
            mounts, files = [mount / names, mount / controller], list(first)
        else:
            continue
        group = PurePosixPath(path)
        # in a container the path may be the host's, whose folders are not there; the mount itself always is
        for folder in {where / str(each).lstrip("/") for where in mounts for each in (group, *group.parents)}:
            with suppress(OSError):
                yield " ".join((folder / file).read_text().strip() for file in files)


def _number(text: str) -> float:
    """What a file of a control group says: a number, or ``max``."""
    try:
        return float(text)
    except ValueError:
        return math.inf
