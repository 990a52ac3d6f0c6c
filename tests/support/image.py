"""The image of deploy/container, built by buildah and run by podman (``make image-test``).

Its base is a Debian that debootstrap makes, for tests may not depend on a registry; users name one by its digest, which
is done here too.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from . import chaos
from .chaos import has_ended, wait_for
from .charts import ROOT

IMAGE_VARIABLE = "NNUNET_TORCHSERVE_IMAGE"
"""Names the image that is tested; ``build`` has it built first."""

BASE = "localhost/nnunet-torchserve-test-base:bookworm"
BUILT = "localhost/nnunet-torchserve:test"
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"

NOBODYS_UID = 54321
RUNTIME = Path("/run/nnunet-torchserve/engines")
WRITABLE = ("/tmp", "/run/nnunet-torchserve", "/var/lib/nnunet-torchserve")
"""What the chart mounts; with a read-only root there is nothing else."""

_LASTING = ("serve --foreground", "org.pytorch.serve.ModelServer", "model_service_worker", "engine.process")
_BARE = not Path("/run/systemd/system").exists()
_ULIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=32768:32768")
_NEEDED = ("podman", "buildah", "debootstrap")
_PIP_SETTINGS = ("cert", "extra-index-url", "find-links", "index-url", "timeout")


def podman(*arguments: str, program: str = "podman") -> str:
    """What podman says."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    own = {"CONTAINERS_CONF": str(ROOT / "tests" / "image" / "containers.conf")} if _BARE else {}
    return own | os.environ


def wanted() -> str:
    """The image to test, built if that is asked for; its tests are skipped where none is named."""
    image = os.environ.get(IMAGE_VARIABLE)
    if not image:
        pytest.skip(f"{IMAGE_VARIABLE} is not set: make image-test does it")
    needed = _NEEDED if image == "build" else _NEEDED[:1]
    missing = [each for each in needed if not shutil.which(each)]
    assert not missing, f"apt-get install --no-install-recommends {' '.join(missing)}"
    if image != "build":
        return image
    done = build(BUILT, f"BASE={base()}")
    assert done.returncode == 0, done.stdout
    return BUILT


@cache
def base() -> str:
    """The base by its digest, made if it is not there."""
    if subprocess.run(["podman", "image", "exists", BASE], check=False, env=_environment()).returncode != 0:
        with tempfile.TemporaryDirectory() as folder:
            root, archive = Path(folder, "root"), Path(folder, "root.tar")
            # python3.11-venv wants python3.11-distutils, which is no package but what python3-distutils provides;
            # debootstrap does not know such names
            include = "--include=python3.11,python3.11-venv,python3-distutils,ca-certificates"
            subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", str(root)], check=True)
            for unneeded in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
                shutil.rmtree(root / unneeded)
                (root / unneeded).mkdir()
            with tarfile.open(archive, "w") as tar:
                for each in sorted(root.iterdir()):
                    tar.add(each, each.name, recursive=each.name not in ("dev", "proc", "sys"))
            podman("import", "--quiet", str(archive), BASE)
    name = BASE.rpartition(":")[0]
    return f"{name}@{podman('image', 'inspect', '--format={{.Digest}}', BASE)}"


def build(name: str, *build_arguments: str) -> subprocess.CompletedProcess[str]:
    """Build the image from this working tree.

    Args:
        name: that it gets.
        build_arguments: as ``BASE=…``.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["buildah", "bud", "--layers", "--pull-never", "--network=host", "--force-rm", "--tag", name]
        command += ["--runtime", "runc", *_ULIMITS] if _BARE else []
        command += _pip_settings(Path(folder, "pip.conf"))
        command += [f"--build-arg={each}" for each in build_arguments]
        command += ["--file", str(CONTAINERFILE), str(ROOT)]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=_environment()
        )


def _pip_settings(file: Path) -> list[str]:
    """Arguments with which pip finds within the build what it finds on this machine: a mirror, authorities, folders."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in sorted(listed.stdout.splitlines(), reverse=True):  # those of the environment, ":env:", last
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    lines, folders = ["[global]"], set()
    for key in _PIP_SETTINGS:
        for position, value in enumerate(settings.get(key, "").split()):
            lines.append(f"{key} = {value}" if position == 0 else f"    {value}")
            if value.startswith("file://"):
                folders.add(Path(value.removeprefix("file://")).parent)  # indexes point at what lies beside them
            elif value.startswith("/"):
                folders.add(Path(value))
    file.write_text("\n".join([*lines, ""]))
    return [f"--secret=id=pip.conf,src={file}", *(f"--volume={each}:{each}:ro" for each in sorted(folders))]


@dataclass(frozen=True)
class Container:
    """A container of the image, whose process 1 is ``serve --foreground``.

    Attributes:
        name: podman's.
        health_port: of its own address.
    """

    name: str
    health_port: int = 8083

    def state(self) -> dict[str, Any]:
        """What podman says of it."""
        state: dict[str, Any] = json.loads(podman("inspect", "--format={{json .State}}", self.name))
        return state

    @property
    def address(self) -> str:
        """Of the container, in podman's network on this machine."""
        networks = json.loads(podman("inspect", "--format={{json .NetworkSettings}}", self.name))
        return str(networks["IPAddress"] or next(iter(networks["Networks"].values()))["IPAddress"])

    @property
    def url(self) -> str:
        return f"http://{self.address}:8080"

    def start(self) -> None:
        podman("start", self.name)

    def execute(self, *command: str) -> str:
        """What a command says that is run in it."""
        return podman("exec", self.name, *command)

    def log(self) -> str:
        """What it has said so far, on stdout and stderr."""
        command = ["podman", "logs", self.name]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, env=_environment()
        )
        return done.stdout

    def probe(self, name: str) -> int:
        """The status of a probe; 0 if nothing answers."""
        try:
            url = f"http://{self.address}:{self.health_port}/{name}"
            return httpx.get(url, timeout=60, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.state()["Running"], self.log()
            return self.probe("ready") == httpx.codes.OK

        wait_for(ready, within_s=1200)

    def predict(self, model: str, body: bytes, options: str) -> httpx.Response:
        with httpx.Client(timeout=1200, trust_env=False) as client:
            url = f"{self.url}/predictions/{model}"
            return client.post(url, content=body, headers={"X-Nnunet-Options": options})

    def processes(self) -> list[psutil.Process]:
        """Process 1, and all below it, as this machine sees them."""
        first = psutil.Process(self.state()["Pid"])
        return [first, *first.children(recursive=True)]

    def lasting(self) -> set[int]:
        """The ids of those that live as long as the server: process 1, the JVM, workers and engines."""
        lines = {each.pid: " ".join(each.cmdline()) for each in self.processes()}
        return {pid for pid, line in lines.items() if any(each in line for each in _LASTING)}

    def engine(self) -> psutil.Process:
        """Its one engine."""
        ours = self.processes()
        [engine] = [each for each in chaos.engine_processes(RUNTIME) if each in ours and not has_ended(each)]
        return engine

    def processor_seconds(self) -> float:
        """What its processes, and those that have ended below them, have computed so far."""
        times = [each.cpu_times() for each in self.processes()]
        return sum(each.user + each.system for each in times) + times[0].children_user + times[0].children_system


@contextmanager
def container(
    image: str, *arguments: str, options: Sequence[str] = (), user: int = NOBODYS_UID, memory: str = "2500m"
) -> Iterator[Container]:
    """Run a container as careful people do, and remove it in the end with all that it wrote.

    Args:
        image: its name.
        arguments: in place of the image's own command.
        options: podman's, beside these: nobody's user, a read-only root, no capability, two processors.
        user: its id.
        memory: its limit.
    """
    name = f"nnunet-torchserve-test-{uuid.uuid4().hex[:12]}"
    volumes = {f"{name}-{number}": path for number, path in enumerate(WRITABLE)}
    command = [
        "run",
        "--detach",
        "--name",
        name,
        "--pull=never",
        "--read-only",
        "--read-only-tmpfs=false",
        "--cap-drop=all",
    ]
    command += ["--security-opt=no-new-privileges", f"--user={user}:{user}", "--passwd=false", "--cpus=2"]
    command += [f"--memory={memory}", f"--memory-swap={memory}"]
    command += [f"--volume={volume}:{path}" for volume, path in volumes.items()]
    try:
        podman(*command, *options, image, *arguments)
        yield Container(name)
    finally:
        podman("rm", "--force", "--time=0", "--ignore", name)
        podman("volume", "rm", "--force", *volumes)
