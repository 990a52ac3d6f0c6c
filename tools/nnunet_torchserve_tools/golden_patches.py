"""What is computed with an archive's stored weights before anybody gets it: its golden patches, and a trial.

A worker computes a golden patch again before it takes requests, and compares. So what is written here is what the
weights in the archive give, and not what the checkpoints gave from which they were taken.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from nnunet_torchserve.backend import FROM_WEIGHTS, NEEDS_REPORT, Backend
from nnunet_torchserve.bundle import BUNDLE_FILE, BundleDescription, ModelBundle
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.backends.openvino_networks import OpenVinoNetworks, graph_paths
from nnunet_torchserve.engine.golden import golden_name, golden_tensors
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.measured_here import patches_at_once
from nnunet_torchserve.member import Member
from nnunet_torchserve.member_description import GOLDEN_FILE
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.settings import HandlerSettings

from .calibration import calibration_patches, spread
from .errors import ModelWarning, ToolError
from .graphs import write_graphs
from .measurement import not_measured
from .quantisation import quantise
from .validation_cases import Validation, cases_of

NO_NETWORK = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What nnU-Net and PyTorch raise where plans, dataset and weights do not belong together; somebody's own code may raise
anything."""

_DRY_RUN_LIMIT_S = 600.0

_OF_A_GPU = re.compile(r"cuda|nvidia|triton", re.IGNORECASE)
"""What networks say that want a GPU."""

_CPU = torch.device("cpu")


def add_golden_patches(
    stage: Path,
    description: BundleDescription,
    settings: HandlerSettings,
    calibration: Sequence[Path] = (),
    tell: Callable[[str], None] = lambda _line: None,
) -> tuple[str, ...] | None:
    """Run the stored weights once on one thread and write ``bundle.json``, complete.

    Then load what was written as a worker does, with the archive's own settings: it must give the same again, and
    answer one small case; with another backend, if there is one, too.

    Args:
        stage: the folder that becomes the archive, with all its members.
        description: what ``bundle.json`` will say, but for the checksums.
        settings: the archive's own.
        calibration: images that int8 is calibrated on.
        tell: hears lines for people.

    Returns:
        sha256 of the files that int8 was calibrated on; ``None`` of what is not calibrated.

    Raises:
        UsageError: there are too few images to calibrate on.
        ToolError: a network cannot be built or fails, a graph cannot be made of it, or the archive does not load.

    Warns:
        ModelWarning: the trial did not prove that the archive answers.
    """
    write_bundle(stage, description)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calibrated_on = None
    try:
        for member in ModelBundle(stage).members.values():
            expected = (Exception,) if description.code is not None else NO_NETWORK
            networks, golden = _golden(member, expected)
            save_file(golden, member.folder / GOLDEN_FILE)
            if description.backend is not None and description.backend.backend not in FROM_WEIGHTS:
                write_graphs(member, networks)
        write_bundle(stage, description)
        complete = ModelBundle(stage)
        if description.backend is not None and description.backend.backend is Backend.OPENVINO_INT8:
            cases = spread(cases_of(Validation(tuple(calibration)), complete.lead))
            _quantise(complete, calibration_patches(complete, settings, cases, tell))
            calibrated_on = tuple(digest for case in cases for digest in case.digests())
            write_bundle(stage, description)
            complete = ModelBundle(stage)
        limits = Limits.from_settings(settings.limits, {}).for_model(complete.lead.channels)
        batch = patches_at_once(settings.max_patch_batch)
        backends = dict.fromkeys((Backend.EAGER, description.backend.backend if description.backend else Backend.EAGER))
        for backend in backends:
            try:
                engine = LocalEngine(complete, _CPU, batch, settings.policy, limits, backend)
            except BundleError as error:
                if backend not in NEEDS_REPORT:
                    raise
                raise ToolError(not_measured(backend, str(error))) from error
            pipeline = Pipeline(complete, engine, limits, _DRY_RUN_LIMIT_S, settings=settings)
            if (warning := pipeline.dry_run()) is not None:
                warnings.warn(warning, ModelWarning, stacklevel=4)
    except BundleError as error:
        raise ToolError(str(error)) from error
    finally:
        torch.set_num_threads(threads)
    return calibrated_on


def _quantise(bundle: ModelBundle, patches: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Put graphs of int8 in the place of all graphs, and their logits beside eager's golden ones."""
    backend = Backend.OPENVINO_INT8
    for member in bundle.members.values():
        for fold in member.folds:
            quantise(graph_paths(member.folder, fold), patches[member.name])
        try:
            networks = OpenVinoNetworks(member, backend, batch=1)
        except BundleError as error:
            raise ToolError(not_measured(backend, str(error))) from error
        golden, own = load_file(member.folder / GOLDEN_FILE), golden_tensors(networks, member.folds)
        golden |= {golden_name(backend, fold): own[f"fold_{fold}"] for fold in member.folds}
        save_file(golden, member.folder / GOLDEN_FILE)


def _golden(member: Member, expected: tuple[type[Exception], ...]) -> tuple[EagerNetworks, dict[str, torch.Tensor]]:
    """The networks of a member, and its golden patch.

    Args:
        member: written, but for this.
        expected: what may be raised where there is no network, or one that fails.

    Raises:
        ToolError: it is so; the message says whether the network is not built or does not run.
    """
    name, stage = member.name, f"plans.json, dataset.json and the checkpoints of {member.name} make no network"
    try:
        networks = EagerNetworks(member, _CPU)
        stage = f"the network of {name} was built, and fails on a patch on the CPU"
        return networks, golden_tensors(networks, member.folds)
    except BundleError as error:
        msg = str(error) if name in str(error) else f"{name}: {error}"
        raise ToolError(msg) from error
    except expected as error:
        msg = f"{stage}: {type(error).__name__} {error}"
        if _OF_A_GPU.search(msg):
            msg += ". Archives are made and checked on a CPU: a network that runs on CUDA only cannot be served"
        raise ToolError(msg) from error


def write_bundle(stage: Path, description: BundleDescription) -> None:
    """Write ``bundle.json`` for the files that are there.

    Args:
        stage: the folder that becomes the archive.
        description: what it will say, but for the checksums.
    """
    files = {
        file.relative_to(stage).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(stage.rglob("*"))
        if file.is_file() and file.name != BUNDLE_FILE
    }
    complete = description.model_copy(update={"files": files})
    (stage / BUNDLE_FILE).write_text(complete.model_dump_json(indent=1))
