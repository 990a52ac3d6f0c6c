"""A pass on a GPU, captured once and replayed: its kernels are launched together, and not one by one from Python.

A graph holds the addresses of what it reads and writes. So it has its patches and logits in places of their own, and it
is worth nothing once the weights lie elsewhere: whoever moves them captures anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...options import FoldName

Pass = Callable[[torch.Tensor], torch.Tensor]

_WARMUPS = 3
"""cuDNN chooses its algorithms, libraries take their workspaces: nothing of that may happen while it is captured."""


class CapturedPasses:
    """The passes of several networks for batches of one size; they share places and memory, and run one at a time."""

    def __init__(self, passes: Mapping[FoldName, Pass], patches: torch.Tensor) -> None:
        """Run each a few times, then capture it.

        Args:
            passes: of each fold.
            patches: any batch (B, C, *patch) on the device; it becomes the place that patches are put into.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            RuntimeError: a pass cannot be captured: it waits for the device in between.
        """
        self._patches = patches
        self._logits = torch.empty(0)
        self._graphs: dict[FoldName, torch.cuda.CUDAGraph] = {}
        pool: Any = torch.cuda.graph_pool_handle()
        aside: Any = torch.cuda.Stream(patches.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(patches.device):
            for fold, run in passes.items():
                logits = self._warmed_up(run, aside)
                if not self._graphs:
                    self._logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
                del logits
                graph = torch.cuda.CUDAGraph()
                # others may use the device meanwhile; what they do is not captured
                with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self._logits.copy_(run(patches))
                self._graphs[fold] = graph

    def _warmed_up(self, run: Pass, aside: Any) -> torch.Tensor:
        """The logits of the last of some passes on another stream."""
        current = torch.cuda.current_stream(self._patches.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARMUPS):
                logits = run(self._patches)
        current.wait_stream(aside)
        return logits

    def __call__(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of at most as many patches as a batch has; they are the caller's."""
        count = len(patches)
        self._patches[:count].copy_(patches)
        if count < len(self._patches):
            self._patches[count:] = patches[-1]
        self._graphs[fold].replay()
        return self._logits[:count].clone()
