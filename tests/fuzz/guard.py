"""What must hold of the process while a target runs.

No file is opened by a name, no warning is given, nothing is printed, no handle is left open, no program is started,
nothing is unpickled, and no memory is taken beyond what small limits promise. Exceptions that a target lets out are
finds like these.

One guard for a process, in its main thread; it changes the working directory, the standard streams, the warning
filters and the resource limits for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CANARY = "canary.raw"
"""A file that lies where the targets run."""

FIND, ACCEPTED = "find", "accepted"

_DATA_BYTES = 160 * 2**20
"""Above what the process has when it is armed: an allocation beyond raises MemoryError, which is a find. The largest
image that the targets' limits allow takes less than 50 MiB in float64, twice."""

_RESIDENT_BYTES = 96 * 2**20
"""Above the same, of memory that was written to: for whoever catches the MemoryError."""

_LARGEST_FILE_BYTES = 16 * 2**20
"""Of a memfd."""

_IN_OPEN, _IN_CREATE = 0x20, 0x100

_MAY_BE_OPENED = tuple(
    str(Path(folder))
    for folder in (sys.prefix, sys.base_prefix, Path(__file__).parents[2] / "handler", "/proc/self/fd", "/dev/fd")
)
_FORBIDDEN_EVENTS = (
    "os.exec", "os.fork", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.symlink", "os.system",
    "os.truncate", "pickle.find_class", "shutil.", "socket.", "subprocess.", "tempfile.", "urllib.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one input ended.

    Attributes:
        word: ``accepted``, a problem's code, or ``find``.
        problem: what was found, the same words for the same fault.
        report: all that is known of it.
        fatal: the process is no longer as it was; take another one.
    """

    word: str
    problem: str = ""
    report: str = ""
    fatal: bool = False


class Guard:
    """Runs targets and notices what they do to the process."""

    def __init__(self, folder: Path, *, watch_streams: bool = True) -> None:
        """Live in ``folder``, an empty one, from now on.

        Args:
            folder: where the canary lies; whatever is opened there is noticed, by C code too.
            watch_streams: redirect what is printed, and take it for a find.
        """
        os.chdir(folder)
        Path(CANARY).write_bytes(b"canary" * 100)
        self._events: list[str] = []
        self._printed = os.memfd_create("printed") if watch_streams else None
        if self._printed is not None:
            os.dup2(self._printed, 1)
            os.dup2(self._printed, 2)
        self._inotify = _watch(folder)
        self._armed = False
        sys.addaudithook(self._audit)

    def arm(self, target: Callable[[bytes], str], warm_up: Iterable[bytes]) -> None:
        """Run some inputs, so that what is loaded late is loaded; from there on everything counts."""
        for data in warm_up:
            with contextlib.suppress(Exception):
                target(data)
        gc.collect()
        warnings.simplefilter("error")
        self._drain()
        self._opened()
        self._resident = _resident_bytes()
        limit = _data_bytes() + _DATA_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE_BYTES, _LARGEST_FILE_BYTES))
        self._lowest_handle = _lowest_handle()

    def run(self, target: Callable[[bytes], str], data: bytes) -> Outcome:
        """One input."""
        self._armed = True
        try:
            word = target(data)
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is a find)
            self._armed = False
            report = "".join(traceback.format_exception(error, chain=True)) + self._drain()
            self._opened()
            self._events = []
            return Outcome(FIND, _signature(error), report, fatal=isinstance(error, MemoryError))
        finally:
            self._armed = False
        return self._side_effects() or Outcome(word)

    def _side_effects(self) -> Outcome | None:
        if printed := self._drain():
            return Outcome(FIND, f"printed: {_words(printed)}", printed)
        if self._events:
            event, self._events = self._events[0], []
            return Outcome(FIND, event.splitlines()[0], event)
        if self._opened():
            return Outcome(FIND, "a file that the input names was opened")
        if _resident_bytes() > self._resident + _RESIDENT_BYTES:
            grown = (_resident_bytes() - self._resident) // 2**20
            return Outcome(FIND, "memory beyond the limits' promise", f"{grown} MiB more than before", fatal=True)
        if _lowest_handle() != self._lowest_handle:
            gc.collect()
            if _lowest_handle() != self._lowest_handle:
                return Outcome(FIND, "a handle was left open", fatal=True)
        return None

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            name, flags = arguments[0], arguments[2]
            if isinstance(name, int):
                return
            path = os.fsdecode(name) if isinstance(name, bytes | str) else str(name)
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if path.startswith(_MAY_BE_OPENED) and not writes:
                return
        elif not event.startswith(_FORBIDDEN_EVENTS):
            return
        self._armed = False
        where = traceback.extract_stack()
        self._events.append(f"{event} {_own_line(where)}\n{arguments!r:.300}\n{''.join(traceback.format_list(where))}")
        self._armed = True

    def _opened(self) -> bool:
        try:
            return bool(os.read(self._inotify, 4096))
        except BlockingIOError:
            return False

    def _drain(self) -> str:
        if self._printed is None:
            return ""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        size = os.fstat(self._printed).st_size
        if not size:
            return ""
        printed = os.pread(self._printed, min(size, 4000), 0).decode("utf-8", "replace")
        os.ftruncate(self._printed, 0)
        os.lseek(self._printed, 0, os.SEEK_SET)
        return printed


def _signature(error: BaseException) -> str:
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    said = _words(str(error)) if kind == "Find" else ""
    return f"{kind} {_own_line(frames)} {_line(frames[-1])} {said}".strip()


def _words(text: str) -> str:
    """The first words of a text, the same whatever its numbers are."""
    return " ".join(re.findall(r"[A-Za-z_]{2,}", text.split(":", maxsplit=1)[0])[:3])


def _own_line(frames: traceback.StackSummary) -> str:
    """The last line of the serving core that is on the stack."""
    own = [frame for frame in frames if "nnunet_torchserve" in frame.filename]
    return _line(own[-1]) if own else "-"


def _line(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


def _watch(folder: Path) -> int:
    """A handle from which an event can be read when something in ``folder`` is opened or made."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if handle < 0 or libc.inotify_add_watch(handle, os.fsencode(folder), _IN_OPEN | _IN_CREATE) < 0:
        msg = f"inotify: {os.strerror(ctypes.get_errno())}"
        raise OSError(msg)
    return handle


def _resident_bytes() -> int:
    """The most that this process ever had, its parent not counted, as ``getrusage`` does."""
    return _of_status("VmHWM:")


def _data_bytes() -> int:
    return _of_status("VmData:")


def _of_status(name: str) -> int:
    with open("/proc/self/status", "rb") as status:  # noqa: PTH123 (for each input: pathlib is slower)
        text = status.read()
    return int(text[text.index(name.encode()) :].split(None, 2)[1]) * 1024


def _lowest_handle() -> int:
    handle = os.dup(0)
    os.close(handle)
    return handle
