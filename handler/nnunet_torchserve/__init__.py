"""The serving core: what a model archive carries. It knows nothing of TorchServe."""

from __future__ import annotations

__version__ = "0.1.0"
