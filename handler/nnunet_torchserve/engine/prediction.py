"""What an engine is to its callers, wherever the networks live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..backend import Backend
from ..cases import Price, Settings
from ..options import Priority


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the engine gives for one case.

    Attributes:
        logits: float16 (float32 if the settings sum so) (classes, z, y, x) on the network's grid, on the CPU.
        queue_s: seconds before the case's first forward pass.
        network_s: seconds from there to its last.
        backend: what ran the networks.
    """

    logits: torch.Tensor
    queue_s: float
    network_s: float
    backend: Backend


@dataclass(frozen=True, slots=True)
class Keys:
    """What a case may have in common with others.

    Attributes:
        volumes: of each member whose preprocessed volumes may be kept: equal where those are.
        answer: equal where the answers are; ``None`` neither waits for another case's nor gives its own away.
    """

    volumes: Mapping[str, str] = field(default_factory=dict)
    answer: str | None = None


NO_KEYS = Keys()


@dataclass(frozen=True, slots=True)
class Keep:
    """That a preprocessed volume is to be kept for later cases: under which key, and with what note."""

    key: str
    note: str


@dataclass(frozen=True, slots=True)
class KeptVolume:
    """A preprocessed volume that an earlier case left: float32 (C, z, y, x), and the note that came with it."""

    data: torch.Tensor
    note: str


@dataclass(frozen=True, slots=True)
class SharedAnswer:
    """The answer of an equal case that was computed meanwhile, and the note that came with it."""

    body: bytes
    note: str


@dataclass(slots=True)
class Reservation:
    """What a case got.

    Attributes:
        waited_s: seconds that it took.
        answer: spares everything; nothing is held then.
        amend: says what the case takes, where that was a guess; waits until it is charged so. Raises what
            :meth:`Engine.reserve` raises, and :class:`~.errors.Busy` if it waits for cases that wait themselves.
        recall: gives the volume that was kept under a key, which spares decoding and preprocessing, if it is there.
        share: takes the answer and a note, for equal cases that wait for it.
    """

    waited_s: float
    answer: SharedAnswer | None = None
    amend: Callable[[Price], None] = lambda _price: None
    recall: Callable[[str], KeptVolume | None] = lambda _key: None
    share: Callable[[bytes, str], None] = lambda _body, _note: None


class Watcher(Protocol):
    """Who wants to know how a case gets on. Called by the thread that waits for the engine, between its waits."""

    def queued(self, ahead: int) -> None:
        """The case waits for memory, and so many others before it."""

    def passes(self, done: int) -> None:
        """So many forward passes of the case are done; from 0 again if an engine died."""


class Engine(Protocol):
    """Patches in, logits out; wherever the networks live."""

    @property
    def backend(self) -> Backend | None:
        """What runs the networks now; ``None`` while there is no engine. Any thread may ask."""

    def reserve(
        self,
        price: Price,
        deadline: float | None,
        *,
        guaranteed: bool = False,
        watcher: Watcher | None = None,
        answer_key: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> AbstractContextManager[Reservation]:
        """Hold what one case takes, from before it is decoded until its answer is written.

        Args:
            price: what it takes.
            deadline: ``time.monotonic()`` after which the case is given up.
            guaranteed: do not wait, whatever others hold.
            watcher: told while the case waits.
            answer_key: of :class:`Keys`.
            priority: whether somebody waits for it.

        Returns:
            A context in which the case may be worked on; entering it waits.

        Raises:
            Busy: as many cases as allowed wait already, or a batch case would take the last free worker.
            Deadline: the time ran out.
            OutOfMemory: it would not fit even alone.
            NoEngine: there is no engine, and none could be started.
        """

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None,
        watcher: Watcher | None = None,
        keep: Keep | None = None,
        passes_after: int = 0,
    ) -> Prediction:
        """Predict one preprocessed case; within a reservation, once for each member.

        Args:
            data: float32 (C, z, y, x) on the network's grid.
            settings: folds, mirroring, tiling.
            deadline: ``time.monotonic()`` after which the case is given up.
            watcher: told now and then how many passes are done.
            keep: the volume for later cases.
            passes_after: forward passes that the case needs for other members afterwards.

        Raises:
            Deadline: the time ran out; nothing of the case is kept.
            CaseFailed: the logits are not finite, or the network failed on this case.
            OutOfMemory: the device cannot hold this case.
            NoEngine: the engine died again and again, or none could be started.
        """
