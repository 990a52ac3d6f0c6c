"""The reference backend: nnU-Net's own modules, run by PyTorch as stock runs them: on a CPU to the bit.

Each fold has a module of its own. nnU-Net keeps one module and loads each fold's weights into it for every case,
which costs time and makes concurrent requests impossible.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from ...backend import Backend
from ...errors import BundleError
from ...member import Member
from ...member_description import NetworkBuilder
from ...options import FoldName
from ...own_code import Kind
from .interface import Weights


class EagerNetworks:
    """The network of every fold of a member, in evaluation mode on one device; a :class:`~.interface.FoldNetworks`.

    Its weights can be given up and loaded again. What the archive does not hold (the modules themselves, and buffers
    that no state dict has) stays, so that nothing but the archive's weights is needed.
    """

    def __init__(self, member: Member, device: torch.device) -> None:
        """Build and load all folds.

        Raises:
            BundleError: the weights do not fit the network that the plans describe.
        """
        self.backend = Backend.EAGER
        self._member = member.name
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

    def load(self, weights: Weights) -> None:
        """Load the weights again, in the memory layout that they had; if that fails, none is loaded.

        Args:
            weights: have the state dict of a fold, as the networks had it.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError says so.
        """
        try:
            for tensor, layout in self._given_up:
                tensor.data = torch.empty_like(layout, device=self.device)
            for fold, network in self._networks.items():
                network.load_state_dict(weights.read(self._member, fold))
        except BaseException:
            self._empty()
            raise
        self._given_up = []

    def _empty(self) -> None:
        for tensor, _ in self._given_up:
            tensor.data = tensor.new_empty(0)

    @property
    def files(self) -> tuple[str, ...]:
        """None: it reads weights."""
        return ()

    @property
    def precisions(self) -> Mapping[str, int]:
        """Nothing: what runs is what PyTorch was told to run."""
        return {}

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """The folds' networks."""
        return self._networks.values()

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that are loaded."""
        return tuple(self._networks)

    def forward(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of patches, float32 (float16 on CUDA); see :meth:`~.interface.FoldNetworks.forward`."""
        with self.autocast():
            logits: torch.Tensor = self._networks[fold](patches)
        return logits

    def autocast(self) -> AbstractContextManager[Any]:
        """float16 autocast on CUDA, nothing elsewhere, as ``predict_sliding_window_return_logits`` does."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()


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
