"""The functional groups of an object of many frames: those that all share, and those of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import Malformed
from .library import quietly


def functional_groups(found: Any, frames: int) -> tuple[Any, Sequence[Any]]:
    """The groups that all frames share, and those of each frame (PS3.3, C.7.6.16); empty for a single-frame object."""
    with quietly():
        shared = found.get("SharedFunctionalGroupsSequence")
        own = found.get("PerFrameFunctionalGroupsSequence")
        if own and len(own) != frames:
            msg = f"a DICOM file declares {frames} frames, and describes {len(own)}"
            raise Malformed(msg)
        return (shared[0] if shared else None), (list(own) if own else [None] * frames)


def group_of(name: str, shared: Any, own: Any) -> Any:
    """The first item of a functional group, the frame's own before the shared one."""
    for groups in (own, shared):
        if groups is not None and (sequence := groups.get(name)):
            return sequence[0]
    return None
