"""What the processor computes at most: a large matrix product in each type, on PyTorch's threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from nnunet_torchserve.backend import Backend

_SIDE = 4096
_BUDGET_S = 3.0
_LEAST, _MOST = 2, 12

TYPES = {
    Backend.EAGER: "float32",
    Backend.OPENVINO_FLOAT32: "float32",
    Backend.OPENVINO_BFLOAT16: "bfloat16",
    Backend.OPENVINO_INT8: "int8",
}
"""Backend -> the type that its convolutions compute in."""


def peaks() -> dict[str, float]:
    """Type -> operations a second, a multiplication and an addition each counted, of the fastest product of a few."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-128, 128, (2, _SIDE, _SIDE), generator=generator, dtype=torch.int8)
    parts = whole.float() / 128
    products: dict[str, Callable[[], torch.Tensor]] = {
        "float32": partial(torch.mm, *parts),
        "bfloat16": partial(torch.mm, *parts.bfloat16()),
        "int8": partial(torch._int_mm, *whole),  # noqa: SLF001 (PyTorch has no other product of whole numbers on a CPU)
    }
    return {name: 2 * _SIDE**3 / _fastest(product) for name, product in products.items()}


def _fastest(product: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest of a few."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _LEAST or (len(seconds) < _MOST and time.perf_counter() - began < _BUDGET_S):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
