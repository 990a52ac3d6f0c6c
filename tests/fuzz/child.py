"""A process that runs targets under guard until one kills it.

The parent keeps the input that it has sent, so a death has a culprit. The pipes carry a length and the input one way,
a line of JSON the other way; the child's standard error carries the stacks of its threads when a signal ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Self

from .guard import FIND, Guard, Outcome

TIME_LIMIT_S = 5.0
"""For one input."""

_START_LIMIT_S = 120.0
_LENGTH = struct.Struct("<I")


class Child:
    """The parent's side: a context in which inputs are run, and a process that is replaced when it has died."""

    def __init__(self, target: str, time_limit_s: float = TIME_LIMIT_S, python: Path | None = None) -> None:
        self.target, self.time_limit_s = target, time_limit_s
        self._python = str(python or sys.executable)
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        self.replaced = 0

    def __enter__(self) -> Self:
        self._process = self._start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()
        self._folder.cleanup()
        self._errors.close()

    def run(self, data: bytes) -> Outcome:
        """One input, in the process that ran the others before it."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(_LENGTH.pack(len(data)) + data)
            process.stdin.flush()
            line = self._line(self.time_limit_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            report = self._end(signal.SIGABRT)
            return Outcome(FIND, f"longer than {self.time_limit_s:g} s {_own_line(report)}", report, fatal=True)
        if not line:
            status, report = process.wait(), self._end(signal.SIGKILL)
            how = signal.Signals(-status).name if status < 0 else f"exit {status}"
            return Outcome(FIND, f"{how} {_own_line(report)}", report, fatal=True)
        outcome = Outcome(**json.loads(line))
        if outcome.fatal:
            self._end(signal.SIGKILL)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors.seek(0)
        self._errors.truncate()
        folder = tempfile.mkdtemp(dir=self._folder.name)
        paths = [str(Path(__file__).parents[1]), *sys.path]
        self._process = subprocess.Popen(
            [self._python, "-m", "fuzz.child", self.target, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": folder},
        )
        if self._line(_START_LIMIT_S) != b"ready\n":
            msg = f"the child did not start: {self._end(signal.SIGKILL, replace=False)}"
            raise RuntimeError(msg)
        return self._process

    def _line(self, limit_s: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise TimeoutError
        return self._process.stdout.readline()

    def _end(self, number: signal.Signals, *, replace: bool = True) -> str:
        """What the child said at its end; another one takes its place."""
        assert self._process is not None
        self._process.send_signal(number)
        self._stop()
        self.replaced += 1
        self._errors.seek(0)
        report = self._errors.read().decode("utf-8", "replace")
        self._process = self._start() if replace else None
        return report

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _own_line(report: str) -> str:
    """The innermost line of the serving core in what faulthandler wrote."""
    lines = [line.strip() for line in report.splitlines() if "nnunet_torchserve" in line]
    if not lines:
        return "-"
    _, path, rest = lines[0].split('"')
    return f"{Path(path).name}:{rest.removeprefix(', line ').split()[0]}"


def _target(name: str) -> tuple[Callable[[bytes], str], Iterable[bytes]]:
    """A target, and inputs that load what it loads late."""
    if name == "trap":
        from .traps import trap

        return trap, []
    from .seeds import image_seeds
    from .targets import TARGETS

    return TARGETS[name], image_seeds().values() if name == "image" else [b""]


def _main(target_name: str, folder: str) -> None:
    requests, answers, errors = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.dup(2)
    faulthandler.enable(errors, all_threads=True)
    target, warm_up = _target(target_name)
    guard = Guard(Path(folder))
    guard.arm(target, warm_up)
    answers.write(b"ready\n")
    answers.flush()
    while header := requests.read(_LENGTH.size):
        [size] = _LENGTH.unpack(header)
        outcome = guard.run(target, requests.read(size))
        answers.write(json.dumps(asdict(outcome)).encode() + b"\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    _errors = os.dup(2)  # what is printed from here on is watched
    try:
        _main(*sys.argv[1:])
    except BaseException:
        os.write(_errors, traceback.format_exc().encode())
        raise
