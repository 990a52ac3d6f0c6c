"""How much memory the JVM gets and how large a body may be.

A request's body costs the JVM three to four times its size (received, aggregated, queued, sent to a worker), and
the JVM holds every request that a worker works on or that waits in a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError

MIB = 1024**2
HEAP_SHARE = 0.25
BODY_COPIES = 4
SMALLEST_BODY_LIMIT = 64 * MIB
LARGEST_BODY_LIMIT = 512 * MIB
FRONT_END_MARGIN = MIB
"""TorchServe's own limits lie this much above ours, so that ours answers first, with a reason."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: the JVM's heap, and the largest body in and out."""

    heap: int
    body_limit: int

    @property
    def front_end_limit(self) -> int:
        """TorchServe's max_request_size and max_response_size."""
        return self.body_limit + FRONT_END_MARGIN


def compute_sizes(memory: int, held: int, *, heap: int | None = None, body_limit: int | None = None) -> Sizes:
    """Sizes for a machine.

    Args:
        memory: bytes of the machine.
        held: requests that the JVM may hold at once: workers plus queue places, of all models.
        heap: set by hand, bytes.
        body_limit: set by hand, bytes.

    Raises:
        UsageError: what was set by hand does not fit.

    >>> compute_sizes(24 * 1024 * MIB, held=3).body_limit // MIB
    512
    """
    chosen_heap = heap if heap is not None else int(memory * HEAP_SHARE)
    if body_limit is None:
        fitting = chosen_heap // (BODY_COPIES * held)
        return Sizes(chosen_heap, min(LARGEST_BODY_LIMIT, max(SMALLEST_BODY_LIMIT, fitting)))
    needed = BODY_COPIES * held * body_limit
    if needed > chosen_heap:
        msg = (
            f"--body-limit {body_limit // MIB} needs a heap of {needed // MIB} MiB for {held} requests at once "
            f"({BODY_COPIES} copies each); the heap is {chosen_heap // MIB} MiB: lower it, --workers or --queue, "
            "or raise --heap"
        )
        raise UsageError(msg)
    if body_limit + FRONT_END_MARGIN > 2**31 - 1:
        msg = "--body-limit must be below 2047: TorchServe's limit is a 32-bit number"
        raise UsageError(msg)
    return Sizes(chosen_heap, body_limit)
