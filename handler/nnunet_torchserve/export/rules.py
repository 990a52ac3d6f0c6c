"""From logits to labels: the largest wins, or regions are painted over one another.

Within the export a voxel's answer is a *code*: the class that won, or for region-based models 0 for none and ``k + 1``
for the region painted last. A rule gives codes on the network's grid, where a code is *certain* if interpolation
between voxels that share it can only give it again; decides interpolated voxels in float32, saying where that is too
close to call; and settles those from values in stock's own arithmetic.

Stock rounds resampled logits to the dtype of the logits, float16, before it compares them, so that ties are common and
go to the first class. Why a margin of one step of that dtype is enough: weights are not negative and sum to one. If
class *a* leads class *k* by ``g > eps * max(|a|, |k|)`` at every corner of a cell, it leads by more than
``eps * max(|A|, |K|)`` anywhere between them, and two numbers that far apart round to different ones. It is enough to
look at ``|a|`` and the second best class: ``|k| <= |a| + g``, so that ``g > eps * |a|``, with a little slack, implies
the same of ``|k|``, and every other class is further behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import NonFiniteLogits
from .grid import Array, TrainedModel
from .threads import in_threads

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

Codes = npt.NDArray[Any]
"""uint8, or int32 if there are more than fit."""

CodeType = type[np.uint8] | type[np.int32]

MIXED: dict[Any, int] = {np.uint8: 255, np.int32: -1}
"""What stands for "open" among codes: all bits are set."""

PAINTED = 0.5
"""``LabelManager`` paints a region where its probability is above this."""

_ROUNDING = 2**-20
"""What interpolating in float32 may be off by, as a part of the largest logit: 8 products and sums and the products of
3 weights, each rounded by 2^-24, are within 13 * 2^-24."""

_SLACK = 1.01
"""For what the bounds neglect: rounding of the bounds themselves, and of float64."""

_SURELY_POSITIVE = 2**-20
"""A logit from which sigmoid is above 0.5 in float32 on any processor; at 2^-24 it is not yet."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The numbers that logits of one case can be rounded to.

    Attributes:
        eps: distance of two neighbours, relative to the larger.
        tiny: distance of two neighbours at 0.
        error: what a logit interpolated in float32 may be off by.
    """

    eps: float
    tiny: float
    error: float

    @classmethod
    def of(cls, dtype: torch.dtype, largest: float) -> Precision:
        """For logits of ``dtype`` whose largest magnitude is ``largest``."""
        numbers = torch.finfo(dtype)
        tiny = max(numbers.smallest_normal * numbers.eps, torch.finfo(torch.float32).smallest_normal)
        return cls(numbers.eps * _SLACK, tiny * _SLACK, largest * _ROUNDING)


def rule_of(model: TrainedModel) -> ArgMax | Regions:
    """The rule of ``LabelManager.convert_logits_to_segmentation`` for this model."""
    labels = model.labels
    if labels.has_regions:
        order = tuple(int(label) for label in labels.regions_class_order or ())
        return Regions(len(order), order, labels)
    return ArgMax(int(labels.num_segmentation_heads))


@dataclass(frozen=True, slots=True)
class ArgMax:
    """The class with the largest logit wins, the first of equals."""

    classes: int

    @property
    def dtype(self) -> CodeType:
        """Of codes."""
        return np.uint8 if self.classes <= MIXED[np.uint8] else np.int32

    @property
    def labels(self) -> None:
        """Code -> label; they are the same."""
        return

    @property
    def largest_label(self) -> int:
        """That an answer may hold."""
        return self.classes - 1

    def encode(self, logits: torch.Tensor, *, certify: bool) -> tuple[Codes, float]:
        """Codes of voxels that nothing was done to.

        Args:
            logits: (C, …), float16 or float32.
            certify: also tell where the code is not certain: it is :data:`MIXED` there.

        Returns:
            Codes (…), and the largest magnitude of all logits.

        Raises:
            NonFiniteLogits: a logit is NaN or infinite.
        """
        best = _float32(logits[0])
        ends = [best.min()]
        second = np.full_like(best, -np.inf)
        code = np.zeros(best.shape, self.dtype)
        value, larger, number = np.empty_like(best), np.empty(best.shape, np.bool_), np.empty_like(code)
        for channel in range(1, self.classes):
            torch.from_numpy(value).copy_(logits[channel])  # numpy takes 30 times as long
            ends.append(value.min())
            np.greater(value, best, out=larger)
            np.maximum(code, np.multiply(larger.view(np.uint8), self.dtype(channel), out=number), out=code)
            if certify:
                np.maximum(second, np.minimum(value, best), out=second)
            np.maximum(best, value, out=best)
        largest = _largest([*ends, best.max()])
        if certify:
            precision = Precision.of(logits.dtype, 0)
            with np.errstate(over="ignore"):  # the distance of two float32 may be none
                code[best - second <= np.abs(best) * precision.eps + precision.tiny] = MIXED[self.dtype]
        return code, largest

    def decide(self, values: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of voxels interpolated in float32.

        Args:
            values: float32 (n, C); overwritten.
            precision: of the logits.

        Returns:
            Codes, int64 (n), and where they are too close to call, bool (n).
        """
        best = values.amax(1)
        close = best - (best.abs() * precision.eps + (precision.tiny + 3 * precision.error))
        candidates = torch.ge(values, close[:, None], out=values)
        number = torch.arange(self.classes, device=values.device, dtype=torch.float32)
        winner = candidates.mv(number).long()  # ten times as fast as argmax; exact where there is one candidate
        return winner, candidates.sum(1) != 1

    def settle(self, values: Array) -> Codes:
        """Codes (n) of voxels whose logits (C, n) were resampled and rounded as stock does it."""
        codes: Codes = np.argmax(values, axis=0)
        return codes

    def add(self, channel: int, values: Array, best: Array, codes: Codes) -> None:
        """Take one more class into account.

        Args:
            channel: its number; classes come in order.
            values: its logits on the image's grid, as the plan's function gave them.
            best: the largest so far, at first those of the first class; updated.
            codes: 0 at first; updated.
        """
        larger = values > best
        np.maximum(codes, larger.view(np.uint8) * self.dtype(channel), out=codes)
        np.maximum(best, values, out=best)

    def from_probabilities(self, probabilities: npt.NDArray[np.float32]) -> Codes:
        """Codes (…) of probabilities (C, …), of which different logits may share one."""
        codes: Codes = np.argmax(probabilities, axis=0).astype(self.dtype)
        return codes


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions whose probability is above a half are painted one over the other.

    Attributes:
        classes: regions.
        order: the label that each region is painted with, in the order of painting.
        manager: nnU-Net's; its nonlinearity decides what a probability is.
    """

    classes: int
    order: Sequence[int]
    manager: LabelManager

    @property
    def dtype(self) -> CodeType:
        """Of codes."""
        return np.uint8 if self.classes < MIXED[np.uint8] else np.int32

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Code -> label."""
        return np.array([0, *self.order])

    @property
    def largest_label(self) -> int:
        """That an answer may hold."""
        return max((0, *self.order))

    def encode(self, logits: torch.Tensor, *, certify: bool) -> tuple[Codes, float]:
        """As :meth:`ArgMax.encode`."""
        code = np.zeros(logits.shape[1:], self.dtype)
        value, unsure = np.empty(code.shape, np.float32), np.zeros(code.shape, np.bool_)
        ends = []
        for channel in range(self.classes):
            torch.from_numpy(value).copy_(logits[channel])
            ends += [value.min(), value.max()]
            positive, possible = value >= _SURELY_POSITIVE, value > 0
            if np.count_nonzero(positive) != np.count_nonzero(possible):
                if certify:
                    unsure |= possible ^ positive
                else:
                    positive = self.manager.apply_inference_nonlin(value).numpy() > PAINTED
            np.maximum(code, positive.view(np.uint8) * self.dtype(channel + 1), out=code)
        if certify:
            code[unsure] = MIXED[self.dtype]
        return code, _largest(ends)

    def decide(self, values: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`ArgMax.decide`."""
        error = 2 * precision.error + precision.tiny
        positive = values >= _SURELY_POSITIVE + error
        near = (~positive & (values > -error)).any(1)
        rank = torch.arange(1, self.classes + 1, device=values.device)
        return (positive * rank).amax(1), near

    def settle(self, values: Array) -> Codes:
        """As :meth:`ArgMax.settle`."""
        positive = self.manager.apply_inference_nonlin(values).numpy() > PAINTED
        codes: Codes = np.max(positive * np.arange(1, self.classes + 1)[:, None], axis=0)
        return codes

    def add(self, channel: int, values: Array, best: Array, codes: Codes) -> None:  # noqa: ARG002
        """As :meth:`ArgMax.add`; nothing is compared."""
        positive = self.manager.apply_inference_nonlin(values).numpy() > PAINTED
        np.maximum(codes, positive.view(np.uint8) * self.dtype(channel + 1), out=codes)

    def from_probabilities(self, probabilities: npt.NDArray[np.float32]) -> Codes:
        """As :meth:`ArgMax.from_probabilities`."""
        rank = np.arange(1, self.classes + 1).reshape(-1, *(1,) * (probabilities.ndim - 1))
        codes: Codes = np.max((probabilities > PAINTED) * rank, axis=0).astype(self.dtype)
        return codes


def check_finite(logits: torch.Tensor) -> None:
    """Raise :class:`NonFiniteLogits` if one of (C, …) is NaN or infinite."""
    if not all(in_threads(lambda channel: bool(torch.isfinite(channel).all()), logits)):
        raise NonFiniteLogits


def _float32(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """A copy."""
    values: npt.NDArray[np.float32] = torch.empty(logits.shape).copy_(logits).numpy()
    return values


def _largest(ends: Sequence[np.floating[Any]]) -> float:
    """The largest magnitude of values whose least and largest are among ``ends``, which NaN reaches too."""
    largest = float(np.max(np.abs(ends)))
    if not np.isfinite(largest):
        raise NonFiniteLogits
    return largest
