"""Which backend makes logits of patches: its names, what an archive holds for it, and which one is to run.

``eager`` is the reference, stock's own arithmetic. Every other one gives other bits, so that whatever it answered says
so: the header of the answer, the model's description, the log. How each runs is :mod:`.engine.backends`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

BACKEND_VARIABLE = "NNUNET_TORCHSERVE_BACKEND"
"""What ``serve --backend`` says to the workers."""

logger = logging.getLogger(__name__)


class Backend(StrEnum):
    """Library and precision."""

    EAGER = "eager"
    """PyTorch runs nnU-Net's own modules, as stock does."""

    OPENVINO_FLOAT32 = "openvino:float32"
    """OpenVINO on the CPU; float32 as stock, summed in another order."""

    OPENVINO_BFLOAT16 = "openvino:bf16"
    """The same graphs in bfloat16, on processors that compute in it (AVX512-BF16, AMX, AVX2-VNNI-2)."""

    OPENVINO_INT8 = "openvino:int8"
    """Graphs whose convolutions are in whole numbers of 8 bits, calibrated on images when the archive is made."""

    COMPILED = "compiled"
    """nnU-Net's own modules, compiled by ``torch.compile`` for one shape; in the number formats of eager."""


AUTO: Final = "auto"
"""The fastest of what an archive allows: eager, and what it was made for."""

Choice = Backend | Literal["auto"]
"""What may be asked for."""

DEFAULT_PRECISIONS = {"openvino": Backend.OPENVINO_FLOAT32}
"""Library -> what its name alone means."""

FROM_WEIGHTS = frozenset({Backend.EAGER, Backend.COMPILED})
"""What needs nothing but the weights, which every archive has, and runs on every device."""

WHOLE_NUMBERS = frozenset({Backend.OPENVINO_INT8})
"""What computes in whole numbers: a float that another processor rounds otherwise may become the next one."""

NEEDS_REPORT = frozenset({Backend.OPENVINO_BFLOAT16, Backend.OPENVINO_INT8})
"""What serves only archives in which its accuracy was measured: fewer digits are another network, as far as anybody
knows who has not looked."""


def parse_backend(text: str) -> Backend:
    """Read ``NAME`` or ``NAME:PRECISION``.

    Raises:
        ValueError: there is no such backend.
    """
    try:
        return DEFAULT_PRECISIONS.get(str(text)) or Backend(text)
    except ValueError:
        msg = f"there is no backend {text!r}; there are {', '.join(Backend)}"
        raise ValueError(msg) from None


def parse_choice(text: str) -> Choice:
    """Read the same, or ``auto``.

    Raises:
        ValueError: there is no such backend.
    """
    return AUTO if str(text) == AUTO else parse_backend(text)


def names_of(backends: Collection[str]) -> str:
    """Several only where an engine was replaced by another one meanwhile."""
    return ", ".join(sorted(backends))


class StoredBackend(BaseModel):
    """What an archive holds beside the weights, for a backend that needs something made ahead.

    Attributes:
        backend: that it was made for, and is served with unless somebody says otherwise.
        requires: package -> version specifier; a server without them serves eager.
        made_with: package -> version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Backend
    requires: dict[str, str]
    made_with: dict[str, str]


def wanted_backend(
    stored: StoredBackend | None, setting: Choice | None, environ: Mapping[str, str] = os.environ
) -> Choice:
    """The backend that a server is to use: what ``serve`` says, else model-config.yaml, else the archive.

    Args:
        stored: what the archive holds.
        setting: of model-config.yaml.
        environ: has what ``serve --backend`` said.

    Raises:
        ValueError: the environment names no backend.
    """
    if said := environ.get(BACKEND_VARIABLE):
        return parse_choice(said)
    return setting or candidate(AUTO, stored)


def candidate(wanted: Choice, stored: StoredBackend | None) -> Backend:
    """The backend that is to be tried: with ``auto`` what the archive was made for, as far as it was."""
    if wanted != AUTO:
        return wanted
    return Backend.EAGER if stored is None else stored.backend


def usable_backend(
    wanted: Backend, stored: StoredBackend | None, device_type: str, *, measured: bool = False
) -> Backend:
    """The wanted backend, or eager where archive or device have none such, which is logged.

    What only shows when it is loaded, the engine finds out: :func:`~.engine.golden.load_networks_or_eager`.

    Args:
        wanted: of :func:`wanted_backend`.
        stored: what the archive holds.
        device_type: PyTorch's name.
        measured: the archive has a report of its accuracy, which holds here.
    """
    if (reason := why_not_served(wanted, stored, device_type, measured=measured)) is None:
        return wanted
    logger.warning("backend %s: %s; %s is used instead", wanted, reason, Backend.EAGER)
    return Backend.EAGER


def why_not_served(wanted: Backend, stored: StoredBackend | None, device_type: str, *, measured: bool) -> str | None:
    """The same as :func:`why_not`; or that nobody has measured what must be measured before it serves."""
    reason = why_not(wanted, stored, device_type)
    if reason is None and wanted in NEEDS_REPORT and not measured:
        return (
            "the archive has no report of its accuracy that holds here; make it again with 'nnunet-torchserve archive "
            "--validate'"
        )
    return reason


def why_not(wanted: Backend, stored: StoredBackend | None, device_type: str) -> str | None:
    """What keeps an archive from being served with a backend on a kind of device, as far as the archive tells."""
    if wanted in FROM_WEIGHTS:
        return None
    if stored is None or stored.backend is not wanted:
        return f"the archive holds nothing for it; make it with 'nnunet-torchserve archive --backend {wanted}'"
    return None if device_type == "cpu" else f"it runs on a CPU, not on {device_type}"
