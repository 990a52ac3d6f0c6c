"""Who may take memory: what must hold for every stream of cases."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price
from nnunet_torchserve.engine.admission import OVERTAKEN_AT_MOST, Admission, Budget, Claim, admissible, in_turn
from nnunet_torchserve.engine.folder import ALIVE
from nnunet_torchserve.engine.ledger import Ledger
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import Busy, Deadline, OutOfMemory
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Priority
from support.chaos import wait_for

BUDGET = Budget(bytes=100, passes=50, waiting=4)
SIZES = st.tuples(st.integers(0, 100), st.integers(0, 50))
EVENTS = st.lists(st.tuples(st.sampled_from(["ask", "release"]), SIZES, st.integers(0, 60)), max_size=60)


@given(EVENTS, st.integers(0, 100))
def test_the_budget_is_never_exceeded_and_nobody_is_overtaken(
    events: list[tuple[str, tuple[int, int], int]], elsewhere: int
) -> None:
    admission = Admission(replace(BUDGET, shared_bytes=120), elsewhere)
    asked: list[int] = []
    granted: list[int] = []
    for number, (kind, (size, passes), other) in enumerate(events):
        if kind == "ask":
            if admission.ask(Claim(number, size, passes)):
                asked.append(number)
        elif other in asked:
            admission.release(other)
            asked.remove(other)
        granted += admission.grant()
        assert admission.charged_bytes <= BUDGET.bytes
        assert admission.charged_bytes == 0 or admission.charged_bytes + elsewhere <= 120
        assert admission.charged_passes <= BUDGET.passes
        assert admission.waiting <= BUDGET.waiting
    assert granted == sorted(granted)


@given(st.lists(SIZES, max_size=20))
def test_everybody_is_served_in_the_end(sizes: list[tuple[int, int]]) -> None:
    admission = Admission(replace(BUDGET, waiting=len(sizes)))
    for number, (size, passes) in enumerate(sizes):
        assert admission.ask(Claim(number, size, passes))
    served: list[int] = []
    while admission.waiting:
        granted = admission.grant()
        assert granted
        for number in granted:
            admission.release(number)
        served += granted
    assert served == list(range(len(sizes)))


@given(EVENTS, st.lists(st.sampled_from(Priority), min_size=60, max_size=60))
def test_interactive_claims_overtake_batch_ones_a_few_times_and_nobody_else(
    events: list[tuple[str, tuple[int, int], int]], priorities: list[Priority]
) -> None:
    admission = Admission(replace(BUDGET, waiting=60))
    claims: dict[int, Claim] = {}
    waiting: list[int] = []
    granted: dict[Priority, list[int]] = {priority: [] for priority in Priority}
    overtaken = 0
    for number, (kind, (size, passes), other) in enumerate(events):
        first = next((each for each in waiting if claims[each].priority is Priority.BATCH), None)
        if kind == "ask":
            claims[number] = Claim(number, size, passes, priority=priorities[number])
            assert admission.ask(claims[number])
            waiting.append(number)
        elif other in claims:
            admission.release(other)
            overtaken = 0 if other == first else overtaken
            waiting = [each for each in waiting if each != other]
        for one in admission.grant():
            first = next((each for each in waiting if claims[each].priority is Priority.BATCH), None)
            waiting.remove(one)
            granted[claims[one].priority].append(one)
            if one == first:
                overtaken = 0
            elif first is not None and one > first:
                assert claims[one].priority is Priority.INTERACTIVE
                overtaken += 1
        assert overtaken <= OVERTAKEN_AT_MOST
        assert admission.charged_bytes <= BUDGET.bytes
        assert admission.charged_passes <= BUDGET.passes
        assert [admission.ahead_of(each) for each in waiting] == [
            [claim.number for claim in in_turn([claims[other] for other in waiting], overtaken)].index(each)
            for each in waiting
        ]
    for order in granted.values():
        assert order == sorted(order)


def test_a_large_batch_claim_has_its_turn_under_a_stream_of_interactive_ones() -> None:
    """Each of them fits beside the others, so that there would never be room for it."""
    admission = Admission(replace(BUDGET, waiting=2))
    assert admission.ask(Claim(0, 60, 1))
    assert admission.grant() == [0]
    assert admission.ask(Claim(1, 100, 1, priority=Priority.BATCH))
    for number in range(2, 2 + OVERTAKEN_AT_MOST):
        assert admission.grant() == []
        assert admission.ask(Claim(number, 40, 1))
        assert admission.grant() == [number]
        admission.release(number - 1 if number > 2 else 0)
    assert admission.ask(Claim(50, 40, 1))
    assert admission.grant() == []
    admission.release(1 + OVERTAKEN_AT_MOST)
    assert admission.grant() == [1]
    admission.release(1)
    assert admission.grant() == [50]


def test_batch_claims_that_wait_do_not_have_interactive_ones_refused() -> None:
    admission = Admission(replace(BUDGET, waiting=1))
    assert admission.ask(Claim(0, 80, 1))
    assert admission.grant() == [0]
    assert admission.ask(Claim(1, 30, 1, priority=Priority.BATCH))
    assert not admission.ask(Claim(2, 30, 1, priority=Priority.BATCH))
    assert admission.ask(Claim(3, 30, 1))
    assert not admission.ask(Claim(4, 30, 1))
    assert not admission.ask(Claim(5, 30, 1, priority=Priority.BATCH))
    admission.release(0)
    assert admission.grant() == [3, 1]


@given(st.lists(st.builds(Claim, st.integers(), st.integers(0, 100), st.integers(0, 50), st.booleans()), max_size=20))
def test_a_guaranteed_claim_never_waits(waiting: list[Claim]) -> None:
    granted = admissible(waiting, [Claim(-1, 90, 0)], BUDGET)
    assert {claim for claim in waiting if claim.guaranteed} <= set(granted)
    rest = sum(claim.bytes for claim in granted if not claim.guaranteed)
    assert rest == 0 or rest + 90 <= BUDGET.bytes


def test_one_more_than_may_wait_is_refused_and_forgotten() -> None:
    admission = Admission(replace(BUDGET, waiting=1))
    assert admission.ask(Claim(0, 80, 1))
    assert admission.grant() == [0]
    assert admission.ask(Claim(1, 30, 1))
    assert not admission.ask(Claim(2, 30, 1))
    assert admission.ask(Claim(3, 30, 1, guaranteed=True))
    assert admission.grant() == [3]
    admission.release(0)
    assert admission.grant() == [1]


def test_a_full_queue_refuses_nobody_who_would_not_wait() -> None:
    admission = Admission(replace(BUDGET, waiting=0))
    assert admission.ask(Claim(0, 80, 1))
    assert admission.grant() == [0]
    assert admission.ask(Claim(1, 20, 1))
    assert admission.grant() == [1]
    assert not admission.ask(Claim(2, 1, 1))


@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=12), st.lists(st.integers(0, 11), min_size=60, max_size=60)
)
def test_cases_that_take_more_than_was_guessed_never_wait_for_each_other(
    cases: list[tuple[tuple[int, int], tuple[int, int]]], choices: list[int]
) -> None:
    """Whatever was guessed, each is charged for what it takes before it goes on, or refused; none waits for ever."""
    admission = Admission(replace(BUDGET, waiting=len(cases)))
    for number, (guess, _) in enumerate(cases):
        assert admission.ask(Claim(number, *guess))
    guessed: set[int] = set()
    known: set[int] = set()
    ended: list[int] = []
    for choice in choices:
        for number in admission.grant():
            (known if number in guessed else guessed).add(number)
        assert admission.charged_bytes <= BUDGET.bytes
        assert admission.charged_passes <= BUDGET.passes
        preprocessed = sorted(number for number in guessed - known if not admission.is_growing(number))
        stuck = admission.stuck()
        if preprocessed:
            number = preprocessed[choice % len(preprocessed)]
            admission.amend(Claim(number, *cases[number][1]))
            continue
        if stuck is not None:
            assert not known, "somebody will end, and leave room"
            assert stuck == max(guessed)
            admission.give_up(stuck)
        elif not known:
            break
        number = sorted(known)[choice % len(known)] if stuck is None else stuck
        assert (
            stuck is not None
            or (admission._charged[number].bytes, admission._charged[number].passes) == cases[number][1]
        )
        admission.release(number)
        guessed.discard(number)
        known.discard(number)
        ended.append(number)
    assert sorted(ended) == list(range(len(cases)))
    assert (admission.charged, admission.waiting, admission.growing) == (0, 0, 0)


def test_nobody_new_is_charged_before_a_case_that_waits_for_more() -> None:
    admission = Admission(BUDGET)
    for number in (0, 1):
        assert admission.ask(Claim(number, 40, 1))
    assert admission.grant() == [0, 1]
    admission.amend(Claim(0, 70, 1))
    assert admission.ask(Claim(2, 5, 1))
    assert admission.grant() == []
    assert (admission.waiting_bytes, admission.first_waiting_bytes) == (35, 30)
    assert admission.stuck() is None
    admission.release(1)
    assert admission.grant() == [0, 2]
    assert admission.charged_bytes == 75


def test_a_case_that_takes_less_than_was_guessed_gives_the_rest_back_at_once() -> None:
    admission = Admission(BUDGET, elsewhere=50)
    assert admission.ask(Claim(0, 100, 1))
    assert admission.grant() == [0]
    assert admission.ask(Claim(1, 60, 1))
    admission.amend(Claim(0, 30, 1))
    assert admission.grant() == [0, 1]
    assert admission.charged_bytes == 90


# -- the ledger of several engines ------------------------------------------------------------------------------------


def living(folder: Path) -> Ledger:
    folder.mkdir()
    alive = (folder / ALIVE).open("w")
    fcntl.flock(alive, fcntl.LOCK_EX)
    ledger = Ledger(folder, "cuda:0")
    ledger.__dict__["alive"] = alive  # held for as long as the ledger is
    return ledger


def test_engines_see_what_others_hold_while_they_live(tmp_path: Path) -> None:
    first, second = living(tmp_path / "first"), living(tmp_path / "second")
    assert first.try_hold(60, 100)
    assert second.elsewhere() == 60
    assert not second.try_hold(50, 100)
    assert second.try_hold(40, 100)
    assert not first.try_hold(70, 100)
    assert second.elsewhere() == 60
    first.__dict__.pop("alive").close()  # killed
    assert second.elsewhere() == 0
    assert second.try_hold(100, 100)
    assert Ledger(tmp_path / "second", "host").elsewhere() == 0
    second.__dict__.pop("alive").close()


def test_a_ledger_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gone", "host")
    ledger.hold(5)
    assert ledger.elsewhere() == 0


# -- in the local engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(unpacked: Callable[[str], Path]) -> LocalEngine:
    limits = Limits(memory_bytes=100, passes=50, waiting_cases=1)
    return LocalEngine(ModelBundle(unpacked("five_folds")), torch.device("cpu"), limits=limits)


def price(size: int) -> Price:
    return Price(grid=(1, 1, 1), patches=1, passes=1, bytes=size, preprocess_s=0, export_s=0)


def test_a_case_waits_for_room(engine: LocalEngine) -> None:
    entered = threading.Event()
    waited: list[float] = []

    def follow() -> None:
        with engine.reserve(price(60), None) as reserved:
            waited.append(reserved.waited_s)
            entered.set()

    with engine.reserve(price(60), None):
        second = threading.Thread(target=follow)
        second.start()
        wait_for(lambda: engine._admission.waiting == 1)
        assert not entered.wait(0.2)
        with pytest.raises(Busy) as busy, engine.reserve(price(60), None):
            pass
        assert busy.value.retry_after_s == 1
        with engine.reserve(price(1000), None, guaranteed=True):
            pass
    second.join(120)
    assert waited[0] >= 0.2


def test_a_case_that_never_fits_is_refused_at_once(engine: LocalEngine) -> None:
    with pytest.raises(OutOfMemory), engine.reserve(price(101), None):
        pass


def test_waiting_ends_with_the_deadline(engine: LocalEngine) -> None:
    with engine.reserve(price(100), None):
        with pytest.raises(Deadline), engine.reserve(price(100), time.monotonic() + 0.1):
            pass
        assert engine._admission.waiting == 0


def test_a_case_that_takes_more_than_was_guessed_waits_for_the_rest(engine: LocalEngine) -> None:
    asked, done = threading.Event(), threading.Event()

    def grow() -> None:
        with engine.reserve(price(50), None) as reserved:
            asked.set()
            reserved.amend(price(80))
            assert engine._admission.charged_bytes == 80
            done.set()

    with engine.reserve(price(40), None) as first:
        second = threading.Thread(target=grow)
        second.start()
        assert asked.wait(120)
        assert not done.wait(0.2)
        assert engine._admission.charged_bytes == 90
        with pytest.raises(OutOfMemory):
            first.amend(price(101))
    second.join(120)
    assert done.is_set()
    assert engine._admission.charged == 0


def test_of_cases_that_wait_for_each_other_the_latest_is_refused(engine: LocalEngine) -> None:
    entered, ended = threading.Barrier(2, timeout=120), []

    def grow(number: int) -> None:
        with engine.reserve(price(40), None) as reserved:
            entered.wait()
            try:
                reserved.amend(price(70))
                ended.append((number, "charged"))
            except Busy as busy:
                ended.append((number, f"refused, {busy.retry_after_s}"))

    both = [threading.Thread(target=grow, args=(number,)) for number in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(120)
    assert sorted(outcome for _, outcome in ended) == ["charged", "refused, 1"]
    assert (engine._admission.charged, engine._admission.growing) == (0, 0)


def test_waiting_for_more_ends_with_the_deadline(engine: LocalEngine) -> None:
    with engine.reserve(price(50), None):
        until = time.monotonic() + 0.1
        with pytest.raises(Deadline), engine.reserve(price(50), until) as reserved:
            reserved.amend(price(60))
        assert (engine._admission.charged, engine._admission.growing) == (1, 0)
