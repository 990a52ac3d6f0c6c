"""From logits on the network's grid to the label map on the image's: what stock nnU-Net would have written."""

from .answer import export
from .ensemble import Predicted
from .labels import label_map, label_map_and_probabilities
from .postprocessing import postprocess

__all__ = ["Predicted", "export", "label_map", "label_map_and_probabilities", "postprocess"]
