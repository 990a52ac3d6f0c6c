"""Faults that a test orders: what cannot be provoked from outside, such as a case that kills the engine.

``NNUNET_TORCHSERVE_FAULTS`` holds a JSON list of :class:`Fault`. The launcher refuses to start with the variable set
unless it is told that this is a test, and a worker refuses to load.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..environment import FAULTS_VARIABLE


class Kind(StrEnum):
    """What happens."""

    KILL = "kill"
    DEVICE_LOST = "device_lost"
    RAISE = "raise"
    OUT_OF_MEMORY = "out_of_memory"
    NAN = "nan"
    SPOIL = "spoil"


class Fault(BaseModel):
    """What goes wrong in a forward pass that a case of a certain size takes part in.

    Attributes:
        kind: see :class:`Kind`.
        shape: (C, z, y, x) of the case on the network's grid, before padding.
        times: how often in an engine's life; ``None`` is always.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    shape: tuple[int, int, int, int]
    times: int | None = None


class Faults:
    """The faults of one engine's life."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._left = [(fault, fault.times) for fault in faults]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Faults:
        """What the variable orders; nothing where it is not set."""
        return cls(TypeAdapter(list[Fault]).validate_json(environ.get(FAULTS_VARIABLE) or "[]"))

    def before_pass(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise or die if a fault is due for one of the cases."""
        if self._due(Kind.KILL, shapes):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._due(Kind.OUT_OF_MEMORY, shapes):
            msg = "ordered by a test"
            raise torch.OutOfMemoryError(msg)
        if self._due(Kind.DEVICE_LOST, shapes):
            msg = "CUDA error: ordered by a test"
            raise RuntimeError(msg)
        if self._due(Kind.RAISE, shapes):
            msg = "ordered by a test"
            raise RuntimeError(msg)

    def after_pass(self, shape: tuple[int, ...], logits: torch.Tensor) -> None:
        """Spoil the logits of a case."""
        if self._due(Kind.NAN, [shape]):
            logits.fill_(torch.nan)

    def spoil(self, shapes: Sequence[tuple[int, ...]], modules: Iterable[torch.nn.Module]) -> None:
        """Overwrite the weights, as a broken memory would."""
        if self._due(Kind.SPOIL, shapes):
            for module in modules:
                for parameter in module.parameters():
                    parameter.fill_(1.0)

    def _due(self, kind: Kind, shapes: Sequence[tuple[int, ...]]) -> bool:
        for number, (fault, left) in enumerate(self._left):
            if fault.kind is kind and fault.shape in shapes and left != 0:
                self._left[number] = (fault, None if left is None else left - 1)
                return True
        return False
