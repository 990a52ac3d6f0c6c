"""nnU-Net's predictor in a process of its own: it starts others, which a process with threads should not.

``python -m support.stock_script MODEL IMAGES TARGET`` calls what works with several processes, and leaves the results
in TARGET.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from support import stock


def main(model: Path, images: Path, target: Path) -> None:
    """Files into ``all``; one of two parts, and then the rest, into ``parts``; arrays into ``arrays.npz``."""
    predictor = stock.loaded(model, folds=[0, 1], use_mirroring=False)
    assert predictor.predict_from_files(str(images), str(target / "all"), True, True, 1, 1) == [None, None]
    assert predictor.predict_from_files(str(images), str(target / "parts"), False, True, 1, 1, None, 2, 1) == [None]
    assert predictor.predict_from_files(str(images), str(target / "parts"), False, False, 1, 1) == [None]
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(max(images.iterdir()))])
    [(labels, probabilities)] = predictor.predict_from_list_of_npy_arrays(
        [image], None, [properties], None, 1, save_probabilities=True, num_processes_segmentation_export=1
    )
    np.savez(target / "arrays.npz", labels=labels, probabilities=probabilities)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
