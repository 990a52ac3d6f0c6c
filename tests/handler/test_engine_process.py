"""The engine in a process of its own: one for all workers, and what its death costs."""

from __future__ import annotations

import array
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings
from nnunet_torchserve.engine import channel, folder, remote, starter, switchboard
from nnunet_torchserve.engine.ledger import Ledger
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.messages import Failed, Granted, Heartbeat, Message, Release, Reserve, Submit
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.engine.shared_memory import share
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE, TESTING_VARIABLE
from nnunet_torchserve.errors import BundleError, Busy, CaseFailed, Deadline, NoEngine, OutOfMemory
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Priority
from support import warm
from support.chaos import PATIENCE_S, shared_memory
from support.chaos import engine_processes as engines

CPU = torch.device("cpu")
PLAIN = Settings(member="3d_fullres", folds=(0,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
LONG = replace(PLAIN, folds=(0, 1, 2, 3, 4), mirroring_axes=(0, 1, 2))
GONE_WITHIN_S = switchboard.IDLE_S + 120


@pytest.fixture(scope="module")
def bundle(unpacked: Callable[[str], Path]) -> ModelBundle:
    return ModelBundle(unpacked("five_folds"))


Connect = Callable[[ModelBundle], RemoteEngine]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes engine connections that are closed in the end."""
    made: list[RemoteEngine] = []

    def make(bundle: ModelBundle) -> RemoteEngine:
        made.append(RemoteEngine(bundle, CPU))
        return made[-1]

    yield make
    for engine in made:
        engine.disconnect()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runtime directory with one engine, which does not leave."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture(scope="module")
def keeper(bundle: ModelBundle, kept: Path) -> Iterator[RemoteEngine]:
    """The connection for which it stays."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(RUNTIME_DIR_VARIABLE, str(kept))
        keeper = RemoteEngine(bundle, CPU)
    yield keeper
    keeper.disconnect()
    for engine in engines(kept):
        engine.kill()


@pytest.fixture
def one_engine(kept: Path, keeper: RemoteEngine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory for tests that leave its engine as it was."""
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(kept))
    return kept


def volume(size: int, seed: int) -> torch.Tensor:
    return torch.randn((1, size, size, size), generator=torch.Generator().manual_seed(seed))


def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Workers:
    """Threads with an engine connection each, as TorchServe's workers have."""

    def __init__(self, bundle: ModelBundle, connect: Connect, count: int) -> None:
        self.engines = [connect(bundle) for _ in range(count)]
        self.answers: dict[int, object] = {}
        self._threads: list[threading.Thread] = []

    def submit(self, number: int, data: torch.Tensor, settings: Settings) -> None:
        def ask() -> None:
            try:
                self.answers[number] = self.engines[number].predict(data, settings).logits
            except Exception as error:  # noqa: BLE001 (it is the answer)
                self.answers[number] = error

        thread = threading.Thread(target=ask)
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(600)
        assert not any(thread.is_alive() for thread in self._threads)


def charged_bytes(runtime: Path) -> int:
    """What the one engine of a runtime directory has charged all cases for."""
    [ledger] = runtime.glob("*/holds-host")
    return int(ledger.read_text().split()[0])


def costing(share: float) -> Price:
    """A case that takes so much of all memory for cases."""
    size = int(Limits().memory_bytes * share)
    return Price(grid=(1, 1, 1), patches=1, passes=1, bytes=size, preprocess_s=0, export_s=0)


def test_a_case_that_takes_more_than_was_guessed_is_charged_for_it(
    bundle: ModelBundle, one_engine: Path, connect: Connect
) -> None:
    """What it was charged for stays, the rest is waited for before anybody new, and an end of another gives it."""
    first, second = connect(bundle), connect(bundle)
    asked, got = threading.Event(), threading.Event()

    def grow() -> None:
        with second.reserve(costing(0.3), None) as reserved:
            asked.set()
            reserved.amend(costing(0.8))
            assert charged_bytes(one_engine) == costing(0.8).bytes
            expected = second.predict(volume(24, 1), PLAIN).logits
            assert torch.equal(expected, LocalEngine(bundle, CPU).predict(volume(24, 1), PLAIN).logits)
            got.set()

    with first.reserve(costing(0.2), None) as reserved:
        reserved.amend(costing(0.5))
        assert charged_bytes(one_engine) == costing(0.5).bytes
        with pytest.raises(OutOfMemory, match=r"more memory .* than the engine has"):
            reserved.amend(costing(1.1))
        other = threading.Thread(target=grow)
        other.start()
        assert asked.wait(PATIENCE_S)
        assert not got.wait(0.3)
        assert charged_bytes(one_engine) == costing(0.5).bytes + costing(0.3).bytes
    other.join(PATIENCE_S)
    assert got.is_set()
    assert wait_until(lambda: charged_bytes(one_engine) == 0, PATIENCE_S)


def test_of_cases_that_wait_for_each_others_memory_one_is_refused(
    bundle: ModelBundle, one_engine: Path, connect: Connect
) -> None:
    together, ended = threading.Barrier(2, timeout=PATIENCE_S), []

    def grow(engine: RemoteEngine) -> None:
        with engine.reserve(costing(0.4), None) as reserved:
            together.wait()
            try:
                reserved.amend(costing(0.7))
                ended.append("charged")
            except Busy as busy:
                ended.append("refused for a while" if busy.retry_after_s else "refused")
        with engine.reserve(costing(0.7), None):  # whoever was refused is none the worse for it
            ended.append("charged later")

    workers = [threading.Thread(target=grow, args=(connect(bundle),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert sorted(ended) == ["charged", "charged later", "charged later", "refused for a while"]
    assert wait_until(lambda: charged_bytes(one_engine) == 0, PATIENCE_S)


def test_a_case_that_needs_more_memory_waits_a_moment_for_other_engines(
    bundle: ModelBundle, one_engine: Path, connect: Connect
) -> None:
    """They hear of it and give up what they keep; one that does not is not waited for any longer.

    It is tried again where the neighbour was too slow, on a machine that does much else.
    """
    neighbour, wanted = one_engine / "neighbour", costing(0.7).bytes - costing(0.4).bytes
    neighbour.mkdir()
    engine, granted = connect(bundle), False
    with (neighbour / folder.ALIVE).open("w") as alive, ThreadPoolExecutor(1) as pool:
        fcntl.flock(alive, fcntl.LOCK_EX)
        ledger = Ledger(neighbour, "host")

        def give_up(over: threading.Event) -> None:
            while not over.wait(0.01):
                if ledger.wanted_elsewhere() == wanted:
                    ledger.hold(0)
                    return

        for _ in range(10):
            ledger.hold(0, kept=costing(0.5).bytes)
            over, began = threading.Event(), time.monotonic()
            with engine.reserve(costing(0.4), None) as reserved:
                giving_up = pool.submit(give_up, over)
                try:
                    reserved.amend(costing(0.7))
                    granted = True
                except Busy:
                    assert time.monotonic() - began > 1, "it is waited for"
                finally:
                    over.set()
                giving_up.result()
                if granted:
                    ledger.hold(costing(0.3).bytes)
                    with pytest.raises(Busy):
                        reserved.amend(costing(0.8))
                    break
    shutil.rmtree(neighbour)
    assert granted


def test_the_process_gives_the_local_engines_logits(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    local, far = LocalEngine(bundle, CPU), connect(bundle)
    for settings in (PLAIN, Settings("3d_fullres", (3, 1), (0, 2), 0.75, use_gaussian=False)):
        for size in (20, 33):
            expected = local.predict(volume(size, size), settings).logits
            assert torch.equal(far.predict(volume(size, size), settings).logits, expected)
    assert len(engines(one_engine)) == 1


@pytest.mark.usefixtures("cold")
def test_it_leaves_when_its_last_worker_has_left(bundle: ModelBundle, runtime: Path, connect: Connect) -> None:
    engine = connect(bundle)
    [running] = engines(runtime)
    assert running.ppid() != os.getpid()
    engine.disconnect()
    assert not psutil.wait_procs([running], GONE_WITHIN_S)[1]
    assert not list(runtime.glob(f"*/{folder.SOCKET}"))


@pytest.mark.parametrize("attempt", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))])
def test_workers_that_race_at_a_cold_start_share_one_engine(attempt: int, bundle: ModelBundle, runtime: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from nnunet_torchserve.bundle import ModelBundle;"
        "from nnunet_torchserve.engine.remote import RemoteEngine;"
        "engine = RemoteEngine(ModelBundle(Path(sys.argv[1])), torch.device('cpu'));"
        "from nnunet_torchserve.engine.channel import peer_pid;"
        "print(peer_pid(engine._link.endpoint), flush=True); sys.stdin.read()"
    )
    racers = [
        subprocess.Popen(
            [str(warm.python_of_programs()), "-c", program, str(bundle.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2 if attempt == 0 else 3)
    ]
    pids = {racer.stdout.readline() for racer in racers if racer.stdout}
    assert len(pids) == 1
    assert len(engines(runtime)) == 1
    for racer in racers:
        racer.communicate()


@pytest.mark.long  # tests/chaos has it with a live server
def test_a_killed_engine_costs_nothing_but_time(bundle: ModelBundle, runtime: Path, connect: Connect) -> None:
    expected = {number: LocalEngine(bundle, CPU).predict(volume(30, number), LONG).logits for number in range(2)}
    workers = Workers(bundle, connect, 2)
    [running] = engines(runtime)
    for number in range(2):
        workers.submit(number, volume(30, number), LONG)
    assert wait_until(lambda: len(shared_memory([running], "logits")) == len(expected), PATIENCE_S)
    running.kill()
    workers.join()
    assert all(torch.equal(workers.answers[number], expected[number]) for number in range(2))  # type: ignore[arg-type]
    assert running not in engines(runtime)


@pytest.mark.long  # tests/chaos has it with a live server
def test_a_stopped_engine_is_replaced(
    bundle: ModelBundle, runtime: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SILENCE_S", 4.0)
    expected = LocalEngine(bundle, CPU).predict(volume(30, 0), PLAIN).logits
    workers = Workers(bundle, connect, 1)
    [running] = engines(runtime)
    running.suspend()
    workers.submit(0, volume(30, 0), PLAIN)
    workers.join()
    assert torch.equal(workers.answers[0], expected)  # type: ignore[arg-type]
    assert not psutil.wait_procs([running], 120)[1]


@pytest.mark.long  # tests/chaos has it with a live server
def test_a_case_that_kills_the_engine_fails_alone(bundle: ModelBundle, runtime: Path, connect: Connect) -> None:
    expected = LocalEngine(bundle, CPU).predict(volume(40, 1), LONG).logits
    workers = Workers(bundle, connect, 2)
    killer = threading.Event()

    def kill_whoever_runs_the_poison() -> None:
        """Kill each engine while the flight record names the poisonous case."""
        while not killer.is_set():
            for running in engines(runtime):
                with suppress(AttributeError, RuntimeError):
                    link = workers.engines[0]._link
                    if link is not None and poison_case in link.record.read():
                        running.kill()
            time.sleep(0.005)

    poison_case = 1
    workers.submit(0, volume(40, 0), LONG)
    assert wait_until(lambda: poison_case in (workers.engines[0]._link or _raise()).record.read(), PATIENCE_S)
    threading.Thread(target=kill_whoever_runs_the_poison, daemon=True).start()
    workers.join()
    killer.set()
    workers.submit(1, volume(40, 1), LONG)
    workers.join()
    assert isinstance(workers.answers[0], CaseFailed)
    assert torch.equal(workers.answers[1], expected)  # type: ignore[arg-type]


def _raise() -> starter.Link:
    msg = "not connected"
    raise RuntimeError(msg)


def test_a_worker_that_leaves_takes_its_case_along(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from nnunet_torchserve.bundle import ModelBundle;"
        "from nnunet_torchserve.cases import Settings; from nnunet_torchserve.engine.remote import RemoteEngine;"
        "engine = RemoteEngine(ModelBundle(Path(sys.argv[1])), torch.device('cpu')); print('ready', flush=True);"
        "engine.predict(torch.zeros((1, 90, 90, 90)), Settings('3d_fullres', (0, 1, 2, 3, 4), (0, 1, 2), 0.3, True))"
    )
    command = [str(warm.python_of_programs()), "-c", program, str(bundle.folder)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    [running] = engines(one_engine)
    stays = connect(bundle)

    def cases() -> int:
        return len(shared_memory([running], "logits"))

    assert wait_until(lambda: cases() == 1, PATIENCE_S)
    worker.kill()
    worker.communicate()
    assert wait_until(lambda: cases() == 0, PATIENCE_S)
    assert stays.predict(volume(20, 0), PLAIN).logits.isfinite().all()


def test_a_case_out_of_time_is_given_up(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    engine = connect(bundle)
    with pytest.raises(Deadline):
        engine.predict(volume(60, 0), LONG, time.monotonic() + 0.3)
    assert engine.predict(volume(20, 0), PLAIN).logits.shape[1:] == (20, 20, 20)


def test_a_deleted_socket_is_made_again(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    first = connect(bundle)
    [running] = engines(one_engine)
    for path in one_engine.glob(f"*/{folder.SOCKET}"):
        path.unlink()
    second = connect(bundle)
    assert engines(one_engine) == [running]
    assert torch.equal(first.predict(volume(20, 0), PLAIN).logits, second.predict(volume(20, 0), PLAIN).logits)


def test_a_cleaned_up_directory_is_made_again(bundle: ModelBundle, runtime: Path, connect: Connect) -> None:
    first = connect(bundle)
    [running] = engines(runtime)
    expected = first.predict(volume(20, 0), PLAIN).logits
    while runtime.exists():  # the engine writes there too
        shutil.rmtree(runtime, ignore_errors=True)
    assert not psutil.wait_procs([running], 120)[1]
    assert torch.equal(first.predict(volume(20, 0), PLAIN).logits, expected)
    assert len(engines(runtime)) == 1


def test_a_hung_engine_that_never_said_hello_is_killed(
    bundle: ModelBundle, runtime: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connect(bundle)
    [running] = engines(runtime)
    running.suspend()
    first.disconnect()
    monkeypatch.setattr(starter, "HELLO_LIMIT_S", 1.0)
    with pytest.raises(NoEngine):
        connect(bundle)
    assert not psutil.wait_procs([running], 120)[1]
    monkeypatch.undo()


def test_faults_are_refused_outside_tests(
    bundle: ModelBundle, runtime: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "[]")
    with pytest.raises(BundleError, match="for tests only"):
        connect(bundle)
    monkeypatch.setenv(TESTING_VARIABLE, "1")
    assert connect(bundle).predict(volume(20, 0), PLAIN).logits.shape[1:] == (20, 20, 20)


def test_an_engine_that_cannot_load_says_why(
    unpacked: Callable[[str], Path], runtime: Path, connect: Connect, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(unpacked("flat"), tmp_path / "model"))
    bundle = ModelBundle(model)
    (bundle.lead.folder / "fold_0.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(BundleError, match="fold_0"):
        connect(bundle)


def raw_link(runtime: Path) -> socket.socket:
    [path] = runtime.glob(f"*/{folder.SOCKET}")
    endpoint = channel.new_socket()
    home = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    endpoint.connect(f"/proc/self/fd/{home}/{path.name}")  # which is short enough, however long a test's name is
    os.close(home)
    endpoint.settimeout(120)
    received = channel.receive(endpoint)
    assert received is not None
    channel.close_all(received[1])
    return endpoint


def answer(link: socket.socket) -> Message | None:
    """What the engine says next, but for heartbeats, of which a slow machine sees some; ``None`` if it has closed."""
    while (received := channel.receive(link)) is not None and isinstance(received[0], Heartbeat):
        pass
    return None if received is None else received[0]


def submit_of(shape: tuple[int, int, int, int], **fields: object) -> Submit:
    plain = {"folds": (0,), "mirroring_axes": (), "tile_step_size": 0.5, "use_gaussian": True, "deadline": None}
    plain |= {"shape": shape, "member": "3d_fullres", "suspect": False, "accumulate": "half"}
    return Submit.model_validate_json(json.dumps(plain | fields))


def test_lies_are_refused_and_the_engine_lives(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    engine = connect(bundle)
    [running] = engines(one_engine)
    small, descriptor = share((1, 8, 8, 8), torch.float32, "test")
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, small.numel() * 4)
    lies: list[tuple[Submit, int]] = [
        (submit_of((1, 80, 80, 80)), descriptor),
        (submit_of((1, 8, 8, 8)), unsealed),
        (submit_of((1, 8, 8, 8)), os.open(os.devnull, os.O_RDONLY)),
        (submit_of((2, 8, 8, 4)), descriptor),
        (submit_of((1, 8, 8, 8), folds=(9,)), descriptor),
        (submit_of((1, 8, 8, 8), member="another"), descriptor),
        (submit_of((1, 8, 8, 8), mirroring_axes=(7,)), descriptor),
    ]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    wrong_shape, twice = {"shape": [1, -8, -8, 8]}, {"folds": [0, 0]}
    for nonsense in ({"mirroring_axes": [0] * 30}, twice, {"tile_step_size": 1e-6}, {"member": "../up"}, wrong_shape):
        with raw_link(one_engine) as link:
            channel.send(link, Reserve(bytes=1, passes=1))
            assert isinstance(answer(link), Granted)
            text = submit_of((1, 8, 8, 8)).model_dump_json()
            sent = json.dumps(json.loads(text) | nonsense).encode()
            link.sendmsg([sent], rights)
            with suppress(ConnectionResetError):
                assert answer(link) is None
    for message, fd in lies:
        with raw_link(one_engine) as link:
            channel.send(link, Reserve(bytes=1, passes=1))
            channel.send(link, message, (fd,))
            assert isinstance(answer(link), Granted), message
            assert isinstance(answer(link), Failed), message
    for packet in (b"", b"{}", b"\xff" * 100, b'{"kind": "hello", "protocol": 2}', b"[" * 10_000):
        with raw_link(one_engine) as link:
            link.send(packet)
            with suppress(ConnectionResetError):
                assert answer(link) is None
    out_of_turn: list[list[Message]] = [
        [submit_of((1, 8, 8, 8))],
        [Release()],
        [Reserve(bytes=1, passes=1), Reserve(bytes=1, passes=1)],
        [Reserve(bytes=1, passes=1), submit_of((1, 8, 8, 8))],
        [Heartbeat()],
    ]
    for messages in out_of_turn:
        with raw_link(one_engine) as link:
            for each in messages:
                channel.send(link, each)
            while (said := answer(link)) is not None:
                assert isinstance(said, Granted)
    assert engine.predict(volume(20, 0), PLAIN).logits.shape[1:] == (20, 20, 20)
    assert engines(one_engine) == [running]
    os.close(descriptor)
    os.close(unsealed)


def test_batch_cases_leave_a_worker_to_interactive_ones(keeper: RemoteEngine, one_engine: Path) -> None:
    """A worker that they hold takes no request from TorchServe's queue."""
    cost = Price(grid=(1, 1, 1), patches=1, passes=1, bytes=1, preprocess_s=0, export_s=0)

    def refusal() -> Busy | None:
        try:
            with keeper.reserve(cost, None, priority=Priority.BATCH):
                return None
        except Busy as busy:
            return busy

    with raw_link(one_engine) as second, raw_link(one_engine) as third:
        for link in (second, third):
            channel.send(link, Reserve(bytes=1, passes=1, priority=Priority.BATCH))
            assert isinstance(answer(link), Granted)
        assert wait_until(lambda: refusal() is not None, PATIENCE_S), "an earlier test's worker may not be gone yet"
        refused = refusal()
        assert refused is not None
        assert "2 batch cases" in str(refused)
        assert refused.retry_after_s is not None
        with keeper.reserve(cost, None):
            pass
        channel.send(third, Release())
        assert wait_until(lambda: refusal() is None, PATIENCE_S)


def test_batch_cases_keep_their_workers_when_the_engine_has_died(
    bundle: ModelBundle, runtime: Path, connect: Connect
) -> None:
    """Workers come back with their next case; until then they are there all the same."""
    engine = connect(bundle)
    [running] = engines(runtime)
    idle = [raw_link(runtime) for _ in range(2)]
    for link in idle:
        channel.send(link, Reserve(bytes=2**60, passes=1))
        assert isinstance(answer(link), Failed)
    running.send_signal(signal.SIGKILL)
    psutil.wait_procs([running], PATIENCE_S)
    for link in idle:
        link.close()
    cost = Price(grid=(1, 1, 1), patches=1, passes=1, bytes=1, preprocess_s=0, export_s=0)
    with engine.reserve(cost, None, priority=Priority.BATCH), raw_link(runtime) as second:
        channel.send(second, Reserve(bytes=1, passes=1, priority=Priority.BATCH))
        assert isinstance(answer(second), Granted), "two of three workers"
        with raw_link(runtime) as third:
            channel.send(third, Reserve(bytes=1, passes=1, priority=Priority.BATCH))
            assert isinstance(answer(third), Failed), "the last one is kept"
    engine.disconnect()
    [home] = {path.parent for path in runtime.glob(f"*/{folder.SOCKET}")}
    assert wait_until(lambda: folder.workers_of(home) == 0, PATIENCE_S), "one that leaves has none"


def test_descriptors_do_not_pile_up(bundle: ModelBundle, one_engine: Path, connect: Connect) -> None:
    engine = connect(bundle)
    [running] = engines(one_engine)
    engine.predict(volume(20, 0), PLAIN)
    ours, theirs = psutil.Process().num_fds(), running.num_fds()
    for number in range(20):
        engine.predict(volume(20, number), PLAIN)
    assert psutil.Process().num_fds() <= ours + 2
    assert wait_until(lambda: running.num_fds() <= theirs + 2, PATIENCE_S), "the last case's are closed a little later"


def test_a_runtime_directory_that_others_may_write_to_is_refused(
    bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(shared))
    with pytest.raises(BundleError, match="nobody else"):
        RemoteEngine(bundle, CPU)


def test_the_engine_works_without_its_log(bundle: ModelBundle, runtime: Path, connect: Connect) -> None:
    """A directory in the log's place stands for a disk that cannot be written to."""
    engine = connect(bundle)
    [running] = engines(runtime)
    [log] = runtime.glob(f"*/{folder.LOG}")
    engine.disconnect()
    running.send_signal(signal.SIGKILL)
    psutil.wait_procs([running], 120)
    log.unlink()
    log.mkdir()
    assert connect(bundle).predict(volume(20, 0), PLAIN).logits.shape[1:] == (20, 20, 20)


def wait_for_checks(runtime: Path, count: int) -> None:
    """Wait for so many checks of the golden patch that found nothing."""
    [log] = runtime.glob("*/engine.log")
    assert wait_until(lambda: log.read_text().count("the golden patch is as it was") >= count, PATIENCE_S)


def test_an_engine_whose_weights_change_in_memory_is_found_out_and_replaced(
    bundle: ModelBundle, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden patch is computed again, every second here, with cases in flight or without."""
    bad, good = volume(31, 1), volume(20, 2)
    expected = LocalEngine(bundle, CPU).predict(good, PLAIN).logits
    faults = [{"kind": "spoil", "shape": list(bad.shape), "times": 1}]
    monkeypatch.setenv(FAULTS_VARIABLE, json.dumps(faults))
    monkeypatch.setenv(TESTING_VARIABLE, "1")
    engine = RemoteEngine(bundle, CPU, golden_interval_s=1.0)
    try:
        torch.testing.assert_close(engine.predict(good, PLAIN).logits, expected, rtol=0, atol=0)
        [first] = engines(runtime)
        wait_for_checks(runtime, 2)
        assert first.is_running()
        with suppress(CaseFailed):  # if the check comes in the midst of it, each time
            engine.predict(bad, PLAIN)
        assert wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE, PATIENCE_S)
        torch.testing.assert_close(engine.predict(good, PLAIN).logits, expected, rtol=0, atol=0)
        [log] = runtime.glob("*/engine.log")
        assert "golden patch: the logits of 3d_fullres, fold 0, differ" in log.read_text()
    finally:
        engine.disconnect()


@pytest.mark.long  # tests/handler/test_idle_engine.py has files that are deleted, a loaded engine is above
def test_an_unloaded_models_engine_is_checked_all_the_same(bundle: ModelBundle, runtime: Path, tmp_path: Path) -> None:
    """Unregistering a model deletes its directory while the engine still works on the last cases."""
    shutil.copytree(bundle.folder, tmp_path / "model")
    engine = RemoteEngine(ModelBundle(tmp_path / "model"), CPU, golden_interval_s=0.5)
    try:
        [process] = engines(runtime)
        shutil.rmtree(tmp_path / "model")
        wait_for_checks(runtime, 2)
        assert process.is_running()
        assert engine.predict(volume(20, 2), PLAIN).logits.isfinite().all()
    finally:
        engine.disconnect()
