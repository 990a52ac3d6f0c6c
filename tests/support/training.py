"""nnU-Net's trainers on tiny preprocessed datasets: what their loaders give, and what their steps do."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from .odd_models import Json, OddModel

CPU = torch.device("cpu")
CASES = 2

REGIONS: Json = {"background": 0, "all": [1, 2, 3], "core": [2, 3], "centre": 3}
IGNORE: Json = {"ignore": 4}


def many_regions(count: int, labels: int = 40) -> Json:
    """That many overlapping regions of up to ``labels`` labels, and a label to be ignored."""
    generator = np.random.default_rng(count)
    sets = [sorted({1 + k % labels, *generator.integers(1, labels + 1, 3).tolist()}) for k in range(count)]
    named = {f"region_{k}": each if len(each) > 1 else each[0] for k, each in enumerate(sets)}
    return {"background": 0} | named | {"ignore": 1 + max(map(max, sets))}


@dataclass(frozen=True)
class Task:
    """A dataset and a plan to train on.

    Attributes:
        labels: of dataset.json.
        patch: of the network; its length is the number of dimensions.
        is_cascade: the labels of a previous stage are another input.
        masked: whether normalisation looks at the nonzero region only.
        features: of each stage of the network.
        batch_size: of all processes together.
        batch_dice: whether the loss takes a batch for one image.
    """

    labels: Json
    patch: tuple[int, ...] = (16, 16, 16)
    is_cascade: bool = False
    masked: bool = False
    features: tuple[int, ...] = (2, 4, 4)
    batch_size: int = 2
    batch_dice: bool = False

    @property
    def model(self) -> OddModel:
        """Its plans."""
        regions = [name for name in self.labels if name not in {"background", "ignore"}]
        return OddModel(
            dimensions=len(self.patch),
            channels=("MR", "T2"),
            schemes=("ZScoreNormalization",) * 2,
            labels=self.labels,
            more_dataset={"regions_class_order": list(range(1, len(regions) + 1))},
            features=self.features,
            masked=self.masked,
            named="3d_cascade_fullres" if self.is_cascade else None,
            previous_stage="3d_lowres" if self.is_cascade else None,
        )

    def plans(self) -> Json:
        """As nnU-Net reads them."""
        plans = self.model.plans()
        plans["configurations"][self.model.configuration] |= {
            "patch_size": list(self.patch),
            "batch_size": self.batch_size,
            "batch_dice": self.batch_dice,
        }
        return plans


class Home:
    """nnU-Net's folders, with the preprocessed cases of one task, which :meth:`write` makes."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task = folder, task
        self.plans, self.dataset = task.plans(), task.model.dataset()
        self.base = folder / "preprocessed" / self.plans["dataset_name"]

    def write(self) -> None:
        """Write it all but the results."""
        cases = self.base / self.plans["configurations"][self.task.model.configuration]["data_identifier"]
        cases.mkdir(parents=True)
        (self.base / "dataset_fingerprint.json").write_text("{}")
        manager = PlansManager(copy.deepcopy(self.plans)).get_label_manager(self.dataset)
        places: list[Any] = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            places.append([-1, *manager.all_labels])
        for number in range(CASES):
            seg = self._segmentation(number)
            noise = np.random.default_rng(number).normal(0, 0.3, (2, *seg.shape[1:]))
            located = DefaultPreprocessor._sample_foreground_locations(seg, places)
            blocks, chunks = comp_blosc2_params(noise.shape, self.task.patch)
            nnUNetDatasetBlosc2.save_case(
                (seg + noise).astype(np.float32), seg, {"class_locations": located}, str(cases / f"case_{number}"),
                chunks=chunks, blocks=blocks, chunks_seg=(1, *chunks[1:]), blocks_seg=(1, *blocks[1:]),
            )  # fmt: skip

    def _segmentation(self, number: int) -> np.ndarray[Any, Any]:
        """Blocks of every label, (1, Z, Y, X), -1 outside of the nonzero region."""
        labels = 1 + max(label for each in self.task.labels.values() for label in np.atleast_1d(each))
        shape = (5, 24, 26) if len(self.task.patch) == 2 else (22, 24, 20)
        blocks = np.random.default_rng(number).integers(0, labels, [1 + n // 3 for n in shape])
        seg = np.kron(blocks, np.ones((3, 3, 3), int))[tuple(map(slice, shape))].astype(np.int16)
        seg[:1] = -1
        return seg[None]

    def trainer(self, kind: type, fold: int | str = "all") -> Any:
        """A trainer of this class, on the CPU; nnU-Net's variables must name this home."""
        plans = copy.deepcopy(self.plans) | {"continue_training": False}
        trainer = kind(plans, self.task.model.configuration, fold, copy.deepcopy(self.dataset), CPU)
        if self.task.is_cascade:
            previous = Path(trainer.folder_with_segs_from_previous_stage)
            previous.mkdir(parents=True, exist_ok=True)
            for number in range(CASES):
                [guess] = np.roll(self._segmentation(number).clip(0), 1, axis=2).astype(np.uint8)
                nnUNetDatasetBlosc2.save_seg(guess, str(previous / f"case_{number}"))
        return trainer

    def variables(self) -> dict[str, str]:
        """What nnU-Net must find in its environment."""
        return named_folders(self.folder)


def named_folders(folder: Path) -> dict[str, str]:
    """nnU-Net's variables for folders below ``folder``, and no processes for augmentation, so that seeds decide."""
    named = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    return named | {"nnUNet_n_proc_DA": "0"}


@contextmanager
def at_home(folder: Path, task: Task) -> Iterator[Home]:
    """A home that nnU-Net's variables name meanwhile."""
    home = Home(folder, task)
    home.write()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.variables().items():
            patch.setenv(name, value)
        yield home


def seed(number: int) -> None:
    """Of every generator that augmentation and networks draw from."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def batches(trainer: Any, number: int, count: int = 2) -> list[dict[str, Any]]:
    """The first of training, then of validation, that the trainer's own loaders give after a seed."""
    if not trainer.was_initialized:
        trainer._set_batch_size_and_oversample()
    seed(number)
    loaders = trainer.get_dataloaders()
    return [next(loader) for loader in loaders for _ in range(count)]


def same_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Stock times two ways to blur and takes the sooner, whose rounding differs: here it is always the first."""
    once = GaussianBlurTransform.__init__

    def not_timed(self: Any, *args: Any, **kwargs: Any) -> None:
        once(self, *args, **kwargs | {"benchmark": False})

    patch.setattr(GaussianBlurTransform, "__init__", not_timed)


def scales(target: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The targets of a batch, the finest first."""
    return list(target) if isinstance(target, list) else [target]  # type: ignore[list-item]
