"""The networks of one model on one device: one for each member and fold.

Each fold has a module of its own. nnU-Net keeps one module and loads each fold's weights into it for every case,
which costs time and makes concurrent requests impossible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from ..bundle import ModelBundle
from ..errors import BundleError
from ..member import Member, NetworkBuilder
from ..options import FoldName
from ..own_code import Kind

_BATCHES = (1, 2, 4, 8, 16)
_BATCH_MEMORY_SHARE = 0.5
_NEARLY = 0.97
_PROBE_WARMUPS, _PROBE_RUNS = 3, 5


class FoldNetworks:
    """The network of every fold of a member, in evaluation mode on one device. Not thread-safe: one thread runs it.

    Its weights can be given up and loaded again. What the archive does not hold (the modules themselves, and buffers
    that no state dict has) stays, so that nothing but the archive's weights is needed.
    """

    def __init__(self, member: Member, device: torch.device) -> None:
        """Build and load all folds.

        Raises:
            BundleError: the weights do not fit the network that the plans describe.
        """
        self.device = device if device.type != "cpu" else torch.device("cpu")  # there is one, whatever its number
        self.patch_size = member.patch_size
        self.classes = member.classes
        self.input_channels = int(determine_num_input_channels(member.plans, member.configuration, member.dataset))
        self._networks: dict[FoldName, torch.nn.Module] = {}
        for fold in member.folds:
            network = build_network(member, self.input_channels, self.classes)
            try:
                network.load_state_dict(member.weights(fold))
            except RuntimeError as error:
                msg = f"the weights of {member.name}, fold {fold}, do not fit the network that plans.json describes"
                raise BundleError(msg) from error
            self._networks[fold] = network.to(device).eval().requires_grad_(False)
        self._given_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def loaded(self) -> bool:
        """Whether the networks have their weights; without them no pass may be made."""
        return not self._given_up

    def unload(self) -> None:
        """Give the weights' memory up."""
        if not self.loaded:
            return
        stored = {id(each): each for network in self.modules for each in network.state_dict(keep_vars=True).values()}
        self._given_up = [(tensor, torch.empty_like(tensor, device="meta")) for tensor in stored.values()]
        self._empty()

    def load(self, weights: Callable[[FoldName], Mapping[str, torch.Tensor]]) -> None:
        """Load the weights again, in the memory layout that they had; if that fails, none is loaded.

        Args:
            weights: the state dict of a fold, as the networks had it.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError says so.
        """
        try:
            for tensor, layout in self._given_up:
                tensor.data = torch.empty_like(layout, device=self.device)
            for fold, network in self._networks.items():
                network.load_state_dict(weights(fold))
        except BaseException:
            self._empty()
            raise
        self._given_up = []

    def _empty(self) -> None:
        for tensor, _ in self._given_up:
            tensor.data = tensor.new_empty(0)

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """The folds' networks."""
        return self._networks.values()

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that are loaded."""
        return tuple(self._networks)

    def autocast(self) -> AbstractContextManager[Any]:
        """float16 autocast on CUDA, nothing elsewhere, as ``predict_sliding_window_return_logits`` does."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def forward(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of patches.

        Args:
            fold: whose network.
            patches: (B, C, *patch) on the device.

        Returns:
            (B, classes, *patch), float32 (float16 under autocast).
        """
        logits: torch.Tensor = self._networks[fold](patches)
        return logits


class Networks:
    """Those of all members. Not thread-safe: one thread runs them.

    Attributes:
        device: where they are.
        members: name -> networks.
    """

    def __init__(self, bundle: ModelBundle, device: torch.device) -> None:
        """Build and load them.

        Raises:
            BundleError: weights do not fit the network that the plans describe.
        """
        self.members = {name: FoldNetworks(member, device) for name, member in bundle.members.items()}
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

    def load(self, weights: Callable[[str, FoldName], Mapping[str, torch.Tensor]]) -> None:
        """Load the weights again; if that fails, none is loaded.

        Args:
            weights: the state dict of a member's fold, as the networks had it.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError says so.
        """
        try:
            for name, networks in self.members.items():
                networks.load(partial(weights, name))
        except BaseException:
            self.unload()
            raise

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """Every network."""
        return [module for networks in self.members.values() for module in networks.modules]

    def autocast(self) -> AbstractContextManager[Any]:
        """See :meth:`FoldNetworks.autocast`."""
        return next(iter(self.members.values())).autocast()


def probe_batch(networks: Networks) -> int:
    """How many patches a forward pass should take: what is best for the member that bears the least."""
    return min(_best_batch(each) for each in networks.members.values())


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
        with networks.autocast():
            each.forward(each.folds[0], patches)
    torch.cuda.synchronize(networks.device)
    return int(torch.cuda.max_memory_reserved(networks.device))


def device_name(device: torch.device) -> str:
    """A name that two servers have in common for one GPU, whatever number it has for them."""
    if device.type != "cuda":
        return str(device)
    return f"cuda-{getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"


def _forward_seconds(networks: FoldNetworks, batch: int) -> float:
    patches = torch.randn((batch, networks.input_channels, *networks.patch_size), device=networks.device)
    fold = networks.folds[0]
    with networks.autocast():
        for _ in range(_PROBE_WARMUPS):
            networks.forward(fold, patches)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        for _ in range(_PROBE_RUNS):
            networks.forward(fold, patches)
        ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000 / _PROBE_RUNS


def build_network(member: Member, input_channels: int, classes: int) -> torch.nn.Module:
    """The untrained network that the model's trainer makes of plans.json, without deep supervision."""
    configuration = member.configuration
    from_plans = (
        # it may have moved since
        member.names.located(member.description.network_class or configuration.network_arch_class_name),
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
    )
    if member.description.network_builder is NetworkBuilder.TRAINER:
        trainer = member.names.needed(Kind.TRAINER, member.description.network_trainer or member.description.trainer)
        build = trainer.build_network_architecture
        # nnU-Net before 2.6 had the plans' parts as arguments; trainers written for it are still called so
        takes_plans = "plans_manager" in inspect.signature(build).parameters
        arguments = (member.plans, configuration) if takes_plans else from_plans
        network = build(*arguments, input_channels, classes, enable_deep_supervision=False)
    else:
        network = get_network_from_plans(*from_plans, input_channels, classes, allow_init=False, deep_supervision=False)
    module: torch.nn.Module = network
    return module
