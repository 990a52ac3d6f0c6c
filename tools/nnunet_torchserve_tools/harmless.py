"""What a checkpoint may hold beside tensors, and what is made of it instead.

torch's restricted loader calls whatever stands here under the name that a pickle gives. NumPy's own functions are not
among them: they build any type from numbers that nobody has checked. These build plain numbers, texts and arrays from
bytes whose length fits, under the names of NumPy 1 and 2, and refuse the rest by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

_SPEC = re.compile(r"[biufcSUmM][0-9]{1,9}")
"""NumPy's kinds and bytes (of ``U``: characters) of numbers, texts, dates and durations; no objects, no structures."""

_UNITS = frozenset({"Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"})
_BYTE_ORDERS = frozenset("<>=|")


class Refused(Exception):
    """An object that is not harmless. The message names it."""


class Dtype:
    """A NumPy type as a pickle spells it, in place of ``numpy.dtype``."""

    def __init__(self, spec: object, align: object = False, copy: object = False) -> None:
        """``dtype.__reduce__`` gives these."""
        del align, copy
        self._spec = spec
        self._order = "="
        self._metadata: Any = None

    def __setstate__(self, state: Any) -> None:
        """Byte order, and of dates their unit; what the size follows from is in the spec."""
        _version, self._order, _subarray, _names, _fields, _bytes, _alignment, _flags, *rest = state
        self._metadata = rest[0] if rest else None

    @property
    def value(self) -> np.dtype[Any]:
        """The type itself.

        Raises:
            Refused: objects, structures, or a type that this machine does not have.
        """
        spec = self._spec
        if not isinstance(spec, str) or not _SPEC.fullmatch(spec) or self._order not in _BYTE_ORDERS:
            msg = f"numpy.dtype({spec!r})"
            raise Refused(msg)
        if spec[0] in "mM":
            spec += self._unit()
        try:
            return np.dtype(spec).newbyteorder("=" if self._order == "|" else self._order)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            msg = f"numpy.dtype({spec!r}), a type that NumPy does not have on this machine"
            raise Refused(msg) from None

    def _unit(self) -> str:
        """As in ``M8[25s]``, from ``(metadata, (unit, number, numerator, denominator))``."""
        unit, number, *_ = self._metadata[1] if self._metadata else ("generic", 1)
        unit = unit.decode("ascii", "replace") if isinstance(unit, bytes) else unit
        if unit == "generic":
            return ""
        if unit not in _UNITS or not isinstance(number, int) or number < 1:
            msg = f"numpy.dtype({self._spec!r}) of an unknown unit"
            raise Refused(msg)
        return f"[{number}{unit}]"


class Array:
    """A NumPy array, in place of ``numpy.ndarray``."""

    def __init__(self) -> None:
        self.value: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        """``(version, shape, type, column by column, bytes)``."""
        *_, shape, dtype, by_columns, raw = state
        self.value = _numbers(dtype, raw, tuple(shape)).reshape(shape, order="F" if by_columns else "C")

    def __len__(self) -> int:
        """Of the first axis."""
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        """Along the first axis."""
        return iter(self.value)


def _reconstruct(kind: object, *_start: object) -> Array:
    if kind is not Array:
        msg = "a subclass of numpy.ndarray"
        raise Refused(msg)
    return Array()


def _scalar(dtype: object, raw: object = b"") -> Any:
    return _numbers(dtype, raw, ())[0]


def _numbers(dtype: object, raw: object, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A flat array of as many numbers as the shape has."""
    if not isinstance(dtype, Dtype):
        msg = "a NumPy array or number of an unknown type"
        raise Refused(msg)
    kind, count = dtype.value, math.prod(shape)
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
    if not isinstance(raw, bytes | bytearray) or len(raw) != count * kind.itemsize:
        msg = f"a NumPy array of {count} {kind} without their bytes"
        raise ValueError(msg)
    if not kind.itemsize:  # empty texts take no bytes, so that nothing else bounds their number
        return np.zeros(min(count, 1), kind)
    return np.frombuffer(raw, kind, count)


def _no_bytes(*content: object) -> bytes:
    """Protocol 2 has no other way to write ``b""``; any other length comes as a text."""
    if content:
        msg = "builtins.bytes with arguments"
        raise Refused(msg)
    return b""


def _default_dict(*_factory: object) -> dict[Any, Any]:
    return {}


SAFE_GLOBALS: list[Any] = [
    *(
        (own, f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")  # of NumPy 1, of NumPy 2
        for name, own in (("scalar", _scalar), ("_reconstruct", _reconstruct))
    ),
    (Array, "numpy.ndarray"),
    (Dtype, "numpy.dtype"),
    (_no_bytes, "builtins.bytes"),
    (_default_dict, "collections.defaultdict"),
    (str, "torch.torch_version.TorchVersion"),
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, int, float, str, list, tuple, dict, frozenset, slice)),
]
"""For ``torch.serialization.safe_globals``, beside what torch itself takes: tensors, ``OrderedDict``, ``Counter``,
sets, complex numbers, ``torch.device``, ``torch.dtype``, ``torch.Size``. The logs and ``_best_ema`` of every stock
checkpoint hold NumPy's numbers."""
