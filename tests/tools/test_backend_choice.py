"""``archive --backend`` and ``serve --backend``: what is refused, and what is said before a server starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nnunet_torchserve.backend import AUTO, Backend, StoredBackend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.compiler import why_not_compiled
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.graphs import REQUIRES, write_graphs
from nnunet_torchserve_tools.model_store import find_archives, missed_backend
from support import volumes

OPENVINO = Backend.OPENVINO_FLOAT32
STORED = StoredBackend(backend=OPENVINO, requires=REQUIRES, made_with={})


@pytest.mark.parametrize("command", [["archive", "FOLDER"], ["serve"]])
def test_a_backend_that_there_is_not_is_wrong_usage(command: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*command, "--backend", "tensorrt"])
    assert result.exit_code == 2
    assert "--backend: there is no backend 'tensorrt'; there are eager, openvino:float32" in result.output


def test_what_this_machine_cannot_make_is_refused_before_anything_else(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REQUIRES, "openvino", "<1")
    with pytest.raises(ToolError, match=r"openvino:float32 needs openvino<1; .*pip install '\.\[openvino\]'"):
        make_archives(ArchiveRequest(models["flat"], tmp_path, backend=OPENVINO))
    assert not list(tmp_path.iterdir())


def test_compiled_without_a_compiler_is_told_before_anything_starts(
    models: dict[str, Path], archive_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no archive but those that are to be compiled: with auto, or by eager, it does not matter."""
    [plain] = find_archives(archive_of("flat").parent, ["flat.mar"])
    monkeypatch.setenv("CXX", f"{tmp_path / 'ccache'} g++")
    missed = missed_backend(plain, Backend.COMPILED, 0)
    assert missed is not None
    assert missed.startswith("flat.mar is served by eager and not by compiled: there is no C++ compiler")
    assert "apt-get install g++" in missed
    made = replace(plain, backend=STORED.model_copy(update={"backend": Backend.COMPILED, "requires": {}}))
    assert "no C++ compiler" in (missed_backend(made, None, 1) or "")
    assert {missed_backend(made, other, 0) for other in (AUTO, Backend.EAGER)} == {None}
    with pytest.raises(ToolError, match=r"--backend compiled: there is no C\+\+ compiler .*/ccache"):
        make_archives(ArchiveRequest(models["flat"], tmp_path / "store", backend=Backend.COMPILED))
    assert not (tmp_path / "store").exists()
    volumes.write(tmp_path, "ccache", b"#!/bin/sh").chmod(0o755)
    assert missed_backend(plain, Backend.COMPILED, 0) is None


@pytest.mark.parametrize("named", ["", " ", "g++ '-O3"], ids=["empty", "blank", "a quotation without end"])
def test_a_compiler_that_pytorch_cannot_run_either_is_none(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    assert "there is no C++ compiler" in (why_not_compiled() or "")


class Odd(torch.nn.Module):
    """Cannot be traced."""

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        msg = f"no patch of {patch.ndim} axes"
        raise ArithmeticError(msg)


def test_a_network_of_which_there_is_no_graph_is_named_with_the_reason(
    unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    member = ModelBundle(unpacked("flat")).lead
    networks = EagerNetworks(member, torch.device("cpu"))
    networks._networks[0] = Odd()
    with pytest.raises(ToolError, match=r"no graph of the network of 2d, fold 0: no patch of 4 axes$"):
        write_graphs(member, networks)


def test_serve_says_beforehand_which_archives_eager_will_answer_for(archive_of: Callable[[str], Path]) -> None:
    store = archive_of("flat").parent
    [plain] = find_archives(store, ["flat.mar"])
    assert missed_backend(plain, None, 0) is None
    assert missed_backend(plain, Backend.EAGER, 0) is None
    missed = missed_backend(plain, OPENVINO, 0)
    assert missed is not None
    assert missed.startswith(
        "flat.mar is served by eager and not by openvino:float32: the archive holds nothing for it"
    )

    made = replace(plain, backend=STORED)
    assert missed_backend(made, None, 0) is None
    assert "not on cuda" in (missed_backend(made, None, 1) or "")
    assert missed_backend(replace(made, wanted_backend=Backend.EAGER), None, 1) is None
    less = replace(made, backend=STORED.model_copy(update={"backend": Backend.OPENVINO_BFLOAT16}))
    assert "has no report of its accuracy" in (missed_backend(less, None, 0) or "")
    assert missed_backend(replace(less, measured=True), None, 0) is None
    without = replace(made, backend=STORED.model_copy(update={"requires": {"openvino": "<1"}}))
    assert "needs openvino<1" in (missed_backend(without, None, 0) or "")
