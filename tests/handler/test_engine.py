"""Cases in flight: who goes first, who shares a batch, and who pays when one goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.accumulator import Layout, held_bytes, mirrorings, new_accumulator
from nnunet_torchserve.engine.core import CaseInFlight, EngineCore
from nnunet_torchserve.engine.faults import Fault, Faults, Kind
from nnunet_torchserve.engine.golden import load_networks
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import Networks
from nnunet_torchserve.engine.scheduler import Policy
from nnunet_torchserve.errors import CaseFailed, Deadline, OutOfMemory
from nnunet_torchserve.options import Accumulate

CPU = torch.device("cpu")
PLAIN = Settings(member="3d_fullres", folds=(0,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
MIRRORED = Settings(member="3d_fullres", folds=(0, 2), mirroring_axes=(0, 1, 2), tile_step_size=0.5, use_gaussian=True)


@pytest.fixture(scope="module")
def bundle(unpacked: Callable[[str], Path]) -> ModelBundle:
    return ModelBundle(unpacked("five_folds"))


@pytest.fixture(scope="module")
def networks(bundle: ModelBundle) -> Networks:
    return load_networks(bundle, CPU)


def volume(size: int, seed: int) -> torch.Tensor:
    return torch.randn((1, size, size, size), generator=torch.Generator().manual_seed(seed))


def layout_of(networks: Networks, settings: Settings, batch: int = 1) -> Layout:
    of_member = networks.of(settings.member)
    return Layout(of_member.classes, of_member.patch_size, CPU, batch)


def case(
    networks: Networks,
    number: int,
    data: torch.Tensor,
    settings: Settings = PLAIN,
    batch: int = 1,
    **fields: object,
) -> CaseInFlight:
    accumulator = new_accumulator(data, settings, layout_of(networks, settings, batch))
    return CaseInFlight(number, settings.member, accumulator, arrived=float(number), **fields)  # type: ignore[arg-type]


def run(core: EngineCore, now: float = 10.0) -> dict[int, Exception | torch.Tensor]:
    ended: dict[int, Exception | torch.Tensor] = {}
    while len(core):
        for outcome in core.step(now):
            ended[outcome.case.case_id] = outcome.error or outcome.case.accumulator.result()
    return ended


def test_mirrorings_are_in_nnunets_order() -> None:
    assert mirrorings((0, 2)) == [(), (1,), (3,), (1, 3)]
    assert mirrorings(()) == [()]


@pytest.mark.parametrize("batch", [1, 3])
def test_an_answer_does_not_depend_on_who_else_is_served(batch: int, networks: Networks) -> None:
    sizes = {0: 40, 1: 26, 2: 33}
    alone: dict[int, Exception | torch.Tensor] = {}
    for number, size in sizes.items():
        core = EngineCore(networks, batch)
        core.admit(case(networks, number, volume(size, number), MIRRORED if number == 1 else PLAIN))
        alone |= run(core)
    together = EngineCore(networks, batch)
    for number, size in sizes.items():
        together.admit(case(networks, number, volume(size, number), MIRRORED if number == 1 else PLAIN))
    ended = run(together)
    for number in sizes:
        assert torch.equal(ended[number], alone[number])  # type: ignore[arg-type]


def test_a_batch_holds_patches_of_several_cases(networks: Networks) -> None:
    batches: list[list[int]] = []
    core = EngineCore(networks, 4, before_pass=lambda cases: batches.append(list(cases)))
    for number in range(3):
        core.admit(case(networks, number, volume(24, number)))
    run(core)
    assert any(len(batch) > 1 for batch in batches)
    assert batches[-1] == []


def test_cases_of_two_members_are_answered_as_alone_and_share_no_batch(unpacked: Callable[[str], Path]) -> None:
    """Both need fold 0, each of its own network: there is room in a batch for all of them."""
    bundle, second = (ModelBundle(unpacked(name)) for name in ("five_folds", "anisotropic"))
    second.lead.description = second.lead.description.model_copy(update={"name": "thick"})
    bundle.members["thick"] = second.lead
    networks, thick = Networks(bundle, CPU), replace(PLAIN, member="thick")
    asked = {number: (volume(24, number), thick if number % 2 else PLAIN) for number in range(4)}
    expected: dict[int, Exception | torch.Tensor] = {}
    for number, (data, settings) in asked.items():
        core = EngineCore(networks, 4)
        core.admit(case(networks, number, data, settings))
        expected |= run(core)
    batches: list[list[int]] = []
    together = EngineCore(networks, 4, before_pass=lambda cases: batches.append(list(cases)))
    for number, (data, settings) in asked.items():
        together.admit(case(networks, number, data, settings))
    ended = run(together)
    assert all(torch.equal(ended[number], expected[number]) for number in asked)  # type: ignore[arg-type]
    assert all(len({number % 2 for number in batch}) <= 1 for batch in batches)
    assert {frozenset(batch) for batch in batches if len(batch) > 1} >= {frozenset({0, 2}), frozenset({1, 3})}


def test_a_small_case_is_not_held_up_by_a_large_one(networks: Networks) -> None:
    core = EngineCore(networks)
    core.admit(case(networks, 0, volume(40, 0), MIRRORED))
    for _ in range(3):
        core.step(0.1)
    small = case(networks, 1, volume(20, 1))
    core.admit(small)
    steps = len(small.accumulator)
    ended = [outcome.case.case_id for _ in range(steps) for outcome in core.step(1.0)]
    assert ended == [1]


def test_first_come_first_served_on_request(networks: Networks) -> None:
    core = EngineCore(networks, policy=Policy.FIFO)
    core.admit(case(networks, 0, volume(30, 0)))
    core.admit(case(networks, 1, volume(20, 1)))
    assert list(run(core)) == [0, 1]


def test_only_the_case_with_bad_logits_fails(networks: Networks) -> None:
    core = EngineCore(networks, 2)
    bad = volume(24, 0)
    bad[0, 10, 10, 10] = float("nan")
    core.admit(case(networks, 0, bad))
    core.admit(case(networks, 1, volume(24, 1)))
    ended = run(core)
    assert isinstance(ended[0], CaseFailed)
    assert isinstance(ended[1], torch.Tensor)


def test_only_the_case_that_the_network_fails_on_fails(networks: Networks) -> None:
    core = EngineCore(networks, 4)
    for number in range(3):
        core.admit(case(networks, number, volume(24, number)))
    poison = case(networks, 3, volume(24, 3))
    poison.accumulator._data = poison.accumulator._data[:, :, :, :10]  # a patch of another shape
    core.admit(poison)
    ended = run(core)
    assert isinstance(ended[3], CaseFailed)
    assert all(isinstance(ended[number], torch.Tensor) for number in range(3))


def faulty(networks: Networks, batch: int, kind: Kind, times: int | None = None) -> EngineCore:
    """A core in which something goes wrong for cases of 25 voxels an axis."""
    core = EngineCore(networks, batch, faults=Faults([Fault(kind=kind, shape=(1, 25, 25, 25), times=times)]))
    for number, size in enumerate((24, 25, 26)):
        core.admit(case(networks, number, volume(size, number), batch=batch))
    return core


def alone(networks: Networks, batch: int, number: int, size: int) -> torch.Tensor:
    core = EngineCore(networks, batch)
    core.admit(case(networks, number, volume(size, number), batch=batch))
    ended = run(core)[number]
    assert isinstance(ended, torch.Tensor)
    return ended


@pytest.mark.parametrize(
    ("kind", "error"), [(Kind.RAISE, CaseFailed), (Kind.NAN, CaseFailed), (Kind.OUT_OF_MEMORY, OutOfMemory)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_only_the_guilty_case_pays(kind: Kind, error: type[Exception], batch: int, networks: Networks) -> None:
    core = faulty(networks, batch, kind)
    ended = run(core)
    assert isinstance(ended[1], error)
    left = core.batch
    assert left == (1 if kind is Kind.OUT_OF_MEMORY else batch)
    if left == batch:  # a halved batch gives other last bits
        assert torch.equal(ended[0], alone(networks, batch, 0, 24))  # type: ignore[arg-type]
        assert torch.equal(ended[2], alone(networks, batch, 2, 26))  # type: ignore[arg-type]
    else:
        assert all(isinstance(ended[number], torch.Tensor) for number in (0, 2))


def test_batches_are_halved_before_a_case_is_given_up(networks: Networks) -> None:
    core = faulty(networks, 4, Kind.OUT_OF_MEMORY, times=2)
    ended = run(core)
    assert core.batch == 1
    assert torch.equal(ended[1], alone(networks, 1, 1, 25))  # type: ignore[arg-type]


@pytest.mark.parametrize("mirroring_axes", [(), (0, 2)])
def test_float32_sums_are_closer_to_the_truth_and_do_not_depend_on_the_batch(
    mirroring_axes: tuple[int, ...], networks: Networks
) -> None:
    half = Settings("3d_fullres", (0, 1), mirroring_axes, 0.5, use_gaussian=True)
    single = replace(half, accumulate=Accumulate.FLOAT32)

    def logits(settings: Settings, batch: int) -> torch.Tensor:
        core = EngineCore(networks)
        core.admit(case(networks, 0, volume(30, 0), settings, batch))
        ended = run(core)[0]
        assert isinstance(ended, torch.Tensor)
        return ended

    expected = torch.stack([logits(replace(single, folds=(fold,)), 1).double() for fold in single.folds]).mean(0)
    exact = logits(single, 1)
    assert exact.dtype is torch.float32
    for batch in (2, 3, 100):
        assert torch.equal(logits(single, batch), exact)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=1e-5)
    assert (logits(half, 1) - expected).abs().max() > 10 * (exact - expected).abs().max()


def test_what_an_accumulator_holds_is_known_before(networks: Networks) -> None:
    for settings in (PLAIN, MIRRORED, replace(MIRRORED, accumulate=Accumulate.FLOAT32)):
        layout = layout_of(networks, settings)
        accumulator = new_accumulator(volume(37, 0), settings, layout)
        tensors = [each for each in vars(accumulator).values() if isinstance(each, torch.Tensor)]
        held = sum({t.data_ptr(): t.numel() * t.itemsize for t in tensors if t is not accumulator._gaussian}.values())
        assert held == held_bytes((1, 37, 37, 37), settings, layout)


def test_a_case_out_of_time_is_given_up(networks: Networks) -> None:
    core = EngineCore(networks)
    core.admit(case(networks, 0, volume(30, 0), deadline=5.0))
    core.admit(case(networks, 1, volume(24, 1)))
    ended = run(core, now=6.0)
    assert isinstance(ended[0], Deadline)
    assert isinstance(ended[1], torch.Tensor)


def test_a_dropped_case_is_forgotten(networks: Networks) -> None:
    core = EngineCore(networks)
    core.admit(case(networks, 0, volume(30, 0)))
    core.step(1.0)
    assert core.drop(0)
    assert not core.drop(0)
    assert core.step(1.0) == []


def test_threads_share_one_local_engine(bundle: ModelBundle) -> None:
    engine = LocalEngine(bundle, CPU)
    alone = {number: engine.predict(volume(26, number), PLAIN).logits for number in range(4)}
    together: dict[int, torch.Tensor] = {}

    def predict(number: int) -> None:
        together[number] = engine.predict(volume(26, number), PLAIN).logits

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[number], alone[number]) for number in range(4))
    assert len(engine._core) == 0
    assert not engine._outcomes


def test_a_local_engine_keeps_nothing_of_a_case_out_of_time(bundle: ModelBundle) -> None:
    engine = LocalEngine(bundle, CPU)
    with pytest.raises(Deadline):
        engine.predict(volume(40, 0), MIRRORED, deadline=time.monotonic() + 0.05)
    assert len(engine._core) == 0
    assert not engine._outcomes
