from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import warm
from support.examples import thin

from .child import Child
from .guard import ACCEPTED, FIND
from .mutate import SEEDS, Tally, fuzz
from .seeds import bombs, dicom_lies, image_seeds

SEED = 1
PATIENCE_S = 30
"""For one input, on a machine that does much else; ``make fuzz`` has less."""

IMAGES, OTHERS = thin(1200), thin(2000)

ENOUGH = 100
"""Mutations of a format, after which one must have been accepted."""

REGRESSIONS = sorted(file for file in Path(__file__).with_name("regressions").iterdir() if "-" in file.name)

TRAPS = {
    "signal": "SIGSEGV",
    "exit": "exit 0",
    "raise": "ZeroDivisionError",
    "warn": "UserWarning",
    "hang": "longer than",
    "memory": "MemoryError",
    "touched memory": "memory beyond",
    "open": "open",
    "open in C": "a file that the input names was opened",
    "leak": "a handle",
    "print": "printed",
    "unpickle": "pickle.find_class",
}
REFUSED = (
    "nifti/pair", "nrrd/ascii", "nrrd/detached", "mha/text", "mha/detached", "mha/list", "mha/pattern", "mha/absolute",
    "npy/structured", "npy/objects", "npy/text", "npy/none", "npz/bzip2", "npz/lzma", "npz/two", "npz/zip", "png/LA",
    "png/animated", "tiff/zstd", "tiff/lzma", "tiff/jpeg", "tiff/webp", "tiff/png", "tiff/lerc", "tiff/volume",
    "tiff/pillow 1", "other/",
)  # fmt: skip


def started(target: str) -> Child:
    return Child(target, PATIENCE_S, warm.python_of_programs())


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with started("image") as running:
        yield running


def test_a_find_is_noticed_and_the_next_input_is_run_all_the_same() -> None:
    with started("trap") as trapped:
        for trap, problem in TRAPS.items():
            trapped.time_limit_s = 3 if trap == "hang" else PATIENCE_S
            outcome = trapped.run(trap.encode())
            trapped.time_limit_s = PATIENCE_S
            assert (outcome.word, outcome.problem[: len(problem)]) == (FIND, problem), outcome.report
            assert trapped.run(b"nothing").word == ACCEPTED


@pytest.mark.parametrize("name", image_seeds())
def test_seeds_reach_the_voxels_or_are_refused(name: str, child: Child) -> None:
    outcome = child.run(image_seeds()[name])
    assert outcome.word != FIND, outcome.report
    assert (outcome.word == ACCEPTED) is not name.startswith(REFUSED)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_lengths_and_offsets_of_a_series_may_lie(count: int, child: Child) -> None:
    for name, body in dicom_lies(count, SEED):
        outcome = child.run(body)
        assert outcome.word != FIND, f"{name}: {outcome.report}"


def test_no_bomb_is_unpacked(child: Child) -> None:
    for name, bomb in bombs().items():
        outcome = child.run(bomb)
        assert outcome.word != FIND, f"{name}: {outcome.report}"


@pytest.mark.parametrize("file", REGRESSIONS, ids=lambda file: file.name)
def test_what_once_was_a_find_is_none_any_more(file: Path, child: Child) -> None:
    target = file.name.split("-")[0]
    if target == "image":
        outcome = child.run(file.read_bytes())
    else:
        with started(target) as other:
            outcome = other.run(file.read_bytes())
    assert outcome.word != FIND, outcome.report


def test_no_mutated_image_is_a_find(child: Child) -> None:
    check(fuzz(child, SEED, count=IMAGES))


@pytest.mark.parametrize("target", sorted(set(SEEDS) - {"image"}))
def test_no_mutated_text_is_a_find(target: str) -> None:
    with started(target) as other:
        check(fuzz(other, SEED, count=OTHERS))


def check(tally: Tally) -> None:
    assert not tally.finds, "\n".join(outcome.report for _, outcome in tally.finds.values())
    for group, words in tally.words.items():
        is_told = words[ACCEPTED] or group == "other" or sum(words.values()) < ENOUGH
        assert is_told, f"no mutated {group} was accepted; the mutations are too wild"
