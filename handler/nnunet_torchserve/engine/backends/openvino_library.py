"""OpenVINO, imported so that nothing is sent to anybody.

``import openvino`` starts its telemetry, which tells an analytics service of each import and each conversion unless the
user has opted out, and writes an id into the home directory. Where the package ``openvino_telemetry`` cannot be
imported, OpenVINO takes a stub that does nothing; so that is what it finds here. Nothing else may import it first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from ...errors import BundleError
from ...extras import how_to_install

_TELEMETRY = "openvino_telemetry"


def openvino() -> ModuleType:
    """The library.

    Raises:
        BundleError: it is not installed, or does not load on this machine.
    """
    silence()
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        msg = f"OpenVINO cannot be imported ({error}); {how_to_install('openvino')}"
        raise BundleError(msg) from error


def silence() -> None:
    """Keep OpenVINO's telemetry from being imported, unless somebody else has done that already."""
    if _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]


def is_installed() -> bool:
    """Whether there is such a package; it is not imported."""
    return importlib.util.find_spec("openvino") is not None
