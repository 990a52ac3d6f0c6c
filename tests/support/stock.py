"""Stock nnU-Net, run live: ``nnUNetPredictor`` on a trained model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

CHECKPOINT = "checkpoint_final.pth"

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StockAnswer:
    """What stock gives: labels (Z, Y, X) and, if asked for, probabilities (C, Z, Y, X)."""

    labels: npt.NDArray[np.integer[Any]]
    probabilities: npt.NDArray[np.float32] | None


def predict(
    model_folder: Path,
    images: Sequence[Path],
    *,
    folds: Sequence[int | str] | None = None,
    use_mirroring: bool = True,
    tile_step_size: float = 0.5,
    use_gaussian: bool = True,
    checkpoint: str = CHECKPOINT,
    probabilities: bool = True,
) -> StockAnswer:
    """Read ``images`` (a file for each channel) with the plan's own reader and predict them."""
    predictor = loaded(
        model_folder,
        folds=folds,
        use_mirroring=use_mirroring,
        tile_step_size=tile_step_size,
        use_gaussian=use_gaussian,
        checkpoint=checkpoint,
    )
    return run(predictor, images, probabilities=probabilities)


def cascade(first: Path, last: Path, images: Sequence[Path], *, probabilities: bool = True, **how: Any) -> StockAnswer:
    """Its two commands, one after the other; the last gets the first one's labels as its reader would read them."""
    labels = predict(first, images, probabilities=False, **how).labels
    return run(loaded(last, **how), images, probabilities=probabilities, previous=labels.astype(np.float32)[None])


def ensemble(models: Sequence[Path], images: Sequence[Path], **how: Any) -> StockAnswer:
    """``merge_files`` of what each predictor gives: the labels of ``average_probabilities``."""
    mean: npt.NDArray[np.float32] | None = None
    for model in models:
        probabilities = predict(model, images, **how).probabilities
        assert probabilities is not None
        mean = probabilities.astype(np.float32) if mean is None else mean + probabilities
    assert mean is not None
    mean /= len(models)
    return StockAnswer(loaded(models[0], **how).label_manager.convert_probabilities_to_segmentation(mean), mean)


def loaded(
    model_folder: Path,
    *,
    folds: Sequence[int | str] | None = None,
    use_mirroring: bool = True,
    tile_step_size: float = 0.5,
    use_gaussian: bool = True,
    checkpoint: str = CHECKPOINT,
    device: torch.device = _CPU,
) -> nnUNetPredictor:
    """A stock predictor with its weights in memory; everything on the device if that is a GPU, as stock does it."""
    predictor = nnUNetPredictor(
        tile_step_size=tile_step_size,
        use_gaussian=use_gaussian,
        use_mirroring=use_mirroring,
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(
        str(model_folder), use_folds=None if folds is None else tuple(folds), checkpoint_name=checkpoint
    )
    return predictor


def run(
    predictor: nnUNetPredictor,
    images: Sequence[Path],
    *,
    probabilities: bool,
    previous: npt.NDArray[np.float32] | None = None,
) -> StockAnswer:
    """One case through a loaded predictor; ``previous`` (1, Z, Y, X) are the labels of a cascade's first stage."""
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(image) for image in images])
    answer = predictor.predict_single_npy_array(
        array, properties, previous, None, save_or_return_probabilities=probabilities
    )
    return StockAnswer(*answer) if probabilities else StockAnswer(answer, None)
