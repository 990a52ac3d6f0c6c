"""Our own texts beside a patient's: in the character set of those, and as long as their kind may be."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .copied import CHARACTER_SET
from .origin import Origin

_UTF_8, _ASCII = "ISO_IR 192", "ISO_IR 6"
_DEFAULTS = frozenset({"", "ISO_IR 6"})
"""What says that texts are ASCII."""

_LONG_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Texts:
    """What the object's character set can say.

    Attributes:
        declared: the character set, where it is not the source's own.
        term: of a set in which our own texts are the same bytes: that one, or ASCII.
        codec: Python's name of it.
    """

    declared: str | None
    term: str
    codec: str

    @classmethod
    def of(cls, origin: Origin, own: Sequence[str]) -> Texts:
        """The source's character set, or UTF-8 where our own texts need more and the source's are plain ASCII.

        Texts of the patient stay as they are. Beside a set of several, switched by escapes, our own are in ASCII.

        Args:
            origin: the source.
            own: texts that will be written.
        """
        from pydicom.charset import python_encoding

        terms = origin.text(CHARACTER_SET)
        is_one = "\\" not in terms and not terms.startswith("ISO 2022") and terms not in _DEFAULTS
        codec = python_encoding.get(terms, "ascii") if is_one else "ascii"
        copied = b"".join(value for tag, value in origin.elements.items() if tag != CHARACTER_SET)
        is_ascii = copied.isascii() and b"\x1b" not in copied
        if is_ascii and not all(_is_said_in(codec, text) for text in own):
            return cls(_UTF_8, _UTF_8, "utf-8")
        return cls(None, _ASCII if codec == "ascii" else terms, codec)

    def declare(self, ds: Any) -> None:
        """Say the character set, where it is not the source's."""
        if self.declared is not None:
            ds.SpecificCharacterSet = self.declared

    def long(self, text: str) -> str:
        """As an LO: a line of 64 characters, without the backslash that separates values."""
        line = "".join(c for c in self._said(text).replace("\\", "/") if c.isprintable()).strip()
        return line[:_LONG_CHARACTERS].strip()

    def free(self, text: str, characters: int) -> str:
        """As an ST or LT."""
        return "".join(c for c in self._said(text) if c.isprintable())[:characters]

    def _said(self, text: str) -> str:
        if _is_said_in(self.codec, text):
            return text
        plain = unicodedata.normalize("NFKD", text)
        return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _is_said_in(codec: str, text: str) -> bool:
    try:
        text.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
