"""A student's batches and steps: stock's, and the teacher's probabilities moved as image and labels are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)

from nnunet_torchserve_trainers.distill_trainers import nnUNetTrainerDistill
from nnunet_torchserve_trainers.distillation import DistillMixin
from nnunet_torchserve_trainers.region_targets import RegionLabelmapMixin
from nnunet_torchserve_trainers.soft_target_files import SoftTargetError, SoftTargets
from support.distilling import cases_of, certain, doubtful, label_manager, teach, teacher_of
from support.tables import table
from support.training import CASES, IGNORE, REGIONS, Home, Task, at_home, batches, same_everywhere, scales, seed

LABELS = {"background": 0, "one": 1, "two": 2}
TASKS = {
    "labels": LABELS,
    "labels, some ignored": LABELS | {"ignore": 3},
    "regions": REGIONS,
    "regions, some ignored": REGIONS | IGNORE,
}
PATCHES = {"2d": (16, 12), "3d": (16, 12, 8), "3d, augmented slice by slice": (4, 16, 16)}
SURE = 0.9
"""A probability above which nothing else that is interpolated can have won the voxel's label."""

ROUNDED = 2e-3
"""Probabilities that were rounded to float16 twice."""


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


@pytest.fixture(autouse=True)
def _always_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is rotated and scaled, not one in three."""
    once = SpatialTransform.__init__

    def always(self: Any, *args: Any, **kwargs: Any) -> None:
        once(self, *args, **kwargs | {"p_rotation": 1, "p_scaling": 1})

    monkeypatch.setattr(SpatialTransform, "__init__", always)


def distilled(trainer: type) -> type:
    """What a user writes."""
    return type(f"Distilled{trainer.__name__}", (DistillMixin, trainer), {})


def parted(batch: dict[str, Any], trainer: Any) -> tuple[Any, torch.Tensor]:
    """The targets that stock's step gets, and the soft ones."""
    *targets, soft = batch["target"]
    return (targets if trainer.enable_deep_supervision else targets[0]), soft


@pytest.mark.parametrize(
    ("patch", "trainer", "task", "cascade"),
    [
        *table(PATCHES, (nnUNetTrainer, nnUNetTrainerNoDeepSupervision), TASKS, (False, True)),
        pytest.param("2d, square", nnUNetTrainerDA5, "labels", False),
    ],
)
def test_images_and_labels_are_stocks_and_soft_targets_go_with_them(
    patch: str, trainer: type, task: str, cascade: bool, tmp_path: Path
) -> None:
    """Of a teacher who knows the labels, away from where several are interpolated."""
    with at_home(tmp_path, Task(TASKS[task], PATCHES.get(patch, (16, 16)), is_cascade=cascade, masked=cascade)) as home:
        teach(home, certain)
        stock, ours = home.trainer(trainer), home.trainer(distilled(trainer))
        *expected, expected_of_validation, _ = batches(stock, 0)
        *found, found_of_validation, _ = batches(ours, 0)
        ignored, has_regions = ours.label_manager.ignore_label, ours.label_manager.has_regions
        assert found_of_validation.keys() == expected_of_validation.keys()
        same(found_of_validation["target"], expected_of_validation["target"])
        shares = []
        for theirs, mine in zip(expected, found, strict=True):
            target, soft = parted(mine, ours)
            assert list(mine["keys"]) == list(theirs["keys"])
            assert torch.equal(mine["data"], theirs["data"])
            same(target, theirs["target"])
            assert soft.dtype == torch.float16
            assert soft.shape[2:] == mine["data"].shape[2:]
            shares.append(share_that_goes_with(soft, scales(target)[0], ignored, has_regions=has_regions))
        assert np.mean(shares) > 0.05, "hardly a voxel was compared"


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, list) == isinstance(expected, list)
    for one, other in zip(scales(found), scales(expected), strict=True):
        assert torch.equal(one, other)


def share_that_goes_with(soft: torch.Tensor, target: torch.Tensor, ignored: int | None, *, has_regions: bool) -> float:
    """Compare where it is sure; in how many of the voxels it is sure of something else than background."""
    if has_regions:
        inside = target[:, : soft.shape[1]]
        assert inside[soft > SURE].all()
        assert not inside[soft < 1 - SURE].any()
        return float((soft > SURE).float().mean())
    known = torch.ones_like(target[:, 0], dtype=torch.bool) if ignored is None else target[:, 0] != ignored
    sure = (soft.amax(1) > SURE) & known
    assert torch.equal(soft.argmax(1)[sure], target[:, 0][sure].long())
    return float((soft[:, 1:].amax(1)[known] > SURE).float().mean())


IN_SPACE = (
    Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform, RemoveLabelTansform,
    DownsampleSegForDSTransform,
)  # fmt: skip


class OnlyInSpace(nnUNetTrainer):  # type: ignore[misc]
    """Stock without what changes intensities."""

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        pipeline.transforms = [each for each in pipeline.transforms if isinstance(each, IN_SPACE)]
        return pipeline


@pytest.mark.parametrize("patch", PATCHES)
def test_probabilities_move_voxel_by_voxel_as_an_image_does(patch: str, tmp_path: Path) -> None:
    """The images are the probabilities of both foreground classes here, so they must stay the same."""
    with at_home(tmp_path, Task(LABELS, PATCHES[patch])) as home:
        targets = teach(home, doubtful)
        images_are_probabilities(home, targets)
        ours = home.trainer(distilled(OnlyInSpace))
        outside = []
        for mine in batches(ours, 5, 3)[:3]:
            _, soft = parted(mine, ours)
            torch.testing.assert_close(soft[:, 1:].float(), mine["data"], rtol=0, atol=ROUNDED)
            torch.testing.assert_close(soft.float().sum(1), torch.ones_like(mine["data"][:, 0]), rtol=0, atol=ROUNDED)
            outside.append((mine["data"] == 0).all(1))
            assert (soft[:, 0][outside[-1]] == 1).all(), "what lies outside of the image is background"
        assert torch.stack(outside).any(), "no patch left the image"


def images_are_probabilities(home: Home, targets: SoftTargets) -> None:
    cases = cases_of(home)
    for number in range(CASES):
        name = f"case_{number}"
        _, seg, _, properties = nnUNetDatasetBlosc2(str(cases)).load_case(name)
        labels, probabilities = seg[:], targets.load(name)[:].astype(np.float32)
        for file in (f"{name}.b2nd", f"{name}_seg.b2nd"):
            (cases / file).unlink()
        blocks, chunks = comp_blosc2_params(probabilities[1:].shape, home.task.patch)
        nnUNetDatasetBlosc2.save_case(
            probabilities[1:], labels, properties, str(cases / name), chunks=chunks, blocks=blocks,
            chunks_seg=(1, *chunks[1:]), blocks_seg=(1, *blocks[1:]),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "trainer", "cascade"),
    [
        (LABELS, nnUNetTrainer, False),
        (LABELS, nnUNetTrainer, True),
        (LABELS, nnUNetTrainerNoDeepSupervision, False),
        (REGIONS | IGNORE, nnUNetTrainer, False),
        (REGIONS | IGNORE, nnUNetTrainerNoDeepSupervision, True),
    ],
)
def test_a_step_has_stocks_loss_and_the_divergence_of_each_scale(
    labels: dict[str, Any], trainer: type, cascade: bool, tmp_path: Path
) -> None:
    with at_home(tmp_path, Task(labels, (16, 12), is_cascade=cascade)) as home:
        teach(home, doubtful)
        stock, ours = home.trainer(trainer), home.trainer(distilled(trainer))
        ours.distillation_weight, ours.distillation_temperature = 0.6, 3.0
        for each in (stock, ours):
            seed(3)
            each.initialize()
        first, _, validation, _ = batches(ours, 0)
        target, soft = parted(first, ours)
        stock.network.train()
        with torch.no_grad():
            output = stock.network(first["data"])
            plain = float(stock.loss(output, target))
            of_teacher = divergence_in_plain_words(scales(output), soft, stock, 3.0)
        ours.network.train()
        assert ours.train_step(first)["loss"] == pytest.approx(plain + 0.6 * of_teacher, rel=1e-4)
        assert of_teacher > 0.01
        assert changed(ours, stock)
        ours.network.load_state_dict(stock.network.state_dict())
        for each in (stock, ours):
            each.network.eval()
        with torch.no_grad():
            mine, theirs = (each.validation_step(validation | {"target": copied(validation)}) for each in (ours, stock))
        assert all((mine[name] == theirs[name]).all() for name in theirs)


def copied(batch: dict[str, Any]) -> Any:
    """Stock's validation writes into its targets."""
    target = batch["target"]
    return [each.clone() for each in target] if isinstance(target, list) else target.clone()


def changed(one: Any, other: Any) -> bool:
    return not all(map(torch.equal, one.network.state_dict().values(), other.network.state_dict().values()))


def divergence_in_plain_words(outputs: list[torch.Tensor], soft: torch.Tensor, trainer: Any, t: float) -> float:
    has_scales = trainer.enable_deep_supervision
    weights = trainer.loss.weight_factors if has_scales else (1.0,)
    factors = trainer._get_deep_supervision_scales() if has_scales else [[1.0] * (soft.ndim - 2)]
    total = 0.0
    for weight, output, factor in zip(weights, outputs, factors, strict=True):
        taken = torch.stack(
            [DownsampleSegForDSTransform([factor])(segmentation=each)["segmentation"][0] for each in soft]
        )
        logits, p = output.double() / t, taken.double()
        if trainer.label_manager.has_regions:
            p = p.clamp(2**-12, 1 - 2**-12)
            p = p ** (1 / t) / (p ** (1 / t) + (1 - p) ** (1 / t))
            q = torch.sigmoid(logits)
            each_voxel = torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
        else:
            p = p ** (1 / t) / (p ** (1 / t)).sum(1, keepdim=True)
            each_voxel = torch.xlogy(p, p / torch.softmax(logits, 1)).sum(1)
        total += weight * t**2 * float(each_voxel.mean())
    return total


@pytest.mark.parametrize("ignore", [{}, IGNORE])
def test_regions_may_be_packed_too(ignore: dict[str, int], tmp_path: Path) -> None:
    class Both(DistillMixin, RegionLabelmapMixin, nnUNetTrainer):  # type: ignore[misc]
        pass

    with at_home(tmp_path, Task(REGIONS | ignore, (16, 12))) as home:
        teach(home, doubtful)
        losses = []
        for kind in (nnUNetTrainerDistill, Both):
            trainer = home.trainer(kind)
            seed(1)
            trainer.initialize()
            batch, *_ = batches(trainer, 0)
            losses.append(float(trainer.train_step(batch)["loss"]))
        assert batch["target"][0].dtype == torch.uint8
        assert losses[0] == losses[1]


def test_mixins_in_an_order_that_cannot_work_are_refused() -> None:
    with pytest.raises(TypeError, match="DistillMixin before"):
        type("Wrong", (RegionLabelmapMixin, DistillMixin, nnUNetTrainer), {})


@pytest.mark.parametrize("trainer", [nnUNetTrainer, nnUNetTrainerDA5])
@pytest.mark.parametrize("mixin", [DistillMixin, RegionLabelmapMixin])
def test_a_mixin_behind_its_trainer_would_do_nothing_and_is_refused(mixin: type, trainer: type) -> None:
    with pytest.raises(TypeError, match=f"Wrong: name {mixin.__name__} before the trainer"):
        type("Wrong", (trainer, mixin), {})


@pytest.mark.parametrize("base", [nnUNetTrainer, nnUNetTrainerNoDeepSupervision])
def test_transforms_that_hide_the_mixins_are_named(base: type, tmp_path: Path) -> None:
    """Written as a trainer's of nnU-Net's are: static, so that it asks nobody."""

    class Mine(DistillMixin, base):  # type: ignore[misc]
        @staticmethod
        def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
            return nnUNetTrainer.get_training_transforms(*args, **kwargs)

    with at_home(tmp_path, Task(LABELS, (8, 8))) as home:
        teach(home, certain)
        trainer = home.trainer(Mine)
        trainer.initialize()
        batch, *_ = batches(trainer, 0)
        with pytest.raises(TypeError, match=r"Mine\.get_training_transforms hides DistillMixin's"):
            trainer.train_step(batch)


class Drops(BasicTransform):  # type: ignore[misc]
    """Somebody's transform, of whom nobody wanted a regression target so far."""

    def _apply_to_image(self, img: torch.Tensor, **_: Any) -> torch.Tensor:
        return img

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **_: Any) -> torch.Tensor:
        return segmentation


@pytest.mark.parametrize("drops", [Drops(), RandomTransform(Drops())], ids=["alone", "wrapped"])
def test_a_transform_that_does_not_know_soft_targets_is_named(drops: BasicTransform, tmp_path: Path) -> None:
    class Own(nnUNetTrainer):  # type: ignore[misc]
        @staticmethod
        def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
            pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
            pipeline.transforms.insert(1, drops)
            return pipeline

    with at_home(tmp_path, Task(LABELS, (8, 8))) as home:
        teach(home, certain)
        with pytest.raises(TypeError, match=r"^Drops drops regression targets"):
            batches(home.trainer(distilled(Own)), 0)


def test_what_the_loaders_processes_need_can_be_sent_to_them(tmp_path: Path) -> None:
    """Where processes are not forked, cases and transforms are pickled."""
    with at_home(tmp_path, Task(LABELS, (8, 8))) as home:
        teach(home, doubtful)
        ours = home.trainer(nnUNetTrainerDistill)
        ours._set_batch_size_and_oversample()
        loader = ours.get_dataloaders()[0].data_loader
        sent = pickle.loads(pickle.dumps(loader))  # noqa: S301 (our own)
        made = []
        for each in (loader, sent):
            seed(0)
            made.append(each.generate_train_batch())
        same(made[1]["target"], made[0]["target"])


def test_a_student_is_trained_and_goes_on_and_is_nobodys_but_stocks(tmp_path: Path) -> None:
    with at_home(tmp_path, Task(LABELS, (16, 16))) as home:
        (home.base / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
        teach(home, doubtful)
        (SoftTargets.beside(cases_of(home)).folder / "case_1.b2nd").unlink()  # nobody asks for those of validation
        seed(0)
        trainer = home.trainer(nnUNetTrainerDistill, 0)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        trainer.run_training()
        file = Path(trainer.output_folder) / "checkpoint_final.pth"
        assert file.parts[-3] == "nnUNetTrainerDistill__nnUNetPlans__2d"
        assert torch.load(file, weights_only=False)["trainer_name"] == "nnUNetTrainer"
        assert "weight 1, temperature 2" in Path(trainer.log_file).read_text()
        later = home.trainer(nnUNetTrainerDistill, 0)
        later.num_epochs = 2
        later.load_checkpoint(str(file))
        assert later.current_epoch == 1
        for group in trainer.optimizer.param_groups:
            group["lr"] = later.optimizer.param_groups[0]["lr"]
        batch, *_ = batches(later, 0)
        losses = [float(each.train_step(batch)["loss"]) for each in (trainer, later)]
        assert losses[0] == losses[1]
        assert not changed(trainer, later)


@pytest.mark.parametrize(
    ("folds", "fold", "others"),
    [((0,), 0, None), ((0, 1), 0, "1"), ((1, 2), 0, "1, 2"), (("all",), 0, "all"), ((0, 1), "all", None)],
)
def test_the_log_says_when_a_teacher_has_seen_the_cases_of_validation(
    folds: tuple[int | str, ...], fold: int | str, others: str | None, tmp_path: Path
) -> None:
    with at_home(tmp_path, Task(LABELS, (8, 8))) as home:
        (home.base / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
        record = teach(home, certain).folder / "teacher.json"
        record.write_text(json.dumps(teacher_of(label_manager(home), folds=folds).as_json()))
        trainer = home.trainer(nnUNetTrainerDistill, fold)
        trainer._set_batch_size_and_oversample()
        trainer.get_dataloaders()
        log = Path(trainer.log_file).read_text()
    assert "soft targets of a teacher" in log
    assert ("WARNING" in log) == (others is not None)
    assert f"its folds {others} have seen some that fold {fold} is validated on" in log or others is None


def others_labels(targets: SoftTargets, manager: Any) -> None:
    teacher = teacher_of(manager)
    swapped = (teacher.channels[0], teacher.channels[2], teacher.channels[1])
    (targets.folder / "teacher.json").write_text(json.dumps(teacher_of(manager, channels=swapped).as_json()))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda targets, _: (targets.folder / "teacher.json").unlink(), "there are no soft targets"),
        (lambda targets, _: (targets.folder / "teacher.json").write_text("{}"), "does not say whose"),
        (lambda targets, _: (targets.folder / "case_1.b2nd").unlink(), "1 training cases have no soft targets, case_1"),
        (lambda targets, _: (targets.folder / "case_1.b2nd").write_bytes(b"no array"), "cannot be read"),
        (lambda targets, _: targets.save("case_1", np.zeros((3, 4, 8, 8), np.float16), (8, 8)), "holds float16 of"),
        (lambda targets, _: targets.save("case_1", np.zeros((3, 5, 24, 26), np.float32), (8, 8)), "float32"),
        (others_labels, "the student's labels are"),
    ],
)
def test_soft_targets_that_do_not_belong_to_the_cases_are_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    with at_home(tmp_path, Task(LABELS, (8, 8))) as home:
        spoil(teach(home, certain), label_manager(home))
        trainer = home.trainer(nnUNetTrainerDistill)
        trainer._set_batch_size_and_oversample()
        with pytest.raises(SoftTargetError, match=said):
            trainer.get_dataloaders()
