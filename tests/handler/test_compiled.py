"""``compiled`` on a CPU: its logic with PyTorch's tracer alone, and with the compiler in the long tests."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_torchserve.backend import AUTO, Backend, StoredBackend, candidate, parse_choice, why_not
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine import golden
from nnunet_torchserve.engine.backends import compile_cache as compile_cache_module
from nnunet_torchserve.engine.backends.compile_cache import FOLDER, compile_cache, compiling, hold
from nnunet_torchserve.engine.golden import check_golden, load_networks_or_eager, read_golden
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import Networks, probe_batch, seconds_per_patch
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.measured_here import backend_here, report_in_force
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.graphs import stored_backend
from nnunet_torchserve_tools.validation_cases import Validation
from support import volumes
from support.accuracy import report, structure
from support.chaos import engine_processes as engines
from support.chaos import has_ended, wait_for

CPU = torch.device("cpu")
COMPILED = Backend.COMPILED
BOTH = Settings("3d_fullres", (0, 1), (0, 2), tile_step_size=0.5, use_gaussian=True)


@pytest.fixture
def bundle(unpacked: Any) -> ModelBundle:
    return ModelBundle(unpacked("five_folds"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch traces and guards as ever, and runs what it traced as it is: nothing is compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def some_patches(networks: Networks, count: int) -> torch.Tensor:
    lead = networks.of("3d_fullres")
    shape = (count, lead.input_channels, *lead.patch_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.usefixtures("traced")
def test_batches_are_filled_up_and_weights_come_back(bundle: ModelBundle, runtime: Path) -> None:
    networks, eager = Networks(bundle, CPU, COMPILED, 3), Networks(bundle, CPU)
    ours, theirs = networks.of("3d_fullres"), eager.of("3d_fullres")
    assert (networks.backend, ours.backend, probe_batch(networks)) == (COMPILED, COMPILED, 3)
    assert eager.batch is None
    patches = some_patches(networks, 4)
    with torch.inference_mode():
        together = ours.forward(1, patches)
        for number, patch in enumerate(patches):
            assert torch.equal(ours.forward(1, patch[None])[0], together[number])
        torch.testing.assert_close(together, theirs.forward(1, patches))
        assert not torch.equal(together, ours.forward(0, patches))
    weights = OpenWeights(bundle.members.values(), bundle.description.files, networks.files)
    networks.unload()
    assert not networks.loaded
    assert sum(parameter.numel() for module in networks.modules for parameter in module.parameters()) == 0
    networks.load(weights)
    check_golden(networks, read_golden(bundle))
    assert torch.equal(ours.forward(1, patches), together)
    assert (runtime / FOLDER).stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("runtime")
def test_where_nothing_can_be_compiled_eager_answers_and_says_why(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def no_compiler(*_: object, **__: object) -> Any:
        def run(_patches: torch.Tensor) -> torch.Tensor:
            msg = "backend='inductor' raised:\nInvalidCxxCompiler"
            raise RuntimeError(msg) from OSError("no working C++ compiler found")

        return run

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", no_compiler)
        assert load_networks_or_eager(bundle, CPU, COMPILED, 1).backend is Backend.EAGER
    assert "eager is used and not compiled: PyTorch cannot compile" in caplog.text
    assert "OSError: no working C++ compiler found" in caplog.text
    (tmp_path / "file").touch()
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "file"))
    assert load_networks_or_eager(bundle, CPU, COMPILED, 1).backend is Backend.EAGER
    assert "what torch.compile makes cannot be kept in" in caplog.text


def test_what_is_compiled_is_kept_by_archive_and_kind_of_device_and_is_nobody_elses(runtime: Path) -> None:
    folder = compile_cache("a" * 64, CPU)
    assert folder == compile_cache("a" * 64, torch.device("cpu", 1))
    assert folder != compile_cache("b" * 64, CPU)
    assert folder.parent == runtime / FOLDER
    folder.parent.chmod(0o770)
    with pytest.raises(BundleError, match="must belong to user"):
        compile_cache("a" * 64, CPU)


def test_every_archive_can_be_run_compiled_and_its_report_is_of_the_cpu() -> None:
    assert {why_not(COMPILED, None, kind) for kind in ("cpu", "cuda")} == {None}
    stored = stored_backend(COMPILED)
    assert stored.requires.keys() == stored.made_with.keys() == {"torch"}
    measured = report({"part": structure(9, 9, 9)}, backend=COMPILED).model_copy(
        update={"software": stored.made_with, "max_patch_batch": 1}
    )
    assert report_in_force(measured, stored, COMPILED, "cpu", 1) is measured
    assert report_in_force(measured, stored, COMPILED, "cuda", 1) is None


def test_auto_tries_what_the_archive_was_made_for() -> None:
    assert parse_choice("auto") == HandlerSettings.read({"backend": "auto"}).backend == AUTO
    assert parse_choice("openvino") is Backend.OPENVINO_FLOAT32
    assert candidate(AUTO, None) is Backend.EAGER
    less = StoredBackend(backend=Backend.OPENVINO_BFLOAT16, requires={}, made_with={})
    assert candidate(AUTO, less) is Backend.OPENVINO_BFLOAT16
    assert backend_here(AUTO, less, None, "cpu", 1) == (Backend.EAGER, None)  # nobody has measured it


@pytest.mark.usefixtures("traced", "runtime")
@pytest.mark.parametrize(("seconds", "chosen"), [((0.9, 1.0), COMPILED), ((0.99, 1.0), Backend.EAGER)])
def test_auto_takes_eager_unless_the_other_is_faster(
    seconds: tuple[float, float],
    chosen: Backend,
    bundle: ModelBundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = dict(zip((COMPILED, Backend.EAGER), seconds, strict=True))
    assert seconds_per_patch(Networks(bundle, CPU), 1) > 0
    monkeypatch.setattr(golden, "seconds_per_patch", lambda networks, _batch: taken[networks.backend])
    with caplog.at_level(logging.INFO):
        assert load_networks_or_eager(bundle, CPU, COMPILED, "auto", only_if_faster=True).backend is chosen
    assert f"{chosen} is the fastest" in caplog.text


@pytest.mark.usefixtures("traced", "runtime")
def test_auto_takes_eager_where_there_is_no_memory_for_both(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, loaded = golden.load_networks, []

    def with_room_for_one(bundle: ModelBundle, device: torch.device, *of_another: Any) -> Networks:
        loaded.append(of_another)
        if len(loaded) == 2:
            raise torch.OutOfMemoryError
        return real(bundle, device, *of_another)

    monkeypatch.setattr(golden, "load_networks", with_room_for_one)
    networks = load_networks_or_eager(bundle, CPU, COMPILED, "auto", only_if_faster=True)
    assert networks.backend is Backend.EAGER
    assert len(loaded) == 3
    assert "eager is used and not compiled" in caplog.text


def kept_for(**days: float) -> list[Path]:
    """The folder of each archive, with something in it, as if it had been asked for so many days ago."""
    folders = [compile_cache(archive * 64, CPU) for archive in days]
    for folder, ago in zip(folders, days.values(), strict=True):
        (folder / "code.so").touch()
        then = time.time() - ago * 86400
        os.utime(folder / "lock", (then, then))
    return folders


def test_what_was_compiled_for_an_archive_that_nobody_serves_any_more_goes(runtime: Path) -> None:
    gone, compiles, rare = kept_for(a=31, b=99, c=29)
    with compiling(compiles):
        used = compile_cache("d" * 64, CPU)
    assert set(used.parent.iterdir()) == {compiles, rare, used}
    assert (rare / "code.so").exists()
    assert compile_cache("a" * 64, CPU) == gone
    assert [each.name for each in gone.iterdir()] == ["lock"]
    assert set(used.parent.iterdir()) == {rare, used, gone}  # whoever compiled has ended


def test_of_many_archives_those_that_were_served_last_are_kept(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, latest, oldest, _ = kept_for(a=3, b=1, c=5, d=4)
    monkeypatch.setattr(compile_cache_module, "_MOST_FOLDERS", 3)
    used = compile_cache("e" * 64, CPU)
    assert set(used.parent.iterdir()) == {used, latest, older}
    assert compile_cache("c" * 64, CPU) == oldest
    assert set(used.parent.iterdir()) == {oldest, used, latest}


@pytest.mark.usefixtures("traced")
def test_what_loaded_networks_were_compiled_for_is_kept_however_old_it_is(bundle: ModelBundle, runtime: Path) -> None:
    """An engine may run for months; the one that follows it must not compile for minutes."""
    networks = Networks(bundle, CPU, COMPILED)
    folder = compile_cache(bundle.digest, CPU)
    with pytest.raises(OSError, match="full"), compiling(folder):  # of another one, which leaves nothing that it made
        raise OSError(errno.ENOSPC, "full")
    os.utime(folder / "lock", (0, 0))
    other = compile_cache("d" * 64, CPU)
    assert networks.loaded
    assert set(other.parent.iterdir()) == {folder, other}


def test_a_folder_that_is_held_is_kept_until_it_is_not(runtime: Path) -> None:
    [folder] = kept_for(a=31)
    held = hold(folder)
    used = compile_cache("d" * 64, CPU)
    assert set(used.parent.iterdir()) == {folder, used}
    os.close(held)
    compile_cache("d" * 64, CPU)
    assert set(used.parent.iterdir()) == {used}


def test_only_folders_are_removed_and_nothing_that_a_link_leads_to(runtime: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    [gone] = kept_for(f=99)
    link, file = gone.parent / "0_link", gone.parent / "0_file"
    link.symlink_to(elsewhere)
    file.touch()
    for each in (file, elsewhere):
        os.utime(each, (0, 0))
    used = compile_cache("d" * 64, CPU)
    assert set(used.parent.iterdir()) == {used, link, file}
    assert not list(elsewhere.iterdir())


def test_a_folder_that_was_removed_before_its_engine_began_to_compile_is_made_again(runtime: Path) -> None:
    folder = compile_cache("2" * 64, CPU)
    shutil.rmtree(folder)
    with compiling(folder):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_an_engine_waits_only_so_long_for_another_that_compiles(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_cache("0" * 64, CPU)
    monkeypatch.setattr(compile_cache_module, "_LONGEST_WAIT_S", 0.0)
    with compiling(folder), pytest.raises(BundleError, match="another process has been compiling"), compiling(folder):
        pass


def test_of_what_could_not_be_compiled_nothing_is_kept(runtime: Path) -> None:
    folder = compile_cache("1" * 64, CPU)
    (folder / "half").mkdir()
    (folder / "half" / "code.so").touch()
    with pytest.raises(OSError, match="full"), compiling(folder):
        raise OSError(errno.ENOSPC, "full")
    assert [each.name for each in folder.iterdir()] == ["lock"]


@pytest.mark.long
def test_an_archive_is_compiled_once_and_answers_nearly_as_eager(
    models: dict[str, Path], tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real compiler: an archive, an engine process, and its death."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    image, labels = volumes.blobs((24, 28, 24), seed=40)
    affine = volumes.oblique((1.5, 1.5, 1.5), 0.0)
    content = volumes.nifti_gz(image, affine)
    volumes.write(tmp_path / "imagesTs", "case_0000.nii.gz", content)
    volumes.write(tmp_path / "labelsTs", "case.nii.gz", volumes.nifti_gz(labels, affine))
    validation = Validation((tmp_path / "imagesTs",), tmp_path / "labelsTs")
    request = ArchiveRequest(
        models["five_folds"], tmp_path / "store", folds=(0, 1), name="m", backend=COMPILED, validation=validation
    )
    [archive] = make_archives(request)
    zipfile.ZipFile(archive).extractall(tmp_path / "model")
    made = ModelBundle(tmp_path / "model")
    data = torch.randn((1, 30, 33, 30), generator=torch.Generator().manual_seed(3))
    expected = LocalEngine(made, CPU).predict(data, BOTH).logits
    engine_here = LocalEngine(made, CPU, backend=COMPILED)
    found = engine_here.predict(data, BOTH)
    answer = Pipeline(made, engine_here, Limits(), 600.0, backend=COMPILED).answer(Request({"body": content}, {}))
    assert answer.headers["X-Nnunet-Backend"].startswith("compiled; dice=")
    assert found.backend is COMPILED
    assert float((found.logits.float() - expected.float()).abs().max()) < 0.05  # a few steps of float16
    assert not torch.equal(found.logits, expected)  # or another backend answered
    kept, compiled = compile_cache(made.digest, CPU), []
    worker = RemoteEngine(made, CPU, unload_after_s=0.2, backend=COMPILED)
    try:
        for _ in range(2):
            assert worker.backend is COMPILED
            assert torch.equal(worker.predict(data, BOTH).logits, found.logits)
            [engine] = engines(runtime)
            compiled.append({file.relative_to(kept): file.stat().st_mtime_ns for file in kept.rglob("*.so")})
            assert not engine.children()  # nobody who compiled is left
            engine.kill()
            wait_for(partial(has_ended, engine))
    finally:
        worker.disconnect()
    first, second = compiled
    assert first
    assert second == first  # nothing was compiled anew
    assert {folder.name for folder in home.glob("*/*")} <= {"matplotlib"}
