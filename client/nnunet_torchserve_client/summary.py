"""What became of the cases of a folder, for people and for programs; ``failed.json`` is made of it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import ClientError


@dataclass(slots=True)
class Summary:
    """What became of a call.

    Attributes:
        cases: of this part, those that were there already among them.
        there: cases that were left out, because they were there.
        done: names of those that were predicted and written.
        failed: the error of each that failed.
        left: names of those that were not tried, or given up.
        interrupted: whether the caller ended it.
        seconds: in all.
        stages: where the cases' time went, seconds summed over cases: those that were in flight together count each.
        warnings: the server's, by case.
        other_backends: what ran the networks if it was not nnU-Net's own way, and for how many cases.
    """

    cases: int
    there: int = 0
    done: list[str] = field(default_factory=list)
    failed: list[ClientError] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    other_backends: dict[str, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every case is there."""
        return not self.failed and not self.left

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "cases": self.cases,
            "already_there": self.there,
            "done": len(self.done),
            "failed": [error.as_json() for error in self.failed],
            "not_predicted": self.left,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "warnings": self.warnings,
            "other_backends": self.other_backends,
        }
