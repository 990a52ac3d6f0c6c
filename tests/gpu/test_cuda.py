"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine import network
from nnunet_torchserve.engine.accumulator import Layout, held_bytes, new_accumulator
from nnunet_torchserve.engine.core import CaseInFlight, EngineCore
from nnunet_torchserve.engine.faults import Fault, Faults, Kind
from nnunet_torchserve.engine.folder import ALIVE, LOG
from nnunet_torchserve.engine.golden import load_networks
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.errors import OutOfMemory
from nnunet_torchserve.export import label_map
from nnunet_torchserve.options import Accumulate
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import stock
from support.chaos import engine_processes as engines
from support.chaos import wait_for
from support.export_cases import Case, Labelling, Pattern, classes, stock_labels
from support.untrained import DEMO_MODEL, standard_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PLAIN = Settings(member="3d_fullres", folds=(0,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
BOTH = Settings(member="3d_fullres", folds=(0, 1), mirroring_axes=(0, 1, 2), tile_step_size=0.5, use_gaussian=True)
SHAPE = (1, 90, 100, 84)


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda:0")


def unpack(model: Path, folder: Path) -> ModelBundle:
    [archive] = make_archives(ArchiveRequest(model, folder / "store"))
    zipfile.ZipFile(archive).extractall(folder / "model")
    return ModelBundle(folder / "model")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return unpack(DEMO_MODEL, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def networks(bundle: ModelBundle, cuda: torch.device) -> network.Networks:
    return load_networks(bundle, cuda)


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(networks: network.Networks, number: int, settings: Settings, batch: int, device: str) -> CaseInFlight:
    of_member = networks.of(settings.member)
    layout = Layout(of_member.classes, of_member.patch_size, torch.device(device), batch)
    return CaseInFlight(number, settings.member, new_accumulator(volume(number), settings, layout), float(number))


def run(core: EngineCore) -> dict[int, Exception | torch.Tensor]:
    ended: dict[int, Exception | torch.Tensor] = {}
    while len(core):
        for outcome in core.step(10.0):
            ended[outcome.case.case_id] = outcome.error or outcome.case.accumulator.result().cpu()
    return ended


@pytest.mark.parametrize("settings", [PLAIN, BOTH])
def test_labels_differ_from_stock_no_more_than_stock_from_itself(
    settings: Settings, bundle: ModelBundle, networks: network.Networks, cuda: torch.device
) -> None:
    predictor = stock.loaded(
        DEMO_MODEL, folds=[0, 1][: len(settings.folds)], use_mirroring=bool(settings.mirroring_axes), device=cuda
    )
    data = volume(1)
    first = predictor.predict_logits_from_preprocessed_data(data).float()
    ours = LocalEngine(bundle, cuda).predict(data, settings).logits.float()
    assert torch.equal(ours.argmax(0), first.argmax(0)) or _share(ours, first) < 1e-3
    torch.testing.assert_close(ours, first, rtol=0.05, atol=0.05)


def _share(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.argmax(0) != other.argmax(0)).float().mean())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("accumulate", list(Accumulate))
def test_an_answer_does_not_depend_on_who_else_is_served(
    batch: int, accumulate: Accumulate, networks: network.Networks
) -> None:
    settings = replace(BOTH, accumulate=accumulate)
    alone: dict[int, Exception | torch.Tensor] = {}
    for number in range(3):
        core = EngineCore(networks, batch)
        core.admit(case(networks, number, settings, batch, "cuda:0"))
        alone |= run(core)
    core = EngineCore(networks, batch)
    for number in range(3):
        core.admit(case(networks, number, settings, batch, "cuda:0"))
    together = run(core)
    assert all(torch.equal(together[n], alone[n]) for n in range(3))  # type: ignore[arg-type]


def test_sums_on_the_host_are_the_same(networks: network.Networks) -> None:
    answers = []
    for device in ("cuda:0", "cpu"):
        core = EngineCore(networks)
        core.admit(case(networks, 0, BOTH, 1, device))
        answers.append(run(core)[0])
    assert torch.equal(*answers)  # type: ignore[arg-type]


def test_a_case_whose_memory_runs_out_goes_on_on_the_host(networks: network.Networks) -> None:
    expected = EngineCore(networks)
    expected.admit(case(networks, 0, BOTH, 1, "cuda:0"))
    fault = Fault(kind=Kind.OUT_OF_MEMORY, shape=SHAPE, times=2)
    core = EngineCore(networks, 2, faults=Faults([fault]))
    core.admit(case(networks, 0, BOTH, 1, "cuda:0"))
    answer = run(core)[0]
    assert core.batch == 1
    assert torch.equal(answer, run(expected)[0])  # type: ignore[arg-type]
    always = EngineCore(networks, 2, faults=Faults([fault.model_copy(update={"times": None})]))
    always.admit(case(networks, 0, BOTH, 1, "cuda:0"))
    assert isinstance(run(always)[0], OutOfMemory)


def hog(leave: int, cuda: torch.device) -> torch.Tensor:
    """Memory of nobody's use, so that ``leave`` bytes of the device are free."""
    torch.cuda.empty_cache()
    return torch.empty(torch.cuda.mem_get_info(cuda)[0] - leave, dtype=torch.uint8, device=cuda)


def test_a_device_too_full_for_the_batch_halves_it(networks: network.Networks, cuda: torch.device) -> None:
    few, many = (network.peak_bytes(networks, batch) for batch in (2, 16))
    core = EngineCore(networks, 16)
    core.admit(case(networks, 0, PLAIN, 16, "cuda:0"))
    taken = hog((few + many) // 2, cuda)
    answer = run(core)[0]
    del taken
    assert isinstance(answer, torch.Tensor)
    assert core.batch < 16
    alone = EngineCore(networks, core.batch)
    alone.admit(case(networks, 0, PLAIN, core.batch, "cuda:0"))
    assert _share(answer.float(), run(alone)[0].float()) < 1e-3  # type: ignore[union-attr]


def test_a_device_too_full_for_the_sums_has_them_on_the_host(bundle: ModelBundle, cuda: torch.device) -> None:
    engine = LocalEngine(bundle, cuda)
    large = volume(0, (1, 300, 300, 300))
    coarse = replace(BOTH, mirroring_axes=(), tile_step_size=1.0)
    expected = engine.predict(large, coarse).logits
    networks = engine._core.networks
    of_member = networks.of(coarse.member)
    needed = held_bytes(tuple(large.shape), coarse, Layout(of_member.classes, of_member.patch_size, cuda))
    taken = hog(max(network.peak_bytes(networks, 1), needed // 2), cuda)
    assert torch.cuda.mem_get_info(cuda)[0] < needed
    answer = engine.predict(large, coarse).logits
    del taken
    assert torch.equal(answer, expected)


def test_the_probed_batch_is_one_of_those_tried(networks: network.Networks) -> None:
    assert network.probe_batch(networks) in (1, 2, 4, 8, 16)


def test_the_engine_process_holds_the_only_context_and_survives_its_death(
    bundle: ModelBundle, runtime: Path, cuda: torch.device
) -> None:
    workers = [RemoteEngine(bundle, cuda, "auto") for _ in range(3)]
    expected = {number: workers[0].predict(volume(number), BOTH).logits for number in range(3)}
    [engine] = engines(runtime)
    program = (
        "import sys, torch; from pathlib import Path; from nnunet_torchserve.bundle import ModelBundle;"
        "from nnunet_torchserve.cases import Settings; from nnunet_torchserve.engine.remote import RemoteEngine;"
        "engine = RemoteEngine(ModelBundle(Path(sys.argv[1])), torch.device('cuda:0'), 'auto');"
        "engine.predict(torch.zeros((1, 60, 60, 60)), Settings('3d_fullres', (0,), (), 0.5, True));"
        "print(torch.cuda.is_initialized())"
    )
    idle = subprocess.run(
        [sys.executable, "-c", program, str(bundle.folder)], capture_output=True, text=True, check=True
    )
    assert idle.stdout.split() == ["False"]
    assert engines(runtime) == [engine]
    answers: dict[int, torch.Tensor] = {}

    def ask(number: int) -> None:
        answers[number] = workers[number].predict(volume(number), BOTH).logits

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    engine.kill()
    for thread in threads:
        thread.join(120)
    for worker in workers:
        worker.disconnect()
    assert answers.keys() == expected.keys()
    for number, logits in answers.items():  # another engine's cuDNN may choose other algorithms
        assert _share(logits.float(), expected[number].float()) < 1e-3


def test_what_another_engine_holds_of_the_device_is_respected(
    bundle: ModelBundle, runtime: Path, cuda: torch.device
) -> None:
    engine = RemoteEngine(bundle, cuda, "auto")
    expected = engine.predict(volume(5), PLAIN).logits
    [entry] = runtime.glob("*/holds-cuda-*")
    assert int(entry.read_text().split()[0]) > 0
    other = runtime / "other"
    other.mkdir()
    with (other / ALIVE).open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        (other / entry.name).write_text(f"{torch.cuda.get_device_properties(cuda).total_memory} 0 inf")
        assert torch.equal(engine.predict(volume(5), PLAIN).logits, expected)
    log = entry.with_name(LOG)
    assert log.read_text().count("is summed on the host") == 1
    assert torch.equal(engine.predict(volume(5), PLAIN).logits, expected)
    assert log.read_text().count("is summed on the host") == 1
    engine.disconnect()


def test_two_models_share_the_device(bundle: ModelBundle, runtime: Path, cuda: torch.device, tmp_path: Path) -> None:
    other = unpack(standard_unet(tmp_path, patch_size=(64, 64, 64), features=(32, 64, 128)), tmp_path)
    first, second = RemoteEngine(bundle, cuda, "auto"), RemoteEngine(other, cuda, "auto")
    assert len(engines(runtime)) == 2
    held = [int(file.read_text().split()[0]) for file in runtime.glob("*/holds-cuda-*")]
    assert len(held) == 2
    assert all(size > 0 for size in held)
    for engine, model in ((first, bundle), (second, other)):
        logits = engine.predict(volume(5), PLAIN).logits
        assert _share(logits.float(), LocalEngine(model, cuda).predict(volume(5), PLAIN).logits.float()) < 1e-2
        engine.disconnect()


def test_an_idle_models_part_of_the_device_is_given_back(
    bundle: ModelBundle, runtime: Path, cuda: torch.device
) -> None:
    engine = RemoteEngine(bundle, cuda, unload_after_s=1.0)
    before = engine.predict(volume(5), PLAIN).logits
    [entry] = runtime.glob("*/holds-cuda-*")

    def held() -> int:
        return int(entry.read_text().split()[0])

    for _ in range(2):
        wait_for(lambda: held() == 0)
        assert _share(engine.predict(volume(5), PLAIN).logits.float(), before.float()) < 1e-3
        assert held() > 0
    engine.disconnect()


def test_logits_on_the_gpu_are_exported_as_those_on_the_cpu(cuda: torch.device) -> None:
    """Argmax, regions, anisotropic plans, ties and noise: 0 voxels differ from stock nnU-Net."""
    patterns = (Pattern.ORGANS, Pattern.NOISE, Pattern.NEAR_TIES, Pattern.INTEGERS, Pattern.THRESHOLD)
    regions = Labelling({"background": 0, "all": [1, 2, 3], "core": [2, 3], "centre": 3}, [1, 2, 3])
    for pattern in patterns:
        for labelling in (classes(3), classes(40), regions):
            for target in ((1.0, 1.0, 1.0), (5.0, 1.0, 1.0)):
                case = Case(pattern, (20, 30, 28), (20, 47, 25), labelling, target=target)
                model = case.model()
                logits, properties = case.logits(model), case.properties()
                expected = stock_labels(model, logits, properties)
                assert (label_map(model, logits.to(cuda), properties) == expected).all(), case
