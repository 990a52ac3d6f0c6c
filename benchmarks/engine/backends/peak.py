"""What the processor computes at most: a large matrix product in each type, on PyTorch's threads.

By PyTorch, and by OpenVINO too, if it is installed: PyTorch's library for float32 leaves out some processors' widest
instructions, and what is slower than a network's own layers is no peak.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.engine.backends.openvino_library import openvino
from nnunet_torchserve.engine.backends.openvino_networks import settings_of

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
    products: list[tuple[str, Callable[[], Any]]] = [
        ("float32", partial(torch.mm, *parts)),
        ("bfloat16", partial(torch.mm, *parts.bfloat16())),
        ("int8", partial(torch._int_mm, *whole)),  # noqa: SLF001 (PyTorch has no other product of whole numbers on a CPU)
        *_by_openvino(parts),
    ]
    found = dict.fromkeys(TYPES.values(), 0.0)
    for name, product in products:
        found[name] = max(found[name], 2 * _SIDE**3 / _fastest(product))
    return found


def shares(network: Mapping[str, Any], of: Mapping[str, float]) -> dict[str, float]:
    """Backend -> the share of the processor's peak that it reached with a network, as :func:`peaks` has that."""
    rates: Mapping[str, float] = network["patches_per_second"]
    return {name: round(network["flops"] * rate / of[TYPES[Backend(name)]], 3) for name, rate in rates.items()}


def _by_openvino(parts: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same product as a graph, in the types that it computes floating-point products in here."""
    if importlib.util.find_spec("openvino") is None:
        return
    library = openvino()
    operations, core = library.opset13, library.Core()
    first, second = (part.numpy() for part in parts)
    for backend in (Backend.OPENVINO_FLOAT32, Backend.OPENVINO_BFLOAT16):
        parameter = operations.parameter(first.shape, first.dtype)
        graph = library.Model([operations.matmul(parameter, operations.constant(second), False, False)], [parameter])
        request = core.compile_model(graph, "CPU", settings_of(backend, torch.get_num_threads())).create_infer_request()
        request.set_input_tensor(library.Tensor(first))
        yield TYPES[backend], request.infer


def _fastest(product: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _LEAST or (len(seconds) < _MOST and time.perf_counter() - began < _BUDGET_S):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
