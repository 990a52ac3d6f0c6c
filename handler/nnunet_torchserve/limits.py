"""What one worker accepts: the numbers, their defaults, and where they come from.

``nnunet-torchserve serve`` computes byte limits from the machine's memory and hands them to its workers in the
environment; the archive's model-config.yaml may set all of them; the defaults are for a bare TorchServe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .machine import memory_bytes

LIMITS_VARIABLE = "NNUNET_TORCHSERVE_LIMITS"
"""JSON object with any of the attributes of :class:`Limits`."""


_SHARE_FOR_CASES = 0.4
"""Of the machine's memory: the JVM may take half (a quarter each of heap and direct memory); the rest is for the
workers' code and the networks."""


_OTHER_PARTS = 8
"""Fields of a request beside a file for each channel."""


def memory_for_cases() -> int:
    """Bytes that all cases of this machine may take together."""
    return int(memory_bytes() * _SHARE_FOR_CASES)


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one request.

    Attributes:
        body_bytes: all image parts of a request together, as sent.
        response_bytes: the body of an answer.
        expanded_bytes: one image part after decompression.
        voxels: voxels of one channel, as sent.
        channels: images in one file.
        header_bytes: the text header of an NRRD or MHA file, or of an array.
        header_fields: entries of such a header; files in an npz.
        parts: fields of a multipart request.
        grid_voxels: voxels of one channel on the network's grid: a header that claims a huge spacing asks for a
            huge grid with few bytes.
        passes: forward passes (patches x folds x mirrorings) of one request, and of all that an engine works on.
        dicom_files: files in a zip or tar, or fields of a request, that hold a DICOM series.
        dicom_frames: images of such a series, in all its files.
        dicom_header_bytes: of one DICOM file, before its pixels.
        dicom_elements: of all the headers of one image together.
        dicom_nesting: sequences within sequences.
        memory_bytes: memory that all cases of a model on a device may take together, from their headers to their
            answers; those of all models together may take :func:`memory_for_cases`.
        waiting_cases: cases that may wait for that memory in an engine; the next one is refused.
    """

    body_bytes: int = 512 * 1024**2
    response_bytes: int = 512 * 1024**2
    expanded_bytes: int = 4 * 1024**3
    voxels: int = 1_000_000_000
    channels: int = 64
    header_bytes: int = 64 * 1024
    header_fields: int = 256
    parts: int = 72
    grid_voxels: int = 1_000_000_000
    passes: int = 200_000
    dicom_files: int = 10_000
    dicom_frames: int = 10_000
    dicom_header_bytes: int = 32 * 1024**2
    dicom_elements: int = 5_000_000
    dicom_nesting: int = 16
    memory_bytes: int = field(default_factory=memory_for_cases)
    waiting_cases: int = 8

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Limits:
        """The archive's ``limits`` settings, no larger than what ``serve`` hands over in the environment.

        Raises:
            TypeError: a name that is no limit.
        """
        limits = {name: int(value) for name, value in settings.items()}
        known = {each.name for each in fields(cls)}
        for name, value in json.loads(environ.get(LIMITS_VARIABLE, "{}")).items():
            if name in known:  # an archive may be older than the launcher
                limits[name] = min(int(value), limits.get(name, int(value)))
        return cls(**limits)

    def for_model(self, channels: int) -> Limits:
        """These limits, where each lets one case of a model with so many channels through."""
        return replace(self, channels=max(self.channels, channels), parts=max(self.parts, channels + _OTHER_PARTS))
