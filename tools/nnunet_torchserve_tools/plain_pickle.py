"""A pickle of plain values, read without unpickling it.

Its instructions are those of a small machine. Here they are followed by hand: only those that nnU-Net's own small files
have, on numbers, texts and containers. Nothing is imported and nothing is called but what :mod:`.harmless` has for
NumPy's numbers; a function's name becomes a value. The rest is refused by name.

Time and memory to read it follow from the file's length: nothing is compared, spelled or hashed but texts, and what is
made anew has a few bytes. The value is another matter: a container may stand in it any number of times, so that a short
file gives a long walk. Whoever walks through it counts.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .harmless import NUMBERS, Dtype, Refused, printable

_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
"""What stands in the file itself, and is of a type that plain values have."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_WITHOUT_MEANING = {"PROTO", "FRAME"}

_MOST_NUMBER_BYTES = 32
"""NumPy's longest number, of two float128. A text of its own would be copied as often as it is named."""


@dataclass(frozen=True, slots=True)
class Function:
    """The name of a function that a pickle refers to.

    Attributes:
        name: with its module.
    """

    name: str


def read_plain_pickle(content: bytes, functions: Collection[str]) -> Any:
    """The value of a pickle.

    Args:
        content: of the file; its caller bounds its length.
        functions: full names that may stand in it, each of which becomes a :class:`Function`.

    Returns:
        ``None``, truth values, integers, texts, bytes, NumPy's numbers and functions; lists and tuples of them, and
        dictionaries with texts as keys. A container may hold another one several times.

    Raises:
        Refused: it holds another object, or another instruction; the message names it.
        ValueError: it is no pickle, or a damaged one.
    """
    machine = _Machine(frozenset(functions))
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "STOP":
                return machine.stack.pop()
            machine.follow(instruction.name, argument)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        msg = "its instructions make no sense"
        raise ValueError(msg) from error
    msg = "it has no end"
    raise ValueError(msg)


class _Machine:
    """Where values are while a pickle is read; a method for each instruction that does something with them."""

    def __init__(self, functions: frozenset[str]) -> None:
        self.stack: list[Any] = []
        self._functions = functions
        self._below: list[list[Any]] = []  # what was on the stack at each mark
        self._memo: dict[int, Any] = {}

    def follow(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        elif name not in _WITHOUT_MEANING:
            if (method := _FOLLOWED.get(name)) is None:
                msg = f"the pickle instruction {name}"
                raise Refused(msg)
            method(self, argument)

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError
        first = len(self.stack) - count
        taken = self.stack[first:]
        del self.stack[first:]
        return taken

    def _to_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self._below.pop()
        return taken

    def mark(self, _argument: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def empty_list(self, _argument: Any) -> None:
        self.stack.append([])

    def empty_dict(self, _argument: Any) -> None:
        self.stack.append({})

    def to_tuple(self, _argument: Any) -> None:
        members = self._to_mark()
        self.stack.append(tuple(members))

    def append(self, _argument: Any) -> None:
        self._extend(self._pop(1))

    def appends(self, _argument: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, members: list[Any]) -> None:
        if type(target := self.stack[-1]) is not list:
            raise TypeError
        target.extend(members)

    def set_item(self, _argument: Any) -> None:
        self._update(self._pop(2))

    def set_items(self, _argument: Any) -> None:
        self._update(self._to_mark())

    def _update(self, pairs: list[Any]) -> None:
        target, keys = self.stack[-1], pairs[::2]
        if type(target) is not dict or not all(type(key) is str for key in keys):
            raise TypeError
        target.update(zip(keys, pairs[1::2], strict=True))

    def memoize(self, _argument: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def put(self, argument: int) -> None:
        self._memo[argument] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self._memo[argument])

    def refer(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def refer_by_stack(self, _argument: Any) -> None:
        self._name(*self._pop(2))

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        full = f"{module}.{name}"
        if full not in self._functions and full not in NUMBERS:
            raise Refused(printable(full))
        self.stack.append(Function(full))

    def reduce(self, _argument: Any) -> None:
        function, arguments = self._pop(2)
        if type(function) is not Function or type(arguments) is not tuple:
            raise TypeError
        if function.name not in NUMBERS:
            msg = f"a call of {function.name}"
            raise Refused(msg)
        if any(type(each) in {str, bytes} and len(each) > _MOST_NUMBER_BYTES for each in arguments):
            msg = f"a NumPy number of more than {_MOST_NUMBER_BYTES} bytes"
            raise Refused(msg)
        self.stack.append(NUMBERS[function.name](*arguments))

    def build(self, _argument: Any) -> None:
        [state] = self._pop(1)
        if type(target := self.stack[-1]) is not Dtype:
            raise TypeError
        target.__setstate__(state)


_FOLLOWED: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "EMPTY_LIST": _Machine.empty_list, "APPEND": _Machine.append, "APPENDS": _Machine.appends,
    "EMPTY_DICT": _Machine.empty_dict, "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "TUPLE": _Machine.to_tuple,
    "MEMOIZE": _Machine.memoize, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.refer, "STACK_GLOBAL": _Machine.refer_by_stack,
    "REDUCE": _Machine.reduce, "BUILD": _Machine.build,
}  # fmt: skip
