"""Tensors as an archive stores them: a safetensors file, in which tensors that share memory are stored once.

A state dict names some tensors twice (``decoder.encoder.*``). safetensors would store them twice or refuse them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from .errors import BundleError

if TYPE_CHECKING:
    import torch

ALIASES_KEY = "aliases"
"""Key of the safetensors metadata: JSON, name of an aliased tensor -> name under which it is stored."""


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; names in its alias map share the stored tensor's memory.

    Raises:
        BundleError: it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
            aliases: dict[str, str] = json.loads((stored.metadata() or {}).get(ALIASES_KEY, "{}"))
    except Exception as error:
        msg = f"{file.name} cannot be read as safetensors"
        raise BundleError(msg) from error
    return tensors | {name: tensors[target] for name, target in aliases.items()}
