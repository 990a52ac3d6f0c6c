"""The GPU benchmark on the CPU: its transcription of stock's loop, and its batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import nn

from benchmarks.gpu import gpu_engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PATCH = (16, 16, 16)
CLASSES = 3
SHAPES = ((24, 20, 30), (16, 40, 9), (11, 14, 15))
TASKS = [
    gpu_engine.Task(PATCH, CLASSES),
    gpu_engine.Task(PATCH, CLASSES, (1,)),
    gpu_engine.Task(PATCH, CLASSES, (0, 1, 2)),
]
WITHOUT_OTHERS = """
import sys
for name in ("nnunetv2", "nnunet_torchserve", "scipy", "acvl_utils", "nibabel", "SimpleITK", "psutil", "httpx"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from benchmarks.gpu import gpu_engine
network = gpu_engine.build_network(gpu_engine.Architecture.TINY, 16, 2)
loop, whose = gpu_engine.stock_loop(network, gpu_engine.Task((16, 16, 16), 2), gpu_engine.torch.device("cpu"))
print(whose.partition(" ")[0], *loop(gpu_engine.torch.zeros(1, 20, 16, 12)).shape)
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return gpu_engine.build_network(gpu_engine.Architecture.TINY, PATCH[0], CLASSES)


@pytest.fixture(scope="module")
def volumes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((1, *shape), generator=generator) for shape in SHAPES]


def bits(logits: torch.Tensor) -> torch.Tensor:
    assert logits.dtype is torch.half
    return logits.contiguous().view(torch.int16)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_transcription_gives_nnunets_logits_bit_by_bit(
    network: nn.Module, volumes: list[torch.Tensor], task: gpu_engine.Task
) -> None:
    own = gpu_engine.nnunet_loop(network, task, CPU)
    transcription = gpu_engine.transcribed_loop(network, task, CPU)
    for volume in volumes:
        logits = transcription(volume)
        assert logits.shape == (CLASSES, *volume.shape[1:])
        assert torch.equal(bits(logits), bits(own(volume)))


@pytest.mark.parametrize("patch", [(128, 128, 128), (96, 160, 56), (5, 7, 12)])
def test_weights_are_nnunets_bit_by_bit(patch: tuple[int, ...]) -> None:
    expected = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=CPU)
    assert torch.equal(bits(gpu_engine.importance(patch, CPU)), bits(expected))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_batches_of_one_give_stocks_logits_bit_by_bit(
    network: nn.Module, volumes: list[torch.Tensor], task: gpu_engine.Task
) -> None:
    stock, _ = gpu_engine.stock_loop(network, task, CPU)
    found = gpu_engine.predict_batched(network, volumes, task, CPU, gpu_engine.Contender(1))
    assert all(torch.equal(bits(logits), bits(stock(each))) for logits, each in zip(found, volumes, strict=True))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_same_patch_logits_are_summed_to_the_same_bits_in_any_batch(
    network: nn.Module, volumes: list[torch.Tensor], task: gpu_engine.Task
) -> None:
    recorder = gpu_engine.Recorder(network)
    stock = gpu_engine.nnunet_loop(recorder, task, CPU)
    expected = [stock(volume) for volume in volumes]
    for batch in (1, 2, 4, 8):
        replay = gpu_engine.Replay(recorder.logits)
        found = gpu_engine.predict_batched(replay, volumes, task, CPU, gpu_engine.Contender(batch))
        assert gpu_engine.different_bits(expected, found) == 0


def test_a_changed_logit_is_seen(network: nn.Module, volumes: list[torch.Tensor]) -> None:
    recorder = gpu_engine.Recorder(network)
    stock = gpu_engine.nnunet_loop(recorder, TASKS[0], CPU)
    expected = [stock(volume) for volume in volumes]
    recorder.logits[2] = recorder.logits[2] + 1
    found = gpu_engine.predict_batched(
        gpu_engine.Replay(recorder.logits), volumes, TASKS[0], CPU, gpu_engine.Contender(2)
    )
    assert gpu_engine.different_bits(expected, found) > 0


def test_needs_neither_nnunet_nor_the_handler() -> None:
    command = [sys.executable, "-c", WITHOUT_OTHERS, str(ROOT)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["transcription", "2", "20", "16", "12"]


@pytest.mark.long  # the parts of a run are tested above
def test_a_result_lists_every_point_as_measured_or_skipped(tmp_path: Path) -> None:
    output = tmp_path / "gpu_engine.json"
    options = ["--smoke", "--device", "cpu", "--output", str(output), "--parts", "forward", "end-to-end"]
    assert gpu_engine.main(options) == 0
    measured = json.loads(output.read_text())
    assert gpu_engine.main([*options, "--budget-s", "0"]) == 0
    skipped = json.loads(output.read_text())
    assert len(measured["forward"]) == len(gpu_engine.points(gpu_engine.SMOKE))
    assert measured["settings"]["stock_loop"].startswith("nnunetv2 ")
    assert [row["loop"] for row in measured["end_to_end"][0]["loops"]] == ["stock", "batched", "batched", "batched"]
    assert not measured["skipped"]
    assert len(skipped["skipped"]) == len(measured["forward"]) + len(measured["end_to_end"])
