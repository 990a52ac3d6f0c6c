"""Patches per second on a GPU: stock nnU-Net's patch loop against fixed batches of patches from several cases.

Needs torch, numpy and dynamic-network-architectures beside this repository, so that it runs wherever there is a GPU.
Stock's loop is nnunetv2's own where that imports, otherwise :func:`transcribed_loop`, which a test on the CPU holds
equal to it bit by bit. Weights are random with a fixed seed: they do not change the speed, but the logits of an
untrained network nearly tie, so the labels that differ are more than those of a trained one.

Three parts write one result file:

* end to end: the same volumes, from host memory to logits in host memory, by stock's loop and by batches, in turns
  (stock's logits through ``.to("cpu")`` as nnU-Net does, those of batches through pinned memory);
* parity: both loops sum the same recorded logits; stock in this process against stock in a second one;
* forward: one batch through the network, for each patch size, batch size and number format.

Stock's producer is a thread; batches are gathered in the calling thread while the GPU works on the one before.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from queue import Queue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import RESULTS
from benchmarks.harness import provenance

OUTPUT = RESULTS / "gpu_engine.json"
SEED = 20261122
STEP, SIGMA_SCALE, PEAK_WEIGHT = 0.5, 1 / 8, 10
"""nnU-Net's tile step, and its Gaussian: sigma is an eighth of the patch, the peak is 10."""

FEATURES = (32, 64, 128, 256, 320, 320)
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)
"""nnU-Net's planners: 32 features doubled up to 320; ``ResEncUNetPlanner.UNet_blocks_per_stage_encoder``."""

_WARMUPS = 2  # the first call chooses cuDNN's algorithms
_FEWEST, _MOST = 5, 30  # timed calls of a point
_COMPILE_GUESS_S = 45
_COMPILE_ORDER = {1: 1, 4: 2, 2: 3, 8: 4}
_GIB, _TERA = 1024**3, 1e12

Shape = tuple[int, ...]
Window = tuple[slice, ...]
Loop = Callable[[torch.Tensor], torch.Tensor]
"""float32 (C, z, y, x) in host memory to float16 logits (classes, z, y, x) on the device."""


class Architecture(Enum):
    """A network that nnU-Net's planners would configure; TINY is for machines without a GPU."""

    STANDARD = "standard"
    RESENC_L = "ResEnc-L"
    TINY = "tiny"


class Variant(Enum):
    """How a network runs."""

    FP32 = "fp32"
    FP16 = "fp16 autocast"
    BF16 = "bf16 autocast"
    FP16_CHANNELS_LAST = "fp16 autocast, channels_last_3d"
    FP16_COMPILED = "fp16 autocast, torch.compile"

    @property
    def dtype(self) -> torch.dtype:
        """The type that convolutions compute in."""
        return {Variant.FP32: torch.float32, Variant.BF16: torch.bfloat16}.get(self, torch.float16)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return nullcontext() if self is Variant.FP32 else torch.autocast(device.type, dtype=self.dtype)


class Gather(Enum):
    """Where a volume lies when its patches are cut."""

    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Task:
    """What the sliding window predicts: patch (z, y, x), classes, and axes of the volume (z, y, x) to mirror."""

    patch: Shape
    classes: int
    mirror_axes: tuple[int, ...] = ()

    @property
    def mirrorings(self) -> list[tuple[int, ...]]:
        """Every combination of axes of a patch (C, z, y, x) in nnU-Net's order, none first."""
        axes = [axis + 1 for axis in self.mirror_axes]
        counts = range(len(axes) + 1)
        return [chosen for count in counts for chosen in itertools.combinations(axes, count)]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of batching, under float16 autocast on a GPU as stock."""

    batch: int
    gather: Gather = Gather.HOST


@dataclass(frozen=True, slots=True)
class Scenario:
    """Volumes that every loop predicts, ``repeats`` times in turns."""

    architecture: Architecture
    patch: int
    mirroring: bool = False
    cases: int = 4
    repeats: int = 5
    volume: Shape = (160, 192, 160)

    def describe(self) -> dict[str, object]:
        """For the result file."""
        return {"architecture": self.architecture.value, "patch": self.patch, "mirroring": self.mirroring}

    def task(self, classes: int) -> Task:
        """The sliding window of this scenario."""
        return Task((self.patch,) * 3, classes, (0, 1, 2) if self.mirroring else ())

    def volumes(self) -> list[torch.Tensor]:
        """Smooth noise, float32 (1, z, y, x)."""
        generator = torch.Generator().manual_seed(SEED)
        coarse = tuple(math.ceil(n / 8) for n in self.volume)
        smooth = torch.randn((self.cases, 1, *coarse), generator=generator)
        noise = torch.randn((self.cases, 1, *self.volume), generator=generator)
        return list(interpolate(smooth, self.volume, mode="trilinear") + 0.2 * noise)


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured."""

    scenarios: tuple[Scenario, ...]
    contenders: tuple[Contender, ...]
    architectures: tuple[Architecture, ...] = (Architecture.STANDARD, Architecture.RESENC_L)
    patches: tuple[int, ...] = (64, 96, 128)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    variants: tuple[Variant, ...] = tuple(Variant)
    seconds_per_point: float = 0.25
    matmul: int = 8192


_CONTENDERS = (
    *(Contender(batch) for batch in (1, 2, 4, 8)),
    Contender(4, gather=Gather.DEVICE),
)
FULL = Scope(
    scenarios=(
        Scenario(Architecture.STANDARD, 128),
        Scenario(Architecture.STANDARD, 96, repeats=3),
        Scenario(Architecture.STANDARD, 64, repeats=3),
        Scenario(Architecture.STANDARD, 128, mirroring=True, cases=2, repeats=3),
        Scenario(Architecture.RESENC_L, 128, repeats=3),
        Scenario(Architecture.RESENC_L, 96, repeats=3),
    ),
    contenders=_CONTENDERS,
)
QUICK = Scope(
    scenarios=(Scenario(Architecture.STANDARD, 128, repeats=2),),
    contenders=_CONTENDERS,
    architectures=(Architecture.STANDARD,),
    patches=(128,),
    batches=(1, 4),
)
SMOKE = Scope(
    scenarios=(
        Scenario(Architecture.TINY, 16, cases=2, repeats=2, volume=(20, 24, 16)),
        Scenario(Architecture.TINY, 16, mirroring=True, cases=2, repeats=2, volume=(20, 16, 14)),
    ),
    contenders=(Contender(1), Contender(4), Contender(4, gather=Gather.DEVICE)),
    architectures=(Architecture.TINY,),
    patches=(16,),
    batches=(1, 2),
    variants=(Variant.FP32, Variant.BF16),
    seconds_per_point=0.01,
    matmul=128,
)


@dataclass(slots=True)
class Run:
    """One run of the script: its settings, its deadline, and what it found."""

    device: torch.device
    classes: int
    deadline: float
    output: Path
    found: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, object]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def skip(self, part: str, reason: str, **what: object) -> None:
        """Note what was not measured."""
        self.skipped.append({"part": part, **what, "reason": reason})

    def fraction_of_peak(self, operations_per_s: float, variant: Variant) -> float:
        """Of the matrix product in the same number format in this run."""
        peak: float = self.found["peak"][_name(variant.dtype)] * _TERA
        return round(operations_per_s / peak, 4)

    def write(self) -> None:
        """Write what there is."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps({**self.found, "skipped": self.skipped}, indent=1) + "\n")


def build_network(architecture: Architecture, patch: int, classes: int) -> nn.Module:
    """An untrained network in evaluation mode; halves a cube of ``patch`` voxels while an edge has 8 or more."""
    torch.manual_seed(SEED)
    pools = max(int(math.log2(patch)) - 2, 1)
    stages = pools + 1
    features = FEATURES[:stages] if architecture is not Architecture.TINY else (4, 8, 8)[:stages]
    common = {
        "input_channels": 1,
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": (1, *(2 for _ in range(pools))),
        "num_classes": classes,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    network: nn.Module
    if architecture is Architecture.RESENC_L:
        blocks = RESENC_BLOCKS[:stages]
        network = ResidualEncoderUNet(n_blocks_per_stage=blocks, n_conv_per_stage_decoder=(1,) * pools, **common)
    else:
        network = PlainConvUNet(n_conv_per_stage=(2,) * stages, n_conv_per_stage_decoder=(2,) * pools, **common)
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=16)
def operations(architecture: Architecture, patch: int, classes: int) -> int:
    """Floating-point operations of one forward pass of one patch: two for each multiplication and addition."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        build_network(architecture, patch, classes)(torch.empty(1, 1, patch, patch, patch))
    total: int = counter.get_total_flops()
    return total


def prepared(network: nn.Module, variant: Variant, device: torch.device) -> nn.Module:
    """A copy of ``network`` on the device, laid out or compiled as the variant says."""
    made = copy.deepcopy(network).to(device)
    if variant is Variant.FP16_CHANNELS_LAST:
        made = made.to(memory_format=torch.channels_last_3d)
    if variant is Variant.FP16_COMPILED:
        made.compile(dynamic=False)
    return made


# What follows restates nnunetv2 2.8.1: inference/sliding_window_prediction.py, inference/predict_from_raw_data.py
# and acvl_utils' pad_nd_image.


def padded(volume: torch.Tensor, patch: Shape) -> tuple[torch.Tensor, Window]:
    """``volume`` (C, z, y, x) with zeros around it up to the patch, and the slices that undo that."""
    missing = [max(size - n, 0) for n, size in zip(volume.shape[1:], patch, strict=True)]
    margins = [(count // 2, count - count // 2) for count in missing]
    flat = [side for below_above in reversed(margins) for side in below_above]
    inner = (slice(below, below + n) for (below, _), n in zip(margins, volume.shape[1:], strict=True))
    return pad_tensor(volume, flat), (slice(None), *inner)


def sliding_windows(shape: Shape, patch: Shape) -> list[Window]:
    """Slices of (C, z, y, x), in the order of summation."""
    starts = []
    for length, size in zip(shape, patch, strict=True):
        count = math.ceil((length - size) / (size * STEP)) + 1
        stride = (length - size) / max(count - 1, 1)
        starts.append([int(np.round(stride * number)) for number in range(count)])
    return [
        (slice(None), *(slice(start, start + size) for start, size in zip(corner, patch, strict=True)))
        for corner in itertools.product(*starts)
    ]


@lru_cache(maxsize=16)
def importance(patch: Shape, device: torch.device) -> torch.Tensor:
    """The weight of each voxel of a patch, float16: scipy's truncated Gaussian of a single central voxel."""
    weights = np.ones(())
    for size in patch:
        sigma = size * SIGMA_SCALE
        radius = int(4 * sigma + 0.5)
        kernel = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
        kernel /= kernel.sum()
        offset = radius - size // 2
        weights = np.multiply.outer(weights, kernel[offset : offset + size])
    weights /= weights.max() / PEAK_WEIGHT
    half = torch.from_numpy(weights).to(device=device, dtype=torch.half)
    half[half == 0] = half[half != 0].min()
    return half


def transcribed_loop(network: nn.Module, task: Task, device: torch.device) -> Loop:
    """``nnUNetPredictor.predict_sliding_window_return_logits``, without its way out when the device is full."""

    @torch.inference_mode()
    def predict(volume: torch.Tensor) -> torch.Tensor:
        _empty_cache(device)
        with _stock_autocast(device):
            data, unpad = padded(volume, task.patch)
            logits = _sum_patches(network, data, task, device)
        _empty_cache(device)
        return logits[unpad]

    return predict


def _sum_patches(network: nn.Module, data: torch.Tensor, task: Task, device: torch.device) -> torch.Tensor:
    _empty_cache(device)
    data = data.to(device)
    windows = sliding_windows(tuple(data.shape[1:]), task.patch)
    patches: Queue[tuple[torch.Tensor, Window] | None] = Queue(maxsize=2)

    def produce() -> None:
        for window in windows:
            patches.put((torch.clone(data[window][None], memory_format=torch.contiguous_format).to(device), window))
        patches.put(None)

    Thread(target=produce, daemon=True).start()
    sums = torch.zeros((task.classes, *data.shape[1:]), dtype=torch.half, device=device)
    weights = torch.zeros(data.shape[1:], dtype=torch.half, device=device)
    gaussian = importance(task.patch, device)
    while (item := patches.get()) is not None:
        patch, window = item
        logits = network(patch)
        for mirror in task.mirrorings[1:]:
            axes = [axis + 1 for axis in mirror]
            logits += torch.flip(network(torch.flip(patch, axes)), axes)
        if task.mirror_axes:
            logits /= len(task.mirrorings)
        logits = logits[0]
        logits *= gaussian
        sums[window] += logits
        weights[window[1:]] += gaussian
    torch.div(sums, weights, out=sums)
    if torch.any(torch.isinf(sums)):
        msg = "the logits are not finite"
        raise RuntimeError(msg)
    return sums


def nnunet_loop(network: nn.Module, task: Task, device: torch.device) -> Loop:
    """nnunetv2's own loop.

    Raises:
        ImportError: nnunetv2, or something that it needs, is missing.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=STEP,
        use_mirroring=bool(task.mirror_axes),
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    predictor.network = network
    predictor.allowed_mirroring_axes = task.mirror_axes or None
    predictor.configuration_manager = SimpleNamespace(patch_size=task.patch)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=task.classes)
    predict: Loop = predictor.predict_sliding_window_return_logits
    return predict


def stock_loop(network: nn.Module, task: Task, device: torch.device) -> tuple[Loop, str]:
    """Stock's loop, and whose it is."""
    try:
        return nnunet_loop(network, task, device), f"nnunetv2 {importlib.metadata.version('nnunetv2')}"
    except ImportError as error:
        return transcribed_loop(network, task, device), f"transcription ({error})"


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of a case."""

    case: CaseSum
    window: Window
    mirror: tuple[int, ...]


class CaseSum:
    """A volume's patches and the sums of their logits, in the arithmetic of the handler's ``CaseAccumulator``."""

    def __init__(self, volume: torch.Tensor, task: Task, device: torch.device, gather: Gather) -> None:
        data, self._unpad = padded(volume, task.patch)
        self.data = data.to(device) if gather is Gather.DEVICE else data
        self._task = task
        self._windows = sliding_windows(tuple(data.shape[1:]), task.patch)
        self._gaussian = importance(task.patch, device)
        self._sums = torch.zeros((task.classes, *data.shape[1:]), dtype=torch.half, device=device)
        self._weights = torch.zeros(data.shape[1:], dtype=torch.half, device=device)
        self._partial: torch.Tensor | None = None
        self._left = len(self._windows) * len(task.mirrorings)
        self.result = torch.empty(0)
        self.finite = torch.empty(0)

    def passes(self) -> Iterator[Pass]:
        """The passes in the order in which their logits are to be added."""
        return (Pass(self, window, mirror) for window in self._windows for mirror in self._task.mirrorings)

    def add(self, one: Pass, logits: torch.Tensor) -> None:
        """Take in the logits (classes, z, y, x) of the next pass; the last starts the copy to the host."""
        if self._partial is None:
            self._partial = logits
        else:
            self._partial += torch.flip(logits, one.mirror)
        if one.mirror == self._task.mirrorings[-1]:
            if self._task.mirror_axes:
                self._partial /= len(self._task.mirrorings)
            self._partial *= self._gaussian
            self._sums[one.window] += self._partial
            self._weights[one.window[1:]] += self._gaussian
            self._partial = None
        self._left -= 1
        if not self._left:
            torch.div(self._sums, self._weights, out=self._sums)
            self.finite = torch.isfinite(self._sums).all()
            logits = self._sums[self._unpad]
            self.result = torch.empty(logits.shape, dtype=torch.half, pin_memory=logits.is_cuda)
            self.result.copy_(logits, non_blocking=True)


class Staging:
    """Two pinned batches: the host fills one while the network has the other, and a stream of its own uploads them."""

    def __init__(self, batch: int, patch: Shape, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty((batch, 1, *patch), pin_memory=True) for _ in range(2)]
        self._used = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._turn = 0

    def upload(self, patches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The patches (C, z, y, x) as a batch on the device; waits for the batch before the last."""
        current = torch.cuda.current_stream(self._device)
        self._used[self._turn].record(current)
        self._turn = 1 - self._turn
        self._used[self._turn].synchronize()
        buffer = self._buffers[self._turn]
        for row, patch in zip(buffer, patches, strict=True):
            row.copy_(patch)
        with torch.cuda.stream(self._uploads):
            batch = buffer.to(self._device, non_blocking=True)
        current.wait_stream(self._uploads)
        batch.record_stream(current)
        return batch


@torch.inference_mode()
def predict_batched(
    network: nn.Module, volumes: Sequence[torch.Tensor], task: Task, device: torch.device, contender: Contender
) -> list[torch.Tensor]:
    """Logits of several volumes, all from batches of one size that one case's last patches share with the next's first.

    Args:
        network: in evaluation mode, on the device.
        volumes: float32 (1, z, y, x) in host memory.
        task: what is predicted.
        device: where the network is.
        contender: how patches are gathered. A batch that is not full repeats its last patch.

    Returns:
        float16 (classes, z, y, x) in host memory for each volume.

    Raises:
        RuntimeError: a logit is NaN or infinite.
    """
    cases: list[CaseSum] = []

    def draw() -> Iterator[Pass]:
        for volume in volumes:
            cases.append(CaseSum(volume, task, device, contender.gather))
            yield from cases[-1].passes()

    staged = contender.gather is Gather.HOST and device.type == "cuda"
    staging = Staging(contender.batch, task.patch, device) if staged else None
    passes = draw()
    with _stock_autocast(device):
        while drawn := list(itertools.islice(passes, contender.batch)):
            full = drawn + [drawn[-1]] * (contender.batch - len(drawn))
            patches = [each.case.data[each.window] for each in full]
            batch = staging.upload(patches) if staging else torch.stack(patches)
            for row, each in zip(batch, full, strict=True):
                if each.mirror:
                    row.copy_(torch.flip(row, each.mirror))
            for each, logits in zip(drawn, network(batch), strict=False):
                each.case.add(each, logits)
    _synchronize(device)
    if not all(case.finite for case in cases):
        msg = "the logits are not finite"
        raise RuntimeError(msg)
    return [case.result for case in cases]


def end_to_end(run: Run, scenario: Scenario, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Every loop on the same volumes: seconds, and labels that differ from stock's.

    The first round chooses cuDNN's algorithms and gives the logits that are compared; the timed rounds follow.
    """
    task, volumes = scenario.task(run.classes), scenario.volumes()
    untrained = build_network(scenario.architecture, scenario.patch, run.classes)
    network = prepared(untrained, Variant.FP16, run.device)
    stock, _ = stock_loop(network, task, run.device)

    def by_stock() -> list[torch.Tensor]:
        return [stock(volume).to("cpu") for volume in volumes]

    loops = {each: partial(predict_batched, network, volumes, task, run.device, each) for each in contenders}
    reference = by_stock()
    differences = {contender: compare(reference, loop(), run.device) for contender, loop in loops.items()}
    stock_again = compare(reference, by_stock(), run.device)
    del reference
    everyone: list[Callable[[], list[torch.Tensor]]] = [by_stock, *loops.values()]
    seconds = [[alone(loop, run.device) / scenario.cases for loop in everyone] for _ in range(scenario.repeats)]
    by_loop = list(zip(*seconds, strict=True))
    case, _ = padded(volumes[0], task.patch)
    patches = len(sliding_windows(tuple(case.shape[1:]), task.patch))
    forwards = patches * len(task.mirrorings)
    work = forwards * operations(scenario.architecture, scenario.patch, run.classes)

    def row(name: str, own: Sequence[float]) -> dict[str, object]:
        typical = statistics.median(own)
        return {
            "loop": name,
            "seconds_per_case": spread(own),
            "forwards_per_s": round(forwards / typical, 2),
            "fraction_of_peak": run.fraction_of_peak(work / typical, Variant.FP16),
        }

    rows = [{**row("stock", by_loop[0]), "against_stock": stock_again}]
    for (contender, difference), own in zip(differences.items(), by_loop[1:], strict=True):
        ratios = [theirs / ours for theirs, ours in zip(by_loop[0], own, strict=True)]
        rows.append(
            {
                **row("batched", own),
                "batch": contender.batch,
                "volumes_in": contender.gather.value,
                "speedup": spread(ratios),
                "against_stock": difference,
            }
        )
    return {
        **scenario.describe(),
        "volume": list(scenario.volume),
        "cases": scenario.cases,
        "repeats": scenario.repeats,
        "patches_per_case": patches,
        "forwards_per_case": forwards,
        "loops": rows,
    }


def compare(these: Sequence[torch.Tensor], others: Sequence[torch.Tensor], device: torch.device) -> dict[str, float]:
    """Voxels, voxels whose label differs, and the largest difference of a logit."""
    pairs = [(one.to(device), other.to(device)) for one, other in zip(these, others, strict=True)]
    return {
        "voxels": sum(one[0].numel() for one, _ in pairs),
        "flips": sum(int((one.argmax(0) != other.argmax(0)).sum()) for one, other in pairs),
        "largest_logit_difference": round(max(float((one - other).abs().max()) for one, other in pairs), 6),
    }


class Recorder(nn.Module):
    """Keeps the logits that a network gives."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.logits: list[torch.Tensor] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The network's logits."""
        logits: torch.Tensor = self.network(batch)
        self.logits += logits.clone().chunk(len(batch))
        return logits


class Replay(nn.Module):
    """Gives recorded logits in their order, whatever it sees."""

    def __init__(self, logits: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._logits = iter(logits)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The next logits, as many as there are patches; the last is repeated at the end."""
        drawn = list(itertools.islice(self._logits, len(batch)))
        return torch.cat(drawn + [drawn[-1]] * (len(batch) - len(drawn)))


def recorded_parity(run: Run, scenario: Scenario, batches: Sequence[int]) -> dict[str, Any]:
    """Logits that differ in any bit where another loop sums the patch logits that stock's loop has summed."""
    task, volumes = scenario.task(run.classes), scenario.volumes()
    network = build_network(scenario.architecture, scenario.patch, run.classes)
    recorder = Recorder(prepared(network, Variant.FP16, run.device))
    stock, _ = stock_loop(recorder, task, run.device)
    expected = [stock(volume).to("cpu") for volume in volumes]
    transcription = transcribed_loop(Replay(recorder.logits), task, run.device)
    different = {"transcription": different_bits(expected, [transcription(volume).to("cpu") for volume in volumes])}
    for batch in batches:
        found = predict_batched(Replay(recorder.logits), volumes, task, run.device, Contender(batch))
        different[f"batch {batch}"] = different_bits(expected, found)
    return {**scenario.describe(), "logits": sum(one.numel() for one in expected), "different": different}


def different_bits(these: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int:
    """Logits (float16) that are not the same bit by bit."""
    pairs = ([each.contiguous().view(torch.int16) for each in pair] for pair in zip(these, others, strict=True))
    return sum(int((one != other).sum()) for one, other in pairs)


def stock_in_second_process(run: Run, scenario: Scenario) -> dict[str, object]:
    """Stock here against stock in a process that chooses cuDNN's algorithms anew."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.pt"
        arguments = (scenario, run.classes, run.device, file)
        process = multiprocessing.get_context("spawn").Process(target=_save_stock_logits, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            msg = f"stock's loop failed in its own process ({process.exitcode})"
            raise RuntimeError(msg)
        there = torch.load(file)
    here = _stock_logits(scenario, run.classes, run.device)
    return {**scenario.describe(), **compare(here, there, run.device)}


def _save_stock_logits(scenario: Scenario, classes: int, device: torch.device, file: Path) -> None:
    torch.backends.cudnn.benchmark = True
    torch.save(_stock_logits(scenario, classes, device), file)


def _stock_logits(scenario: Scenario, classes: int, device: torch.device) -> list[torch.Tensor]:
    network = prepared(build_network(scenario.architecture, scenario.patch, classes), Variant.FP16, device)
    stock, _ = stock_loop(network, scenario.task(classes), device)
    return [stock(volume).to("cpu") for volume in scenario.volumes()]


@dataclass(frozen=True, slots=True)
class Point:
    """One batch of one variant of one network."""

    architecture: Architecture
    patch: int
    batch: int
    variant: Variant

    def describe(self) -> dict[str, object]:
        """For the result file."""
        return {
            "architecture": self.architecture.value,
            "patch": self.patch,
            "batch": self.batch,
            "variant": self.variant.value,
        }


def points(scope: Scope) -> list[Point]:
    """The matrix; compiled networks last, for they take longest, and of those batches of one and of four first."""
    matrix = itertools.product(scope.architectures, scope.patches, scope.batches, scope.variants)
    made = itertools.starmap(Point, matrix)
    return sorted(made, key=lambda point: _COMPILE_ORDER[point.batch] if point.variant is Variant.FP16_COMPILED else 0)


@torch.inference_mode()
def measure(run: Run, point: Point, network: nn.Module, seconds: float) -> dict[str, Any]:
    """Patches per second of batch after batch, and the latency of a batch alone."""
    device = run.device
    made = prepared(network, point.variant, device)
    batch = torch.randn(point.batch, 1, point.patch, point.patch, point.patch, device=device)

    def forward() -> torch.Tensor:
        with point.variant.autocast(device):
            logits: torch.Tensor = made(batch)
        return logits

    started = time.monotonic()
    for _ in range(_WARMUPS):
        forward()
    _synchronize(device)
    first = time.monotonic() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count = min(max(int(seconds / alone(forward, device)), _FEWEST), _MOST)
    latencies = [alone(forward, device) for _ in range(count)]
    intervals = back_to_back(forward, device, count)
    rate = point.batch / statistics.median(intervals)
    work = operations(point.architecture, point.patch, run.classes)
    return {
        **point.describe(),
        "patches_per_s": round(rate, 2),
        "ms_per_batch": spread([1000 * each for each in intervals]),
        "latency_ms": spread([1000 * each for each in latencies]),
        "fraction_of_peak": run.fraction_of_peak(rate * work, point.variant),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / _GIB, 2) if device.type == "cuda" else None,
        "warm_up_s": round(first, 2),
        "repeats": count,
    }


def matmul_peak(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of a square matrix product by number format; float32 as TF32, which cuDNN's convolutions use too."""
    found = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            product = partial(torch.mm, *(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)))
            alone(product, device)
            seconds = statistics.median(back_to_back(product, device, _MOST))
            found[_name(dtype)] = float(f"{2 * size**3 / seconds / _TERA:.4g}")
    finally:
        torch.set_float32_matmul_precision(precision)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def alone(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from the call until the device has finished."""
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def back_to_back(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds between the ends of successive calls that nobody waits for, by the device's clock."""
    if device.type != "cuda":
        return [alone(call, device) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [one.elapsed_time(other) / 1000 for one, other in itertools.pairwise(events)]


def _stock_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine or its user."""
    about: dict[str, object] = {
        **provenance.cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "dynamic-network-architectures": importlib.metadata.version("dynamic-network-architectures"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / _GIB, 1),
            "multiprocessors": card.multi_processor_count,
            "compute_capability": f"{card.major}.{card.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return about


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or "unknown"


def run_end_to_end(run: Run, scope: Scope) -> None:
    """The first part."""
    run.found["end_to_end"] = []
    for scenario in scope.scenarios:
        if run.left <= 0:
            run.skip("end_to_end", "budget", **scenario.describe())
            continue
        found = end_to_end(run, scenario, scope.contenders)
        run.found["end_to_end"].append(found)
        run.write()
        print(f"end to end, {scenario.describe()}, {run.left:.0f} s left")
        for row in found["loops"]:
            label = f"batch {row['batch']}, volumes in {row['volumes_in']}" if "batch" in row else "stock"
            ratio = f"{row['speedup']['median']:6.3f}x" if "speedup" in row else "       "
            print(f"  {row['seconds_per_case']['median']:8.3f} s/case {ratio} {label}: {row['against_stock']}")


def run_parity(run: Run, scope: Scope) -> None:
    """The second part."""
    found: dict[str, Any] = {"recorded": [], "stock_in_second_process": []}
    run.found["parity"] = found
    base = replace(scope.scenarios[0], cases=2, patch=scope.patches[0])
    for scenario in (base, replace(base, mirroring=True)):
        found["recorded"].append(recorded_parity(run, scenario, scope.batches))
        print(f"recorded logits, mirroring {scenario.mirroring}: {found['recorded'][-1]['different']}")
    for scenario in {s.architecture: s for s in reversed(scope.scenarios)}.values():
        if run.left <= 0:
            run.skip("parity", "budget", **scenario.describe())
            continue
        found["stock_in_second_process"].append(stock_in_second_process(run, scenario))
        print(f"stock in two processes: {found['stock_in_second_process'][-1]}, {run.left:.0f} s left")
    run.write()


def run_forward(run: Run, scope: Scope) -> None:
    """The third part: what can be measured in the time that is left."""
    run.found["forward"] = []
    compile_s: float = _COMPILE_GUESS_S
    built: tuple[Architecture, int] | None = None
    network: nn.Module | None = None
    for point in points(scope):
        compiled = point.variant is Variant.FP16_COMPILED
        if run.left < (compile_s if compiled else 0):
            run.skip("forward", "budget", **point.describe())
            continue
        if network is None or built != (point.architecture, point.patch):
            built = (point.architecture, point.patch)
            network = build_network(*built, run.classes)
        try:
            found = measure(run, point, network, scope.seconds_per_point)
        except RuntimeError as error:
            run.skip("forward", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", **point.describe())
            continue
        finally:
            torch.compiler.reset()
            _empty_cache(run.device)
        if compiled:
            compile_s = max(compile_s, 1.5 * found["warm_up_s"])
        run.found["forward"].append(found)
        run.write()
        print(
            f"forward {point.architecture.value:8} patch {point.patch:3} batch {point.batch} {point.variant.value:32}"
            f"{found['patches_per_s']:9} patches/s, {found['fraction_of_peak']:.1%} of peak, {found['warm_up_s']} s"
        )


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, and the peak that they are compared with."""
    _, stock = stock_loop(nn.Identity(), Task((8, 8, 8), 2), options.device)
    size = options.scope.matmul
    return {
        "benchmark": "gpu_engine",
        "date": provenance.now(),
        **provenance.commit(),
        "machine": machine(options.device),
        "settings": {
            "stock_loop": stock,
            "classes": options.classes,
            "weights": f"random, seed {SEED}",
            "volumes": "smooth noise",
            "tile_step": STEP,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "fp32_convolutions": "TF32" if torch.backends.cudnn.allow_tf32 else "IEEE float32",
            "budget_s": options.budget_s,
        },
        "peak": {
            "unit": "TFLOP/s",
            "of": f"matrix product of {size}×{size}, float32 as TF32",
            **matmul_peak(options.device, size),
        },
    }


PARTS: dict[str, Callable[[Run, Scope], None]] = {
    "end-to-end": run_end_to_end,
    "parity": run_parity,
    "forward": run_forward,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 1 if the loops sum the same logits differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="scope", const=QUICK, help="one network, one patch size")
    size.add_argument("--smoke", action="store_const", dest="scope", const=SMOKE, help="a tiny network, for the CPU")
    parser.set_defaults(scope=FULL)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--budget-s", type=float, default=480, help="what does not fit is listed as skipped")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    run = Run(options.device, options.classes, time.monotonic() + options.budget_s, options.output)
    run.found = header(options)
    print(run.found["machine"], run.found["settings"], run.found["peak"], sep="\n")
    started = time.monotonic()
    for part in options.parts:
        PARTS[part](run, options.scope)
    run.found["settings"]["seconds"] = round(time.monotonic() - started, 1)
    run.write()
    recorded = run.found.get("parity", {}).get("recorded", [])
    return int(any(any(each["different"].values()) for each in recorded))


if __name__ == "__main__":
    sys.exit(main())
