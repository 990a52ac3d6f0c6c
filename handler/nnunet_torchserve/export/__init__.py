"""Logits on the network's grid to a segmentation on the image's grid."""

from __future__ import annotations
