"""The order of cases, as properties that hold for every state."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nnunet_torchserve.engine.scheduler import OLDEST_EVERY, Policy, Share, Waiting, in_order, next_batch
from nnunet_torchserve.options import Priority

NOW = 1000.0
NETWORKS = [(member, fold) for member in ("2d", "3d_fullres") for fold in (0, 1)]
ONE = NETWORKS[0]


@st.composite
def states(draw: st.DrawFn) -> list[Waiting]:
    count = draw(st.integers(0, 12))
    cases = []
    for case_id in range(count):
        remaining = draw(st.integers(1, 5000))
        cases.append(
            Waiting(
                case_id,
                arrived=draw(st.floats(0, NOW)),
                remaining=remaining,
                network=draw(st.sampled_from(NETWORKS)),
                network_remaining=draw(st.integers(1, remaining)),
                suspect=draw(st.booleans()),
                priority=draw(st.sampled_from(Priority)),
            )
        )
    return cases


policies = st.sampled_from(Policy)
turns = st.integers(0, 100)


@given(states(), policies, st.integers(1, 8), turns)
def test_a_batch_is_never_too_large_and_of_one_network(
    state: list[Waiting], policy: Policy, size: int, turn: int
) -> None:
    shares = next_batch(state, policy, turn, size)
    by_id = {case.case_id: case for case in state}
    assert bool(shares) == bool(state)
    assert sum(share.passes for share in shares) <= size
    assert len({by_id[share.case_id].network for share in shares}) <= 1
    for share in shares:
        assert 1 <= share.passes <= by_id[share.case_id].network_remaining


@given(policies, st.integers(2, 8), turns)
def test_the_same_fold_of_another_member_is_another_network(policy: Policy, size: int, turn: int) -> None:
    """There is room for both, and nothing else waits."""
    state = [Waiting(k, NOW, 1, (member, 0), 1) for k, member in enumerate(("2d", "3d_fullres"))]
    [share] = next_batch(state, policy, turn, size)
    assert share == Share(0, 1)
    alike = [replace(case, network=ONE) for case in state]
    assert next_batch(alike, policy, turn, size) == [Share(0, 1), Share(1, 1)]


@given(states(), policies, st.integers(1, 8), turns)
def test_the_most_urgent_case_is_always_served(state: list[Waiting], policy: Policy, size: int, turn: int) -> None:
    shares = next_batch(state, policy, turn, size)
    if state:
        assert shares[0].case_id == in_order(state, policy, turn)[0].case_id


@given(states(), policies, st.integers(2, 8), turns)
def test_a_suspect_shares_its_batch_with_nobody(state: list[Waiting], policy: Policy, size: int, turn: int) -> None:
    shares = next_batch(state, policy, turn, size)
    suspects = {case.case_id for case in state if case.suspect}
    if any(share.case_id in suspects for share in shares):
        assert len(shares) == 1


@given(states(), policies, st.integers(1, 8), turns)
def test_a_batch_is_filled_while_somebody_can_fill_it(
    state: list[Waiting], policy: Policy, size: int, turn: int
) -> None:
    shares = next_batch(state, policy, turn, size)
    taken = {share.case_id for share in shares}
    if not shares or sum(share.passes for share in shares) == size:
        return
    first = next(case for case in state if case.case_id == shares[0].case_id)
    left = [c for c in state if c.case_id not in taken and c.network == first.network and not c.suspect]
    assert first.suspect or not left


@given(st.integers(1, 300), st.integers(1, 50), turns)
def test_a_large_case_ends_under_a_stream_of_small_ones(large: int, small: int, first_turn: int) -> None:
    """Small cases keep arriving that would keep the device busy for good."""
    left, turn = large, first_turn
    while left:
        stream = [Waiting(1 + k, NOW + turn, small, ONE, small) for k in range(10)]
        [share] = next_batch([Waiting(0, NOW, left, ONE, left), *stream], Policy.SHORTEST_REMAINING, turn, 1)
        left -= share.case_id == 0
        turn += 1
    assert turn - first_turn <= OLDEST_EVERY * large


@given(st.integers(1, 60), st.lists(st.integers(100, 5000), min_size=1, max_size=12), turns)
def test_a_small_case_loses_at_most_an_eighth_to_large_ones(small: int, large: list[int], first_turn: int) -> None:
    """However long the large ones have been there."""
    olders = [Waiting(1 + k, float(k), remaining, ONE, remaining) for k, remaining in enumerate(large)]
    left, turn = small, first_turn
    while left:
        [share] = next_batch([*olders, Waiting(0, NOW, left, ONE, left)], Policy.SHORTEST_REMAINING, turn, 1)
        left -= share.case_id == 0
        turn += 1
    assert turn - first_turn <= small * OLDEST_EVERY / (OLDEST_EVERY - 1) + 1


@given(policies, st.integers(1, 300), st.integers(1, 50), turns)
def test_a_batch_case_ends_under_a_stream_of_interactive_ones(
    policy: Policy, batch: int, interactive: int, first_turn: int
) -> None:
    """The same guarantee as for a large case: an eighth of the device, once it is the oldest."""
    left, turn = batch, first_turn
    while left:
        stream = [Waiting(1 + k, NOW + turn, interactive, ONE, interactive) for k in range(10)]
        [share] = next_batch([of_a_folder(0, NOW, left), *stream], policy, turn, 1)
        left -= share.case_id == 0
        turn += 1
    assert turn - first_turn <= OLDEST_EVERY * batch


@given(policies, st.integers(1, 60), st.lists(st.integers(1, 5000), min_size=1, max_size=12), turns)
def test_an_interactive_case_loses_at_most_an_eighth_to_batch_ones(
    policy: Policy, interactive: int, batch: list[int], first_turn: int
) -> None:
    """However short and old they are."""
    olders = [of_a_folder(1 + k, float(k), remaining) for k, remaining in enumerate(batch)]
    left, turn = interactive, first_turn
    while left:
        [share] = next_batch([*olders, Waiting(0, NOW, left, ONE, left)], policy, turn, 1)
        left -= share.case_id == 0
        turn += 1
    assert turn - first_turn <= interactive * OLDEST_EVERY / (OLDEST_EVERY - 1) + 1


@given(states(), policies, turns)
def test_of_one_priority_the_policy_decides_alone(state: list[Waiting], policy: Policy, turn: int) -> None:
    for priority in Priority:
        same = [replace(case, priority=priority) for case in state]
        plain = [replace(case, priority=Priority.INTERACTIVE) for case in state]
        ordered = [case.case_id for case in in_order(same, policy, turn)]
        assert ordered == [case.case_id for case in in_order(plain, policy, turn)]


def of_a_folder(case_id: int, arrived: float, remaining: int) -> Waiting:
    return Waiting(case_id, arrived, remaining, ONE, remaining, priority=Priority.BATCH)


def test_the_shorter_of_two_goes_first_and_fifo_does_not_care() -> None:
    long = Waiting(0, NOW - 1, 1000, ONE, 1000)
    short = Waiting(1, NOW, 8, ONE, 8)
    assert in_order([long, short], Policy.SHORTEST_REMAINING, 0) == [short, long]
    assert in_order([long, short], Policy.FIFO, 0) == [long, short]
