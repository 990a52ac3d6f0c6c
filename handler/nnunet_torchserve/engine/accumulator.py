"""One case on its way through the network, in stock's arithmetic.

``nnUNetPredictor`` sums mirrored logits in float32, adds weighted float32 patches into float16 buffers, divides by
float16 weights for each fold, then sums folds in float16. That rounding decides labels where two classes nearly tie,
so it is kept to the bit: the same operations, on the same types, in the same order. Used by one thread at a time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image

from ..cases import Settings
from ..errors import CaseFailed, Deadline
from ..options import FoldName
from ..tiling import Slicer, gaussian, slicers

_CHECK_EVERY = 64

Allocate = Callable[[tuple[int, ...]], torch.Tensor]
"""Makes a zeroed float16 tensor of a shape, wherever the caller wants the result to lie."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One forward pass of one case: a window, seen by one fold's network, mirrored along some axes."""

    fold: FoldName
    window: Slicer
    mirror: tuple[int, ...]
    last_of_window: bool
    last_of_fold: bool


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of mirroring axes in nnU-Net's order, none first; axes of a patch (C, *spatial)."""
    return [
        tuple(axis + 1 for axis in combination)
        for count in range(len(axes) + 1)
        for combination in itertools.combinations(axes, count)
    ]


class CaseAccumulator:
    """The forward passes that a case needs, and the logits so far.

    Passes are numbered 0 to ``len(self) - 1``, fold-major, then by window, then by mirroring; they may be computed
    in any batches, but must be added in this order.
    """

    def __init__(
        self,
        data: torch.Tensor,
        classes: int,
        patch_size: tuple[int, ...],
        settings: Settings,
        device: torch.device,
        allocate: Allocate | None = None,
        deadline: float | None = None,
    ) -> None:
        """Pad the volume and lay out the buffers.

        Args:
            data: float32 (C, z, y, x) on the network's grid.
            classes: output channels of the network.
            patch_size: (z, y, x) or (y, x).
            settings: tile step, weighting, folds, mirroring.
            device: where the volume and the sums are held.
            allocate: makes the buffer of the result; an ordinary tensor on ``device`` where it is not given.
            deadline: monotonic seconds; weighting very many windows is given up then.

        Raises:
            Deadline: the time ran out.
        """
        padded, unpad = pad_nd_image(data.to(device), patch_size, "constant", {"value": 0}, return_slicer=True)
        self._data: torch.Tensor = padded
        self.device = device
        self.unpad: tuple[slice, ...] = (slice(None), *(slice(int(s.start), int(s.stop)) for s in unpad[1:]))
        self._windows = slicers(tuple(padded.shape[1:]), patch_size, settings.tile_step_size)
        self._folds = settings.folds
        self._mirrorings = mirrorings(settings.mirroring_axes)
        self._gaussian = gaussian(patch_size, device) if settings.use_gaussian else None
        shape = (classes, *padded.shape[1:])
        self._result = allocate(shape) if allocate else _zeros(shape, device)
        self._fold_sum = self._result if len(self._folds) == 1 else _zeros(shape, device)
        self._weights = _zeros(shape[1:], device)
        weight = 1 if self._gaussian is None else self._gaussian
        for number, window in enumerate(self._windows):
            if deadline is not None and number % _CHECK_EVERY == 0 and time.monotonic() >= deadline:
                msg = "the time for this request ran out while its patches were laid out"
                raise Deadline(msg)
            self._weights[window[1:]] += weight
        self._partial: torch.Tensor | None = None
        self._added = 0
        self._folds_done = 0

    def __len__(self) -> int:
        """Forward passes in all."""
        return len(self._folds) * self.passes_per_fold

    @property
    def passes_per_fold(self) -> int:
        """Forward passes that one fold's network makes."""
        return len(self._windows) * len(self._mirrorings)

    @property
    def added(self) -> int:
        """Passes whose logits are in; the number of the next."""
        return self._added

    @property
    def done(self) -> bool:
        """Whether every pass is in."""
        return self._added == len(self)

    def unit(self, number: int) -> Unit:
        """What pass ``number`` is."""
        rest, mirror = divmod(number, len(self._mirrorings))
        fold, window = divmod(rest, len(self._windows))
        last_of_window = mirror == len(self._mirrorings) - 1
        return Unit(
            fold=self._folds[fold],
            window=self._windows[window],
            mirror=self._mirrorings[mirror],
            last_of_window=last_of_window,
            last_of_fold=last_of_window and window == len(self._windows) - 1,
        )

    def patch(self, unit: Unit) -> torch.Tensor:
        """The network's input for a pass: float32 (C, *patch)."""
        patch = self._data[unit.window]
        return torch.flip(patch, unit.mirror) if unit.mirror else patch

    def add(self, unit: Unit, logits: torch.Tensor) -> None:
        """Take in the next pass; ``logits`` (classes, *patch) is used up.

        Raises:
            CaseFailed: a logit of a finished fold, or of the mean of folds, is NaN or infinite. Stock checks for
                infinity in a fold only, and would answer a NaN with background.
        """
        if self._partial is None:
            self._partial = logits
        else:
            self._partial += torch.flip(logits, unit.mirror)
        if unit.last_of_window:
            window_logits, self._partial = self._partial, None
            if len(self._mirrorings) > 1:
                window_logits /= len(self._mirrorings)
            if self._gaussian is not None:
                window_logits *= self._gaussian
            self._fold_sum[unit.window] += window_logits
        if unit.last_of_fold:
            self._finish_fold()
        self._added += 1
        if self.done and len(self._folds) > 1:
            self._result /= len(self._folds)
            _check_finite(self._result)  # the sum of folds may overflow where no fold does

    def _finish_fold(self) -> None:
        torch.div(self._fold_sum, self._weights, out=self._fold_sum)
        _check_finite(self._fold_sum)
        if self._fold_sum is self._result:
            return
        if self._folds_done == 0:
            self._result.copy_(self._fold_sum)
        else:
            self._result += self._fold_sum
        self._folds_done += 1
        self._fold_sum.zero_()

    def result(self) -> torch.Tensor:
        """The mean logits of all folds with the padding: float16 (classes, z, y, x)."""
        if not self.done:
            msg = f"{self._added} of {len(self)} passes are in"
            raise RuntimeError(msg)
        return self._result


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        msg = "the network's logits for this case are not finite; no segmentation can be given"
        raise CaseFailed(msg)


def _zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.half, device=device)
