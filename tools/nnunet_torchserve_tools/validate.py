"""``nnunet-torchserve validate`` and ``archive --validate``: a backend is measured, and refused if it loses much."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nnunet_torchserve.accuracy import ACCURACY_FILE, AccuracyReport
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.settings import HandlerSettings

from .accuracy_gate import check, limits_of
from .accuracy_table import lines
from .errors import ToolError, UsageError
from .golden_patches import write_bundle
from .measurement import measure, not_measured
from .serving_settings import MODEL_CONFIG_FILE, read_model_config
from .validation_cases import Validation, cases_of


def validate(file: Path, asked: Validation, tell: Callable[[str], None]) -> AccuracyReport:
    """Compare an archive's backend with eager. The archive stays as it is; code of its owner that is in it is run.

    Args:
        file: the archive.
        asked: images, their labels, and what may be lost.
        tell: hears a line for each case.

    Raises:
        UsageError: there is no such archive, it has no other backend, or images or labels are missing.
        ToolError: it is damaged, this machine cannot run the backend, or a case is refused. Not what
            :func:`~.accuracy_gate.check` finds.
    """
    asked.check()
    with _unpacked(file) as folder:
        try:
            bundle = ModelBundle(folder)
            settings = HandlerSettings.read(_config(folder).get("handler"))
        except BundleError as error:
            msg = f"{file}: {error}"
            raise ToolError(msg) from error
        calibrated_on = None if bundle.accuracy is None else bundle.accuracy.calibrated_on
        return _measured(bundle, settings, asked, tell, calibrated_on)


def add_accuracy(
    stage: Path,
    settings: HandlerSettings,
    asked: Validation,
    tell: Callable[[str], None],
    calibrated_on: tuple[str, ...] | None = None,
) -> AccuracyReport:
    """Measure the backend of an archive that is being made, and put the report into it.

    Args:
        stage: the folder that becomes the archive, complete but for this.
        settings: the archive's own.
        asked: as of :func:`validate`.
        tell: hears a line for each case, and the table.
        calibrated_on: sha256 of the files that the backend was calibrated on; ``None`` of one that is not calibrated.

    Raises:
        UsageError, ToolError: as :func:`validate`; or it loses too much.
    """
    bundle = ModelBundle(stage)
    report = _measured(bundle, settings, asked, tell, calibrated_on)
    for line in lines(report):
        tell(line)
    check(report)
    (stage / ACCURACY_FILE).write_text(report.without_names().model_dump_json(indent=1))
    write_bundle(stage, bundle.description)
    ModelBundle(stage)  # reads it as a worker does
    return report


def _measured(
    bundle: ModelBundle,
    settings: HandlerSettings,
    asked: Validation,
    tell: Callable[[str], None],
    calibrated_on: tuple[str, ...] | None,
) -> AccuracyReport:
    limits = limits_of(asked.tolerance, has_labels=asked.labels is not None)
    try:
        return measure(bundle, settings, cases_of(asked, bundle.lead), limits, tell, calibrated_on)
    except (ToolError, OSError, Warning):
        raise
    except Exception as error:  # what libraries raise while they load or run a network, or where memory ends
        backend = Backend.EAGER if bundle.description.backend is None else bundle.description.backend.backend
        raise ToolError(not_measured(backend, f"{type(error).__name__} {error}")) from error


@contextmanager
def _unpacked(file: Path) -> Iterator[Path]:
    """The archive, as TorchServe unpacks it."""
    with tempfile.TemporaryDirectory(prefix="nnunet-torchserve-validate-") as scratch:
        try:
            with zipfile.ZipFile(file) as archive:
                archive.getinfo(BUNDLE_FILE)
                archive.extractall(scratch)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            msg = f"{file} is no archive of 'nnunet-torchserve archive', or it is damaged"
            raise UsageError(msg) from error
        yield Path(scratch)


def _config(folder: Path) -> dict[str, Any]:
    """What model-config.yaml says."""
    try:
        return read_model_config((folder / MODEL_CONFIG_FILE).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        msg = f"{MODEL_CONFIG_FILE} of the archive cannot be read"
        raise BundleError(msg) from error
