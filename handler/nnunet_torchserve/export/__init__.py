"""From logits on the network's grid to the label map on the image's: what stock nnU-Net would have written."""

from .labels import export, label_map, label_map_and_probabilities

__all__ = ["export", "label_map", "label_map_and_probabilities"]
