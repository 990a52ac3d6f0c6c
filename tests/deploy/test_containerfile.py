"""The image's Containerfile and what it is made of, without building it: ``make image-test`` does that."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nnunet_torchserve_tools.cli import app
from support.charts import FOLDER, FOLDER_CHART, ROOT, render, serve, tool
from support.locks import CONTAINER, GPU_ONLY, INSTALLED, LOCKS, locked, version_of_project

_STEP = re.compile(r"^([A-Z]+)\s+((?:.*\\\n)*.*)$", re.MULTILINE)


def steps(stage: str) -> list[tuple[str, str]]:
    """Instructions of a stage and what follows them."""
    [text] = re.findall(rf"^FROM \S+ AS {stage}$(.*?)(?=^FROM |\Z)", containerfile(), re.MULTILINE | re.DOTALL)
    return [(name, rest.replace("\\\n", " ")) for name, rest in _STEP.findall(text)]


def only(stage: str, instruction: str) -> str:
    """What follows the one instruction of a kind."""
    [found] = [rest for name, rest in steps(stage) if name == instruction]
    return found


def environment() -> dict[str, str]:
    return dict(each.partition("=")[::2] for each in shlex.split(only("server", "ENV")))


def containerfile() -> str:
    return (CONTAINER / "Containerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    run = subprocess.run(
        [tool("hadolint", "lint/bin"), CONTAINER / "Containerfile"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_everything_installed_has_a_version_and_checksums(path: Path) -> None:
    lines = path.read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith(("#", " "))]
    assert len(packages) == len(locked(path))
    assert set(lines) - set(packages) <= {line for line in lines if line.startswith(("#", "    --hash=sha256:"))}


def test_versions_are_those_that_are_tested() -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tested: dict[str, str] = {canonicalize_name(name): version for name, version in constraints.items()}
    for path in INSTALLED:
        for name, version in locked(path).items():
            assert tested.get(name, version) == version, f"{path.name} is not of constraints.txt: run lock.sh"


def test_the_image_has_what_the_server_and_the_client_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(each) for each in (*project["dependencies"], *extras["server"], *extras["dicom"])]
    versions = {name: version for path in INSTALLED for name, version in locked(path).items()}
    for each in wanted:
        assert each.specifier.contains(versions[canonicalize_name(each.name)])
    assert not versions.keys() & {"pytest", "ruff", "mypy", "hypothesis", "pip"}


def test_each_package_is_in_one_list() -> None:
    names = [name for path in INSTALLED for name in locked(path)]
    assert len(names) == len(set(names))
    assert "triton" in locked(GPU_ONLY)


def test_pip_checks_every_checksum_and_runs_no_packages_code_but_the_named() -> None:
    commands = [rest for stage in ("tools", "project", "server") for name, rest in steps(stage) if name == "RUN"]
    calls = [call for command in commands for call in command.split("&&") if " -m pip " in call]
    assert len(calls) == 6
    for call in calls:
        assert "--no-deps" in call
        assert "--no-index" in call or "--require-hashes" in call, "of what was checked before, or with checksums"
        assert " wheel " in call or "--only-binary=:all:" in call or "--no-index" in call
    assert locked(CONTAINER / "requirements-sources.txt").keys() == {"acvl-utils"}


def test_the_whole_project_is_built_and_nothing_else_goes_to_the_builder() -> None:
    """hatchling says nothing of a package that is not there: the image had no trainers once."""
    copied = {
        source
        for stage in ("tools", "project", "server")
        for name, rest in steps(stage)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    packed = {Path(each).parts[0] for each in (*wheel["only-include"], *wheel["force-include"])}
    assert packed <= copied
    _, everything, *allowed, unneeded = (ROOT / ".dockerignore").read_text().split("\n")[:-1]
    assert (everything, unneeded) == ("*", "**/__pycache__")
    builds = {f"deploy/container/{name}" for name in ("requirements-build.txt", "requirements-sources.txt")}
    assert {each.removeprefix("!") for each in allowed} == copied - builds


def test_both_bases_are_the_one_that_is_given() -> None:
    assert re.findall(r"^FROM (\S+) AS (\S+)$", containerfile(), re.MULTILINE) == [
        ("${BASE}", "tools"),
        ("tools", "project"),
        ("${BASE}", "server"),
    ]
    assert "ARG BASE\n" in containerfile().partition("FROM ")[0], "and there is no other by default"
    assert re.search(r"^RUN case \"\$\{BASE\}\" in \*@sha256:\*\)", containerfile(), re.MULTILINE)


def test_the_image_fits_the_chart() -> None:
    rendered = serve({"metrics": {"enabled": True}})
    container, security = rendered.container(), rendered.pod["securityContext"]
    assert json.loads(only("server", "ENTRYPOINT")) == container["command"][:1]
    assert only("server", "WORKDIR") == container["workingDir"]
    assert only("server", "USER") == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert {str(each["containerPort"]) for each in container["ports"]} == set(only("server", "EXPOSE").split())
    ours = environment()
    assert {each["name"]: each["value"] for each in container["env"]}.items() <= ours.items()
    made = next(rest for name, rest in steps("server") if name == "RUN")
    mounted = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert mounted - {"/tmp"} <= set(made.split())
    folder = render(FOLDER_CHART, FOLDER).kind("Job")["spec"]["template"]["spec"]
    assert folder["containers"][0]["command"][:1] == container["command"][:1]
    assert folder["securityContext"]["runAsUser"] == security["runAsUser"]


def test_its_own_command_is_one() -> None:
    verb, *arguments = json.loads(only("server", "CMD"))
    command = typer.main.get_command(app)
    parsed = command.commands[verb].make_context(verb, arguments).params  # type: ignore[attr-defined]
    assert parsed["foreground"] is True
    assert parsed["host"] == parsed["health_host"] == "0.0.0.0"
    assert parsed["management_host"] is None


def test_its_labels_say_which_version_it_is() -> None:
    labels = only("server", "LABEL")
    for name in ("title", "description", "licenses", "version", "revision", "source", "base.name"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert ("ARG", f"VERSION={version_of_project()}") in steps("server")
