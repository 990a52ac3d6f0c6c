"""Probabilities and the labels that go with them, bit for bit stock's, without all classes twice in memory.

Stock resamples every class, then runs torch's softmax or sigmoid over all of it on eight threads. Both compute most
values by vector instructions and the last few of a thread's share one by one, and the two may differ in the last bit:
so stock's shares are kept here, whatever blocks they are computed in. Labels beside probabilities are those of the
probabilities, as in stock: logits that differ may share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..tiling import STOCK_THREADS
from . import stock_arithmetic
from .canvas import Canvas
from .grid import Array, Resampling, Shape
from .rules import ArgMax, Regions, check_finite
from .sparse import Box, boxes
from .streamed import resampled
from .threads import check, in_threads

_ELEMENTS = 2**21
"""Values of a block; 8 MiB in float32."""

_VECTORS = 64
"""A multiple of what any processor's vectors hold; blocks within a thread's share are multiples of it."""

Probabilities = npt.NDArray[np.float32] | npt.NDArray[np.float16]


def export(
    logits: torch.Tensor,
    resampling: Resampling,
    rule: ArgMax | Regions,
    canvas: Canvas,
    chosen: Sequence[int],
    out: Probabilities,
    deadline: float | None = None,
) -> None:
    """Paint labels and write probabilities.

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU.
        resampling: how they reach the image's.
        rule: the model's.
        canvas: what to paint on.
        chosen: channels that are wanted.
        out: (len(chosen), z, y, x) of the crop, in the plan's axis order.
        deadline: ``time.monotonic()`` after which it is given up.

    Raises:
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    check_finite(logits)
    if resampling.taps is None or isinstance(rule, Regions):
        _whole(logits, resampling, rule, canvas, chosen, out, deadline)
        return

    def block(span: tuple[int, int]) -> None:
        put(of_span(logits, resampling, span), span, resampling.shape, rule, canvas, chosen, out)

    in_threads(block, shares(resampling.shape, len(logits)), deadline)


def of_span(logits: torch.Tensor, resampling: Resampling, span: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Softmax probabilities (C, n) of some voxels.

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU.
        resampling: how they reach the image's; it has taps.
        span: first and last voxel, counted through the whole crop; of :func:`shares`.
    """
    if resampling.taps is None:
        msg = "the plan's function gives no part of a class"
        raise ValueError(msg)
    width = resampling.shape[2]
    first, last = span[0] // width, -(-span[1] // width)
    values = stock_arithmetic.rows(logits, resampling.taps, first, last).reshape(len(logits), -1)
    values = values[:, span[0] - first * width : span[1] - first * width]
    probabilities: npt.NDArray[np.float32] = torch.softmax(torch.from_numpy(values).float().contiguous(), 0).numpy()
    return probabilities


def put(
    probabilities: npt.NDArray[np.float32],
    span: tuple[int, int],
    shape: Shape,
    rule: ArgMax | Regions,
    canvas: Canvas,
    chosen: Sequence[int],
    out: Probabilities,
) -> None:
    """Paint the labels of some voxels, and write the probabilities that are wanted.

    Args:
        probabilities: (C, n) of the voxels of ``span``.
        span: see :func:`of_span`.
        shape: of the crop.
        rule: see :func:`export`.
        canvas: see :func:`export`.
        chosen: see :func:`export`.
        out: see :func:`export`.
    """
    codes = rule.from_probabilities(probabilities)
    for box, part in _runs(span, shape):
        canvas.paint(box, codes[part].reshape(_sizes(box)))
        for target, channel in zip(out, chosen, strict=True):
            target[box] = probabilities[channel, part].reshape(_sizes(box))


def _whole(
    logits: torch.Tensor,
    resampling: Resampling,
    rule: ArgMax | Regions,
    canvas: Canvas,
    chosen: Sequence[int],
    out: Probabilities,
    deadline: float | None,
) -> None:
    """All classes at once, in float32, once: for regions, and for functions that give no part of a class."""
    values = np.empty((len(logits), *resampling.shape), np.float32)
    if resampling.taps is None:
        for channel, resampled_class in resampled(logits, resampling):
            check(deadline)
            values[channel] = resampled_class
    else:
        taps, flat = resampling.taps, values.reshape(len(logits), -1, resampling.shape[2])
        step = max(1, _ELEMENTS // flat.shape[2] // len(logits))

        def block(first: int) -> None:
            last = min(first + step, flat.shape[1])
            flat[:, first:last] = stock_arithmetic.rows(logits, taps, first, last)

        in_threads(block, range(0, flat.shape[1], step), deadline)
    if isinstance(rule, Regions):
        threads = torch.get_num_threads()
        torch.set_num_threads(STOCK_THREADS)
        try:
            torch.from_numpy(values).sigmoid_()
        finally:
            torch.set_num_threads(threads)
    else:
        lines = torch.from_numpy(values).flatten(1)
        in_threads(lambda span: _softmax(lines[:, slice(*span)]), shares(resampling.shape, len(logits)), deadline)

    def paint(box: Box) -> None:
        canvas.paint(box, rule.from_probabilities(values[:, *box]))
        for target, channel in zip(out, chosen, strict=True):
            target[box] = values[channel][box]

    in_threads(paint, boxes(resampling.shape, max(1, _ELEMENTS // len(logits))), deadline)


def _softmax(values: torch.Tensor) -> None:
    values.copy_(torch.softmax(values.contiguous(), 0))


def shares(shape: Shape, classes: int) -> Iterator[tuple[int, int]]:
    """Spans of voxels, counted through the whole crop, none of which crosses from one thread's share to the next."""
    voxels = shape[0] * shape[1] * shape[2]
    share = -(-voxels // STOCK_THREADS)
    step = max(1, _ELEMENTS // classes // _VECTORS) * _VECTORS
    for begin in range(0, voxels, share):
        end = min(voxels, begin + share)
        for start in range(begin, end, step):
            yield start, min(end, start + step)


def _runs(span: tuple[int, int], shape: Shape) -> Iterator[tuple[Box, slice]]:
    """Boxes that make up a span, each with its part of the span: pieces of rows, and whole rows of a plane."""
    _, height, width = shape
    start, end = span
    while start < end:
        row, column = divmod(start, width)
        plane, row = divmod(row, height)
        whole = 0 if column else min(height - row, (end - start) // width)
        size = whole * width if whole else min(width - column, end - start)
        columns = slice(0, width) if whole else slice(column, column + size)
        box = (slice(plane, plane + 1), slice(row, row + max(1, whole)), columns)
        yield box, slice(start - span[0], start - span[0] + size)
        start += size


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def blank(rule: ArgMax | Regions, channels: Sequence[int], shape: Sequence[int], dtype: type[np.generic]) -> Array:
    """Probabilities outside the crop: background is certain there, unless there are regions."""
    outside = np.zeros((len(channels), *shape), dtype)
    if isinstance(rule, ArgMax):
        outside[[channel == 0 for channel in channels]] = 1
    return outside
