"""Why an object of a series is of no use, kept until it is known whether that matters."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DicomReason, DicomRefused, Malformed, RequestError, TooLarge


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an object is of no use: what an exception says, without the frames, and so the bytes, that one holds on to.

    Attributes:
        code: the exception's.
        message: for the client.
    """

    code: str
    message: str

    @classmethod
    def of(cls, error: DicomRefused | Malformed | TooLarge) -> Problem:
        """What it says."""
        return cls(error.code, str(error))

    def error(self) -> RequestError:
        """To be raised."""
        for damaged in (Malformed, TooLarge):
            if self.code == damaged.code:
                return damaged(self.message)
        return DicomRefused(DicomReason(self.code), self.message)
