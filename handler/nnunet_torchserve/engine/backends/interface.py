"""What the engine knows of a backend: the networks of a member's folds, which make logits of patches.

Scheduler, accumulator and core do not know which one runs. All of its methods are called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from ...backend import Backend
from ...options import FoldName


class Weights(Protocol):
    """An archive's files, to be read when networks are loaded again: :class:`~...open_weights.OpenWeights`."""

    def read(self, member: str, fold: FoldName) -> Mapping[str, torch.Tensor]:
        """The state dict of a member's fold."""

    def content(self, file: str) -> bytes:
        """Another file, by its name in the archive."""


class FoldNetworks(Protocol):
    """The network of every fold of a member, in evaluation mode on one device. Not thread-safe: one thread runs it.

    Its weights can be given up and loaded again.

    Attributes:
        backend: what runs.
        device: where patches are to be, and where logits are.
        patch_size: voxels per axis, (z, y, x) or (y, x).
        input_channels, classes: of a patch, and of its logits.
    """

    backend: Backend
    device: torch.device
    patch_size: tuple[int, ...]
    input_channels: int
    classes: int

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that it has."""

    @property
    def loaded(self) -> bool:
        """Whether the networks have their weights; without them no pass may be made."""

    def unload(self) -> None:
        """Give the weights' memory up."""

    def load(self, weights: Weights) -> None:
        """Load the weights again; if that fails, none is loaded.

        Args:
            weights: those of the archive that the networks were loaded from.

        Raises:
            torch.OutOfMemoryError: the device has no room; on a CPU a RuntimeError or a MemoryError says so.
        """

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the archive, beside those of the weights, that :meth:`load` reads."""

    @property
    def precisions(self) -> Mapping[str, int]:
        """In which precisions all folds' layers run, where that is read from what was compiled; else nothing.

        Returns:
            The library's name of a precision -> how many convolutions and matrix products run in it.
        """

    def forward(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of patches.

        Args:
            fold: whose network.
            patches: (B, C, *patch) on the device.

        Returns:
            (B, classes, *patch), float32 (float16 on CUDA).
        """

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """The folds' PyTorch modules, of a backend that runs such."""
