"""One case on its way through the network: its forward passes, and the sums of their logits.

:class:`HalfAccumulator` keeps stock's arithmetic. ``nnUNetPredictor`` sums mirrored logits in float32, adds weighted
float32 patches into float16 buffers, divides by float16 weights for each fold, then sums folds in float16. That
rounding decides labels where two classes nearly tie, so it is kept to the bit: the same operations, on the same
types, in the same order. :class:`Float32Accumulator` averages the folds of a window before it is added, and has one
float32 buffer. Used by one thread at a time.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image

from ..cases import Settings
from ..errors import NonFiniteLogits
from ..options import Accumulate, FoldName
from ..tiling import Slicer, gaussian, padded_shape, slicers

_HOST = torch.device("cpu")

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a zeroed tensor of a shape and type, wherever the caller wants the result to lie."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One forward pass of one case: a window, seen by one fold's network, mirrored along some axes."""

    fold: FoldName
    number: int
    window: Slicer
    mirror: tuple[int, ...]
    last_of_window: bool
    last_of_fold: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """What a network takes and gives, and where its cases are summed.

    Attributes:
        classes: output channels of the network.
        patch_size: (z, y, x) or (y, x).
        device: where the volume and the sums are held.
        batch: passes in a forward pass of the network.
    """

    classes: int
    patch_size: tuple[int, ...]
    device: torch.device
    batch: int = 1


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of mirroring axes in nnU-Net's order, none first; axes of a patch (C, *spatial)."""
    return [
        tuple(axis + 1 for axis in combination)
        for count in range(len(axes) + 1)
        for combination in itertools.combinations(axes, count)
    ]


def new_accumulator(
    data: torch.Tensor,
    settings: Settings,
    layout: Layout,
    allocate: Allocate | None = None,
) -> CaseAccumulator:
    """The accumulator that the settings ask for; arguments as for :class:`CaseAccumulator`."""
    kind = Float32Accumulator if settings.accumulate is Accumulate.FLOAT32 else HalfAccumulator
    return kind(data, settings, layout, allocate)


def held_bytes(shape: Sequence[int], settings: Settings, layout: Layout) -> int:
    """Bytes that an accumulator holds on its device for a volume of ``shape`` (C, z, y, x)."""
    channels, *spatial = shape
    voxels = math.prod(padded_shape(spatial, layout.patch_size))
    if settings.accumulate is Accumulate.FLOAT32:
        sums, size = 1, torch.float32.itemsize
    else:
        sums, size = min(2, len(settings.folds)), torch.half.itemsize
    return voxels * (channels * torch.float32.itemsize + (layout.classes * sums + 1) * size)


class CaseAccumulator(ABC):
    """The forward passes that a case needs, and the logits so far.

    Passes are numbered 0 to ``len(self) - 1``: by group of windows, then fold, window and mirroring. They may be
    computed in any batches, but must be added in this order.
    """

    dtype: torch.dtype
    folds_together: bool
    """Whether a window is summed over all folds before it is added."""

    def __init__(
        self,
        data: torch.Tensor,
        settings: Settings,
        layout: Layout,
        allocate: Allocate | None = None,
    ) -> None:
        """Pad the volume and lay out the buffers.

        Args:
            data: float32 (C, z, y, x) on the network's grid.
            settings: tile step, weighting, folds, mirroring.
            layout: of the network and its device.
            allocate: makes the buffer of the result; an ordinary tensor on the device where it is not given.
        """
        self.volume_shape = tuple(int(n) for n in data.shape)
        self.device = layout.device
        padded, unpad = pad_nd_image(
            data.to(self.device), layout.patch_size, "constant", {"value": 0}, return_slicer=True
        )
        self._data: torch.Tensor = padded
        self.unpad: tuple[slice, ...] = (slice(None), *(slice(int(s.start), int(s.stop)) for s in unpad[1:]))
        self._windows = slicers(tuple(padded.shape[1:]), layout.patch_size, settings.tile_step_size)
        self._folds = settings.folds
        self._mirrorings = mirrorings(settings.mirroring_axes)
        self._gaussian = gaussian(layout.patch_size, self.device) if settings.use_gaussian else None
        self._group = self._windows_in_a_group(layout.batch)
        shape = (layout.classes, *padded.shape[1:])
        self._result = allocate(shape, self.dtype) if allocate else self._zeros(shape)
        self._weights = self._zeros(shape[1:])
        self._partial: dict[int, torch.Tensor] = {}
        self._weighted = self._added = 0

    def __len__(self) -> int:
        """Forward passes in all."""
        return len(self._folds) * len(self._windows) * len(self._mirrorings)

    @property
    def added(self) -> int:
        """Passes whose logits are in; the number of the next."""
        return self._added

    @property
    def done(self) -> bool:
        """Whether every pass is in."""
        return self._added == len(self)

    @property
    def same_fold(self) -> int:
        """Passes from the next one on that need the same fold's network."""
        _, windows, rest = self._place(self._added)
        share = windows * len(self._mirrorings)
        return share - rest % share

    def unit(self, number: int) -> Unit:
        """What pass ``number`` is."""
        first, windows, rest = self._place(number)
        rest, mirror = divmod(rest, len(self._mirrorings))
        fold, window = divmod(rest, windows)
        last_of_window = mirror == len(self._mirrorings) - 1
        return Unit(
            fold=self._folds[fold],
            number=first + window,
            window=self._windows[first + window],
            mirror=self._mirrorings[mirror],
            last_of_window=last_of_window and (not self.folds_together or fold == len(self._folds) - 1),
            last_of_fold=last_of_window and first + window == len(self._windows) - 1,
        )

    def patch(self, unit: Unit) -> torch.Tensor:
        """The network's input for a pass: float32 (C, *patch)."""
        patch = self._data[unit.window]
        return torch.flip(patch, unit.mirror) if unit.mirror else patch

    @abstractmethod
    def add(self, unit: Unit, logits: torch.Tensor) -> None:
        """Take in the next pass; ``logits`` (classes, *patch) is used up.

        Raises:
            NonFiniteLogits: a finished logit is NaN or infinite. Stock checks for infinity only, and would answer a NaN
                with background.
        """

    def move_to_host(self) -> bool:
        """Give the device's memory back and go on with the host's; ``False`` if that was done before."""
        if self.device == _HOST:
            return False
        moved = {name: value.to(_HOST) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        self._partial = {number: logits.to(_HOST) for number, logits in self._partial.items()}
        vars(self).update(moved)
        self.device = _HOST
        return True

    def result(self) -> torch.Tensor:
        """The mean logits of all folds with the padding: ``dtype`` (classes, z, y, x)."""
        if not self.done:
            msg = f"{self._added} of {len(self)} passes are in"
            raise RuntimeError(msg)
        return self._result

    def _windows_in_a_group(self, _batch: int) -> int:
        """Windows that one fold's network sees before the next fold's turn."""
        return len(self._windows)

    def _place(self, number: int) -> tuple[int, int, int]:
        """The group of a pass: its first window, how many it has, and the pass's number in it."""
        group, rest = divmod(number, self._group * len(self._folds) * len(self._mirrorings))
        first = group * self._group
        return first, min(self._group, len(self._windows) - first), rest

    def _collect(self, unit: Unit, logits: torch.Tensor) -> torch.Tensor | None:
        """Sum the passes of a window; the sum when its last pass is in."""
        if unit.mirror:
            logits = torch.flip(logits, unit.mirror)
        if unit.number in self._partial:
            self._partial[unit.number] += logits
        else:
            self._partial[unit.number] = logits
        if not unit.last_of_window:
            return None
        if self._weighted == unit.number:  # not again for another fold
            self._weights[unit.window[1:]] += 1 if self._gaussian is None else self._gaussian
            self._weighted += 1
        return self._partial.pop(unit.number)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class HalfAccumulator(CaseAccumulator):
    """Stock's arithmetic: fold after fold, each in a float16 buffer, summed in another."""

    dtype = torch.half
    folds_together = False

    def __init__(
        self,
        data: torch.Tensor,
        settings: Settings,
        layout: Layout,
        allocate: Allocate | None = None,
    ) -> None:
        super().__init__(data, settings, layout, allocate)
        self._folds_done = 0
        self._fold_sum: torch.Tensor | None = None
        if len(self._folds) > 1:
            self._fold_sum = self._zeros(tuple(self._result.shape))

    def add(self, unit: Unit, logits: torch.Tensor) -> None:
        """See :meth:`CaseAccumulator.add`."""
        window_logits = self._collect(unit, logits)
        if window_logits is not None:
            if len(self._mirrorings) > 1:
                window_logits /= len(self._mirrorings)
            if self._gaussian is not None:
                window_logits *= self._gaussian
            fold_sum = self._result if self._fold_sum is None else self._fold_sum
            fold_sum[unit.window] += window_logits
        if unit.last_of_fold:
            self._finish_fold()
        self._added += 1

    def _finish_fold(self) -> None:
        """Divide by the weights, and add the fold to those before it; a sum of folds may overflow where none does."""
        fold = self._result if self._fold_sum is None else self._fold_sum
        torch.div(fold, self._weights, out=fold)
        _check_finite(fold)
        if fold is self._result:
            return
        if self._folds_done == 0:
            self._result.copy_(fold)
        else:
            self._result += fold
        fold.zero_()
        self._folds_done += 1
        if self._folds_done == len(self._folds):
            self._result /= self._folds_done
            _check_finite(self._result)


class Float32Accumulator(CaseAccumulator):
    """All folds and mirrorings of a window are averaged in float32 before it is added: one buffer, less rounding.

    The folds take turns every few windows, as many as a batch holds, so that a batch needs one fold's network.
    """

    dtype = torch.float32
    folds_together = True

    def add(self, unit: Unit, logits: torch.Tensor) -> None:
        """See :meth:`CaseAccumulator.add`."""
        window_logits = self._collect(unit, logits.float())
        if window_logits is not None:
            window_logits /= len(self._mirrorings) * len(self._folds)
            if self._gaussian is not None:
                window_logits *= self._gaussian
            self._result[unit.window] += window_logits
        self._added += 1
        if self.done:
            torch.div(self._result, self._weights, out=self._result)
            _check_finite(self._result)

    def _windows_in_a_group(self, batch: int) -> int:
        return min(batch, len(self._windows))


def _check_finite(logits: torch.Tensor) -> None:
    # class by class: the temporaries are several times as large as what is looked at
    if not all(bool(torch.isfinite(channel).all()) for channel in logits):
        raise NonFiniteLogits
