"""One patch of nnU-Net's networks, untrained, by every backend in turns; and what loading them takes.

Weights do not change how long a patch takes. They change how far bfloat16 and int8 are from float32: an untrained
network's logits nearly tie, so what is said of that here is an upper end, and the accuracy of trained ones is another
part. int8 is calibrated on the noise that it is run on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.backends.turns import Turns, compared
from benchmarks.harness.material import FOLD
from benchmarks.models import untrained_networks
from benchmarks.models.untrained_networks import FEATURES, RESIDUAL_BLOCKS
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.engine.backends.eager import EagerNetworks, build_network
from nnunet_torchserve.engine.backends.interface import FoldNetworks
from nnunet_torchserve.engine.backends.openvino_networks import OpenVinoNetworks, graph_paths
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.member import Member
from nnunet_torchserve_tools.graphs import write_graphs
from nnunet_torchserve_tools.quantisation import quantise
from support.untrained import standard_unet

CPU = torch.device("cpu")
NETWORKS = {"standard": None, "ResEnc-M": RESIDUAL_BLOCKS}
"""Name -> blocks of each stage of its encoder, if that is residual. ResEnc-M, L and XL are one network, for patches and
batches that fill more or less of a GPU."""

_LARGE = 96
"""Voxels along each axis, from which on nnU-Net's planner has six stages and not five."""

_SEED = 20261129
_NOISE_PATCHES = 2
"""Enough to have ranges from; that the answers are good is not claimed."""


@dataclass(frozen=True, slots=True)
class Untrained:
    """A network of a kind for cubic patches."""

    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.size}³"

    def write(self, folder: Path) -> Path:
        """Write nnU-Net's model folder of it."""
        stages = 6 if self.size >= _LARGE else 5
        blocks = NETWORKS[self.kind]
        return standard_unet(
            folder,
            features=FEATURES[:stages],
            patch_size=(self.size,) * 3,
            residual_blocks=blocks and blocks[:stages],
        )


def staged(model: Path, stage: Path) -> Member:
    """The model's one member as an archive would have it, without the checks and trials of one, which take minutes."""
    return untrained_networks.staged(model, stage, golden=False).lead


@torch.inference_mode()
def measure_patch(network: Untrained, backends: Sequence[Backend], turns: Turns, scratch: Path) -> dict[str, Any]:
    """One patch of a network by eager and by all backends that this machine runs."""
    member = staged(network.write(scratch), scratch / "stage")
    eager = EagerNetworks(member, CPU)
    patches = torch.randn(
        (_NOISE_PATCHES, 1, eager.input_channels, *eager.patch_size), generator=torch.Generator().manual_seed(_SEED)
    )
    made_s, loaded, not_run = _load(member, eager, backends, patches)
    patch = patches[0]
    flops = flops_of(member, eager)
    expected = eager.forward(FOLD, patch)
    different = {}
    for backend, networks in loaded.items():
        logits = networks.forward(FOLD, patch)
        different[str(backend)] = {
            "largest_difference_of_largest_logit": float((logits - expected).abs().max() / expected.abs().max()),
            "argmax_different": float((logits.argmax(1) != expected.argmax(1)).float().mean()),
        }
    sides: dict[Backend, FoldNetworks] = {Backend.EAGER: eager, **loaded}
    seconds = turns.of({backend: partial(_run, networks, patch) for backend, networks in sides.items()})
    found = compared(seconds, Backend.EAGER)
    per_second = {name: round(1 / took["median"], 4) for name, took in found["seconds"].items()}
    return {
        "network": network.kind,
        "patch": list(eager.patch_size),
        "weights_bytes": sum(file.stat().st_size for file in member.folder.glob("*.safetensors")),
        "flops": flops,
        "rounds": len(seconds[Backend.EAGER]),
        "patches_per_second": per_second,
        "made_in_seconds": made_s,
        "layers": {str(each): dict(networks.precisions) for each, networks in loaded.items()},
        "not_run": not_run,
        "different": different,
        **found,
    }


def flops_of(member: Member, networks: EagerNetworks) -> int:
    """Of a patch: multiplications and additions, each counted."""
    with torch.inference_mode(mode=False), torch.no_grad(), FlopCounterMode(display=False) as counted:
        with torch.device("meta"):
            module = build_network(member, networks.input_channels, networks.classes)
        module(torch.empty((1, networks.input_channels, *networks.patch_size), device="meta"))
    return int(counted.get_total_flops())


def _run(networks: FoldNetworks, patch: torch.Tensor) -> None:
    networks.forward(FOLD, patch)


def _load(
    member: Member, eager: EagerNetworks, backends: Sequence[Backend], patches: torch.Tensor
) -> tuple[dict[str, float], dict[Backend, OpenVinoNetworks], dict[str, str]]:
    """Make the graphs and compile them for each backend; seconds of each step, and what does not run with the reason.

    A graph serves float32 and bfloat16; that of int8 takes its place at last.
    """
    made_s, loaded, not_run = {}, {}, {}
    began = time.perf_counter()
    write_graphs(member, eager)
    made_s["graph"] = round(time.perf_counter() - began, 2)
    for backend in sorted(backends, key=lambda each: each is Backend.OPENVINO_INT8):
        if backend is Backend.OPENVINO_INT8:
            began = time.perf_counter()
            quantise(graph_paths(member.folder, FOLD), patches.numpy())
            made_s["int8"] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        try:
            loaded[backend] = OpenVinoNetworks(member, backend, batch=1)
        except BundleError as error:
            not_run[str(backend)] = str(error)
            continue
        made_s[f"{backend} compiled"] = round(time.perf_counter() - began, 2)
    return made_s, loaded, not_run
