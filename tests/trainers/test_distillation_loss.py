"""The divergence from a teacher's probabilities is the one that the paper has, in plain words of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnunet_torchserve_trainers.distillation_loss import (
    DistillationLoss,
    Divergence,
    label_divergence,
    region_divergence,
)

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
DIVERGENCES: dict[Divergence, Callable[[torch.Tensor], torch.Tensor]] = {
    label_divergence: lambda z: torch.softmax(z, 1),
    region_divergence: torch.sigmoid,
}


def logits(seed: int, *shape: int) -> torch.Tensor:
    """Whose probabilities float16 tells from certainty."""
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(-8, 8)


def by_the_paper(kind: Divergence, student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    """Of both's logits; the teacher's were never probabilities."""
    student, teacher = student.double(), teacher.double()
    if kind is label_divergence:
        p, q = torch.softmax(teacher / t, 1), torch.softmax(student / t, 1)
        return t**2 * (p * (p.log() - q.log())).sum(1).mean()
    p, q = torch.sigmoid(teacher / t), torch.sigmoid(student / t)
    return t**2 * (p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())).mean()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_it_is_that_of_softened_logits(kind: Divergence, temperature: float) -> None:
    student, teacher = logits(0, 2, 3, 4, 5), logits(1, 2, 3, 4, 5)
    found = kind(student, DIVERGENCES[kind](teacher), temperature)
    expected = by_the_paper(kind, student, teacher, temperature).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_keep_their_size_at_high_temperatures(kind: Divergence) -> None:
    """Why the paper multiplies by T²; without it they would be 16 times smaller."""
    sizes = []
    for temperature in (16.0, 64.0):
        student = logits(0, 1, 4, 500).requires_grad_()
        [gradient] = torch.autograd.grad(kind(student, DIVERGENCES[kind](logits(1, 1, 4, 500)), temperature), student)
        sizes.append(float(gradient.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_whoever_says_what_the_teacher_says_has_nothing_to_learn(kind: Divergence, temperature: float) -> None:
    same = logits(0, 2, 3, 100).requires_grad_()
    found = kind(same, DIVERGENCES[kind](same.detach()), temperature)
    [gradient] = torch.autograd.grad(found, same)
    assert abs(float(found.detach())) < 1e-5
    assert float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_certain_teachers_and_students_give_numbers(kind: Divergence) -> None:
    """Where probabilities are 0 and 1, as float16 has them often."""
    student = torch.tensor([[[60.0, -60.0], [-60.0, 60.0]]], requires_grad=True)
    certain = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float16)
    found = kind(student, certain, 2.0)
    [gradient] = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()
    assert 10 < float(found.detach()) < 1000  # the second voxel is wrong


def test_a_teacher_who_is_sure_is_believed_as_much_inside_of_a_region_as_outside() -> None:
    """In float16 the one is 1, and the other has digits left."""
    teacher, student = torch.linspace(8.5, 14, 12)[None, None], logits(0, 1, 1, 12)
    inside, outside = (torch.sigmoid(each).half() for each in (teacher, -teacher))
    assert (inside == 1).all()
    assert (outside > 0).all()
    for temperature in TEMPERATURES:
        found = region_divergence(student, inside, temperature)
        torch.testing.assert_close(found, region_divergence(-student, outside, temperature))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_student_is_not_pulled_further_than_float16_can_say(side: float, temperature: float) -> None:
    """Which is a logit of 8.3."""
    student = torch.tensor([[[7.5, 9.0, 30.0]]], requires_grad=True)
    certain = torch.full((1, 1, 3), (1 + side) / 2, dtype=torch.float16)
    [gradient] = torch.autograd.grad(region_divergence(side * student, certain, temperature), student)
    assert gradient[0, 0, 0] < 0
    assert (gradient[0, 0, 1:] > 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_outputs_are_compared_in_full(kind: Divergence) -> None:
    """As autocast gives them on a GPU."""
    student, teacher = logits(0, 2, 3, 50).bfloat16(), DIVERGENCES[kind](logits(1, 2, 3, 50)).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = kind(student, teacher, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, kind(student.float(), teacher.float(), 2.0))


class Counts(nn.Module):
    """A loss on labels that shows how often it was asked."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.mean() + target.float().mean()


def test_each_scale_is_held_against_the_voxels_of_its_labels() -> None:
    scales, weights = [[1.0, 1.0], [0.5, 0.5], [0.5, 0.25], [0.25, 0.125]], (0.6, 0.3, 0.1, 0.0)
    soft = torch.softmax(logits(0, 2, 3, 16, 24), 1)
    at_scales = [
        torch.stack(each)
        for each in zip(
            *(DownsampleSegForDSTransform(scales)(segmentation=one)["segmentation"] for one in soft), strict=True
        )
    ]
    outputs = [logits(number, *each.shape) for number, each in enumerate(at_scales)]
    labels = [torch.zeros(2, 1, *each.shape[2:]) for each in outputs]
    plain = DeepSupervisionWrapper(Counts(), weights)
    loss = DistillationLoss(plain, label_divergence, 0.7, 3.0)
    with loss.taught(soft):
        found = loss(outputs, labels)
    expected = plain(outputs, labels) + 0.7 * sum(
        weight * label_divergence(output, taken, 3.0)
        for weight, output, taken in zip(weights, outputs, at_scales, strict=True)
    )
    torch.testing.assert_close(found, expected)
    assert found > plain(outputs, labels)


@pytest.mark.parametrize("loss", [Counts(), DeepSupervisionWrapper(Counts(), (0.6, 0.4))])
def test_without_soft_targets_it_is_the_trainers_own(loss: nn.Module) -> None:
    many = isinstance(loss, DeepSupervisionWrapper)
    output: Any = [logits(0, 1, 2, 4), logits(1, 1, 2, 2)] if many else logits(0, 1, 2, 4)
    target: Any = [torch.ones(1, 1, 4), torch.ones(1, 1, 2)] if many else torch.ones(1, 1, 4)
    ours = DistillationLoss(loss, label_divergence, 1.0, 2.0)
    with ours.taught(torch.softmax(logits(2, 1, 2, 4), 1)):
        assert ours(output, target) != loss(output, target)
    assert torch.equal(ours(output, target), loss(output, target))


def test_a_loss_that_does_not_say_how_scales_count_is_taught_at_the_finest() -> None:
    class Finest(nn.Module):
        def forward(self, output: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
            return output[0].mean() + target[0].mean()

    outputs, target = [logits(0, 1, 2, 4), logits(1, 1, 2, 2)], [torch.ones(1, 1, 4), torch.ones(1, 1, 2)]
    soft = torch.softmax(logits(2, 1, 2, 4), 1)
    ours = DistillationLoss(Finest(), label_divergence, 1.0, 2.0)
    with ours.taught(soft):
        found = ours(outputs, target)
    torch.testing.assert_close(found, Finest()(outputs, target) + label_divergence(outputs[0], soft, 2.0))


@pytest.mark.parametrize(("weight", "temperature"), [(-0.1, 2.0), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_what_cannot_be_meant_is_refused(weight: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="weight of at least 0 and a temperature above 0"):
        DistillationLoss(Counts(), label_divergence, weight, temperature)
