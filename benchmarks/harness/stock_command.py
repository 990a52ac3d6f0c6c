"""Stock's commands ``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder``, run as their users run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER, Material


def run_command(material: Material, inputs: Path, outputs: Path, scratch: Path) -> float:
    """Seconds that the stock command takes for the one image of ``inputs``.

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
    command += ["-d", str(int(dataset.name[7:10])), "-c", CONFIGURATION, "-f", str(FOLD)]
    command += ["-tr", TRAINER, "-p", PLANS, "--disable_tta", "-device", "cpu"]
    command += ["-npp", "1", "-nps", "1"]
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode != 0:
        msg = f"nnUNetv2_predict ended with {ended.returncode}:\n{ended.stderr[-2000:]}"
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
