"""The patch engine: fold networks resident on one device, patches in, logits out."""

from __future__ import annotations
