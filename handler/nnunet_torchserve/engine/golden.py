"""A patch whose logits an archive stores: what the same weights must give on every machine that serves them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from ..backend import Backend
from ..bundle import ModelBundle
from ..errors import BundleError
from ..machine import torch_threads
from ..member_description import GOLDEN_FILE
from ..options import FoldName
from ..stored_tensors import read_tensors
from ..tiling import STOCK_THREADS
from .backends.interface import FoldNetworks
from .network import Networks, probe_batch, seconds_per_patch

GOLDEN_SCALE = 1 / 32
"""The golden patch is stored as int8; the network sees it multiplied by this."""

GOLDEN_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
"""Largest difference of a golden logit, as a fraction of the largest golden logit. CPU kernels differ between
processors in the last bits; CUDA runs under float16 autocast, as stock does."""

BACKEND_TOLERANCE = {
    Backend.OPENVINO_FLOAT32: 1e-3,
    Backend.OPENVINO_BFLOAT16: 5e-2,
    Backend.OPENVINO_INT8: 1e-1,
}
"""The same for what does not compute as stock does. The stored logits are eager's, so this is a bound for how far a
backend may be from them, and never a check of bits. float32 summed in another order differs by about 1e-5, bfloat16
by about 5e-3 to 1e-2 for small trained networks. What that does to segmentations is measured, see
:mod:`..accuracy`."""

OWN_GOLDEN = frozenset({Backend.OPENVINO_INT8})
"""Backends that are compared with logits of their own, which the archive stores beside eager's. The golden patch is
noise, and a graph of int8 is calibrated on images: what it makes of noise is not near to what eager makes of it. On
another processor the layers between, which are float32, round otherwise, and a whole number may become the next one:
with another number of threads the largest difference of a small trained network was 0.027, with older instructions
0.015."""

WORTHWHILE = 1.05
"""How many times faster than eager a backend must be, to be chosen by its speed."""

logger = logging.getLogger(__name__)

_GOLDEN_SEED = 20261122
_GOLDEN_SAMPLES = 4096


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


def golden_name(backend: Backend, fold: FoldName) -> str:
    """What the stored logits of a fold are called, with which a backend's are compared."""
    return f"{backend}.fold_{fold}" if backend in OWN_GOLDEN else f"fold_{fold}"


def read_golden(bundle: ModelBundle) -> dict[str, dict[str, torch.Tensor]]:
    """Member -> what :func:`golden_tensors` stored of it in the archive."""
    return {name: read_tensors(member.folder / GOLDEN_FILE) for name, member in bundle.members.items()}


def check_golden(
    networks: Networks, golden: Mapping[str, Mapping[str, torch.Tensor]], get_on: Callable[[], None] = lambda: None
) -> None:
    """Compare the networks' logits with those stored in the archive.

    Args:
        networks: all of the archive's.
        golden: of :func:`read_golden`.
        get_on: called before each network.

    Raises:
        BundleError: they differ by more than the device's tolerance: this machine would give wrong segmentations.
    """
    for member, patch in golden.items():
        _check_member(member, networks.of(member), patch, get_on)


def _check_member(
    member: str, networks: FoldNetworks, golden: Mapping[str, torch.Tensor], get_on: Callable[[], None]
) -> None:
    tolerance = BACKEND_TOLERANCE.get(networks.backend)
    if tolerance is None:
        tolerance = GOLDEN_TOLERANCE.get(networks.device.type, GOLDEN_TOLERANCE["cuda"])
    for fold in networks.folds:
        get_on()
        stored = golden.get(golden_name(networks.backend, fold))
        if stored is None:
            msg = f"golden patch: the archive has no logits of {member}, fold {fold}, by {networks.backend}"
            raise BundleError(msg)
        finite = stored.isfinite()
        expected = stored[finite]
        difference = (_golden_logits(networks, fold, golden["patch"])[finite] - expected).abs().max().item()
        if not difference <= tolerance * expected.abs().max().item():
            msg = (
                f"golden patch: the logits of {member}, fold {fold}, differ by {difference:.3g} from those stored with "
                f"the weights; this machine or its libraries would give wrong segmentations"
            )
            raise BundleError(msg)


@torch.inference_mode()
def _golden_logits(networks: FoldNetworks, fold: FoldName, patch: torch.Tensor) -> torch.Tensor:
    logits: Any = networks.forward(fold, (patch.float() * GOLDEN_SCALE)[None].to(networks.device))
    expected = (1, networks.classes, *networks.patch_size)
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        is_tensor = isinstance(logits, torch.Tensor)
        made = f"logits of shape {tuple(logits.shape)}" if is_tensor else f"a {type(logits).__name__}"
        msg = (
            f"golden patch: the network of fold {fold} makes {made} of a patch, and not logits of shape {expected}; "
            "without deep supervision it must give one tensor"
        )
        raise BundleError(msg)
    flat = logits[0].float().cpu().flatten(1)
    return flat[:, :: max(1, flat.shape[1] // _GOLDEN_SAMPLES)].clone()


def load_networks_or_eager(
    bundle: ModelBundle,
    device: torch.device,
    backend: Backend,
    batch: int | Literal["auto"],
    only_if_faster: bool = False,
) -> Networks:
    """The same with another backend than eager; with eager, and a warning in the log, if this machine cannot run it.

    Args:
        bundle: the model.
        device: where they are to be.
        backend: what runs them.
        batch: as of :func:`load_networks`.
        only_if_faster: measure both, once, and take eager unless the other one is faster.

    Raises:
        BundleError: with eager it failed too.
    """
    if backend is not Backend.EAGER:
        try:
            if only_if_faster:
                return _faster(bundle, device, backend, batch)
            return load_networks(bundle, device, backend, batch)
        except Exception as error:  # noqa: BLE001 (whatever another library does here, eager can answer)
            logger.warning("%s is used and not %s: %s", Backend.EAGER, backend, error)
    return load_networks(bundle, device)


def _faster(bundle: ModelBundle, device: torch.device, backend: Backend, batch: int | Literal["auto"]) -> Networks:
    """Eager, unless the others are faster by more than chance: its answers are stock's.

    For a moment both are loaded, for which there may be no memory; then eager alone may have enough.
    """
    networks, eager = load_networks(bundle, device, backend, batch), load_networks(bundle, device)
    each_s = seconds_per_patch(networks, networks.batch or 1)
    eager_s = seconds_per_patch(eager, probe_batch(eager) if batch == "auto" else batch)
    chosen = networks if each_s * WORTHWHILE < eager_s else eager
    logger.info(
        "%s is the fastest: a patch takes %s %.4f s, %s %.4f s",
        *(chosen.backend, Backend.EAGER, eager_s, networks.backend, each_s),
    )
    return chosen


def load_networks(
    bundle: ModelBundle,
    device: torch.device,
    backend: Backend = Backend.EAGER,
    batch: int | Literal["auto"] = 1,
) -> Networks:
    """The networks of an archive on a device, checked against the golden patches.

    Args:
        bundle: the model.
        device: where they are to be.
        backend: what runs them.
        batch: patches in a forward pass, of a backend that must know; see :class:`~.network.Networks`.

    Raises:
        BundleError: the weights do not fit, or a golden patch gives other logits; or archive, device or machine have
            not what the backend needs.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(min(STOCK_THREADS, torch_threads()))
    networks = Networks(bundle, device, backend, batch)
    check_golden(networks, read_golden(bundle))
    return networks
