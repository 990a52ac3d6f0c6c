"""Whether a backend's measured answers are near enough to be served: the decision, and what it says.

With labels what counts is what is lost of eager's Dice to them: a backend may answer otherwise, but not worse. Without
labels nobody knows which answer is the better one, and what counts is how far it is from eager's.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_torchserve.accuracy import AccuracyReport, DiceLimits, Reference, StructureAccuracy

from .errors import ToolError
from .validation_cases import Tolerance

DEFAULTS = {
    Reference.LABELS: DiceLimits(against=Reference.LABELS, mean=0.001, structure=0.005),
    Reference.EAGER: DiceLimits(against=Reference.EAGER, mean=0.005, structure=0.01),
}
"""bfloat16 keeps both for a trained model of brain tissue; a model of 8-bit integers that is no worse against labels
keeps the first only."""

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
    return DiceLimits(against=default.against, mean=tolerance.mean, structure=tolerance.structure)


def check(report: AccuracyReport) -> None:
    """Refuse a backend that loses more than its report's limits allow.

    Raises:
        ToolError: it does, and the message names case and structure; or images or labels prove nothing.
    """
    if report.dice is None:
        msg = f"{report.backend}: no answer has any structure, so nothing was measured; take images that show some"
        raise ToolError(msg)
    labelled = [each.labels for name in report.structures for each in report.of(name) if each.labels is not None]
    if labelled and not any(each.eager_common for each in labelled):
        msg = "eager's answers have nothing in common with the labels: they are of other images, and prove nothing"
        raise ToolError(msg)
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
        if loss > limits.structure + _ROUNDING:
            yield f"{name} of case {case} {_told(each, report, loss)}, more than {limits.structure:g}"
    if (mean := report.mean_loss()) > limits.mean + _ROUNDING:
        yield f"the mean over structures and cases is a loss of {mean:.4g}, more than {limits.mean:g}"


def _told(each: StructureAccuracy, report: AccuracyReport, loss: float) -> str:
    if report.limits.against is Reference.LABELS and each.labels is not None:
        eager, other = (_figure(dice) for dice in (each.labels.eager_dice, each.labels.backend_dice))
        return f"loses {loss:.4g} Dice to the labels (eager {eager}, {report.backend} {other})"
    return f"loses {loss:.4g} Dice to eager's answer"


def _figure(dice: float | None) -> str:
    return "nothing in either" if dice is None else f"{dice:.4f}"
