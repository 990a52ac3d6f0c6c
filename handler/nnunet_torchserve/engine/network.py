"""The fold networks of one model on one device.

Each fold has a module of its own. nnU-Net keeps one module and loads each fold's weights into it for every case,
which costs time and makes concurrent requests impossible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from ..bundle import GOLDEN_FILE, ModelBundle, NetworkBuilder, read_tensors
from ..errors import BundleError
from ..machine import torch_threads
from ..options import FoldName
from ..tiling import STOCK_THREADS

GOLDEN_SCALE = 1 / 32
"""The golden patch is stored as int8; the network sees it multiplied by this."""

GOLDEN_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
"""Largest difference of a golden logit, as a fraction of the largest golden logit. CPU kernels differ between
processors in the last bits; CUDA runs under float16 autocast, as stock does."""

_BATCHES = (1, 2, 4, 8, 16)
_BATCH_MEMORY_SHARE = 0.5
_NEARLY = 0.97
_PROBE_WARMUPS, _PROBE_RUNS = 3, 5

_GOLDEN_SEED = 20261122
_GOLDEN_SAMPLES = 4096


class FoldNetworks:
    """Every fold's network, in evaluation mode on one device. Not thread-safe: one thread runs it.

    Its weights can be given up and loaded again. What the archive does not hold (the modules themselves, and buffers
    that no state dict has) stays, so that nothing but the archive's weights is needed.
    """

    def __init__(self, bundle: ModelBundle, device: torch.device) -> None:
        """Build and load all folds.

        Raises:
            BundleError: the weights do not fit the network that the plans describe.
        """
        self.device = device if device.type != "cpu" else torch.device("cpu")  # there is one, whatever its number
        self.patch_size = bundle.patch_size
        self.classes = bundle.classes
        self.input_channels = int(determine_num_input_channels(bundle.plans, bundle.configuration, bundle.dataset))
        self._networks: dict[FoldName, torch.nn.Module] = {}
        for fold in bundle.folds:
            network = build_network(bundle, self.input_channels, self.classes)
            try:
                network.load_state_dict(bundle.weights(fold))
            except RuntimeError as error:
                msg = f"the weights of fold {fold} do not fit the network that plans.json describes"
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


def load_networks(bundle: ModelBundle, device: torch.device) -> FoldNetworks:
    """The networks of a bundle on a device, checked against the golden patch.

    Raises:
        BundleError: the weights do not fit, or the golden patch gives other logits.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(min(STOCK_THREADS, torch_threads()))
    networks = FoldNetworks(bundle, device)
    check_golden(networks, read_golden(bundle))
    return networks


@torch.inference_mode()
def probe_batch(networks: FoldNetworks) -> int:
    """How many patches a forward pass should take: 1 on a CPU, where that is bit-equal to stock.

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
def peak_bytes(networks: FoldNetworks, batch: int) -> int:
    """Bytes of a GPU that the networks and one forward pass of a batch take; 0 on a CPU.

    Raises:
        torch.OutOfMemoryError: the batch does not fit the device.
    """
    if networks.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(networks.device)
    patches = torch.zeros((batch, networks.input_channels, *networks.patch_size), device=networks.device)
    with networks.autocast():
        networks.forward(networks.folds[0], patches)
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


def build_network(bundle: ModelBundle, input_channels: int, classes: int) -> torch.nn.Module:
    """The untrained network that the model's trainer makes of plans.json, without deep supervision."""
    configuration = bundle.configuration
    from_plans = (
        bundle.description.network_class or configuration.network_arch_class_name,  # it may have moved since
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
    )
    if bundle.description.network_builder is NetworkBuilder.TRAINER:
        trainer = recursive_find_trainer_class_by_name(bundle.description.network_trainer)
        build = trainer.build_network_architecture
        # nnU-Net before 2.6 had the plans' parts as arguments; trainers written for it are still called so
        takes_plans = "plans_manager" in inspect.signature(build).parameters
        arguments = (bundle.plans, configuration) if takes_plans else from_plans
        network = build(*arguments, input_channels, classes, enable_deep_supervision=False)
    else:
        network = get_network_from_plans(*from_plans, input_channels, classes, allow_init=False, deep_supervision=False)
    module: torch.nn.Module = network
    return module


def golden_tensors(networks: FoldNetworks, folds: tuple[FoldName, ...]) -> dict[str, torch.Tensor]:
    """A patch and the logits that the weights give for it, to be stored with them.

    It is noise of the size of normalised images, whatever the model's own images are like: what a network makes of it
    stays in the range of float16, which a GPU computes in.

    Returns:
        ``patch`` int8 (C, *patch), and ``fold_<k>`` float32 (classes, samples): the logits at evenly spread voxels.

    Raises:
        BundleError: a fold has no finite logit for it: it would prove nothing.
    """
    shape = (networks.input_channels, *networks.patch_size)
    noise = np.random.default_rng(_GOLDEN_SEED).integers(-96, 97, shape, dtype=np.int8)
    patch = torch.from_numpy(noise)
    golden = {"patch": patch} | {f"fold_{fold}": _golden_logits(networks, fold, patch) for fold in folds}
    for fold in folds:
        if not golden[f"fold_{fold}"].isfinite().any():
            msg = f"golden patch: the weights of fold {fold} give no finite logit"
            raise BundleError(msg)
    return golden


def read_golden(bundle: ModelBundle) -> dict[str, torch.Tensor]:
    """What :func:`golden_tensors` stored in the archive."""
    return read_tensors(bundle.folder / GOLDEN_FILE)


def check_golden(networks: FoldNetworks, golden: Mapping[str, torch.Tensor]) -> None:
    """Compare the networks' logits with those stored in the archive.

    Args:
        networks: all of the archive's folds.
        golden: of :func:`read_golden`.

    Raises:
        BundleError: they differ by more than the device's tolerance: this machine would give wrong segmentations.
    """
    tolerance = GOLDEN_TOLERANCE.get(networks.device.type, GOLDEN_TOLERANCE["cuda"])
    for fold in networks.folds:
        finite = golden[f"fold_{fold}"].isfinite()
        expected = golden[f"fold_{fold}"][finite]
        difference = (_golden_logits(networks, fold, golden["patch"])[finite] - expected).abs().max().item()
        if not difference <= tolerance * expected.abs().max().item():
            msg = (
                f"golden patch: the logits of fold {fold} differ by {difference:.3g} from those stored with the "
                f"weights; this machine or its libraries would give wrong segmentations"
            )
            raise BundleError(msg)


@torch.inference_mode()
def _golden_logits(networks: FoldNetworks, fold: FoldName, patch: torch.Tensor) -> torch.Tensor:
    with networks.autocast():
        logits = networks.forward(fold, (patch.float() * GOLDEN_SCALE)[None].to(networks.device))
    flat = logits[0].float().cpu().flatten(1)
    return flat[:, :: max(1, flat.shape[1] // _GOLDEN_SAMPLES)].clone()
