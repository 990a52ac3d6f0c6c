"""Whether a backend's measured answers are near enough to be served: the decision, and what it says.

With labels what counts is what is lost of eager's Dice to them: a backend may answer otherwise, but not worse. Without
labels nobody knows which answer is the better one, and what counts is how far it is from eager's. So it does for a
structure in a case whose labels have none of it: both answers have a Dice of 0 to nothing, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_torchserve.accuracy import AccuracyReport, CaseAccuracy, DiceLimits
from nnunet_torchserve.structure_accuracy import Reference, StructureAccuracy

from .errors import ToolError
from .validation_cases import Tolerance

DEFAULTS = {
    Reference.LABELS: DiceLimits(against=Reference.LABELS, mean=0.001, structure=0.005, unlabelled=0.01),
    Reference.EAGER: DiceLimits(against=Reference.EAGER, mean=0.005, structure=0.01, unlabelled=0.01),
}
"""bfloat16 keeps both for a trained model of brain tissue; a model of 8-bit integers that is no worse against labels
keeps the first only."""

FEW_VOXELS = 10
"""So many different voxels are no reason to refuse for a structure in a case: of a small structure one voxel is more
Dice than any limit. Where labels have the structure, or there are none, they count in the mean: there many such cases
add up, and a small structure that is lost counts whole."""

LEAST_DICE = 0.1
"""Eager's to labels that are of the same image, for at least one structure of a case. It is about what chance gives a
structure that fills a tenth of the image; a model that is worse than that in all structures has nothing to lose."""

_MOST_NAMED = 5

_ROUNDING = 1e-9
"""Of float64: what is exactly the limit is not above it."""


def limits_of(tolerance: Tolerance | None, *, has_labels: bool) -> DiceLimits:
    """What may be lost.

    Args:
        tolerance: by whoever asks; ``None`` takes the defaults.
        has_labels: whether there are labels.
    """
    default = DEFAULTS[Reference.LABELS if has_labels else Reference.EAGER]
    if tolerance is None:
        return default
    structure = tolerance.structure
    return DiceLimits(against=default.against, mean=tolerance.mean, structure=structure, unlabelled=structure)


def check(report: AccuracyReport) -> None:
    """Refuse a backend that loses more than its report's limits allow.

    Raises:
        ToolError: it does, and the message names case and structure; or images or labels prove nothing.
    """
    if report.dice is None:
        msg = f"{report.backend}: no answer has any structure, so nothing was measured; take images that show some"
        raise ToolError(msg)
    if report.has_labels:
        _check_labels(report)
    reasons = list(_reasons(report))
    if not reasons:
        return
    told = "; ".join(reasons[:_MOST_NAMED])
    if len(reasons) > _MOST_NAMED:
        told += f"; and {len(reasons) - _MOST_NAMED} more"
    msg = f"{report.backend} loses too much: {told}. --max-dice-loss allows more"
    if report.limits.against is Reference.EAGER:
        msg += "; with labels (--labels) it is asked whether it is worse, and not whether it is different"
    raise ToolError(msg)


def _check_labels(report: AccuracyReport) -> None:
    """Refuse labels that prove nothing: nothing seems to be lost of what eager does not find either."""
    if not any(each.is_labelled for case in report.cases for each in case.structures.values()):
        msg = "the labels have no structure in any case, so nothing could be lost: take others, or leave --labels out"
        raise ToolError(msg)
    for case in report.cases:
        best = _best_dice(case)
        if best is not None and best < LEAST_DICE:
            msg = (
                f"case {case.name} proves nothing: eager's Dice to its labels is {best:.4f} for the best of its "
                f"structures, and at least {LEAST_DICE:g} was expected. They are of another image, or eager finds "
                "nothing of what they hold: mend the labels, or leave the case out"
            )
            raise ToolError(msg)


def _best_dice(case: CaseAccuracy) -> float | None:
    """Eager's to the labels of the structure that it finds best; ``None`` where they have none."""
    found = (each.labels.eager_dice for each in case.structures.values() if each.labels and each.is_labelled)
    return max((dice for dice in found if dice is not None), default=None)


def unseen(report: AccuracyReport) -> list[str]:
    """The structures that no answer has: of their accuracy nothing is known."""
    return [name for name in report.structures if not report.seen(name)]


def _reasons(report: AccuracyReport) -> Iterator[str]:
    """What is above a limit, the worst of it first."""
    limits = report.limits
    losses = [
        (each.loss(limits.against), name, case.name, each)
        for case in report.cases
        for name, each in case.structures.items()
    ]
    for loss, name, case, each in sorted(losses, key=lambda found: -found[0]):
        most = limits.structure if each.reference(limits.against) is limits.against else limits.unlabelled
        if loss > most + _ROUNDING and each.different > FEW_VOXELS:
            yield f"{name} of case {case} {_told(each, report, loss)}, more than {most:g}"
    if (mean := report.mean_loss()) > limits.mean + _ROUNDING:
        yield f"the mean over structures and cases is a loss of {mean:.4g}, more than {limits.mean:g}"


def _told(each: StructureAccuracy, report: AccuracyReport, loss: float) -> str:
    eager = f"loses {loss:.4g} Dice to eager's answer"
    if report.limits.against is Reference.EAGER:
        return eager
    if each.labels is None or each.reference(Reference.LABELS) is Reference.EAGER:
        return f"is not in the labels and {eager}"
    found, other = (f"{dice or 0.0:.4f}" for dice in (each.labels.eager_dice, each.labels.backend_dice))
    return f"loses {loss:.4g} Dice to the labels (eager {found}, {report.backend} {other})"
