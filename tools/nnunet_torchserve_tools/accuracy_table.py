"""A report of a backend's accuracy, for people: a line for each case and structure, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnunet_torchserve.accuracy import AccuracyReport
from nnunet_torchserve.layer_precisions import whole_layers
from nnunet_torchserve.stated_accuracy import rounded_down
from nnunet_torchserve.structure_accuracy import Reference

_NONE = "-"


def lines(report: AccuracyReport) -> Iterator[str]:
    """The whole, as a table."""
    yield f"{report.backend} against eager, on {report.processor}"
    heads = ["case", "structure", "voxels", "different", "Dice", "95% mm"]
    if report.has_labels:
        heads += ["eager-labels", f"{report.backend.partition(':')[2]}-labels"]
    yield from _aligned([heads, *_rows(report)])
    summary = report.summary()
    yield in_short(summary)
    yield from worst(summary)
    yield from in_whole_numbers(summary)
    yield from calibrated(summary)
    against = "the labels" if report.limits.against is Reference.LABELS else "eager's answers"
    yield (
        f"loss of Dice to {against}: {report.mean_loss():.4g} in the mean; allowed are {report.limits.mean:g}, and "
        f"{report.limits.structure:g} of a structure in a case"
        f"{_and_unlabelled(report.limits.model_dump(mode='json'))}"
    )


def in_short(summary: Mapping[str, Any]) -> str:
    """One line, from a report's summary."""
    cases = summary["cases"]
    different, known = summary["different_voxels"], summary["dice"]
    share = f"{different} of {summary['voxels']} voxels different"
    mean = "no structure in any answer" if known is None else f"mean Dice {rounded_down(known, different=different)}"
    return f"{cases} {'case' if cases == 1 else 'cases'}: {share}, {mean}"


def worst(summary: Mapping[str, Any]) -> Iterator[str]:
    """What was worst, from a report's summary."""
    found = {name: each["worst_dice"] for name, each in summary["structures"].items() if each["worst_dice"] is not None}
    if found:
        name = min(found, key=lambda each: found[each])
        yield f"worst Dice of a structure in a case: {name}, {rounded_down(found[name])}"


def in_whole_numbers(summary: Mapping[str, Any]) -> Iterator[str]:
    """How much of a network ran in int8, from a report's summary; nothing if none of it did."""
    whole, layers = whole_layers(summary.get("precisions") or {})
    if whole:
        yield f"in int8: {whole} of {layers} convolutions and matrix products"


def calibrated(summary: Mapping[str, Any]) -> Iterator[str]:
    """Whether it was measured on images that it was calibrated on, from a report's summary; nothing if it was not."""
    if seen := summary.get("calibrated_cases"):
        cases = summary["cases"]
        yield f"calibrated on {seen} of these {cases} cases, which flatters: it may lose more of other images"


def held(summary: Mapping[str, Any]) -> Iterator[str]:
    """What it was held to, and what it says nothing of, from a report's summary."""
    limits = summary["limits"]
    against = "the labels" if limits["against"] == Reference.LABELS else "eager's answers"
    yield (
        f"allowed was a loss of Dice to {against} of {limits['mean']:g} in the mean, and {limits['structure']:g} of a "
        f"structure in a case{_and_unlabelled(limits)}"
    )
    structures = summary["structures"]
    if missing := [name for name, each in structures.items() if each["dice"] is None]:
        yield f"in no answer, so nothing is known of it: {', '.join(missing)}"
    told = [
        f"{name} {_dice(each['dice_to_labels']['eager'])} and {_dice(each['dice_to_labels']['backend'])}"
        for name, each in structures.items()
        if each["dice_to_labels"] is not None
    ]
    if told:
        yield f"mean Dice to labels, of eager and of {summary['backend']}: {'; '.join(told)}"


def _and_unlabelled(limits: Mapping[str, Any]) -> str:
    if limits["against"] != Reference.LABELS:
        return ""
    return f"; where a case's labels lack it, {limits['unlabelled']:g} to eager's answer"


def _rows(report: AccuracyReport) -> Iterator[list[str]]:
    for number, case in enumerate(report.cases, start=1):
        for name, each in case.structures.items():
            row = [case.name or str(number), name, str(each.eager), str(each.different), _dice(each.dice)]
            distance = each.surface_distance_95_mm
            row.append(_NONE if distance is None else f"{distance:.3g}")
            if each.labels is not None:
                both = (each.labels.eager_dice, each.labels.backend_dice)
                row += [_dice(value) if each.is_labelled else _NONE for value in both]
            yield row


def _dice(value: float | None) -> str:
    return _NONE if value is None else rounded_down(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of equal width; the first two are names, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)  # noqa: PLR2004
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
