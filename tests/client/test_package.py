"""What the package needs, and what it does not."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nnunet_torchserve_client
from nnunet_torchserve_tools.console import OF_THE_SERVER


def test_neither_torch_nor_nnunet_is_loaded_by_any_module() -> None:
    script = """
import pkgutil, sys, importlib
import nnunet_torchserve_client as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
heavy = {"torch", "nnunetv2", "nibabel", "SimpleITK", "scipy", "pydantic", "nnunet_torchserve"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"


def test_what_takes_long_to_load_is_loaded_when_it_is_used() -> None:
    script = """
import sys
from nnunet_torchserve_client import AsyncRemotePredictor, Client, RemotePredictor
late = {"httpx", "rich", "click"}
before = sorted(late & sys.modules.keys())
RemotePredictor("http://127.0.0.1:1", "brain").close()
print(before, "httpx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[] True\n"


def test_the_clients_verbs_and_the_list_of_trainers_need_what_the_base_install_has() -> None:
    script = """
import sys
from nnunet_torchserve_tools.cli import app
codes = [
    app(["list"], standalone_mode=False),
    app(["predict", "-i", "in", "-o", "out", "--model", "m", "--server", "nowhere"], standalone_mode=False),
    app(["trainers"], standalone_mode=False),
]
heavy = {"torch", "nnunetv2", "nibabel", "SimpleITK", "scipy", "psutil", "yaml"}  # typer may bring pydantic
print(codes, sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[2, 2, None] []"


def test_a_prediction_does_not_wait_for_what_only_other_verbs_need() -> None:
    script = """
import sys
from nnunet_torchserve_tools.console import main
sys.argv = ["nnunet-torchserve", "predict", "-i", "in", "-o", "out", "--model", "m", "--server", "nowhere"]
try:
    main()
except SystemExit as end:
    print(end.code, sorted({"typer", "pydantic"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith("error: ")


def test_nobody_is_told_to_install_a_name_that_no_index_has_of_ours() -> None:
    """Whoever registers it there first would run code on every machine whose owner does as he is told."""
    root = Path(__file__).parents[2]
    folders = [root / name for name in ("docs", "handler", "tools", "client", "trainers")]
    files = [root / "README.md", *(file for folder in folders for file in folder.rglob("*"))]
    texts = [file for file in files if file.suffix in {".md", ".py"}]
    assert len(texts) > 100
    wrong = r"pip3? (install|download)[^\n]*nnunet-torchserve(?![/\w])"
    assert [str(file) for file in texts if re.search(wrong, file.read_text())] == []


def test_every_public_name_is_there() -> None:
    for name in nnunet_torchserve_client.__all__:
        assert getattr(nnunet_torchserve_client, name).__doc__


def test_a_missing_module_is_the_servers_if_its_extra_installs_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"]["server"]}
    installs = {
        module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()
    }
    named = {module for module in installs if installs[module] & wanted}
    assert named >= OF_THE_SERVER
    assert {name for module in OF_THE_SERVER for name in installs[module]} >= wanted
