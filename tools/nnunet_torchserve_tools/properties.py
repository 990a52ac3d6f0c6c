"""A config.properties as Java reads it, and what ``serve`` makes of it.

Java's format has more than ``key=value``: other separators, continued lines, escapes, and Latin-1 where everybody
writes UTF-8. The javaproperties package knows it. What is written here is ASCII, so that Java, TorchServe's starter
(which reads ``vmargs`` by itself, without escapes) and a reader agree on it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import javaproperties
from javaproperties import KeyValue, PropertiesElement

from .errors import UsageError

REPLACED = "# replaced by nnunet-torchserve serve: "
ADDED = "# added by nnunet-torchserve serve"

_FROM_ENVIRONMENT = re.compile(r"\$\$([^$]+[^$])\$\$")
"""TorchServe's own way to name an environment variable in a value."""

_NEEDLESS_ESCAPE = re.compile(r"\\([:=#!])")


@dataclass(frozen=True, slots=True)
class Properties:
    """A parsed file.

    Attributes:
        elements: its entries, comments and empty lines, in order.
        name: of the file, for messages.
    """

    elements: tuple[PropertiesElement, ...]
    name: str

    @classmethod
    def parse(cls, content: bytes, name: str = "config.properties") -> Properties:
        """Read a file: UTF-8, or Latin-1 where it is no UTF-8.

        Raises:
            UsageError: an escape that Java would not read.
        """
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        lines = io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n"))
        try:
            return cls(tuple(javaproperties.parse(lines)), name)
        except javaproperties.InvalidUEscapeError as error:
            msg = f"{name}: {error.escape} is no character; a backslash is written as two"
            raise UsageError(msg) from error

    def get(self, key: str) -> str | None:
        """The value that Java would take, the last one, without spaces around it; ``None`` if there is none.

        Raises:
            UsageError: it names an environment variable that is not set.
        """
        values = [each.value for each in self.elements if isinstance(each, KeyValue) and each.key == key]
        if not values:
            return None
        value = _FROM_ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[0]), values[-1])
        if missing := _FROM_ENVIRONMENT.search(value):
            msg = f"{self.name}: {key} names the environment variable {missing[1]}, which is not set"
            raise UsageError(msg)
        return value.strip()

    def merge(self, settings: Mapping[str, object]) -> tuple[str, list[str]]:
        """The file with the given keys set, each line that had another value marked as replaced.

        Args:
            settings: by key; ``None`` takes the key away, because it is given in another way.

        Returns:
            ASCII text, and the keys whose values were replaced, in order.
        """
        left = {key: value for key, value in settings.items() if value is not None}
        lines: list[str] = []
        replaced: list[str] = []
        for element in self.elements:
            if not isinstance(element, KeyValue) or element.key not in settings:
                lines.append(_ascii(element))
                continue
            if element.key in left and element.value == str(left[element.key]):
                lines.append(_line(element.key, left.pop(element.key)))
                continue
            if element.key not in replaced:
                replaced.append(element.key)
            lines += [REPLACED + line for line in _escaped(element.source.rstrip("\n")).split("\n")]
            if element.key in left:
                lines.append(_line(element.key, left.pop(element.key)))
        if left:
            lines += ["", ADDED, *(_line(key, value) for key, value in left.items())]
        return "\n".join(lines) + "\n", replaced


def _line(key: str, value: object) -> str:
    """One entry. Only what Java needs is escaped: TorchServe's starter takes ``vmargs`` as it stands."""
    return _NEEDLESS_ESCAPE.sub(r"\1", javaproperties.join_key_value(key, str(value)))


def _ascii(element: PropertiesElement) -> str:
    source = element.source.rstrip("\n")
    if isinstance(element, KeyValue) and not source.isascii():
        return _line(element.key, element.value)
    return _escaped(source)


def _escaped(text: str) -> str:
    return text.encode("ascii", "javapropertiesreplace").decode("ascii")
