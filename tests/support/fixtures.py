"""Fixtures: trained models, archives of them, and pipelines and servers that serve them.

A plugin of its own (conftest.py), for the process that hands tests to others needs none of this.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine import starter
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest

from . import warm
from .chaos import engine_processes
from .models import carried
from .once import once, run_folder
from .server import SERVED, LiveServer, running

MATERIAL_VARIABLE = "NNUNET_TORCHSERVE_MATERIAL"

COLD = starter.run


@pytest.fixture(scope="session", autouse=True)
def _runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines of the tests share nothing with a server of this user."""
    os.environ[RUNTIME_DIR_VARIABLE] = str(tmp_path_factory.mktemp("runtime") / "engines")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of a test's own; its engines are gone in the end."""
    folder = tmp_path / "run"
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(folder))
    yield folder
    for engine in engine_processes(folder):
        engine.kill()


@pytest.fixture(scope="session", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    warm.share(run_folder(tmp_path_factory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "run", warm.run)
        yield


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are started as workers start them, by an interpreter of their own."""
    monkeypatch.setattr(starter, "run", COLD)


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """Name -> trained model folder, as the repository carries it: copy what is to be changed."""
    return carried()


@pytest.fixture(scope="session")
def archive_of(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model -> its archive ``NAME.mar``, made when it is first asked for, by whichever process of the run."""
    store = run_folder(tmp_path_factory) / "model_store"

    @cache
    def archive(name: str) -> Path:
        def make() -> None:
            with tempfile.TemporaryDirectory() as unfinished:
                [made] = make_archives(ArchiveRequest(models[name], Path(unfinished), name=name))
                store.mkdir(exist_ok=True)
                shutil.move(made, store)

        once(store.with_name(f"{name}.made"), make)
        return store / f"{name}.mar"

    return archive


@pytest.fixture(scope="session")
def model_store(models: dict[str, Path], archive_of: Callable[[str], Path]) -> Path:
    """A folder with one archive, ``NAME.mar``, for each trained model."""
    [store] = {archive_of(name).parent for name in models}
    return store


@pytest.fixture(scope="session")
def unpacked(archive_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model -> its archive, unpacked as TorchServe does it."""

    @cache
    def unpack(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(archive_of(name)) as archive:
            archive.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def pipeline(unpacked: Callable[[str], Path]) -> Callable[[str], Pipeline]:
    """Name of a model -> the pipeline that a worker has, in this process."""

    @cache
    def load(name: str) -> Pipeline:
        bundle = ModelBundle(unpacked(name))
        return Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)

    return load


@pytest.fixture(scope="session")
def server(archive_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A real TorchServe that serves ``SERVED``, with a body limit of 2 MiB."""
    [store] = {archive_of(name).parent for name in SERVED}
    models = [f"{name}.mar" for name in SERVED]
    with running(store, tmp_path_factory.mktemp("server"), models=models, body_limit=2 * 1024**2) as live:
        yield live


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder with more models and images; the test is skipped where there is none."""
    folder = os.environ.get(MATERIAL_VARIABLE)
    if not folder:
        pytest.skip(f"{MATERIAL_VARIABLE} is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def material_pipeline(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pipeline]:
    """Dataset and configuration of the material -> a pipeline that serves all its folds."""

    @cache
    def load(dataset: str, configuration: str) -> Pipeline:
        folder = material / "models" / dataset / f"nnUNetTrainer__nnUNetPlans__{configuration}"
        [archive] = make_archives(ArchiveRequest(folder, tmp_path_factory.mktemp("material_store")))
        target = tmp_path_factory.mktemp("material_model")
        zipfile.ZipFile(archive).extractall(target)
        bundle = ModelBundle(target)
        return Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)

    return load
