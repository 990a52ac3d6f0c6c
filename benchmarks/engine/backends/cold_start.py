"""Seconds until a graph is ready to run: compiled anew, and from OpenVINO's own cache of what it has compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.backends.networks import CPU, staged
from benchmarks.harness.material import FOLD
from benchmarks.harness.spread import spread
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.backends.openvino_library import openvino
from nnunet_torchserve.engine.backends.openvino_networks import graph_paths, settings_of
from nnunet_torchserve_tools.graphs import write_graphs

_TIMES = 3


def measure_cold_start(model: Path, backends: Sequence[Backend], scratch: Path) -> dict[str, Any]:
    """Seconds of one fold, by eager and by each backend; a fresh core each time, as a new engine has.

    Returns:
        Of each backend ``compiled``, ``cache_written`` (the first time with a cache) and ``from_cache``, and the bytes
        that the cache takes.
    """
    member = staged(model, scratch / "stage")
    eager = EagerNetworks(member, CPU)
    write_graphs(member, eager)
    shape = [1, eager.input_channels, *eager.patch_size]
    files = graph_paths(member.folder, FOLD)
    found: dict[str, Any] = {str(Backend.EAGER): {"loaded": _seconds(lambda: EagerNetworks(member, CPU), _TIMES)}}
    for backend in backends:
        cache = scratch / f"cache_{len(found)}"
        compile_ = partial(_compile, files, shape, backend)
        found[str(backend)] = {
            "compiled": _seconds(compile_, _TIMES),
            "cache_written": _seconds(partial(compile_, cache), 1),
            "from_cache": _seconds(partial(compile_, cache), _TIMES),
            "cache_bytes": sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()),
        }
    return found


def _compile(files: tuple[Path, Path], shape: Sequence[int], backend: Backend, cache: Path | None = None) -> object:
    core = openvino().Core()
    if cache is not None:
        core.set_property({"CACHE_DIR": str(cache)})
    model = core.read_model(*files)
    model.reshape(list(shape))
    settings = settings_of(backend, torch.get_num_threads())
    return core.compile_model(model, "CPU", settings).create_infer_request()


def _seconds(call: Callable[[], object], times: int) -> dict[str, float] | float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return spread(taken) if times > 1 else round(taken[0], 4)
