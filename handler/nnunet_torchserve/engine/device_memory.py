"""The memory of the engine's device: what its networks and cases hold of it, shared with other engines by a ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import torch

from .accumulator import CaseAccumulator, Layout
from .ledger import Ledger

logger = logging.getLogger(__name__)

_DEVICE_SHARE = 0.9
"""Of a GPU's memory, for all engines on it; the rest is for the CUDA contexts."""

_CACHE_BYTES = 256 * 1024**2
"""What an idle engine may keep of a GPU for its next pass, which would wait for the driver to get it anew."""

_HOST = torch.device("cpu")


class DeviceMemory:
    """A GPU's memory, shared with other engines. A CPU's is the host's, which admission keeps."""

    def __init__(self, device: torch.device, ledger: Ledger, networks: int) -> None:
        self._device, self._ledger, self._networks = device, ledger, networks
        self._cases: dict[int, int] = {}
        self._cuda = device.type == "cuda"
        self.total = 0
        if self._cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.total = int(torch.cuda.get_device_properties(device).total_memory)
            self._capacity = int(self.total * _DEVICE_SHARE)
            ledger.hold(networks)

    def place(
        self, case_id: int, size: int, layout: Layout, accumulate: Callable[[Layout], CaseAccumulator]
    ) -> CaseAccumulator:
        """The accumulator of a case, on the GPU where it fits, else on the host, as stock does."""
        if not self._cuda:
            return accumulate(layout)
        self._cases[case_id] = size
        if self._ledger.try_hold(self._held(), self._capacity):
            with suppress(torch.OutOfMemoryError):
                return accumulate(layout)
            torch.cuda.empty_cache()
        self.free(case_id)
        logger.warning("case %d is summed on the host: it does not fit the device's memory now", case_id)
        return accumulate(replace(layout, device=_HOST))

    def transfers(self) -> AbstractContextManager[Any]:
        """Copies made inside do not wait for the batch that runs."""
        return torch.cuda.stream(self._stream if self._cuda else None)

    def free(self, case_id: int) -> None:
        """A case has ended, or is not on the device."""
        if self._cases.pop(case_id, None) is not None:
            self._ledger.hold(self._held())

    def hold_networks(self, size: int) -> None:
        """The networks and one forward pass take as much from now on, 0 if they were unloaded."""
        self._networks = size
        if self._cuda:
            if not size:
                torch.cuda.empty_cache()
            self._ledger.hold(self._held())

    def give_cache_back(self) -> None:
        """Free what the allocator keeps for the next pass, if it is much."""
        if self._cuda:
            reserved, allocated = (
                ask(self._device) for ask in (torch.cuda.memory_reserved, torch.cuda.memory_allocated)
            )
            if is_worth_freeing(reserved, allocated):
                torch.cuda.empty_cache()

    def _held(self) -> int:
        return self._networks + sum(self._cases.values())


def is_worth_freeing(reserved: int, allocated: int) -> bool:
    """Whether an idle engine keeps too much of its GPU: bytes that its allocator has, and that tensors use of them."""
    return reserved - allocated > _CACHE_BYTES
