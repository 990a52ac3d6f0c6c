"""``compiled`` on a GPU, with CUDA graphs; skipped where there is none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.backends.compiled_networks import CompiledNetworks
from nnunet_torchserve.engine.golden import GOLDEN_TOLERANCE, check_golden, load_networks, read_golden
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import Networks, peak_bytes, probe_batch
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.chaos import engine_processes as engines
from support.chaos import wait_for
from support.untrained import DEMO_MODEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda:0")
BOTH = Settings(member="3d_fullres", folds=(0, 1), mirroring_axes=(0, 1, 2), tile_step_size=0.5, use_gaussian=True)
BATCH = 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    folder = tmp_path_factory.mktemp("demo")
    [archive] = make_archives(ArchiveRequest(DEMO_MODEL, folder / "store"))
    zipfile.ZipFile(archive).extractall(folder / "model")
    return ModelBundle(folder / "model")


@pytest.fixture(scope="module")
def networks(bundle: ModelBundle) -> Networks:
    return load_networks(bundle, CUDA, Backend.COMPILED, BATCH)


@pytest.fixture(scope="module")
def eager(bundle: ModelBundle) -> Networks:
    return load_networks(bundle, CUDA)


def volume(seed: int) -> torch.Tensor:
    return torch.randn((1, 90, 100, 84), generator=torch.Generator().manual_seed(seed))


def some_patches(networks: Networks, count: int, seed: int = 0) -> torch.Tensor:
    lead = networks.of("3d_fullres")
    shape = (count, lead.input_channels, *lead.patch_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def assert_near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as the golden patch wants them, and hardly a label of noise is another."""
    logits, expected = logits.float(), expected.float()
    assert float((logits - expected).abs().max() / expected.abs().max()) < GOLDEN_TOLERANCE["cuda"]
    assert float((logits.argmax(1) != expected.argmax(1)).float().mean()) < 1e-2


@torch.inference_mode()
def test_each_fold_is_captured_and_near_eager(networks: Networks, eager: Networks, bundle: ModelBundle) -> None:
    ours, theirs = networks.of("3d_fullres"), eager.of("3d_fullres")
    assert isinstance(ours, CompiledNetworks)
    assert ours._captured is not None
    assert networks.batch == probe_batch(networks) == BATCH
    assert peak_bytes(networks, BATCH) > 0
    check_golden(networks, read_golden(bundle))
    patches = some_patches(networks, BATCH)
    answers = [ours.forward(fold, patches).clone() for fold in ours.folds]
    for fold, logits in zip(ours.folds, answers, strict=True):
        assert logits.dtype is torch.float16
        assert_near(logits, theirs.forward(fold, patches))
    assert not torch.equal(answers[0], answers[1])  # folds share memory, and not weights


@torch.inference_mode()
def test_an_answer_is_the_callers_and_does_not_depend_on_its_place(networks: Networks) -> None:
    ours = networks.of("3d_fullres")
    patches = some_patches(networks, BATCH + 1)
    together = ours.forward(0, patches)
    alone = [ours.forward(0, patch[None])[0] for patch in patches]  # each replays over the one before
    for row, logits in zip(together, alone, strict=True):
        assert torch.equal(row, logits)


@torch.inference_mode()
def test_unloaded_networks_are_captured_anew_and_answer_as_before(networks: Networks, bundle: ModelBundle) -> None:
    weights = OpenWeights(bundle.members.values(), bundle.description.files, networks.files)
    ours = networks.of("3d_fullres")
    patches = some_patches(networks, BATCH, seed=1)
    expected = ours.forward(1, patches)
    networks.unload()
    torch.cuda.empty_cache()
    taken = torch.full((64 * 1024**2,), float("nan"), device=CUDA)  # where the weights were
    with torch.inference_mode(mode=False):
        networks.load(weights)
    assert torch.isfinite(expected).all()
    assert_near(ours.forward(1, patches), expected)
    check_golden(networks, read_golden(bundle))
    del taken


def test_a_case_is_answered_as_by_eager(bundle: ModelBundle) -> None:
    data = volume(3)
    expected = LocalEngine(bundle, CUDA, BATCH).predict(data, BOTH).logits
    engine = LocalEngine(bundle, CUDA, BATCH, backend=Backend.COMPILED)
    found = engine.predict(data, BOTH)
    assert found.backend is Backend.COMPILED
    assert_near(found.logits[None], expected[None])
    assert torch.equal(engine.predict(data, BOTH).logits, found.logits)


def test_an_engine_process_captures_in_one_thread_and_replays_in_another(bundle: ModelBundle, runtime: Path) -> None:
    worker = RemoteEngine(bundle, CUDA, "auto", unload_after_s=1.0, backend=Backend.COMPILED)
    try:
        assert worker.backend is Backend.COMPILED
        before = worker.predict(volume(4), BOTH).logits
        [entry] = runtime.glob("*/holds-cuda-*")
        wait_for(lambda: int(entry.read_text().split()[0]) == 0)  # idle: unloaded
        again = worker.predict(volume(4), BOTH).logits
        assert_near(again[None], before[None])
        [engine] = engines(runtime)
        assert not engine.children()  # nobody who compiled is left
    finally:
        worker.disconnect()
