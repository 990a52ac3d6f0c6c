"""A result says which code and which processor it is of, and a benchmark can be found."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.harness import provenance
from benchmarks.harness.results import write_json

MODULE = re.compile(r"\w+\.\w+")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, taken for this one."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("one = 1\n")
    (tmp_path / "benchmarks" / "results" / "command.json").write_text("{}\n")
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "one")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def test_a_result_names_its_commit(repository: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    assert provenance.commit() == {"commit": head.stdout.strip(), "uncommitted_changes": False}


def test_a_change_of_code_is_said_and_a_result_just_written_is_none(repository: Path) -> None:
    (repository / "benchmarks" / "results" / "command.json").write_text('{"new": 1}\n')
    (repository / "benchmarks" / "results" / "other.json").write_text("{}\n")
    assert provenance.commit()["uncommitted_changes"] is False
    (repository / "code.py").write_text("one = 2\n")
    assert provenance.commit()["uncommitted_changes"] is True


def test_without_a_history_the_commit_is_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc")
    assert provenance.commit() == {"commit": "abc", "uncommitted_changes": None}


def test_flags_are_the_processors_and_decide_kernels() -> None:
    flags = provenance.cpu()["cpu_flags"]
    assert isinstance(flags, list)
    assert set(flags) <= set(Path("/proc/cpuinfo").read_text().split())
    assert not {"fpu", "sse2", "aes"} & set(flags)


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "command.json"
    write_json(file, {"seconds": 1})
    with pytest.raises(TypeError):
        write_json(file, {"seconds": object()})
    assert json.loads(file.read_text()) == {"seconds": 1}


def test_every_benchmark_is_in_the_table_and_made_by_make() -> None:
    measured = {
        ".".join(each.relative_to(ROOT / "benchmarks").with_suffix("").parts).removesuffix(".__main__")
        for each in (ROOT / "benchmarks").glob("*/**/*.py")
        if re.search(r"^def main\(.*\) -> int:\n    \"\"\"(?:Measure|Run)", each.read_text(), re.MULTILINE)
    } - {"stages.codecs.memory"}  # a process of stages.codecs
    [made] = re.findall(r"^BENCHMARKS \?= (.*?)^\w", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    on_gpus = {each for each in measured if each.startswith("gpu.")}
    apart = on_gpus | {"load.soak", "training.distill", "image.cold_start"}
    assert set(MODULE.findall(made)) == measured - apart
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(measured)
