"""The networks of one model on one device: one for each member and fold; and what a device bears of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch

from ..backend import FROM_WEIGHTS, Backend, why_not
from ..bundle import ModelBundle, check_requirements
from ..errors import BundleError
from ..options import FoldName
from .backends.compile_cache import compile_cache
from .backends.compiled_networks import CompiledNetworks
from .backends.eager import EagerNetworks
from .backends.interface import FoldNetworks, Weights
from .backends.openvino_networks import OpenVinoNetworks

_BATCHES = (1, 2, 4, 8, 16)
_BATCH_MEMORY_SHARE = 0.5
_NEARLY = 0.97
_PROBE_WARMUPS, _PROBE_RUNS = 3, 5
_CPU_PROBE_RUNS = 3
"""The fastest of them counts: the first ones may warm up, others may use the processor."""


class Networks:
    """Those of all members. Not thread-safe: one thread runs them.

    Attributes:
        backend: what runs them.
        device: where they are.
        members: name -> networks.
        batch: patches in a forward pass, of a backend that is bound to one number; else ``None``.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device,
        backend: Backend = Backend.EAGER,
        batch: int | Literal["auto"] = 1,
    ) -> None:
        """Build and load them.

        Args:
            bundle: the model.
            device: where they are to be.
            backend: what runs them.
            batch: patches in a forward pass, of a backend that must know; ``auto``: what is best for eager.

        Raises:
            BundleError: weights do not fit the network that the plans describe; or archive, device or machine have not
                what the backend needs.
        """
        self.backend = backend
        if backend is not Backend.EAGER:
            _check_backend(bundle, device, backend)
        self.members: dict[str, FoldNetworks]
        self.batch: int | None = None
        if backend in FROM_WEIGHTS:
            eager = {name: EagerNetworks(member, device) for name, member in bundle.members.items()}
            self.members = dict(eager)
            if backend is Backend.COMPILED:
                self.batch = _least_batch(eager.values()) if batch == "auto" else batch
                self.members = _compiled(eager, self.batch, bundle.digest)
        else:
            self.batch = size = 1 if batch == "auto" else batch
            self.members = {name: OpenVinoNetworks(each, backend, size) for name, each in bundle.members.items()}
        [self.device] = {networks.device for networks in self.members.values()}

    def of(self, member: str) -> FoldNetworks:
        """Those of one member."""
        return self.members[member]

    @property
    def loaded(self) -> bool:
        """Whether they have their weights; without them no pass may be made."""
        return all(networks.loaded for networks in self.members.values())

    def unload(self) -> None:
        """Give the weights' memory up."""
        for networks in self.members.values():
            networks.unload()

    @property
    def files(self) -> tuple[str, ...]:
        """See :attr:`FoldNetworks.files`."""
        return tuple(file for networks in self.members.values() for file in networks.files)

    @property
    def precisions(self) -> Mapping[str, int]:
        """See :attr:`FoldNetworks.precisions`, of all members."""
        return sum((Counter(networks.precisions) for networks in self.members.values()), Counter())

    def load(self, weights: Weights) -> None:
        """Load the weights again; if that fails, none is loaded.

        Args:
            weights: those of the archive.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError or a MemoryError says so.
        """
        try:
            for networks in self.members.values():
                networks.load(weights)
        except BaseException:
            self.unload()
            raise

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """Every network."""
        return [module for networks in self.members.values() for module in networks.modules]


def _compiled(eager: Mapping[str, EagerNetworks], batch: int, digest: str) -> dict[str, FoldNetworks]:
    """The members' networks, compiled for a size of a batch."""
    [device] = {networks.device for networks in eager.values()}
    cache = compile_cache(digest, device)
    return {name: CompiledNetworks(networks, batch, cache) for name, networks in eager.items()}


def _check_backend(bundle: ModelBundle, device: torch.device, backend: Backend) -> None:
    """Raise :class:`BundleError` unless the archive holds what the backend needs, and the packages are there."""
    stored = bundle.description.backend
    if (reason := why_not(backend, stored, device.type)) is not None:
        msg = f"backend {backend}: {reason}"
        raise BundleError(msg)
    if stored is not None and stored.backend is backend:
        check_requirements(stored.requires, f"the backend {backend}")


def probe_batch(networks: Networks) -> int:
    """How many patches a forward pass should take: what is best for the member that bears the least."""
    return networks.batch or _least_batch(networks.members.values())


def _least_batch(members: Iterable[FoldNetworks]) -> int:
    return min(_best_batch(each) for each in members)


@torch.inference_mode()
def _best_batch(networks: FoldNetworks) -> int:
    """How many patches a forward pass of a member should take: 1 on a CPU, where that is bit-equal to stock.

    On CUDA the smallest batch that is nearly as fast a patch as the fastest, among those whose memory leaves room
    for the cases.
    """
    device = networks.device
    if device.type != "cuda":
        return 1
    rates: dict[int, float] = {}
    room = torch.cuda.mem_get_info(device)[0] * _BATCH_MEMORY_SHARE
    for batch in _BATCHES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = _forward_seconds(networks, batch)
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_reserved(device) > room:
            break
        rates[batch] = batch / seconds
    torch.cuda.empty_cache()
    fastest = max(rates.values(), default=0.0)
    return next((batch for batch, rate in rates.items() if rate >= _NEARLY * fastest), 1)


@torch.inference_mode()
def peak_bytes(networks: Networks, batch: int) -> int:
    """Bytes of a GPU that all networks and one forward pass of a batch take; 0 on a CPU.

    Raises:
        torch.OutOfMemoryError: the batch does not fit the device.
    """
    if networks.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(networks.device)
    for each in networks.members.values():
        patches = torch.zeros((batch, each.input_channels, *each.patch_size), device=networks.device)
        each.forward(each.folds[0], patches)
    torch.cuda.synchronize(networks.device)
    return int(torch.cuda.max_memory_reserved(networks.device))


def device_name(device: torch.device) -> str:
    """A name that two servers have in common for one GPU, whatever number it has for them."""
    if device.type != "cuda":
        return str(device)
    return f"cuda-{getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"


@torch.inference_mode()
def seconds_per_patch(networks: Networks, batch: int) -> float:
    """Seconds of a patch in batches of a size, summed over the members."""
    return sum(_forward_seconds(each, batch) for each in networks.members.values()) / batch


def _forward_seconds(networks: FoldNetworks, batch: int) -> float:
    patches = torch.randn((batch, networks.input_channels, *networks.patch_size), device=networks.device)
    fold = networks.folds[0]
    if networks.device.type != "cuda":
        return min(_seconds_of(networks, fold, patches) for _ in range(_CPU_PROBE_RUNS))
    for _ in range(_PROBE_WARMUPS):
        networks.forward(fold, patches)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(_PROBE_RUNS):
        networks.forward(fold, patches)
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000 / _PROBE_RUNS


def _seconds_of(networks: FoldNetworks, fold: FoldName, patches: torch.Tensor) -> float:
    began = time.perf_counter()
    networks.forward(fold, patches)
    return time.perf_counter() - began
