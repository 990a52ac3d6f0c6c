"""The sum of weighted patch logits of one case, in stock's arithmetic.

``nnUNetPredictor`` adds float32 patches into float16 buffers, divides by float16 weights for each fold, then sums
folds in float16. That rounding decides labels where two classes nearly tie, so it is kept to the bit: the same
operations, on the same types, in the same order. Used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image

from ..cases import Settings
from ..errors import CaseFailed
from ..tiling import Slicer, gaussian, slicers


class CaseAccumulator:
    """One case on its way through the network: its windows, and the logits so far."""

    def __init__(
        self, data: torch.Tensor, classes: int, patch_size: tuple[int, ...], settings: Settings, device: torch.device
    ) -> None:
        """Pad the volume and lay out the buffers.

        Args:
            data: float32 (C, z, y, x) on the network's grid.
            classes: output channels of the network.
            patch_size: (z, y, x) or (y, x).
            settings: tile step, weighting, folds.
            device: where the volume and the sums are held.
        """
        padded, self._unpad = pad_nd_image(data.to(device), patch_size, "constant", {"value": 0}, return_slicer=True)
        self._data: torch.Tensor = padded
        self.windows: Sequence[Slicer] = slicers(tuple(padded.shape[1:]), patch_size, settings.tile_step_size)
        self._gaussian = gaussian(patch_size, device) if settings.use_gaussian else None
        self._folds = len(settings.folds)
        self._folds_done = 0
        self._logits = torch.zeros((classes, *padded.shape[1:]), dtype=torch.half, device=device)
        self._total: torch.Tensor | None = None
        self._weights = torch.zeros(padded.shape[1:], dtype=torch.half, device=device)
        weight = 1 if self._gaussian is None else self._gaussian
        for window in self.windows:
            self._weights[window[1:]] += weight

    def patch(self, window: Slicer) -> torch.Tensor:
        """The volume under a window: float32 (C, *patch), a view."""
        return self._data[window]

    def add(self, window: Slicer, logits: torch.Tensor) -> None:
        """Add one patch; ``logits`` (classes, *patch) is used up. Windows of a fold must come in order."""
        if self._gaussian is not None:
            logits *= self._gaussian
        self._logits[window] += logits

    def finish_fold(self) -> None:
        """All windows of a fold are in: normalise it and add it to the sum of folds.

        Raises:
            CaseFailed: a logit is NaN or infinite. Stock checks for infinity only and would answer a NaN with
                background.
        """
        torch.div(self._logits, self._weights, out=self._logits)
        if not torch.isfinite(self._logits).all():
            msg = "the network's logits for this case are not finite; no segmentation can be given"
            raise CaseFailed(msg)
        self._folds_done += 1
        if self._total is None:
            self._total = self._logits
            if self._folds > 1:
                self._logits = torch.zeros_like(self._total)
        else:
            self._total += self._logits
            self._logits.zero_()

    def result(self) -> torch.Tensor:
        """The mean logits of all folds, padding removed: float16 (classes, z, y, x), on the CPU."""
        if self._total is None or self._folds_done != self._folds:
            msg = f"{self._folds_done} of {self._folds} folds are done"
            raise RuntimeError(msg)
        total = self._total.cpu()
        if self._folds > 1:
            total /= self._folds
        return total[(slice(None), *self._unpad[1:])]
