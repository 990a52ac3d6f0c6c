"""Stock's commands that predict, and the one that makes an ensemble of predictions, run as their users run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER, Material


def run_command(
    material: Material,
    inputs: Path,
    outputs: Path,
    scratch: Path,
    *,
    configuration: str = CONFIGURATION,
    options: Sequence[str | Path] = (),
) -> float:
    """Seconds that ``nnUNetv2_predict`` takes for the one image of ``inputs``.

    Args:
        material: a trained model; that of another configuration lies beside it.
        inputs: a folder with one case.
        outputs: a folder for its segmentation.
        scratch: for nnU-Net's own folders; another one for each dataset.
        configuration: which model.
        options: more of the command's options.

    Raises:
        RuntimeError: it failed.
    """
    dataset = material.model_folder.parent.resolve()
    results = scratch / "results"
    results.mkdir(exist_ok=True)
    if not (results / dataset.name).exists():
        (results / dataset.name).symlink_to(dataset)
    folders = {"nnUNet_raw": scratch, "nnUNet_preprocessed": scratch, "nnUNet_results": results}
    command: list[str | Path] = [Path(sys.executable).parent / "nnUNetv2_predict", "-i", inputs, "-o", outputs]
    command += ["-d", str(int(dataset.name[7:10])), "-c", configuration, "-f", str(FOLD)]
    command += ["-tr", TRAINER, "-p", PLANS, "--disable_tta", "-device", "cpu"]
    command += ["-npp", "1", "-nps", "1", *options]
    return _timed(command, os.environ | {name: str(folder) for name, folder in folders.items()})


def run_ensemble(inputs: Sequence[Path], outputs: Path) -> float:
    """Seconds that ``nnUNetv2_ensemble`` takes for folders with one case each.

    Raises:
        RuntimeError: it failed.
    """
    command: list[str | Path] = [Path(sys.executable).parent / "nnUNetv2_ensemble", "-i", *inputs, "-o", outputs]
    return _timed([*command, "-np", "1"], os.environ)


def _timed(command: Sequence[str | Path], environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode != 0:
        msg = f"{Path(command[0]).name} ended with {ended.returncode}:\n{ended.stderr[-2000:]}"
        raise RuntimeError(msg)
    return seconds


def modelfolder_command(material: Material, inputs: Path, outputs: Path) -> list[str | Path]:
    """Stock's command for a folder of images, with its defaults but for fold, mirroring and device."""
    command: list[str | Path] = [Path(sys.executable).parent / "nnUNetv2_predict_from_modelfolder"]
    command += ["-i", inputs, "-o", outputs, "-m", material.model_folder, "-f", str(FOLD)]
    return [*command, "--disable_tta", "-device", "cpu"]


def copy_to(file: Path, folder: Path, name: str) -> Path:
    """Copy ``file`` to ``folder/name``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(file, folder / name))
