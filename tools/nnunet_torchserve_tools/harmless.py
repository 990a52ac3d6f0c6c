"""What a checkpoint may hold beside tensors, and what is made of it instead.

torch's restricted loader calls whatever stands here under the name that a pickle gives. NumPy's own functions are not
among them: they build any type from numbers that nobody has checked. These build plain numbers, texts and arrays from
bytes whose length fits, under the names of NumPy 1 and 2, and refuse the rest by name.

A pickle can give anything to what it calls, lists in lists that name each other among it: a text of 25 such levels has
gigabytes. So nothing here spells, compares or walks through an argument before its type is known.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

_SPEC = re.compile(r"[biufcSUmM][0-9]{1,9}")
"""NumPy's kinds and bytes (of ``U``: characters) of numbers, texts, dates and durations; no objects, no structures."""

_UNITS = frozenset({"Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"})
_BYTE_ORDERS = ("<", ">", "=", "|")

_MOST_AXES = 64
"""NumPy's own."""

_LARGEST_AXIS = 2**63
_LONGEST_VERSION = 100
_MOST_MEMBERS = 100
"""Of a frozen set; no stock checkpoint has one."""

_LONGEST_NAME = 200

_LONGEST_STATE = 9
"""Of what NumPy writes of a type or an array. To take a longer one apart copies it, as often as a pickle names it."""

_PLAIN = ("bool", "int", "float", "str", "list", "tuple", "dict")
_ATOMS = (type(None), bool, int, float, complex, str, bytes)


class Refused(Exception):
    """An object that is not harmless. The message names it."""


def printable(text: str) -> str:
    """A text of a file's author, for a terminal."""
    return ascii(" ".join(text.split()))[1:-1][:_LONGEST_NAME]


def _is_short(state: object) -> bool:
    return type(state) is tuple and len(state) <= _LONGEST_STATE


class Dtype:
    """A NumPy type as a pickle spells it, in place of ``numpy.dtype``."""

    _spec: object = None  # a pickle may make an object without calling __init__
    _order: object = "="
    _names: object = None
    _metadata: Any = None

    def __init__(self, spec: object, align: object = False, copy: object = False) -> None:
        """``dtype.__reduce__`` gives these."""
        del align, copy
        self._spec = spec

    def __setstate__(self, state: Any) -> None:
        """Byte order, and of dates their unit; what the size follows from is in the spec."""
        if not _is_short(state):
            msg = "a numpy.dtype with a state that NumPy does not write"
            raise Refused(msg)
        _version, self._order, _subarray, self._names, _fields, _bytes, _alignment, _flags, *rest = state
        self._metadata = rest[0] if rest else None

    @property
    def value(self) -> np.dtype[Any]:
        """The type itself.

        Raises:
            Refused: objects, structures, or a type that this machine does not have.
        """
        spec, order = self._spec, self._order
        if type(spec) is not str or not _SPEC.fullmatch(spec) or type(order) is not str or order not in _BYTE_ORDERS:
            raise Refused(self._what())
        if spec[0] in "mM":
            spec += self._unit()
        try:
            return np.dtype(spec).newbyteorder("=" if order == "|" else order)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            msg = f"numpy.dtype({spec!r}), a type that NumPy does not have on this machine"
            raise Refused(msg) from None

    def _what(self) -> str:
        """A type that is not made, in words."""
        if type(self._spec) is not str:
            return "a numpy.dtype that has no name"
        named = f"numpy.dtype({self._spec!r})"
        if self._spec.startswith("O"):
            return f"an object array, {named}"
        if self._spec.startswith("V"):
            return f"{'raw bytes' if self._names is None else 'a structured array'}, {named}"
        return named

    def _unit(self) -> str:
        """As in ``M8[25s]``, from ``(metadata, (unit, number, numerator, denominator))``."""
        told = self._metadata[1] if self._metadata else ("generic", 1)
        unit, number, *_ = told if _is_short(told) else (None, 0)
        unit = unit.decode("ascii", "replace") if type(unit) is bytes else unit
        if type(unit) is str and unit == "generic":
            return ""
        if type(unit) is not str or unit not in _UNITS or not isinstance(number, int) or number < 1:
            msg = f"numpy.dtype({self._spec!r}) of an unknown unit"
            raise Refused(msg)
        return f"[{number}{unit}]"


class Array:
    """A NumPy array, in place of ``numpy.ndarray``."""

    value: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        """``(version, shape, type, column by column, bytes)``."""
        if not _is_short(state):
            msg = "a NumPy array with a state that NumPy does not write"
            raise Refused(msg)
        *_, shape, dtype, by_columns, raw = state
        fits = type(shape) is tuple and len(shape) <= _MOST_AXES
        if not fits or not all(type(size) is int and 0 <= size < _LARGEST_AXIS for size in shape):
            msg = "a NumPy array without a shape"
            raise Refused(msg)
        self.value = _numbers(dtype, raw, shape).reshape(shape, order="F" if by_columns else "C")


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
    if not isinstance(raw, bytes | bytearray | str) or len(raw) != count * kind.itemsize:
        msg = f"a NumPy array of {count} {kind} without their bytes"
        raise ValueError(msg)
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
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


def _frozen_set(members: object = ()) -> frozenset[Any]:
    """Of numbers and texts: to hash tuples in tuples may take for ever."""
    short = type(members) in {list, tuple, set} and len(members) <= _MOST_MEMBERS  # type: ignore[arg-type]
    if not short or not all(type(member) in _ATOMS for member in members):  # type: ignore[attr-defined]
        msg = f"builtins.frozenset of something else than at most {_MOST_MEMBERS} numbers and texts"
        raise Refused(msg)
    return frozenset(members)  # type: ignore[call-overload, no-any-return]


class Version(str):
    """A version of torch, in place of ``TorchVersion``, which pickles as a class whose objects are made of a text."""

    __slots__ = ()

    def __new__(cls, text: object = "") -> Version:  # noqa: PYI034 (a pickle gives the class)
        """Of a text that is one already."""
        if type(text) is not str or len(text) > _LONGEST_VERSION:
            msg = "torch.torch_version.TorchVersion of something else than a short text"
            raise Refused(msg)
        return super().__new__(cls, text)


class Name:
    """A type of Python's own that something names, as ``defaultdict(list)`` does; to call it is refused."""

    def __init__(self, name: str) -> None:
        """With its module."""
        self._name = name

    def __call__(self, *_arguments: object) -> None:
        """Refuse it; no checkpoint makes its numbers, texts and containers by a call."""
        msg = f"a call of {self._name}"
        raise Refused(msg)


_PACKAGES = ("core", "_core")
"""Of NumPy 1, of NumPy 2."""

NUMBERS: dict[str, Any] = {
    "numpy.dtype": Dtype,
    **{f"numpy.{package}.multiarray.scalar": _scalar for package in _PACKAGES},
}
"""Full name -> what is called instead, of all that a pickled number of NumPy's names."""

SAFE_GLOBALS: list[Any] = [
    *((own, name) for name, own in NUMBERS.items()),
    *((_reconstruct, f"numpy.{package}.multiarray._reconstruct") for package in _PACKAGES),
    (Array, "numpy.ndarray"),
    (_no_bytes, "builtins.bytes"),
    (_default_dict, "collections.defaultdict"),
    (_frozen_set, "builtins.frozenset"),
    (Version, "torch.torch_version.TorchVersion"),
    (slice, "builtins.slice"),  # keeps what it is given, and looks at nothing
    *((Name(name), name) for name in (f"builtins.{kind}" for kind in _PLAIN)),
]
"""For ``torch.serialization.safe_globals``, beside what torch itself takes: tensors, ``OrderedDict``, ``Counter``,
sets, byte arrays, complex numbers, ``torch.device``, ``torch.dtype``, ``torch.Size``. Those come first: a name that
torch itself takes cannot be bounded here. The logs and ``_best_ema`` of every stock
checkpoint hold NumPy's numbers."""
