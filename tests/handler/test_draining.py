"""What a worker's gate says while an order stands; live servers are in tests/serve."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nnunet_torchserve.draining import DEFAULT_RETRY_AFTER_S, EVERY_MODEL, ORDERS, REPORTS, Gate, retry_after_s
from nnunet_torchserve.errors import Draining
from support.chaos import wait_for


@pytest.fixture
def briefly() -> Iterator[Callable[[float], object]]:
    """Waits between two looks for a moment, and after the test for ever."""
    over = threading.Event()

    def wait(_: float) -> None:
        if over.wait(0.002):
            threading.Event().wait()

    yield wait
    over.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (ORDERS, REPORTS):
        (tmp_path / name).mkdir()
    return tmp_path


def order(folder: Path, content: str = '{"retry_after_s": 7}') -> Path:
    file = folder / ORDERS / EVERY_MODEL
    file.write_text(content)
    return file


def test_a_worker_says_whether_it_works_on_what_came_before_the_order(
    folder: Path, briefly: Callable[[float], object]
) -> None:
    idle = False
    gate = Gate(folder, "m", "1.0")
    gate.report(lambda: idle, wait=briefly)
    gate.refuse()  # nothing stands: this request is taken
    order(folder)
    assert report_with(folder, idle=False) == {"idle": False, "works": True, "refused": 0}
    idle = True  # it has been answered
    assert report_with(folder, idle=True) == {"idle": True, "works": False, "refused": 0}
    idle = False  # another one comes
    with pytest.raises(Draining) as refused:
        gate.refuse()
    assert refused.value.retry_after_s == 7
    assert report_with(folder, idle=False, refused=1) == {"idle": False, "works": False, "refused": 1}


def test_a_report_goes_with_its_order(folder: Path, briefly: Callable[[float], object]) -> None:
    gate = Gate(folder, "m", "1.0")
    gate.report(lambda: True, wait=briefly)
    standing = order(folder)
    report_with(folder, idle=True)
    standing.unlink()
    wait_for(lambda: not report_file(folder).exists())


@pytest.mark.parametrize("content", ["", "[]", '{"retry_after_s": "soon"}', '{"together_s": 0}', '{"together_s": "x"}'])
def test_an_order_that_makes_no_sense_is_an_order(content: str) -> None:
    assert retry_after_s(content, 0.0) == DEFAULT_RETRY_AFTER_S


def report_file(folder: Path) -> Path:
    return folder / REPORTS / str(os.getpid())


def report_with(folder: Path, **expected: object) -> dict[str, object]:
    """The next report that has these values, without its number."""
    found: dict[str, object] = {}

    def is_there() -> bool:
        try:
            found.update(json.loads(report_file(folder).read_text()))
        except FileNotFoundError:
            return False
        return all(found[name] == value for name, value in expected.items())

    wait_for(is_there)
    return {name: value for name, value in found.items() if name != "report"}
