"""The folder command as its users run it, in a process of its own: its time, its first result, its memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.material import FOLD
from benchmarks.harness.served import MODEL

ENDING = ".nii.gz"
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """Commands that ran at the same time.

    Attributes:
        seconds: until the last one ended.
        first_s: until the first label map was there; ``None`` if none came.
        peak_bytes: resident memory of the largest of them, at most.
        exit_codes: of each.
        said: what they printed, stdout and stderr together.
    """

    seconds: float
    first_s: float | None
    peak_bytes: int
    exit_codes: list[int]
    said: str


def predict_command(url: str, inputs: Path, outputs: Path, *more: str) -> list[str | Path]:
    """Ours, with the same arguments as stock's."""
    command: list[str | Path] = [Path(sys.executable).parent / "nnunet-torchserve", "predict", "--server", url]
    command += ["--model", MODEL, "-i", inputs, "-o", outputs, "-f", str(FOLD), "--disable_tta"]
    return [*command, *more]


def run(commands: Sequence[Sequence[str | Path]], outputs: Path) -> Run:
    """Run commands at once that write their label maps to ``outputs``.

    Raises:
        RuntimeError: one of them failed.
    """
    found = run_whatever(commands, outputs)
    if any(found.exit_codes):
        msg = f"{commands[0][0]} ended with {found.exit_codes}:\n{found.said[-2000:]}"
        raise RuntimeError(msg)
    return found


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had resident since it is this program; 0 if it has ended.

    Not wait4's number: that is the parent's own where it was larger when it forked.
    """
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return 0


def run_whatever(commands: Sequence[Sequence[str | Path]], outputs: Path) -> Run:
    """As :func:`run`, however they end."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        processes = [subprocess.Popen([*map(str, each)], stdout=said, stderr=said) for each in commands]
        waiting, codes, peak, first_s = {each.pid: each for each in processes}, dict[int, int](), 0, None
        while waiting:
            if first_s is None and any(outputs.glob(f"[!.]*{ENDING}")):
                first_s = time.perf_counter() - started
            for pid, process in list(waiting.items()):
                peak = max(peak, _peak_bytes(pid))
                if process.poll() is not None:
                    codes[pid] = waiting.pop(pid).returncode
            if waiting:
                time.sleep(_LOOK_S)
        seconds = time.perf_counter() - started
        said.seek(0)
        return Run(seconds, first_s, peak, [codes[each.pid] for each in processes], said.read())
