"""The coverage-guided fuzzer: atheris (libFuzzer) on the Python code of the serving core.

``python -m fuzz.coverage_guided --seconds 300`` (with ``tests/`` on ``PYTHONPATH``) gives each part its share of the
time, saves what it finds and ends with 1 if there was any. A part is a target with the seeds of one format.

libFuzzer takes over the process's signals and ends it when it is done, so each part runs in a process of its own.
Every other input is changed by ``mutations``, which gets behind checksums, and the rest by libFuzzer, which knows what
the code compared its bytes with. The guard is that of the mutation fuzzer, but for what is printed: libFuzzer prints.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .child import TIME_LIMIT_S
from .mutate import SAVED, SEEDS
from .seeds import image_seeds

_RESIDENT_MIB = 1024
"""libFuzzer's own bound, with its corpus; the guard's is far lower."""

_LONGEST_INPUT = 2**16

_STATISTICS = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)")

logger = logging.getLogger("fuzz")


def parts() -> dict[str, tuple[str, list[bytes]]]:
    """Name -> target and seeds."""
    found: dict[str, tuple[str, list[bytes]]] = {}
    for name, data in image_seeds().items():
        found.setdefault(name.split("/")[0], ("image", []))[1].append(data)
    for target in ("options", "geometry", "request"):
        found[target] = (target, list(SEEDS[target]().values()))
    return found


def run(part: str, save: Path, *, seconds: int | None = None, runs: int | None = None, seed: int = 1) -> int:
    """Fuzz one part in a process of its own.

    Returns:
        Its exit status: 0 without a find.
    """
    save.mkdir(parents=True, exist_ok=True)
    save = save.resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus, here = Path(folder) / "corpus", Path(folder) / "here"
        corpus.mkdir()
        here.mkdir()
        for number, data in enumerate(parts()[part][1]):
            (corpus / f"seed-{number:03}").write_bytes(data)
        settings = {
            "max_total_time": seconds,
            "runs": runs,
            "seed": seed,
            "timeout": int(TIME_LIMIT_S),
            "rss_limit_mb": _RESIDENT_MIB,
            "max_len": _LONGEST_INPUT,
            "artifact_prefix": f"{save}/{part}-",
            "print_final_stats": 1,
        }
        flags = [f"-{name}={value}" for name, value in settings.items() if value is not None]
        paths = [str(Path(__file__).parents[1]), *sys.path]
        process = subprocess.run(
            [sys.executable, "-m", "fuzz.coverage_guided", "--part", part, str(here), *flags, str(corpus)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(here)},
            check=False,
        )
    said = process.stdout.decode("utf-8", "replace")
    statistics = _STATISTICS.findall(said)
    executed, edges, features, corpus_size = statistics[-1] if statistics else ("?",) * 4
    logger.info(
        "%-8s exit %s, %s inputs, %s edges, %s features, corpus %s",
        part, process.returncode, executed, edges, features, corpus_size,
    )  # fmt: skip
    if process.returncode:
        logger.info("%s", said[-6000:])
    return process.returncode


def _fuzz_here(part: str, folder: str, flags: list[str]) -> None:
    """The process of one part."""
    import atheris

    with atheris.instrument_imports(include=["nnunet_torchserve"]):
        from . import targets
    from .guard import FIND, Guard
    from .mutations import mutate

    name, seeds = parts()[part]
    target: Callable[[bytes], str] = targets.TARGETS[name]
    guard = Guard(Path(folder), watch_streams=False)
    guard.arm(target, image_seeds().values() if name == "image" else [b""])

    def one(data: bytes) -> None:
        outcome = guard.run(target, data)
        if outcome.word == FIND:
            msg = f"{outcome.problem}\n{outcome.report}"
            raise targets.Find(msg)

    def change(data: bytes, max_size: int, seed: int) -> Any:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        return mutate(data, seeds, Random(seed))[:max_size]

    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(parts()), default=list(parts()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, default=SAVED)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    share = max(1, arguments.seconds // len(arguments.parts))
    statuses = [run(part, arguments.save, seconds=share, seed=arguments.seed) for part in arguments.parts]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _fuzz_here(sys.argv[2], sys.argv[3], sys.argv[4:])
    sys.exit(main())
