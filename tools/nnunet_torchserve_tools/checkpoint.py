"""Read nnU-Net checkpoints without running what is in them.

A ``.pth`` file is a pickle. It is opened once, when an archive is made, by torch's restricted loader, which builds
tensors and plain containers only; the few other types that nnU-Net's trainer stores are named here.
"""

from __future__ import annotations

import hashlib
import operator
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import ToolError
from .harmless import SAFE_GLOBALS, Array, Refused, printable

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file begins that ``torch.save`` wrote before version 1.6."""

_ZIP_MAGIC = b"PK\x03\x04"
_OTHERS = {
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; fetch it with git lfs pull",
    b"<": "is a page or an XML document and no checkpoint; was it downloaded in a browser?",
    b"\x1f\x8b": "is packed by gzip; unpack it",
    b"\x80": "is a pickle, but none that torch.save wrote",
}
"""First bytes of what is taken for a checkpoint."""

_PROTOCOL = 2
"""The only pickle protocol that torch's restricted loader knows, and the default of ``torch.save``."""

_MOST_EXPANSION, _SMALL_BYTES = 10, 2**30
"""``torch.save`` does not compress. Weights that somebody did are hardly half as long; what expands to more than a GiB
and ten times its length is a trap."""

_MOST_AXES = 3
_CHUNK_BYTES = 2**20

_GLOBAL = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)|[Uu]nsupported class (\S+)", re.DOTALL)
"""How torch names what it refuses; what belongs to ``builtins`` without its module."""

_OPERAND = re.compile(r"[Uu]nsupported operand")
_CLASS = re.compile(r"<(?:class|function|built-in function) '?([\w.]+)'?")
_GONE = re.compile(r"Can't get attribute '([^']+)' on <module '([^']+)'")
_CUT = re.compile(r"EOFError Ran out of input|RuntimeError unexpected EOF|UnpicklingError pickle data was truncated")
"""Of a file of the old format, whose length nothing tells."""

_OPEN_IT = "if the file is your own, use --trust-checkpoint"


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
        ToolError: missing, cut off, damaged, no nnU-Net checkpoint, or it holds something outside the allow-list; with
            ``trust``, whatever came of opening it.
    """
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            content.seek(0)
            head = content.read(len(_LEGACY_MAGIC) + 16)
        size = file.stat().st_size
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise ToolError(msg) from error
    if head.startswith(_ZIP_MAGIC):
        protocol = _check_zip(file, size)
    elif head.startswith(_LEGACY_MAGIC):
        protocol = _PROTOCOL
    else:
        raise ToolError(_no_checkpoint(file, head))
    content = _load_trusted(file) if trust else _load_restricted(file, protocol)
    return _checked(file, content, digest, size)


def _no_checkpoint(file: Path, head: bytes) -> str:
    if _ZIP_MAGIC.startswith(head[: len(_ZIP_MAGIC)]) or _LEGACY_MAGIC.startswith(head[: len(_LEGACY_MAGIC)]):
        return _damaged(file)
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return f"{file} {what}"
    return f"{file} is no PyTorch file: it does not begin like what torch.save writes; is it damaged?"


def _damaged(file: Path) -> str:
    return f"{file} is damaged or cut off: it is no complete PyTorch file"


def _check_zip(file: Path, size: int) -> int:
    """Refuse what is not wholly there, or expands beyond measure; returns the protocol of its pickle.

    torch does not compare checksums: a flipped bit would become part of the archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                msg = f"{file} is a TorchScript archive and no checkpoint; name the file that nnU-Net's training wrote"
                raise ToolError(msg)
            if len(pickles) != 1:
                msg = f"{file} is a zip, but none that torch.save wrote: name the checkpoint of a fold"
                raise ToolError(msg)
            expanded = sum(entry.file_size for entry in entries)
            if expanded > max(_SMALL_BYTES, _MOST_EXPANSION * size):
                msg = f"{file} has {size} bytes and would expand to {expanded}: torch.save does not write such files"
                raise ToolError(msg)
            heads = {entry.filename: _checked_head(archive, entry) for entry in entries}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError, EOFError, OSError) as error:
        raise ToolError(_damaged(file)) from error
    except RuntimeError as error:
        msg = f"{file} is an encrypted zip and no checkpoint"
        raise ToolError(msg) from error
    head = heads[pickles[0].filename]
    return head[1] if head[:1] == b"\x80" and len(head) > 1 else _PROTOCOL


def _checked_head(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The first bytes of a file in the zip, which is read to its end, where its checksum is compared."""
    if entry.CRC == 0:  # torch.serialization.set_crc32_options(False)
        return b""
    with archive.open(entry) as content:
        head = content.read(2)
        while content.read(_CHUNK_BYTES):
            pass
    return head


def _load_restricted(file: Path, protocol: int) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a pickle protocol that torch.save does not use
            return torch.load(file, map_location="cpu", weights_only=True)
    except Refused as error:
        raise ToolError(_refused(file, str(error))) from error
    except pickle.UnpicklingError as error:
        if _OPERAND.search(str(error)) and protocol > _PROTOCOL:
            msg = (
                f"{file} is written in pickle protocol {protocol}, which cannot be opened without running what is in "
                f"it; save it again with torch.save's own protocol {_PROTOCOL}, or {_OPEN_IT}"
            )
            raise ToolError(msg) from error
        if name := _name_of(str(error)):
            raise ToolError(_refused(file, name)) from error
        raise ToolError(_damaged(file)) from error
    except MemoryError as error:
        msg = f"{file} needs more memory than there is"
        raise ToolError(msg) from error
    except Exception as error:  # of a stream of instructions that make no sense, anything
        raise ToolError(_damaged(file)) from error


def _name_of(text: str) -> str | None:
    """The object that torch refuses, by its full name."""
    if found := _GLOBAL.search(text):
        name = found[1] or found[2]
        return name if "." in name else f"builtins.{name}"
    found = None if _OPERAND.search(text) else _CLASS.search(text)
    return found and found[1]


def _refused(file: Path, name: str) -> str:
    return (
        f"{file} holds {printable(name)}, which no nnU-Net checkpoint needs, and opening it could run code; {_OPEN_IT}"
    )


def _load_trusted(file: Path) -> Any:
    """Open it as a pickle, whose objects may do and raise anything."""
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:
        if _CUT.search(f"{type(error).__name__} {error}"):
            raise ToolError(_damaged(file)) from error
        reason = printable(str(error))
        if isinstance(error, ModuleNotFoundError) and error.name:
            msg = (
                f"{file} holds an object that needs the module {printable(error.name)}, which is not installed here; "
                "install it, or save the checkpoint again without that object"
            )
            raise ToolError(msg) from error
        if gone := _GONE.search(str(error)):
            name = printable(f"{gone[2]}.{gone[1]}")
            reason = f"it holds an object of {name}, which the installed module {gone[2]} does not have"
        else:
            reason = f"an object in it cannot be made here: {type(error).__name__}: {reason}"
        msg = f"{file} cannot be opened, though it is trusted: {reason}; save the checkpoint again without that object"
        raise ToolError(msg) from error


def _checked(file: Path, content: Any, digest: str, size: int) -> Checkpoint:
    try:
        weights = content["network_weights"]
        trainer = content["trainer_name"]
        configuration = content["init_args"]["configuration"]
        axes = content.get("inference_allowed_mirroring_axes")
    except (LookupError, TypeError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else f"it holds a {type(content).__name__}"
        msg = f"{file} is no nnU-Net v2 checkpoint: {missing}"
        raise ToolError(msg) from error
    for what, name in (("trainer_name", trainer), ("configuration", configuration)):
        if not isinstance(name, str):
            msg = f"{file} is no nnU-Net v2 checkpoint: {what} is no name but {_shown(name)}"
            raise ToolError(msg)
    if not isinstance(weights, Mapping) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        msg = f"{file} is no nnU-Net v2 checkpoint: network_weights is no state dict"
        raise ToolError(msg)
    for name, tensor in weights.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            msg = f"{file}: the weights {_shown(name)} are no plain tensor; save them dense and not quantized"
            raise ToolError(msg)
    expanded = sum(tensor.nbytes for tensor in weights.values() if tensor.nbytes > tensor.untyped_storage().nbytes())
    if expanded > max(_SMALL_BYTES, _MOST_EXPANSION * size):
        msg = f"{file} has {size} bytes, and weights of {expanded}, which are views that repeat what is stored"
        raise ToolError(msg)
    try:
        mirroring = None if axes is None else _axes(axes)
    except TypeError as error:
        msg = f"{file}: inference_allowed_mirroring_axes are not axes but {_shown(axes)}"
        raise ToolError(msg) from error
    return Checkpoint(
        weights=dict(weights),
        trainer=str(trainer),
        configuration=str(configuration),
        mirroring_axes=mirroring or None,
        sha256=digest,
    )


def _axes(value: Any) -> tuple[int, ...]:
    """Axes as somebody's code may have stored them: in a container, an array or a tensor.

    Raises:
        TypeError: it is none, or holds something else than a few integers.
    """
    values = value.value if isinstance(value, Array) else value
    if isinstance(values, Mapping | str | bytes) or not isinstance(values, Sized) or len(values) > _MOST_AXES:
        msg = "no container of a few axes"
        raise TypeError(msg)
    if isinstance(values, np.ndarray) and values.ndim == 1 and not values.size:
        return ()  # of any type, as np.array([]) is of floats
    return tuple(operator.index(axis) for axis in values)  # type: ignore[attr-defined]


class _Shown(reprlib.Repr):
    """Values of the file's author for a message: a few of a container's, however many there are within."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3

    def repr_instance(self, x: Any, level: int) -> str:
        """Of what is no container of Python's: numbers and arrays in full, else the type."""
        del level
        x = x.value if isinstance(x, Array) else x
        if isinstance(x, np.ndarray) and x.dtype.kind in "biufcSUmM":
            return repr(x)
        if isinstance(x, torch.Tensor):
            return f"a tensor of {x.dtype} and shape {tuple(x.shape)}"
        return repr(x) if isinstance(x, bool | float | complex | bytes | np.generic | None) else f"a {type(x).__name__}"


def _shown(value: Any) -> str:
    return printable(_Shown().repr(value))


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
