"""Faults that a test orders: what cannot be provoked from outside, such as a case that kills the engine.

``NNUNET_TORCHSERVE_FAULTS`` holds a JSON list of :class:`Fault`, :class:`Hold`, :class:`LoadFails` and
:class:`StandIn`. The launcher refuses to start with the variable set unless it is told that this is a test, and a
worker refuses to load.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..environment import FAULTS_VARIABLE

_POLL_S = 0.01
"""While a pass is held; well below what a pass takes."""


class Kind(StrEnum):
    """What happens."""

    KILL = "kill"
    DEVICE_LOST = "device_lost"
    RAISE = "raise"
    OUT_OF_MEMORY = "out_of_memory"
    NAN = "nan"
    SPOIL = "spoil"
    HANG = "hang"


class Fault(BaseModel):
    """What goes wrong in a forward pass that a case of a certain size takes part in.

    Attributes:
        kind: see :class:`Kind`.
        shape: (C, z, y, x) of the case on the network's grid, before padding.
        times: how often in an engine's life; ``None`` is always.
        device: only in this device's engines, such as ``cpu:1``.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    shape: tuple[int, int, int, int]
    times: int | None = None
    device: str | None = None


class Hold(BaseModel):
    """Each pass that a case of a certain size takes part in waits first, so that the case is met in the middle.

    Attributes:
        shape: as of a :class:`Fault`.
        pass_s: for so long, and a case that is held goes on slowly.
        while_exists: and only while there is this file; ``None`` is always.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["hold"] = "hold"
    shape: tuple[int, int, int, int]
    pass_s: float
    while_exists: Path | None = None

    def wait(self) -> None:
        """Wait as ordered."""
        end = time.monotonic() + self.pass_s
        while (self.while_exists is None or self.while_exists.exists()) and time.monotonic() < end:
            time.sleep(_POLL_S)


class LoadFails(BaseModel):
    """An engine that follows one that died does not load.

    Attributes:
        device: only this device's.
        while_exists: only while there is this file; ``None`` is always.
        dies: without a word; else it says why.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["load_fails"] = "load_fails"
    device: str | None = None
    while_exists: Path | None = None
    dies: bool = False


class StandIn(BaseModel):
    """The CPU stands in for GPUs: number 0 of TorchServe's is ``cpu:0``, and so on.

    Attributes:
        devices: as many of them.
        busy_limit_s: in place of the CPU's own, :func:`~.switchboard.busy_limit_s`.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["stand_in"] = "stand_in"
    devices: int
    busy_limit_s: float | None = None


Entry = Fault | Hold | LoadFails | StandIn


def _entries(environ: Mapping[str, str]) -> list[Entry]:
    return TypeAdapter(list[Entry]).validate_json(environ.get(FAULTS_VARIABLE) or "[]")


def stand_in_device(number: int, environ: Mapping[str, str] = os.environ) -> torch.device | None:
    """What stands in for a GPU, if anything does."""
    stands_in = any(isinstance(entry, StandIn) and number < entry.devices for entry in _entries(environ))
    return torch.device("cpu", number) if stands_in else None


class Faults:
    """The faults of one engine's life."""

    def __init__(self, faults: Sequence[Entry]) -> None:
        self._left = [(fault, fault.times) for fault in faults if isinstance(fault, Fault)]
        self._holds = [hold for hold in faults if isinstance(hold, Hold)]
        self._load_fails = [fault for fault in faults if isinstance(fault, LoadFails)]
        limits = [entry.busy_limit_s for entry in faults if isinstance(entry, StandIn)]
        self.busy_limit_s = limits[0] if limits else None

    @classmethod
    def from_environment(cls, device: str, environ: Mapping[str, str] = os.environ) -> Faults:
        """What the variable orders for a device's engine; nothing where it is not set."""
        return cls(
            [each for each in _entries(environ) if isinstance(each, Hold | StandIn) or each.device in (None, device)]
        )

    def before_load(self, *, follows_a_death: bool) -> None:
        """Raise or die if the engine is not to load."""
        for fault in self._load_fails:
            if follows_a_death and (fault.while_exists is None or fault.while_exists.exists()):
                if fault.dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                msg = "ordered by a test"
                raise RuntimeError(msg)

    def before_pass(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Wait, raise, die or never return if a fault is due for one of the cases."""
        for hold in self._holds:
            if hold.shape in shapes:
                hold.wait()
        if self._due(Kind.HANG, shapes):
            threading.Event().wait()
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
