"""What the image is made of, as ``deploy/container/lock.sh`` wrote it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from .charts import DEPLOY, ROOT

CONTAINER = DEPLOY / "container"
LOCKS = sorted(CONTAINER.glob("requirements*.txt"))
INSTALLED = [each for each in LOCKS if each.name != "requirements-build.txt"]
GPU_ONLY = CONTAINER / "requirements-cuda.txt"

_LOCKED = re.compile(r"^([a-z0-9.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def locked(path: Path) -> dict[str, str]:
    """Package -> its one version, of those that have checksums."""
    return {name: version for name, version, _ in _LOCKED.findall(path.read_text())}


def version_of_project() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version
