"""nnU-Net's own modules, compiled by ``torch.compile`` for one shape, and on CUDA captured as CUDA graphs.

Weights and modules are :mod:`.eager`'s, and so are the number formats: float32 on a CPU, float16 autocast on CUDA. What
is compiled adds and rounds in another order.

All of it is done when the networks are loaded, so that what this machine cannot compile is known before a case waits
for it. A smaller batch is filled up: like that an answer does not depend on who else is served. Folds are the same
network with other weights, and are compiled once.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch

from ...backend import Backend
from ...errors import BundleError
from ...options import FoldName
from .compile_cache import compiling, hold
from .cuda_graph import CapturedPasses, Pass
from .eager import EagerNetworks
from .interface import Weights

_RECOMPILES = 256
"""Networks that PyTorch may compile for one piece of code, before it would leave the others as they are."""

_LONGEST_REASON = 500


class CompiledNetworks:
    """The compiled network of every fold of a member; a :class:`~.interface.FoldNetworks`."""

    def __init__(self, eager: EagerNetworks, batch: int, cache: Path) -> None:
        """Compile all folds.

        Args:
            eager: the networks, loaded; they are used, and must not be unloaded by anybody else.
            batch: patches in one forward pass.
            cache: of :func:`~.compile_cache.compile_cache`.

        Raises:
            BundleError: PyTorch cannot compile a network on this machine.
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError or a MemoryError says so.
        """
        self.backend = Backend.COMPILED
        self.device = eager.device
        self.patch_size = eager.patch_size
        self.classes = eager.classes
        self.input_channels = eager.input_channels
        self.batch = batch
        self._eager, self._cache = eager, cache
        self._passes: dict[FoldName, Pass] = {}
        self._captured: CapturedPasses | None = None
        try:
            self._compile()
            self._capture()
        except (BundleError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a compiler does here, eager can answer
            msg = f"PyTorch cannot compile the network: {_reason_of(error)}"
            raise BundleError(msg) from error

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that are loaded."""
        return self._eager.folds

    @property
    def files(self) -> tuple[str, ...]:
        """None: it reads weights."""
        return self._eager.files

    @property
    def precisions(self) -> Mapping[str, int]:
        """Nothing: they are eager's."""
        return self._eager.precisions

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """The folds' networks, as they were before they were compiled; they have the weights."""
        return self._eager.modules

    @property
    def loaded(self) -> bool:
        """Whether the networks have their weights; without them no pass may be made."""
        return self._eager.loaded

    def unload(self) -> None:
        """Give the memory up, that of captured passes too: they know where the weights were."""
        self._captured = None
        self._eager.unload()

    def load(self, weights: Weights) -> None:
        """Load the weights again, and capture anew; if that fails, none is loaded.

        Args:
            weights: have the state dict of a fold, as the networks had it.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError says so.
        """
        self._eager.load(weights)
        try:
            self._capture()
        except BaseException:
            self.unload()
            raise

    @torch.inference_mode()
    def forward(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of patches; see :meth:`~.interface.FoldNetworks.forward`."""
        parts = [self._run(fold, part) for part in torch.split(patches, self.batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """The logits of at most as many patches as the networks are compiled for."""
        return self.uncaptured(fold, patches) if self._captured is None else self._captured(fold, patches)

    @torch.inference_mode()
    def uncaptured(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """The same by the compiled network alone, without CUDA graphs."""
        place = self._place()
        place[: len(patches)] = patches
        place[len(patches) :] = patches[-1]
        return self._pass(fold, place)[: len(patches)]

    def _pass(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        with self._eager.autocast():
            return self._passes[fold](patches)

    def _place(self) -> torch.Tensor:
        """Memory for a full batch. Its strides, and all else that PyTorch compiles for, are always the same."""
        return torch.zeros((self.batch, self.input_channels, *self.patch_size), device=self.device)

    @torch.inference_mode()
    def _compile(self) -> None:
        """Run each network once; the first time that is what compiles it."""
        import torch._dynamo.config as dynamo

        modules = zip(self.folds, self.modules, strict=True)
        self._passes = {fold: torch.compile(each, dynamic=False, fullgraph=True) for fold, each in modules}
        with compiling(self._cache), dynamo.patch(recompile_limit=_RECOMPILES):
            place = self._place()
            for fold in self.folds:
                self._pass(fold, place)
            weakref.finalize(self, os.close, hold(self._cache))

    @torch.inference_mode()
    def _capture(self) -> None:
        """Capture the passes, on CUDA: with the weights where they are now."""
        if self.device.type == "cuda":
            passes: dict[FoldName, Pass] = {fold: partial(self._pass, fold) for fold in self.folds}
            self._captured = CapturedPasses(passes, self._place())


def _reason_of(error: BaseException) -> str:
    """The first line that says why; PyTorch wraps what its compilers raise."""
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return ": ".join([type(reason).__name__, *lines[:1]])[:_LONGEST_REASON]
