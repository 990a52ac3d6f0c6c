"""The trainers that this project adds to nnU-Net: found without importing any, for that would load PyTorch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from .errors import ToolError

_PACKAGE = "nnunet_torchserve_trainers"


def external_folder() -> Path:
    """The folder that nnU-Net's variable ``nnUNet_extTrainer`` must name.

    Raises:
        ToolError: this installation lacks it.
    """
    found = importlib.util.find_spec(_PACKAGE)
    places = [] if found is None else found.submodule_search_locations or []
    folders = [folder for place in places if (folder := Path(place) / "external").is_dir()]
    if not folders:
        msg = f"the package {_PACKAGE} is not installed; it comes with this command: install that again"
        raise ToolError(msg)
    return folders[0]


def added_trainers(folder: Path) -> dict[str, str]:
    """Name of each trainer in the folder -> the first line of what its file says of it."""
    files = sorted(folder.glob("nnUNetTrainer*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0] for file in files}
