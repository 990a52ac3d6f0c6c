"""Which cases are in the running batch: written by the engine, read by the workers when it has died."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch

from .channel import ChannelError
from .shared_memory import share

FLIGHT_RECORD_CASES = 64


class FlightRecord:
    """Which cases are in the running batch, readable after the engine died.

    The first entry is how many follow; it is written last before a batch and first after it.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        """``numbers``: int64 (1 + FLIGHT_RECORD_CASES,) in shared memory."""
        self._numbers = numbers

    @classmethod
    def create(cls) -> tuple[FlightRecord, int]:
        """A new record and its descriptor."""
        numbers, descriptor = share((1 + FLIGHT_RECORD_CASES,), torch.int64, "nnunet-flight-record")
        return cls(numbers), descriptor

    @classmethod
    def map(cls, descriptor: int) -> FlightRecord:
        """The engine's record, seen from a worker. Closes the descriptor."""
        size = (1 + FLIGHT_RECORD_CASES) * torch.int64.itemsize
        try:
            if os.fstat(descriptor).st_size != size:
                msg = "the flight record has another size"
                raise ChannelError(msg)
            memory = mmap.mmap(descriptor, size)  # shared: it must show what the engine writes later
        finally:
            os.close(descriptor)
        return cls(torch.frombuffer(memory, dtype=torch.int64))

    def write(self, cases: Sequence[int]) -> None:
        """Note the cases of the batch that starts now, or none."""
        self._numbers[0] = 0
        for position, case_id in enumerate(cases[:FLIGHT_RECORD_CASES], start=1):
            self._numbers[position] = case_id
        self._numbers[0] = min(len(cases), FLIGHT_RECORD_CASES)

    def read(self) -> set[int]:
        """The cases of the running batch."""
        count = int(self._numbers[0])
        return {int(number) for number in self._numbers[1 : 1 + count]}
