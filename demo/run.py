"""The whole way of a model in one command: package, serve, segment an MR image, compare with stock, show it.

Run it with ``make demo``. It uses the committed demo model (two folds of brain tissue, see ``train_model.py``) and
the ICBM152 T1 template of the installed nilearn package (an average of many heads), and stops its server in the end.
"""

from __future__ import annotations

import gzip
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from nnunet_torchserve_client import Answer, Case, Client, Event, Kind
from nnunet_torchserve_client.progress import shown, state_of
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from train_model import LABELS, template_folder

MODEL = Path(__file__).parent / "model" / "Dataset811_BrainTissueDemo" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
OUTPUT = Path(__file__).parent / "output"
IMAGE = template_folder() / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
NAME = "brain_tissue_demo"

_PATIENCE_S = 5.0
"""Nobody looks at a silent terminal for longer."""

COLOURS = {1: (0.30, 0.60, 1.0), 2: (1.0, 0.55, 0.20), 3: (0.35, 0.85, 0.35)}
Labels = npt.NDArray[np.integer[Any]]


def main() -> None:
    """Run the demo; raises if the answer differs from stock nnU-Net's in any voxel."""
    console = Console(highlight=False, soft_wrap=True)
    OUTPUT.mkdir(exist_ok=True)
    with _step(console, "[1/4] packaging the trained model folder: its two folds are read, checked and tried"):
        [archive] = make_archives(ArchiveRequest(MODEL, OUTPUT / "model_store", name=NAME))
    state_dir = OUTPUT / "server"
    launcher.stop(state_dir)
    with _step(console, f"[2/4] starting TorchServe with {archive.name}: each worker loads the model and tries it"):
        server = launcher.start(
            launcher.ServeRequest(
                OUTPUT / "model_store",
                (f"{NAME}={archive.name}",),
                state_dir,
                launcher.free_ports(),
                device=launcher.DeviceKind.CPU,
            ),
            tell=lambda text: console.print(f"      {text}"),
        )
    try:
        with _step(console, f"[3/4] segmenting {IMAGE.name}: both folds, all mirrorings, on the CPU") as step:
            answer = _segment(server.inference_url, step)
    finally:
        console.print("      stopping TorchServe")
        launcher.stop(state_dir)
    segmentation = OUTPUT / "segmentation.nii.gz"
    segmentation.write_bytes(answer.content)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    labels = np.asarray(image.dataobj)
    with _step(
        console, "[4/4] asking stock nnU-Net for the same image: it loads the model and predicts in this process"
    ):
        started = time.perf_counter()
        expected = _stock_labels()
        stock_seconds = time.perf_counter() - started
    picture = OUTPUT / "segmentation.png"
    _draw(labels, picture)
    _report(console, image, labels, expected, answer.timing)
    console.print(
        f"whole request {answer.seconds:.1f} s, {answer.timing['network']:.1f} s of it the network; "
        f"loading stock nnU-Net and predicting with it {stock_seconds:.1f} s"
    )
    console.print(
        "With two folds and all mirrorings on a CPU, most of both is the network, which computes the same in both. "
        "README.md compares one fold without mirroring with nnU-Net's command: there the rest counts."
    )
    console.print(f"written: {segmentation}, {picture}")
    if np.any(labels != expected):
        msg = "the served segmentation differs from stock nnU-Net's"
        raise SystemExit(msg)


def _segment(url: str, step: _Step) -> Answer:
    """The server's answer: bars on a terminal, elsewhere the step's lines say how far it is."""
    with Client(url, NAME, use_proxies=False) as client, shown("segmenting", 1, wanted=True) as bars:

        def tell(event: Event) -> None:
            bars.event(event)
            if (state := state_of(event)) is not None:
                step.state = f", {state} {event.done}/{event.total}" if event.kind is Kind.PROGRESS else f", {state}"

        return client.predict(Case(IMAGE.name, IMAGE), on_event=tell)


@dataclass
class _Step:
    """What is going on.

    Attributes:
        state: more of it than that it goes on.
    """

    state: str = ""


@contextmanager
def _step(console: Console, what: str) -> Iterator[_Step]:
    """Say what is waited for, every few seconds that it goes on, and in the end how long it took."""
    console.print(what)
    started, done, step = time.monotonic(), threading.Event(), _Step()

    def go_on() -> None:
        while not done.wait(_PATIENCE_S):
            console.print(f"      ... {time.monotonic() - started:.0f} s{step.state}")

    threading.Thread(target=go_on, daemon=True).start()
    try:
        yield step
    finally:
        done.set()
    console.print(f"      done after {time.monotonic() - started:.0f} s")


def _stock_labels() -> Labels:
    """``nnUNetPredictor``'s segmentation of the same image, (x, y, z)."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(MODEL), use_folds=(0, 1))
        reader = predictor.plans_manager.image_reader_writer_class()
        array, properties = reader.read_images([str(IMAGE)])
        labels: Labels = predictor.predict_single_npy_array(array, properties)
    return labels.T


def _report(
    console: Console, image: nib.Nifti1Image, labels: Labels, expected: Labels, timing: dict[str, float]
) -> None:
    voxel_ml = float(np.abs(np.linalg.det(image.affine[:3, :3]))) / 1000
    structures = Table("structure", "volume", "voxels different from stock", title="Segmentation")
    for name, label in LABELS.items():
        if label:
            ours, stock = labels == label, expected == label
            different = str(np.count_nonzero(ours != stock))
            structures.add_row(name.replace("_", " "), f"{np.count_nonzero(ours) * voxel_ml:.0f} ml", different)
    console.print(structures)
    stages = Table("stage", "time", title="Where the time went")
    for stage, seconds in timing.items():
        stages.add_row(stage, f"{seconds:.2f} s")
    console.print(stages)


def _draw(labels: Labels, file: Path) -> None:
    """Three orthogonal slices through the middle, labels over the image."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    image = np.asarray(nib.load(IMAGE).dataobj)
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.4), facecolor="black")
    names = ("sagittal", "coronal", "axial")
    for axis, name in enumerate(names):
        middle = image.shape[axis] // 2
        grey = np.take(image, middle, axis).T
        slice_labels = np.take(labels, middle, axis).T
        overlay = np.zeros((*slice_labels.shape, 4))
        for label, colour in COLOURS.items():
            overlay[slice_labels == label] = (*colour, 0.55)
        for row in range(2):
            axes[row, axis].imshow(grey, cmap="gray", origin="lower")
            axes[row, axis].axis("off")
        axes[1, axis].imshow(overlay, origin="lower")
        axes[0, axis].set_title(name, color="white")
    entries = [Patch(color=COLOURS[label], label=name.replace("_", " ")) for name, label in LABELS.items() if label]
    figure.legend(handles=entries, loc="lower center", ncols=3, frameon=False, labelcolor="white")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=100, facecolor="black")
    plt.close(figure)


if __name__ == "__main__":
    main()
