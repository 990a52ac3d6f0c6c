"""What runs the networks, when it is not nnU-Net's own modules: nearly the same answers, never taken for stock's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from nnunet_torchserve.backend import BACKEND_VARIABLE, Backend, parse_backend, usable_backend, wanted_backend
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.backends import openvino_networks
from nnunet_torchserve.engine.backends.openvino_library import openvino
from nnunet_torchserve.engine.golden import BACKEND_TOLERANCE, check_golden, load_networks_or_eager, read_golden
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import Networks
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.engine.tally import Level, TallyReader
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve.options import Options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.provenance import provenance_of
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.chaos import engine_processes as engines
from support.chaos import has_ended, wait_for
from support.odd_models import OddModel, old_format
from support.packaged import pipeline_of

CPU = torch.device("cpu")
OPENVINO = Backend.OPENVINO_FLOAT32
BOTH = Settings("3d_fullres", (0, 1), (0, 2), tile_step_size=0.5, use_gaussian=True)


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked archive of two folds that was made for OpenVINO."""
    scratch = tmp_path_factory.mktemp("openvino")
    request = ArchiveRequest(models["five_folds"], scratch / "store", folds=(0, 1), name="m", backend=OPENVINO)
    [archive] = make_archives(request)
    zipfile.ZipFile(archive).extractall(scratch / "model")
    return scratch / "model"


@pytest.fixture(scope="module")
def bundle(made: Path) -> ModelBundle:
    return ModelBundle(made)


@pytest.fixture(scope="module")
def networks(bundle: ModelBundle) -> Networks:
    return Networks(bundle, CPU, OPENVINO)


@pytest.fixture(scope="module")
def eager(bundle: ModelBundle) -> LocalEngine:
    return LocalEngine(bundle, CPU)


@pytest.fixture(scope="module")
def fast(bundle: ModelBundle) -> LocalEngine:
    return LocalEngine(bundle, CPU, backend=OPENVINO)


def volume(size: int, seed: int) -> torch.Tensor:
    return torch.randn((1, size, size + 3, size), generator=torch.Generator().manual_seed(seed))


def changed(bundle: ModelBundle, target: Path, change: Callable[[dict[str, Any], Path], None]) -> ModelBundle:
    """A copy of the archive that somebody made otherwise: the checksums are right."""
    folder = Path(shutil.copytree(bundle.folder, target))
    described = json.loads((folder / BUNDLE_FILE).read_text())
    change(described, folder)
    for name in described["files"]:
        described["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / BUNDLE_FILE).write_text(json.dumps(described))
    return ModelBundle(folder)


def test_a_backend_is_named_by_library_and_precision() -> None:
    assert parse_backend("eager") is Backend.EAGER
    assert parse_backend("openvino") is parse_backend("openvino:float32") is OPENVINO
    with pytest.raises(ValueError, match=r"no backend 'openvino:fp8'; there are eager, openvino:float32"):
        parse_backend("openvino:fp8")


def test_serve_wins_over_the_configuration_and_that_over_the_archive(bundle: ModelBundle) -> None:
    stored = bundle.description.backend
    assert stored is not None
    assert wanted_backend(None, None, {}) is Backend.EAGER
    assert wanted_backend(stored, None, {}) is OPENVINO
    assert wanted_backend(stored, Backend.EAGER, {}) is Backend.EAGER
    assert wanted_backend(stored, Backend.EAGER, {BACKEND_VARIABLE: "openvino"}) is OPENVINO


@pytest.mark.parametrize(("has_graphs", "device"), [(False, "cpu"), (True, "cuda")])
def test_what_archive_or_device_lack_is_done_by_eager_and_logged(
    has_graphs: bool, device: str, bundle: ModelBundle, caplog: pytest.LogCaptureFixture
) -> None:
    stored = bundle.description.backend
    assert usable_backend(OPENVINO, stored, "cpu") is OPENVINO
    assert not caplog.records
    assert usable_backend(OPENVINO, stored if has_graphs else None, device) is Backend.EAGER
    assert "eager is used instead" in caplog.text


def test_openvinos_logits_are_near_the_stored_ones_and_not_the_same(networks: Networks, bundle: ModelBundle) -> None:
    """With the same bits it would be another backend that answered."""
    check_golden(networks, read_golden(bundle))
    of_eager, ours = Networks(bundle, CPU).of("3d_fullres"), networks.of("3d_fullres")
    patch = torch.randn((1, ours.input_channels, *ours.patch_size), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for fold in ours.folds:
            expected, logits = of_eager.forward(fold, patch), ours.forward(fold, patch)
            difference = float((logits - expected).abs().max() / expected.abs().max())
            assert 0 < difference < BACKEND_TOLERANCE[OPENVINO] / 10


def test_a_case_with_folds_and_mirroring_is_answered_as_by_eager_and_always_the_same(
    fast: LocalEngine, eager: LocalEngine
) -> None:
    data = volume(26, 0)
    expected, found = eager.predict(data, BOTH), fast.predict(data, BOTH)
    assert (expected.backend, found.backend) == (Backend.EAGER, OPENVINO)
    assert float((found.logits.float() - expected.logits.float()).abs().max()) < 0.05  # a few steps of float16
    differ = found.logits.argmax(0) != expected.logits.argmax(0)
    assert float(differ.float().mean()) < 1e-3
    assert torch.equal(fast.predict(data, BOTH).logits, found.logits)


def test_a_patch_has_the_same_logits_wherever_in_a_batch_it_stands(bundle: ModelBundle) -> None:
    of_three = Networks(bundle, CPU, OPENVINO, batch=3).of("3d_fullres")
    patches = torch.randn((4, 1, *of_three.patch_size), generator=torch.Generator().manual_seed(2))
    together = of_three.forward(0, patches)
    assert together.shape == (4, of_three.classes, *of_three.patch_size)
    for number, patch in enumerate(patches):
        assert torch.equal(of_three.forward(0, patch[None])[0], together[number])


def test_graphs_come_back_from_deleted_files_to_the_bit_and_never_from_changed_ones(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    model = ModelBundle(Path(shutil.copytree(bundle.folder, tmp_path / "model")))
    networks = Networks(model, CPU, OPENVINO)
    weights = OpenWeights(model.members.values(), model.description.files, networks.files)
    files = sorted(model.lead.folder.glob("*.openvino.*"))
    assert [f"members/{model.lead.name}/{file.name}" for file in files] == sorted(networks.files)
    patch = torch.ones((1, 1, *model.lead.patch_size))
    expected = networks.of(model.lead.name).forward(1, patch)
    with files[-1].open("r+b") as content:
        content.seek(-4, os.SEEK_END)
        content.write(b"\1\2\3\4")
    networks.unload()
    assert not networks.loaded
    with pytest.raises(BundleError, match=re.escape(files[-1].name)):
        networks.load(weights)
    assert not networks.loaded
    shutil.copyfile(bundle.folder / files[-1].relative_to(model.folder), files[-1])  # the same file, mended in place
    for file in files:
        file.unlink()
    networks.load(weights)
    assert networks.loaded
    assert torch.equal(networks.of(model.lead.name).forward(1, patch), expected)


def test_without_openvino_eager_answers_and_says_so(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.WARNING):
        networks = load_networks_or_eager(bundle, CPU, OPENVINO, 1)
    assert networks.backend is networks.of("3d_fullres").backend is Backend.EAGER
    assert "eager is used and not openvino:float32: OpenVINO cannot be imported" in caplog.text
    with pytest.raises(BundleError, match=r"in a clone of the project, pip install '\.\[openvino\]'"):
        LocalEngine(bundle, CPU, backend=OPENVINO)


def test_what_an_answer_says_of_its_origin_names_the_backend_and_is_another_object(bundle: ModelBundle) -> None:
    """Two objects with one UID and other voxels would be one too many for any archive."""
    stocks, others = (provenance_of(bundle, Options(), ["0"], None, {each}) for each in (Backend.EAGER, OPENVINO))
    assert stocks.key != others.key
    assert (stocks.as_json()["backends"], others.as_json()["backends"]) == (["eager"], ["openvino:float32"])
    assert not stocks.deviations
    assert any("openvino:float32" in deviation for deviation in others.deviations)


def test_another_version_of_openvino_is_not_tried(bundle: ModelBundle, tmp_path: Path) -> None:
    def need_another(described: dict[str, Any], _folder: Path) -> None:
        described["backend"]["requires"] = {"openvino": "<1"}

    other = changed(bundle, tmp_path / "model", need_another)
    with pytest.raises(BundleError, match=r"openvino:float32 needs openvino<1; .* is installed"):
        LocalEngine(other, CPU, backend=OPENVINO)
    assert load_networks_or_eager(other, CPU, OPENVINO, 1).backend is Backend.EAGER


def test_a_graph_that_is_not_the_weights_is_found_out(
    bundle: ModelBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the golden patch: the checksums are those of the exchanged files."""

    def exchange(_described: dict[str, Any], folder: Path) -> None:
        first, second = (folder / f"members/3d_fullres/fold_{fold}.openvino.bin" for fold in (0, 1))
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)

    other = changed(bundle, tmp_path / "model", exchange)
    assert load_networks_or_eager(other, CPU, OPENVINO, 1).backend is Backend.EAGER
    assert "golden patch: the logits of 3d_fullres, fold 0" in caplog.text


def test_what_runs_is_read_from_what_was_compiled_and_not_from_what_was_asked_for(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO takes the hint bf16 without a word where no bfloat16 can be computed."""
    monkeypatch.setitem(openvino_networks._HINTS, OPENVINO, "bf16")
    read = openvino_networks.layer_precisions
    core, lead = openvino().Core(), bundle.lead
    model = core.read_model(lead.folder / "fold_0.openvino.xml")
    model.reshape([1, 1, *lead.patch_size])
    granted = set(read(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})))
    if granted == {"bf16"}:
        assert Networks(bundle, CPU, OPENVINO).loaded
    else:
        with pytest.raises(BundleError, match=f"computes fold 0 in {', '.join(sorted(granted))} and not as"):
            Networks(bundle, CPU, OPENVINO)
    for found in (Counter(f32=3), Counter(bf16=2, f32=1)):
        monkeypatch.setattr(openvino_networks, "layer_precisions", lambda _compiled, found=found: found)
        with pytest.raises(BundleError, match=f"computes fold 0 in {', '.join(sorted(found))} and not as"):
            Networks(bundle, CPU, OPENVINO)


@pytest.fixture(scope="module")
def in_bfloat16(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The same archive, as if it had been made for bfloat16: the graphs are the same."""

    def ask_for_less(described: dict[str, Any], _folder: Path) -> None:
        described["backend"]["backend"] = "openvino:bf16"

    return changed(bundle, tmp_path_factory.mktemp("bfloat16") / "model", ask_for_less)


def on_a_processor_with(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """What OpenVINO says that the processor has instructions for; all else is this one's."""
    core = openvino().Core
    known = core.get_property

    def told(asked: Any, *names: str) -> Any:
        return list(capabilities) if names == ("CPU", "OPTIMIZATION_CAPABILITIES") else known(asked, *names)

    monkeypatch.setattr(core, "get_property", told)


def test_bfloat16_that_a_processor_would_only_imitate_is_run_by_eager(
    in_bfloat16: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO grants it to every processor with AVX-512, and the layers say bf16 then."""
    monkeypatch.setattr(openvino_networks, "layer_precisions", lambda _compiled: Counter(bf16=3))
    on_a_processor_with(monkeypatch, "FP32", "INT8", "BIN")
    with pytest.raises(BundleError, match=r"no instructions for openvino:bf16, .* takes AVX512-BF16, AMX or AVX2"):
        Networks(in_bfloat16, CPU, Backend.OPENVINO_BFLOAT16)
    assert load_networks_or_eager(in_bfloat16, CPU, Backend.OPENVINO_BFLOAT16, 1).backend is Backend.EAGER
    assert "this CPU has no instructions for openvino:bf16" in caplog.text


def test_bfloat16_is_run_by_processors_that_compute_in_it(
    in_bfloat16: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what was compiled is read all the same: a layer may be left in float32."""
    on_a_processor_with(monkeypatch, "FP32", "BF16")
    with monkeypatch.context() as patched:
        patched.setattr(openvino_networks, "layer_precisions", lambda _compiled: Counter(bf16=3))
        runs = load_networks_or_eager(in_bfloat16, CPU, Backend.OPENVINO_BFLOAT16, 1)
    assert runs.backend is Backend.OPENVINO_BFLOAT16
    monkeypatch.setattr(openvino_networks, "layer_precisions", lambda _compiled: Counter(f32=3))
    assert load_networks_or_eager(in_bfloat16, CPU, Backend.OPENVINO_BFLOAT16, 1).backend is Backend.EAGER
    assert "computes fold 0 in f32 and not as openvino:bf16 on this CPU; it takes AVX512-BF16" in caplog.text


def test_an_archive_for_another_precision_is_run_by_eager(in_bfloat16: ModelBundle) -> None:
    assert load_networks_or_eager(in_bfloat16, CPU, OPENVINO, 1).backend is Backend.EAGER


def test_a_graph_that_cannot_be_read_is_no_outage(bundle: ModelBundle, tmp_path: Path) -> None:
    def spoil(_described: dict[str, Any], folder: Path) -> None:
        (folder / "members/3d_fullres/fold_1.openvino.xml").write_text("<net/>")

    other = changed(bundle, tmp_path / "model", spoil)
    with pytest.raises(BundleError, match=r"OpenVINO cannot compile the graph of fold 1: .*model") as refused:
        Networks(other, CPU, OPENVINO)
    assert "src/" not in str(refused.value)
    assert load_networks_or_eager(other, CPU, OPENVINO, 1).backend is Backend.EAGER


def test_whatever_else_a_library_raises_is_no_outage(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version may describe its layers otherwise, or fail on the golden patch only."""

    def raising(error: Exception) -> Callable[..., Any]:
        def fail(*_: object) -> Any:
            raise error

        return fail

    with monkeypatch.context() as patched:
        patched.setattr(openvino_networks, "layer_precisions", raising(KeyError("layerType")))
        assert load_networks_or_eager(bundle, CPU, OPENVINO, 1).backend is Backend.EAGER
    monkeypatch.setattr(openvino_networks.OpenVinoNetworks, "_infer", raising(RuntimeError("no such kernel")))
    assert load_networks_or_eager(bundle, CPU, OPENVINO, 1).backend is Backend.EAGER


def test_openvino_is_imported_without_its_telemetry() -> None:
    openvino()
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert sys.modules["openvino_telemetry"] is None


def image() -> bytes:
    voxels = np.random.default_rng(0).normal(size=(20, 22, 24)).astype(np.float32)
    content: bytes = nib.Nifti1Image(voxels, np.eye(4)).to_bytes()
    return content


def test_each_answer_says_what_ran_the_networks_and_so_does_the_model(
    bundle: ModelBundle, fast: LocalEngine, eager: LocalEngine
) -> None:
    pipeline = Pipeline(bundle, fast, Limits(), 600.0, backend=OPENVINO)
    for engine, name in ((fast, "openvino:float32"), (eager, "eager")):
        answering = replace(pipeline, engine=engine)
        answer = answering.answer(Request({"body": image()}, {}))
        assert (int(answer.status), answer.headers["X-Nnunet-Backend"]) == (200, name)
        described = json.loads(answering.answer(Request({}, {"describe": "True"})).body)["backend"]
        assert (described["asked"], described["runs"]) == ("openvino:float32", name)
        assert described["archive"]["backend"] == "openvino:float32"
        assert described["archive"]["made_with"].keys() == {"openvino"}


def test_an_engine_process_says_what_it_runs_and_survives_its_death(
    bundle: ModelBundle, fast: LocalEngine, runtime: Path
) -> None:
    data, expected = volume(30, 3), fast.predict(volume(30, 3), BOTH).logits
    worker = RemoteEngine(bundle, CPU, backend=OPENVINO)
    try:
        for _ in range(2):
            answer = worker.predict(data, BOTH)
            assert answer.backend is worker.backend is OPENVINO
            assert torch.equal(answer.logits, expected)
            [engine] = engines(runtime)
            engine.kill()
            wait_for(partial(has_ended, engine))
    finally:
        worker.disconnect()


@pytest.mark.long
def test_an_idle_engine_unloads_its_graphs_and_has_them_again(
    bundle: ModelBundle, fast: LocalEngine, runtime: Path
) -> None:
    tallies: list[TallyReader] = []
    worker = RemoteEngine(
        bundle,
        CPU,
        unload_after_s=0.2,
        backend=OPENVINO,
        on_tally=lambda tally, process: tallies.append(TallyReader(tally, os.dup(process))),
    )
    try:
        for _ in range(2):
            wait_for(lambda: tallies[-1].level(Level.NETWORKS_LOADED) == 0)
            assert torch.equal(worker.predict(volume(30, 3), BOTH).logits, fast.predict(volume(30, 3), BOTH).logits)
    finally:
        worker.disconnect()
        for tally in tallies:
            tally.close()


@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning",  # of packages that nnU-Net's trainers import
    "ignore:Detected old nnU-Net plans",
)
@pytest.mark.parametrize(
    "odd",
    [
        OddModel(2, folds=(0, 1)),
        OddModel(residual=True, features=(4, 8, 16)),
        OddModel(trainer="nnUNetTrainerBN"),
        OddModel(change_plans=old_format),
        OddModel(channels=("T1", "T2"), schemes=("ZScoreNormalization",) * 2, mirroring=(0, 1)),
    ],
    ids=["2d", "residual", "batch norm", "old plans", "two channels"],
)
def test_networks_of_other_kinds_have_graphs_that_answer_as_they_do(odd: OddModel, tmp_path: Path) -> None:
    slow = pipeline_of(odd.write(tmp_path), tmp_path, backend=OPENVINO)
    fast = replace(slow, engine=LocalEngine(slow.bundle, CPU, backend=OPENVINO))
    voxels = np.random.default_rng(0).normal(size=(20, 22, 24, len(odd.channels))).astype(np.float32)
    body = nib.Nifti1Image(voxels.squeeze(), np.diag([1.5, 1.5, 1.5, 1])).to_bytes()
    options = {"X-Nnunet-Options": '{"output_format": "nii"}'}
    answers = [each.answer(Request({"body": body}, options)) for each in (slow, fast)]
    assert [int(each.status) for each in answers] == [200, 200]
    assert [each.headers["X-Nnunet-Backend"] for each in answers] == ["eager", "openvino:float32"]
    first, second = (np.asarray(nib.Nifti1Image.from_bytes(each.body).dataobj) for each in answers)
    assert (first != second).mean() < 1e-3


@pytest.mark.long
def test_graphs_are_the_same_bytes_each_time(models: dict[str, Path], made: Path, tmp_path: Path) -> None:
    request = ArchiveRequest(models["five_folds"], tmp_path / "store", folds=(0, 1), name="m", backend=OPENVINO)
    [archive] = make_archives(request)
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            assert content.read(name) == (made / name).read_bytes()
