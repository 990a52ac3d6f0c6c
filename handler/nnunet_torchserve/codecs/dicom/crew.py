"""Threads that decompress frames while the next ones are read; a bounded number of frames waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from ...machine import usable_threads

MOST_THREADS = 4
"""Other workers decode too."""


class Crew:
    """A context in which work is done by threads; at its end all is done. Used by one thread.

    The first exception of the work is raised by the next :meth:`do`, or at the end. Threads start with the first work.
    """

    def __init__(self) -> None:
        self._threads = min(MOST_THREADS, usable_threads())
        self._pool = ThreadPoolExecutor(self._threads, "dicom")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Hand work over; waits while twice as much as there are threads is in hand."""
        self._pending.append(self._pool.submit(work, *arguments))
        if len(self._pending) > 2 * self._threads:
            self._pending.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while error is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
