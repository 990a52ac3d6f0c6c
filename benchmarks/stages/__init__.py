"""The stages of a request, each beside stock's: reading and writing, preprocessing, export."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded
