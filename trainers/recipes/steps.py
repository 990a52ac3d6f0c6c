"""Steps that are done once: commands, each with a log and a mark that it is done."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Command = list[str | Path]
Work = Command | Callable[[], None]

_LINES_OF_A_LOG = 20


class RecipeError(RuntimeError):
    """A step failed, or cannot be begun."""


class Steps:
    """The steps of one folder. A step that was ended is begun again; one that is done is left alone.

    Attributes:
        home: the folder; ``done/`` in it has the marks, ``logs/`` what the commands said.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        """Name the folder.

        Args:
            home: may be missing yet.
            environment: variables of all commands, beside this process's.
        """
        self.home, self._environment = home, dict(os.environ) | dict(environment)

    @contextmanager
    def alone(self, settings: Mapping[str, object]) -> Iterator[None]:
        """Have the folder for oneself.

        Args:
            settings: that its steps depend on.

        Raises:
            RecipeError: another process has it, or its steps were done with other settings.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                msg = f"another process is at work in {self.home}"
                raise RecipeError(msg) from error
            known = self.home / "settings.json"
            wanted = json.dumps(settings, indent=2)
            if known.exists() and known.read_text() != wanted:
                msg = f"{self.home} was begun with other settings ({known}): remove it, or name another folder"
                raise RecipeError(msg)
            known.write_text(wanted)
            yield

    def do(self, name: str, *works: Work, finally_: Command | None = None) -> None:
        """A step, unless it is done.

        Args:
            name: of it.
            works: commands, the first word a script of this Python's environment, or functions; one after another.
            finally_: a command that is run behind them, also where one fails.

        Raises:
            RecipeError: a command failed.
        """
        mark = self.home / "done" / f"{name}.json"
        if mark.exists():
            print(f"{name}: done before", flush=True)
            return
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        log = self.home / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        try:
            for work in works:
                self._do(name, work, log)
        finally:
            if finally_ is not None:
                self._do(name, finally_, log)
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(json.dumps({"seconds": round(time.monotonic() - began, 1)}))
        print(f"  done after {time.monotonic() - began:.0f} s", flush=True)

    def _do(self, name: str, work: Work, log: Path) -> None:
        if callable(work):
            work()
            return
        program, *arguments = work
        command = [Path(sys.executable).parent / program, *arguments]
        with log.open("a") as said:
            done = subprocess.run(command, env=self._environment, stdout=said, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LINES_OF_A_LOG:])
            msg = f"{name}: {program} ended with {done.returncode}; the end of {log}:\n{tail}"
            raise RecipeError(msg)
