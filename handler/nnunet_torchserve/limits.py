"""What one worker accepts: the numbers, their defaults, and where they come from.

``nnunet-torchserve serve`` computes byte limits from the machine's memory and hands them to its workers in the
environment; the archive's model-config.yaml may set all of them; the defaults are for a bare TorchServe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LIMITS_VARIABLE = "NNUNET_TORCHSERVE_LIMITS"
"""JSON object with any of the attributes of :class:`Limits`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one request.

    Attributes:
        body_bytes: all image parts of a request together, as sent.
        response_bytes: the body of an answer.
        expanded_bytes: one image part after decompression.
        voxels: voxels of one channel, as sent.
        grid_voxels: voxels of one channel on the network's grid: a header that claims a huge spacing asks for a
            huge grid with few bytes.
        passes: forward passes (patches x folds x mirrorings) of one request.
        cases: requests that this machine works on at once; they share its memory.
    """

    body_bytes: int = 512 * 1024**2
    response_bytes: int = 512 * 1024**2
    expanded_bytes: int = 4 * 1024**3
    voxels: int = 1_000_000_000
    grid_voxels: int = 1_000_000_000
    passes: int = 200_000
    cases: int = 1

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Limits:
        """The archive's ``limits`` settings, no larger than what ``serve`` hands over in the environment.

        Raises:
            TypeError: a name that is no limit.
        """
        limits = {name: int(value) for name, value in settings.items()}
        for name, value in json.loads(environ.get(LIMITS_VARIABLE, "{}")).items():
            larger_wins = name == "cases"
            limits[name] = (max if larger_wins else min)(int(value), limits.get(name, int(value)))
        return cls(**limits)

    @property
    def memory_bytes(self) -> int:
        """Bytes that one case may need at its peak when as many as allowed are worked on."""
        return int(total_memory_bytes() * _SHARE_FOR_CASES / self.cases)


_SHARE_FOR_CASES = 0.4
"""Of the machine's memory: the JVM may take half (a quarter each of heap and direct memory); the rest is for the
workers' code and the networks."""


def total_memory_bytes() -> int:
    """Bytes of memory of this machine or, if smaller, of its control group (a container's limit)."""
    total = int(psutil.virtual_memory().total)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total
