"""The same predictor for code that runs in an event loop.

Each call runs in a thread of its own beside the loop, so that the loop is free while a server works. Cancelling a call
ends its connections at once, and waits until its thread has ended: what was being written is there then, and nothing
is written afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from .calls import Prediction
from .cases import Path_
from .description import Description, Json
from .predictor import PROCESSES, RemotePredictor
from .stopping import Stop

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

_LONGEST_END_S = 60.0
"""For a call that was given up, some cases of which may be writing a file."""

logger = logging.getLogger(__name__)


def _awaitable(
    method: Callable[Concatenate[RemotePredictor, Given], Returned],
) -> Callable[Concatenate[AsyncRemotePredictor, Given], Coroutine[Any, Any, Returned]]:
    """A method of the predictor with the same arguments and result, to be awaited."""

    @wraps(method)
    async def awaited(self: AsyncRemotePredictor, /, *arguments: Given.args, **named: Given.kwargs) -> Returned:
        return await self._run(lambda predictor: method(predictor, *arguments, **named))

    return awaited


class AsyncRemotePredictor:
    """:class:`~.predictor.RemotePredictor` with methods to be awaited; arguments and results are the same.

    Any number of calls may be awaited at once. ``get_data_iterator_from_raw_npy_data`` computes nothing, and is no
    coroutine.

    Attributes:
        predictor: what the calls go to; its attributes that ask a server (``dataset_json`` and others) block.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take the arguments of :class:`~.predictor.RemotePredictor`."""
        self.predictor = RemotePredictor(*arguments, **options)
        self._calls: dict[asyncio.Future[Any], Stop] = {}
        self.get_data_iterator_from_raw_npy_data = self.predictor.get_data_iterator_from_raw_npy_data

    def __repr__(self) -> str:
        return f"Async{self.predictor!r}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections; other calls fail. They have ended when this returns, and write nothing any more."""
        self.predictor.close()
        for stop in self._calls.values():
            stop.set()
        if self._calls:
            await _ended(*self._calls)

    async def describe(self) -> Description:
        """See :attr:`~.predictor.RemotePredictor.description`."""
        return await self._run(lambda predictor: predictor.description)

    predict_from_files = _awaitable(RemotePredictor.predict_from_files)
    predict_from_files_sequential = _awaitable(RemotePredictor.predict_from_files_sequential)
    predict_from_list_of_npy_arrays = _awaitable(RemotePredictor.predict_from_list_of_npy_arrays)
    predict_single_npy_array = _awaitable(RemotePredictor.predict_single_npy_array)

    async def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: Path_,
        use_folds: int | str | Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """See :meth:`~.remote_model.RemoteModel.initialize_from_trained_model_folder`."""

        def initialize(predictor: RemotePredictor) -> RemotePredictor:
            predictor.initialize_from_trained_model_folder(model_training_output_dir, use_folds, checkpoint_name)
            return predictor

        self.predictor.agrees_with(await self._run(initialize))

    async def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Json] | AsyncIterable[Json],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = PROCESSES,
    ) -> list[Prediction]:
        """See :meth:`~.predictor.RemotePredictor.predict_from_data_iterator`; the iterator may be asynchronous too."""
        stop, drawing = Stop(), set[asyncio.Task[Any]]()
        items = _drawn(data_iterator, stop, drawing) if isinstance(data_iterator, AsyncIterable) else data_iterator
        try:
            return await self._run(
                lambda predictor: predictor.predict_from_data_iterator(
                    items, save_probabilities, num_processes_segmentation_export
                ),
                stop,
            )
        finally:
            if drawing:  # cancelled, but not yet at its end
                await asyncio.wait(drawing, timeout=_LONGEST_END_S)

    async def _run(self, call: Callable[[RemotePredictor], Returned], stop: Stop | None = None) -> Returned:
        """Run a call in a thread of its own; if this is cancelled, give the call up, and wait for its end."""
        loop, stop = asyncio.get_running_loop(), stop or Stop()
        done: asyncio.Future[Returned] = loop.create_future()
        predictor = self.predictor.stopped_by(stop)

        def settle(result: Returned | None, error: BaseException | None) -> None:
            if error is None:
                done.set_result(result)  # type: ignore[arg-type]  # there is one where there is no error
            else:
                done.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = call(predictor)
            except BaseException as raised:  # noqa: BLE001 (raised again where it is awaited)
                error = raised
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, error)

        self._calls[done] = stop
        done.add_done_callback(self._calls.pop)
        threading.Thread(target=run, name="remote-predictor", daemon=True).start()
        try:
            await asyncio.wait({done})
        except asyncio.CancelledError:
            stop.set()
            await _ended(done)
            raise
        return done.result()


async def _ended(*calls: asyncio.Future[Any]) -> None:
    """Wait for calls that were given up, but not for good: a caller's iterator, or a disk, may hang."""
    ended, hang = await asyncio.wait(calls, timeout=_LONGEST_END_S)
    for call in ended:
        call.exception()  # nobody else asks for it
    if hang:
        logger.warning("%d calls that were given up have not ended after %d s", len(hang), _LONGEST_END_S)


def _drawn(items: AsyncIterable[Json], stop: Stop, drawing: set[asyncio.Task[Any]]) -> Iterator[Json]:
    """The items of an asynchronous iterator, for a thread beside the loop; ``stop`` cancels who is ``drawing`` one."""
    loop, source = asyncio.get_running_loop(), aiter(items)

    async def draw() -> tuple[bool, Json]:
        if (task := asyncio.current_task()) is not None:
            drawing.add(task)
            task.add_done_callback(drawing.discard)
        try:
            return True, await anext(source)
        except StopAsyncIteration:
            return False, {}

    def taken() -> Iterator[Json]:
        while True:
            stop.check()
            drawn = asyncio.run_coroutine_threadsafe(draw(), loop)
            try:
                with stop.telling(drawn.cancel):
                    there, item = drawn.result()
            except CancelledError:
                stop.check()
                raise
            finally:
                drawn.cancel()  # the stop may have come before it was told; one that is done stays as it is
            if not there:
                return
            yield item

    return taken()
