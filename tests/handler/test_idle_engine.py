"""An engine that nobody asks gives its networks' memory back, and has them again when somebody does."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings
from nnunet_torchserve.engine import folder
from nnunet_torchserve.engine.compute import Admit, Compute, Drop, Expect
from nnunet_torchserve.engine.core import EngineCore
from nnunet_torchserve.engine.device_memory import is_worth_freeing
from nnunet_torchserve.engine.golden import check_golden, read_golden
from nnunet_torchserve.engine.ledger import Ledger
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.messages import Failed, Message, Submit
from nnunet_torchserve.engine.network import Networks
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.engine.shared_memory import share
from nnunet_torchserve.engine.tally import Level, Tally, TallyReader, Total
from nnunet_torchserve.errors import BundleError, Busy
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve.options import FoldName
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.chaos import engine_processes as engines
from support.chaos import has_ended, wait_for
from support.descriptors import open_files
from support.untrained import standard_unet

CPU = torch.device("cpu")
BOTH = Settings(member="3d_fullres", folds=(0, 1), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
SHAPE = (1, 16, 16, 16)
PRICE = Price(SHAPE[1:], patches=1, passes=1, bytes=1, preprocess_s=0, export_s=0)
MIB, GIB = 1024**2, 1024**3
AFTER_S = 0.3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Two folds of a network whose weights weigh more than anything else in its passes."""
    scratch = tmp_path_factory.mktemp("idle")
    model = standard_unet(scratch, features=(8, 256, 256), patch_size=(16, 16, 16), folds=2)
    [archive] = make_archives(ArchiveRequest(model, scratch / "store"))
    zipfile.ZipFile(archive).extractall(scratch / "model")
    return ModelBundle(scratch / "model")


@pytest.fixture(scope="module")
def expected(bundle: ModelBundle) -> dict[int, torch.Tensor]:
    """Seed of a volume -> its logits."""
    engine = LocalEngine(bundle, CPU)
    return {seed: engine.predict(volume(seed), BOTH).logits for seed in range(4)}


def volume(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def weights_of(bundle: ModelBundle) -> OpenWeights:
    return OpenWeights(bundle.members.values(), bundle.description.files)


def weights_bytes(bundle: ModelBundle) -> int:
    return sum(file.stat().st_size for file in bundle.folder.glob("members/*/fold_*.safetensors"))


class Watched:
    """An engine process, a worker's connection to it, and its tally."""

    def __init__(self, bundle: ModelBundle, runtime: Path, after_s: float) -> None:
        self._tallies: list[TallyReader] = []
        self.remote = RemoteEngine(bundle, CPU, unload_after_s=after_s, on_tally=self._watch)
        [self.process] = engines(runtime)

    def _watch(self, descriptor: int, process: int) -> None:
        self._tallies.append(TallyReader(descriptor, os.dup(process)))

    @property
    def loaded(self) -> bool:
        return self._tallies[-1].level(Level.NETWORKS_LOADED) == 1

    def total(self, total: Total) -> int:
        return int(self._tallies[-1]._numbers[total])

    def wait_unloaded(self) -> None:
        wait_for(lambda: not self.loaded)

    def close(self) -> None:
        self.remote.disconnect()
        for tally in self._tallies:
            tally.close()


@pytest.fixture
def watch(bundle: ModelBundle, runtime: Path) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(after_s: float = AFTER_S, model: ModelBundle = bundle) -> Watched:
        made.append(Watched(model, runtime, after_s))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_an_idle_engine_gives_its_networks_memory_back_and_answers_as_before(
    watch: Callable[..., Watched], bundle: ModelBundle, expected: dict[int, torch.Tensor]
) -> None:
    engine, weights = watch(), weights_bytes(bundle)
    assert weights > 64 * MIB

    def ask(number: int) -> int:
        """The engine's memory with its networks, which it keeps for as long as a case is there."""
        with engine.remote.reserve(PRICE, None):
            assert torch.equal(engine.remote.predict(volume(number), BOTH).logits, expected[number])
            rss: int = engine.process.memory_info().rss
            return rss

    loaded = ask(0)
    for number in (1, 2):
        engine.wait_unloaded()
        unloaded = engine.process.memory_info().rss
        assert loaded - unloaded > 0.9 * weights
        assert not [
            file.path for file in engine.process.memory_maps() if "weights" in file.path or "fold_" in file.path
        ]
        reloads = engine.total(Total.RELOADS)
        assert engine.total(Total.UNLOADS) == reloads + 1
        loaded = ask(number)
        assert loaded - unloaded > 0.9 * weights
        assert engine.total(Total.RELOADS) == reloads + 1
        assert engine.total(Total.RELOADING_MICROSECONDS) > 0


def test_networks_are_loaded_while_a_case_is_decoded_from_files_that_are_deleted(
    watch: Callable[..., Watched], bundle: ModelBundle, expected: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    """Unregistering a model deletes its directory; another server's workers may still use the engine."""
    shutil.copytree(bundle.folder, tmp_path / "model")
    engine = watch(model=ModelBundle(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    engine.wait_unloaded()
    with engine.remote.reserve(PRICE, None):
        wait_for(lambda: engine.loaded)
        assert torch.equal(engine.remote.predict(volume(0), BOTH).logits, expected[0])
        assert engine.total(Total.UNLOADS) == engine.total(Total.RELOADS) == 1
    engine.wait_unloaded()
    assert not has_ended(engine.process)


def test_weights_that_change_on_disk_are_found_out_and_another_engine_loads_the_good_ones(
    watch: Callable[..., Watched],
    bundle: ModelBundle,
    runtime: Path,
    expected: dict[int, torch.Tensor],
    tmp_path: Path,
) -> None:
    """Another worker of the same model, whose own copy of the archive is whole, gets its answer."""
    shutil.copytree(bundle.folder, tmp_path / "model")
    engine = watch(model=ModelBundle(tmp_path / "model"))
    other = watch()
    assert [engine.process] == [other.process]
    engine.wait_unloaded()
    os.truncate(tmp_path / "model" / bundle.lead.description.folder / "fold_1.safetensors", 1000)
    assert torch.equal(other.remote.predict(volume(0), BOTH).logits, expected[0])
    wait_for(lambda: has_ended(engine.process))
    [log] = runtime.glob(f"*/{folder.LOG}")
    assert "the engine ends: members/3d_fullres/fold_1.safetensors has changed" in log.read_text()


def test_cases_that_race_with_unloading_are_all_answered(
    watch: Callable[..., Watched], expected: dict[int, torch.Tensor]
) -> None:
    """Each worker asks as soon as it sees the networks unloaded, which all see at the same moment."""
    workers, rounds = [watch(after_s=0.02) for _ in range(3)], 2
    found: queue.SimpleQueue[bool] = queue.SimpleQueue()
    together = threading.Barrier(len(workers))

    def ask(worker: Watched) -> None:
        for seed in range(rounds):
            together.wait(300)
            worker.wait_unloaded()
            found.put(torch.equal(worker.remote.predict(volume(seed), BOTH).logits, expected[seed]))

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    asked = rounds * len(workers)
    assert [found.get_nowait() for _ in range(asked)] == [True] * asked
    assert rounds <= workers[0].total(Total.RELOADS) <= asked
    assert not has_ended(workers[0].process)


def test_without_memory_the_case_is_refused_the_engine_lives_and_the_next_case_has_it(
    watch: Callable[..., Watched], bundle: ModelBundle, expected: dict[int, torch.Tensor]
) -> None:
    engine = watch()
    engine.wait_unloaded()
    room = engine.process.memory_info().vms + weights_bytes(bundle) // 4
    _, hard = engine.process.rlimit(psutil.RLIMIT_AS)
    engine.process.rlimit(psutil.RLIMIT_AS, (room, hard))
    for _ in range(2):
        with pytest.raises(Busy, match="load its networks") as refusal:
            engine.remote.predict(volume(0), BOTH)
        assert refusal.value.retry_after_s == 10
        assert not engine.loaded
    engine.process.rlimit(psutil.RLIMIT_AS, (hard, hard))
    with engine.remote.reserve(PRICE, None):  # for so long they are not unloaded again
        assert torch.equal(engine.remote.predict(volume(0), BOTH).logits, expected[0])
        assert not has_ended(engine.process)
        assert engine.total(Total.RELOADS) == engine.total(Total.UNLOADS) == 1


def test_weights_come_back_bit_for_bit_and_what_the_archive_does_not_hold_stays(bundle: ModelBundle) -> None:
    networks, weights = Networks(bundle, CPU), weights_of(bundle)
    first, second = networks.modules
    second.load_state_dict(first.state_dict())  # so that wrong folds would show
    networks.unload()
    networks.load(weights)
    first.register_buffer("derived", torch.arange(3.0), persistent=False)
    parameters = [id(each) for each in first.parameters()]
    strides = [each.stride() for each in first.parameters()]
    networks.unload()
    networks.unload()
    assert not networks.loaded
    assert sum(each.numel() for module in networks.modules for each in module.parameters()) == 0
    networks.load(weights)
    assert networks.loaded
    for fold, module in zip(bundle.lead.folds, networks.modules, strict=True):
        state, stored = module.state_dict(), bundle.lead.weights(fold)
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert torch.equal(first.get_buffer("derived"), torch.arange(3.0))
    assert [id(each) for each in first.parameters()] == parameters
    assert [each.stride() for each in first.parameters()] == strides
    assert len(list(first.parameters())) == len({each.data_ptr() for each in first.parameters()})


class ScarceWeights(OpenWeights):
    """Weights for which the memory ends at the second fold, as often as it is told."""

    def __init__(self, bundle: ModelBundle, failures: int) -> None:
        super().__init__(bundle.members.values(), bundle.description.files)
        self.failures = failures

    def read(self, member: str, fold: FoldName) -> dict[str, torch.Tensor]:
        if fold == 1 and self.failures:
            self.failures -= 1
            msg = "CUDA out of memory"
            raise torch.OutOfMemoryError(msg)
        return super().read(member, fold)


class StuckWeights(OpenWeights):
    """Weights on a disk that does not answer until it is told."""

    def __init__(self, bundle: ModelBundle) -> None:
        super().__init__(bundle.members.values(), bundle.description.files)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def read(self, member: str, fold: FoldName) -> dict[str, torch.Tensor]:
        self.reached.set()
        assert self.go_on.wait(300)
        return super().read(member, fold)


@dataclass
class Answers:
    """A worker that keeps what it is told."""

    messages: list[Message] = field(default_factory=list)

    def answer(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        self.messages.append(message)
        return True


def admit(case_id: int, worker: Answers) -> Admit:
    shared, descriptor = share(SHAPE, torch.float32, "test")
    shared.copy_(volume(0))
    submit = Submit(shape=SHAPE, deadline=None, suspect=False, **asdict(BOTH))
    return Admit(case_id, submit, descriptor, 0.0, worker)


def test_half_loaded_networks_are_none_and_cases_in_hand_are_refused(bundle: ModelBundle, tmp_path: Path) -> None:
    """The compute thread's own steps, one after the other, in this thread."""
    networks, golden = Networks(bundle, CPU), read_golden(bundle)
    weights, tally, checks = ScarceWeights(bundle, failures=2), Tally(), []

    def check(get_on: Callable[[], None]) -> None:
        check_golden(networks, golden, get_on)
        checks.append(networks.loaded)

    ledger = Ledger(tmp_path, "cpu")
    compute = Compute(EngineCore(networks), ledger, 0, tally, check, None, weights, unload_after_s=1e-9)
    compute._once()  # nothing has come
    assert not networks.loaded
    worker, files = Answers(), open_files(collected=True)
    compute.put(Expect(1))
    compute.put(admit(1, worker))
    compute._once()
    [refused] = worker.messages
    assert isinstance(refused, Failed)
    assert (refused.error, refused.retry_after_s) == ("Busy", 10)
    assert weights.failures == 0
    assert not networks.loaded
    assert sum(each.numel() for module in networks.modules for each in module.parameters()) == 0
    assert not checks
    assert open_files() == files
    compute.put(Drop(1))
    compute.put(Expect(2))
    compute.put(admit(2, worker))
    compute._once()
    assert networks.loaded
    assert checks == [True]
    assert compute.passes_done(2) == 1
    compute.put(Drop(2))
    compute._once()
    assert not networks.loaded
    os.close(tally.descriptor)


def test_a_case_that_was_granted_keeps_the_networks_loaded(bundle: ModelBundle, tmp_path: Path) -> None:
    networks, tally = Networks(bundle, CPU), Tally()
    compute = Compute(
        EngineCore(networks), Ledger(tmp_path, "cpu"), 0, tally, weights=weights_of(bundle), unload_after_s=1e-9
    )
    for command, loaded in ((Expect(1), True), (Expect(2), True), (Drop(1), True), (Drop(2), False), (Drop(2), False)):
        compute.put(command)
        compute._once()
        assert networks.loaded == loaded
    os.close(tally.descriptor)


def test_a_load_that_hangs_is_seen_as_a_hang(bundle: ModelBundle, tmp_path: Path) -> None:
    """The heartbeat ends when the compute thread is busy with one thing for too long."""
    networks, weights, tally = Networks(bundle, CPU), StuckWeights(bundle), Tally()
    ledger = Ledger(tmp_path, "cpu")
    compute = Compute(EngineCore(networks), ledger, 0, tally, weights=weights, unload_after_s=1e-9)
    compute._once()
    compute.put(Expect(1))
    turn = threading.Thread(target=compute._once)
    turn.start()
    assert weights.reached.wait(300)
    assert compute.busy_for_s > 0
    assert not networks.loaded
    weights.go_on.set()
    turn.join(300)
    assert compute.busy_for_s == 0
    assert networks.loaded
    os.close(tally.descriptor)


def test_weights_are_read_from_a_deleted_file_and_never_from_a_changed_one(bundle: ModelBundle, tmp_path: Path) -> None:
    model = ModelBundle(Path(shutil.copytree(bundle.folder, tmp_path / "model")))
    weights, stored = weights_of(model), bundle.lead.weights(0)
    first, second = ((model.lead.folder / f"fold_{fold}.safetensors") for fold in (0, 1))
    first.unlink()
    read = weights.read(model.lead.name, 0)
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) for name in stored)
    with pytest.raises(BundleError, match="fold_0"):
        weights_of(model)
    with second.open("r+b") as content:
        content.seek(-100, os.SEEK_END)
        content.write(b"\0" * 8)
    with pytest.raises(BundleError, match="fold_1"):
        weights.read(model.lead.name, 1)
    os.truncate(second, 1000)
    with pytest.raises(BundleError, match="fold_1"):
        weights.read(model.lead.name, 1)


@pytest.mark.parametrize(
    ("reserved", "allocated", "worth"),
    [
        # peaks of a standard U-Net (benchmarks/results/gpu_engine.json, an H100), and its weights
        (int(7.8 * GIB), int(0.12 * GIB), True),  # patch 128, batches of eight
        (int(1.06 * GIB), int(0.12 * GIB), True),  # patch 64, batches of eight
        (int(0.22 * GIB), int(0.12 * GIB), False),  # patch 64, alone: the next pass would wait for the driver
        (GIB, GIB - 256 * MIB, False),  # exactly the threshold
        (GIB, GIB - 256 * MIB - 1, True),
    ],
)
def test_an_idle_gpus_cache_is_freed_when_it_is_large(reserved: int, allocated: int, worth: bool) -> None:
    assert is_worth_freeing(reserved, allocated) == worth
