"""Whether what an archive's report says of a backend holds on the server that is being started.

The archive's files are those that were measured (:func:`~.accuracy.read_accuracy`). What else decides the bits of an
answer is the server's: the version of the library that runs the networks, and how many patches it takes at once, for
which graphs are compiled. Where these are others, the measured number is of other answers, and is stated nowhere.
Another processor may round otherwise too; but there are as many kinds as machines, so that is only said in the log. It
is more of int8, where what is rounded otherwise may become another whole number: that is not what was measured.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection
from typing import Literal

from .accuracy import ACCURACY_FILE, AccuracyReport
from .backend import WHOLE_NUMBERS, Backend, Choice, StoredBackend, candidate, usable_backend, why_not
from .machine import processor_name

logger = logging.getLogger(__name__)


def backend_here(
    wanted: Choice,
    stored: StoredBackend | None,
    report: AccuracyReport | None,
    device_type: str,
    max_patch_batch: int | Literal["auto"],
) -> tuple[Backend, AccuracyReport | None]:
    """What an engine is to run, or to compare with eager, and the report that holds of it; why not another, is logged.

    Args:
        wanted: of :func:`~.backend.wanted_backend`.
        stored: what the archive holds for another backend than eager.
        report: of the archive.
        device_type: PyTorch's name.
        max_patch_batch: of the archive's settings.
    """
    asked = candidate(wanted, stored)
    in_force = report_in_force(report, stored, asked, device_type, max_patch_batch)
    return usable_backend(asked, stored, device_type, measured=in_force is not None), in_force


def report_in_force(
    report: AccuracyReport | None,
    stored: StoredBackend | None,
    wanted: Backend,
    device_type: str,
    max_patch_batch: int | Literal["auto"],
) -> AccuracyReport | None:
    """The archive's report, or ``None`` where the backend would run otherwise than it was measured, which is logged.

    Args:
        report: of the archive.
        stored: what the archive holds for another backend than eager.
        wanted: what is to run the networks; if that is another backend than the report's, the report is none of its
            business and stays.
        device_type: PyTorch's name.
        max_patch_batch: of the archive's settings.
    """
    if report is None or stored is None or why_not(wanted, stored, device_type) is not None:
        return report
    if wanted is not report.backend:
        return report
    if device_type != "cpu":
        logger.warning("%s was measured on a CPU; no Dice is stated for answers of %s", ACCURACY_FILE, device_type)
        return None
    if (reason := _why_not_as_measured(report, stored.requires, patches_at_once(max_patch_batch))) is not None:
        logger.warning("%s is not of answers that %s gives here: %s; no Dice is stated", ACCURACY_FILE, wanted, reason)
        return None
    here = processor_name()
    if here != report.processor and wanted in WHOLE_NUMBERS:
        logger.warning("%s was measured on %s, and may answer otherwise on this %s", wanted, report.processor, here)
        return None
    if seen := report.calibrated_cases:
        logger.warning(
            "%s was calibrated on %d of the %d cases that it was measured on: it may lose more of other images",
            *(wanted, seen, len(report.cases)),
        )
    if here != report.processor:
        logger.warning("%s was measured on %s; this is %s, and may round otherwise", wanted, report.processor, here)
    return report


def patches_at_once(max_patch_batch: int | Literal["auto"]) -> int:
    """Patches in a forward pass on a CPU, where all measured backends run: ``auto`` is 1 there."""
    return 1 if max_patch_batch == "auto" else max_patch_batch


def _why_not_as_measured(report: AccuracyReport, packages: Collection[str], batch: int) -> str | None:
    """What is other than it was when the report was made."""
    for package in packages:
        measured, here = report.software.get(package, "no version"), _version(package)
        if measured != here:
            return f"it was measured with {package} {measured}, and {here} is installed"
    if report.max_patch_batch != batch:
        return f"it was measured with a max_patch_batch of {report.max_patch_batch}, and it is {batch}"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
