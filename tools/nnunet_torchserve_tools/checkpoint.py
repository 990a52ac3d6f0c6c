"""Read nnU-Net checkpoints without running what is in them.

A ``.pth`` file is a pickle. It is opened once, when an archive is made, by torch's restricted loader, which builds
tensors and plain containers only; the few other types that nnU-Net's trainer stores are named here.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import ToolError

_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]  # noqa: SLF001
SAFE_GLOBALS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # the name in files written under numpy 1
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
]
"""``_best_ema`` of every stock checkpoint is a numpy scalar."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What serving needs of a checkpoint.

    Attributes:
        weights: state dict; aliased names share memory.
        trainer: trainer class name.
        configuration: configuration name.
        mirroring_axes: ``inference_allowed_mirroring_axes``; ``None`` if absent or empty.
        sha256: of the file.
    """

    weights: dict[str, torch.Tensor]
    trainer: str
    configuration: str
    mirroring_axes: tuple[int, ...] | None
    sha256: str


def read_checkpoint(file: Path, *, trust: bool = False) -> Checkpoint:
    """Read one checkpoint.

    Args:
        file: the .pth file.
        trust: open it as an ordinary pickle, which can run any code that its author put in.

    Raises:
        ToolError: missing, cut off, no nnU-Net checkpoint, or it holds something outside the allow-list.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise ToolError(msg) from error
    digest = hashlib.sha256(content).hexdigest()
    del content
    return _checked(file, _load(file, trust=trust), digest)


def _load(file: Path, *, trust: bool) -> Any:
    try:
        if trust:
            return torch.load(file, map_location="cpu", weights_only=False)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a pickle protocol that torch.save does not use
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:class|global|operand)[: ]+(\S+)", str(error))
        what = f" ({named[1] or named[2]})" if named else ""
        msg = (
            f"{file} holds something that no nnU-Net checkpoint needs{what}, and opening it could run code; "
            "if the file is your own, use --trust-checkpoint"
        )
        raise ToolError(msg) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        msg = f"{file} is damaged or cut off: it is no complete PyTorch file"
        raise ToolError(msg) from error


def _checked(file: Path, content: Any, digest: str) -> Checkpoint:
    try:
        weights = content["network_weights"]
        trainer = content["trainer_name"]
        configuration = content["init_args"]["configuration"]
        axes = content.get("inference_allowed_mirroring_axes")
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{file} is no nnU-Net v2 checkpoint: {error} is missing"
        raise ToolError(msg) from error
    if not isinstance(weights, Mapping) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        msg = f"{file} is no nnU-Net v2 checkpoint: network_weights is no state dict"
        raise ToolError(msg)
    return Checkpoint(
        weights=dict(weights),
        trainer=str(trainer),
        configuration=str(configuration),
        mirroring_axes=tuple(int(axis) for axis in axes) if axes else None,
        sha256=digest,
    )


def without_aliases(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Store every tensor once.

    nnU-Net's decoder holds its encoder, so a state dict names most tensors twice or more; safetensors refuses
    shared memory.

    Returns:
        The tensors under their first names, contiguous, and the map alias -> first name.
    """
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        key = (
            tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
            tensor.dtype,
        )  # fmt: skip
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return stored, aliases
