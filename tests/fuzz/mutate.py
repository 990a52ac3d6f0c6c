"""The mutation fuzzer: mutated seeds, one after the other, in a child process that may die.

``python -m fuzz.mutate --seconds 300`` (from ``tests/``, or with it on ``PYTHONPATH``) saves one input for each
different find and ends with 1 if there was any. An input is made from the run's seed and its number alone, so
``--seed S --first N --count 1`` makes one again.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from .child import TIME_LIMIT_S, Child
from .guard import FIND, Outcome
from .mutations import mutate
from .seeds import geometry_seeds, image_seeds, option_seeds, request_seeds

SEEDS = {"image": image_seeds, "options": option_seeds, "geometry": geometry_seeds, "request": request_seeds}
SAVED = Path(".nnunet-torchserve/fuzz")

_MINIMISE_S = 30.0

logger = logging.getLogger("fuzz")


@dataclass
class Tally:
    """What a run came to.

    Attributes:
        inputs: how many were run.
        words: how they ended, by format.
        finds: problem -> the smallest input that has it, and its outcome.
        seconds: that it took.
        slowest_s: seconds of the slowest input.
    """

    inputs: int = 0
    words: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    finds: dict[str, tuple[bytes, Outcome]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0


def inputs(target: str, seed: int, first: int = 0) -> Iterator[tuple[str, bytes]]:
    """The format and the bytes of each input, without end: every format as often as the others."""
    seeds = SEEDS[target]()
    groups: dict[str, list[bytes]] = collections.defaultdict(list)
    for name, data in seeds.items():
        groups[name.split("/")[0] if "/" in name else target].append(data)
    names, everything = sorted(groups), list(seeds.values())
    number = first
    while True:
        random = Random(f"{target}:{seed}:{number}")
        group = names[number % len(names)]
        others = groups[group] if random.random() < 0.7 else everything
        yield group, mutate(random.choice(groups[group]), others, random)
        number += 1


def fuzz(child: Child, seed: int, *, first: int = 0, count: int | None = None, seconds: float | None = None) -> Tally:
    """Run inputs of the child's target until there were ``count``, or ``seconds`` are over."""
    tally = Tally()
    started = time.monotonic()
    for group, data in inputs(child.target, seed, first):
        if tally.inputs == count or (seconds is not None and time.monotonic() - started > seconds):
            break
        before = time.monotonic()
        outcome = child.run(data)
        if not outcome.fatal:
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - before)
        tally.inputs += 1
        tally.words[group][outcome.word] += 1
        if outcome.word != FIND:
            continue
        known = tally.finds.get(outcome.problem)
        if known is None:
            logger.warning("input %s of seed %s: %s", first + tally.inputs - 1, seed, outcome.problem)
        if known is None or len(data) < len(known[0]):
            tally.finds[outcome.problem] = (data, outcome)
    tally.seconds = time.monotonic() - started
    return tally


def minimise(target: str, data: bytes, problem: str, seconds: float = _MINIMISE_S) -> bytes:
    """The smallest input found in some seconds that has the same problem: pieces are left out, then set to zero."""
    ends = time.monotonic() + seconds
    with Child(target) as child:

        def same(candidate: bytes) -> bool:
            return time.monotonic() < ends and child.run(candidate).problem == problem

        if not same(data):
            return data
        size = len(data) // 2
        while size:
            at = 0
            while at < len(data):
                shorter = data[:at] + data[at + size :]
                if same(shorter):
                    data = shorter
                else:
                    at += size
            size //= 2
        size = max(1, len(data) // 8)
        while size:
            for at in range(0, len(data), size):
                plainer = data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
                if plainer != data and same(plainer):
                    data = plainer
            size //= 2
    return data


def save(folder: Path, target: str, data: bytes, outcome: Outcome) -> Path:
    """The input as ``TARGET-DIGEST``, and beside it what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    file.with_suffix(".txt").write_text(f"{outcome.problem}\n\n{outcome.report}")
    return file


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, help="for each target; without it, --count")
    parser.add_argument("--count", type=int, help="inputs for each target")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--targets", nargs="+", choices=list(SEEDS), default=["image"])
    parser.add_argument("--save", type=Path, default=SAVED)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if arguments.seconds is None and arguments.count is None:
        parser.error("--seconds or --count")
    found = 0
    for target in arguments.targets:
        with Child(target) as child:
            tally = fuzz(child, arguments.seed, first=arguments.first, count=arguments.count, seconds=arguments.seconds)
        rate = tally.inputs / max(tally.seconds, 1e-3)
        logger.info(
            "%s: %s inputs of seed %s, %.0f a second, slowest %.2f s of %g",
            target, tally.inputs, arguments.seed, rate, tally.slowest_s, TIME_LIMIT_S,
        )  # fmt: skip
        for group, words in sorted(tally.words.items()):
            logger.info("  %-8s %s", group, ", ".join(f"{word} {n}" for word, n in words.most_common()))
        for problem, (data, outcome) in tally.finds.items():
            file = save(arguments.save, target, minimise(target, data, problem), outcome)
            logger.info("  find: %s\n    %s", problem, file)
        found += len(tally.finds)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
