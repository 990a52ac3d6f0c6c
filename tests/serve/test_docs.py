"""Every curl command of README, guide and HTTP reference works as it stands, but for addresses and model names."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from support import volumes
from support.server import LiveServer

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

ROOT = Path(__file__).parents[2]
SHAPE = (30, 28, 24)
MODELS = {"brain": "five_folds", "tumour": "regions"}


def commands() -> list[str]:
    """The curl commands of the pages for callers, each on one line."""
    pages = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "http.md"]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [each for page in pages for each in re.findall(r"`(curl -[^`]*)`", page.read_text())]
    return sorted(
        {re.sub(r"\s+", " ", line) for line in [*lines, *inline] if line.startswith("curl ") and "http:" in line}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images that the pages speak of."""
    image, _ = volumes.blobs(SHAPE, seed=8)
    array = image.astype(np.int16)
    for name in ("head.nii.gz", "t1.nii.gz", "t2.nii.gz"):
        volumes.write(tmp_path, name, volumes.nifti_gz(array, np.diag([1.5, 1.5, 1.5, 1.0])))
    itk = sitk.GetImageFromArray(array.T)
    itk.SetSpacing((1.5, 1.5, 1.5))
    for name in ("head.nrrd", "head.mha"):
        sitk.WriteImage(itk, str(tmp_path / name), True)
    np.save(tmp_path / "head.npy", array.T)
    return tmp_path


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_works(command: str, folder: Path, server: LiveServer) -> None:
    assert "--fail-with-body" in command or "/models/" in command or "/ping" in command, "it must fail where it fails"
    for name, model in MODELS.items():
        for path in ("predictions", "models"):
            command = command.replace(f"/{path}/{name}", f"/{path}/{model}")
    command = command.replace("http://127.0.0.1:8080", server.server.inference_url)
    command = command.replace("http://127.0.0.1:8081", server.server.management_url)
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, timeout=600, check=False)  # noqa: S602
    assert done.returncode == 0, done.stdout + done.stderr
    output = re.search(r"-o (\S+)", command)
    check(output[1] if output else "answer.json", (folder / output[1]).read_bytes() if output else done.stdout, folder)


def test_the_documented_reader_of_events_works(folder: Path, server: LiveServer) -> None:
    """The page's Python, which shows progress and writes the result."""
    [script] = re.findall(r"```python\n([^`]*httpx.*?)```", (ROOT / "docs" / "http.md").read_text(), re.DOTALL)
    script = script.replace(
        "http://127.0.0.1:8080/predictions/brain", f"{server.server.inference_url}/predictions/five_folds"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert b"network" in done.stdout
    check("labels.nii.gz", (folder / "labels.nii.gz").read_bytes(), folder)
    (folder / "head.nii.gz").write_bytes(b"no image")
    refused = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, timeout=600, check=False)
    assert refused.returncode == 1
    assert b"unknown_format" in refused.stderr


def test_the_readme_serves_what_it_calls(folder: Path, server: LiveServer) -> None:
    """Its blocks name one model throughout and leave the server running; its Python works."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    packed = re.findall(r"nnunet-torchserve archive .*--name (\S+)", "\n".join(blocks))
    assert {*packed, *re.findall(r"/predictions/(\w+)", text), *re.findall(r"--model (\w+)", text)} == {"brain"}
    assert not re.search(r"^nnunet-torchserve stop", "\n".join(blocks), re.MULTILINE)
    [script] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    here = script.replace(
        "http://127.0.0.1:8080/predictions/brain", f"{server.server.inference_url}/predictions/five_folds"
    )
    assert here != script
    done = subprocess.run([sys.executable, "-c", here], cwd=folder, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    check("labels.nii.gz", (folder / "labels.nii.gz").read_bytes(), folder)


def check(name: str, body: bytes, folder: Path) -> None:
    """The answer is what its name says, on the image's grid."""
    if name.endswith(".nii.gz"):
        assert nib.Nifti1Image.from_bytes(gzip.decompress(body)).shape == SHAPE
    elif name.endswith((".nrrd", ".mha")):
        assert sitk.ReadImage(str(folder / name)).GetSize() == SHAPE
    elif name.endswith(".zip"):
        parts = zipfile.ZipFile(io.BytesIO(body))
        parts.extractall(folder)
        for part in parts.namelist():
            check(part, parts.read(part), folder)
    elif name.endswith(".json"):
        assert json.loads(body)
    else:
        assert body
