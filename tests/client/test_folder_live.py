"""``nnunet-torchserve predict`` and ``list`` on a live server, beside nnU-Net's own commands on the same folders."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

from nnunet_torchserve_tools import predict
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.list_models import Listed, Listing
from support import stock
from support.chaos import wait_for
from support.predictions import assert_same_files, read, write_heads
from support.server import LiveServer

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENDING = ".nii.gz"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(tmp_path_factory.mktemp("images with ümlauts"))


@pytest.fixture(scope="module")
def ours(server: LiveServer, models: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command leaves."""
    folder = tmp_path_factory.mktemp("ours") / "predictions"
    arguments = ["-i", str(images), "-o", str(folder), "-f", "0", "1", "--disable_tta", "--save_probabilities"]
    model = ["--model", "five_folds", "-m", str(models["five_folds"])]
    predict.run([*arguments, *model, "--server", server.server.inference_url])
    return folder


@pytest.mark.parametrize("command", ["predict_entry_point", "predict_entry_point_modelfolder"])
def test_arguments_are_spelt_as_those_of_nnunets_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[argparse.ArgumentParser] = []

    def end(parser: argparse.ArgumentParser) -> NoReturn:
        theirs.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", end)
    with pytest.raises(KeyboardInterrupt):
        getattr(predict_from_raw_data, command)()
    known = spelt(predict.parser())
    wanted = spelt(theirs[0])
    assert wanted.keys() - known.keys() == set()
    assert {name: known[name] for name in wanted} == wanted
    assert {"-i", "-f", "-num_parts" if command == "predict_entry_point" else "-m"} <= wanted.keys()


def spelt(parser: argparse.ArgumentParser) -> dict[str, tuple[object, ...]]:
    """Arguments by each spelling: how many values they take, and of which type."""
    each = [(name, action) for action in parser._actions for name in action.option_strings]
    return {name: (type(action), action.nargs, action.type or str, action.dest) for name, action in each}


def test_the_folder_is_stocks_and_nnunet_ensembles_it(
    ours: Path, models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    predictor = stock.loaded(models["five_folds"], folds=[0, 1], use_mirroring=False)
    predictor.predict_from_files_sequential(str(images), str(tmp_path / "theirs"), True)
    assert_same_files(tmp_path / "theirs", ours)
    writer = predictor.plans_manager.image_reader_writer_class()
    for name, folder in (("of theirs", tmp_path / "theirs"), ("of ours", ours)):
        files = [str(folder / "b.npz")] * 2
        merge_files(files, str(tmp_path / name), ENDING, writer, predictor.label_manager)
    assert read(tmp_path / f"of theirs{ENDING}") == read(tmp_path / f"of ours{ENDING}") == read(ours / f"b{ENDING}")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(each) for each in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_paths(text: str, folder: Path) -> Any:
    return json.loads(text.replace(str(folder), "FOLDER"))


@pytest.mark.long
def test_nnunets_commands_make_the_same_of_our_folder_and_of_stocks(
    ours: Path, models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """Both folders come from the command line: nnU-Net's is that of nnUNetv2_predict_from_modelfolder."""
    theirs = tmp_path / "theirs"
    arguments: list[str | Path] = ["-i", images, "-o", theirs, "-f", "0", "1", "--disable_tta", "--save_probabilities"]
    run(BIN / "nnUNetv2_predict_from_modelfolder", *arguments, "-m", models["five_folds"], "-device", "cpu")
    assert_same_files(theirs, ours)
    stocks = json.loads((theirs / "predict_from_raw_data_args.json").read_text())
    assert stocks.keys() == json.loads((ours / "predict_from_raw_data_args.json").read_text()).keys()

    reference = tmp_path / "reference"
    reference.mkdir()
    for file in theirs.glob(f"*{ENDING}"):
        (reference / file.name).write_bytes(file.read_bytes())
    postprocessing = tmp_path / "postprocessing.pkl"
    largest = ([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": [1, 2]}])
    postprocessing.write_bytes(pickle.dumps(largest))
    made = {}
    for name, folder in (("theirs", theirs), ("ours", ours)):
        ensemble, processed = tmp_path / f"{name} ensemble", tmp_path / f"{name} processed"
        run(BIN / "nnUNetv2_ensemble", "-i", folder, folder, "-o", ensemble, "-np", "1", "--save_npz")
        run(
            BIN / "nnUNetv2_apply_postprocessing",
            "-i",
            folder,
            "-o",
            processed,
            "-pp_pkl_file",
            postprocessing,
            "-np",
            "1",
        )
        summary = tmp_path / f"{name}.json"
        files: list[str | Path] = ["-djfile", folder / "dataset.json", "-pfile", folder / "plans.json"]
        run(BIN / "nnUNetv2_evaluate_folder", reference, folder, *files, "-o", summary, "-np", "1")
        made[name] = (ensemble, processed, without_paths(summary.read_text(), folder))
    for place in range(2):
        assert_same_files(made["theirs"][place], made["ours"][place])
        assert len(list(made["ours"][place].glob(f"*{ENDING}"))) == 2
    assert made["theirs"][2] == made["ours"][2]
    assert made["ours"][2]["foreground_mean"]["Dice"] == 1


# --- list ------------------------------------------------------------------------------------------------------------


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(["list", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_model_knows_the_others(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.server.inference_url, "--model", "flat"]
    shown = json.loads(listed(capsys, *address, "--json"))
    models = {each["name"]: each for each in shown["models"]}
    assert set(models) == set(server.server.models)
    assert models["regions"]["channels"] == {"0": "first", "1": "second"}
    assert models["five_folds"]["labels"] == {"background": 0, "low": 1, "middle": 2, "high": 3}
    assert (models["flat"]["configuration"], models["flat"]["folds"]) == ("2d", [0])
    assert models["flat"]["workers"] is None
    assert "workers and requests in hand: --management-url or --state-dir" in shown["not_seen"]
    text = listed(capsys, *address)
    assert "Dataset902_BlobsFlat, nnUNetTrainer__nnUNetPlans__2d, folds 0, checkpoint_final.pth" in text
    assert "not seen: workers" in text


def test_the_management_port_and_the_state_directory_have_the_workers(
    server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    managed = json.loads(listed(capsys, "--management-url", server.server.management_url, "--json"))
    flat = {each["name"]: each for each in managed["models"]}["flat"]
    assert (flat["workers"], flat["requests_queued"], flat["is_default"]) == ({"READY": 1}, 0, True)
    assert (flat["labels"]["high"], flat["cases_held"]) == (3, None)
    assert managed["not_seen"] == ["cases that workers have: --state-dir, on the server's machine"]
    idle = "workers: 1 READY; requests: 0 in the queue, 0 with workers"

    def all_are_idle() -> bool:
        """A case that has ended is told of a little later."""
        whole = listed(capsys, "--state-dir", str(server.state_dir))
        assert "not seen" not in whole
        return whole.count(idle) == len(server.server.models)

    wait_for(all_are_idle)


def test_a_cascade_that_did_not_describe_itself_is_listed_without_members() -> None:
    cascade = {"kind": "cascade", "first": None, "member": "3d_cascade_fullres"}
    [name, made_of] = Listing([Listed("second", "1.0", dataset="Dataset950_Odd", recipe=cascade)]).lines()
    assert (name, made_of) == ("second 1.0", "  Dataset950_Odd, labels that a request brings, then 3d_cascade_fullres")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "URL"], "no list of models"),
        (["--server", "URL", "--model", "nobody"], "nobody"),
        (["--management-url", "URL"], "management port (8081) does: HTTP 404"),
        (["--state-dir", "/nowhere"], "no server of /nowhere is running"),
    ],
)
def test_what_cannot_be_listed_is_said(
    arguments: list[str], words: str, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code = app(
        ["list", *(each.replace("URL", server.server.inference_url) for each in arguments)], standalone_mode=False
    )
    assert code in (1, 2)
    assert words in capsys.readouterr().err


# --- The pages -------------------------------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """The commands of a page, each on one line."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line.startswith("nnunet-torchserve ")]


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """Where the pages' commands are run."""
    (tmp_path / "imagesTs").symlink_to(images)
    return tmp_path


@pytest.mark.parametrize("page", ["predict.md", "folder.md"])
def test_the_commands_of_the_pages_work(
    page: str, folder: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NNUNET_TORCHSERVE_URL", server.server.inference_url)
    found = commands(page)
    assert len(found) > 2
    here = {
        "http://127.0.0.1:8080": server.server.inference_url,
        "http://127.0.0.1:8081": server.server.management_url,
        "Dataset501_BrainTissue": "Dataset901_Blobs",
        "brain": "five_folds",
        ".nnunet-torchserve": str(server.state_dir),
        '"': "",
    }
    for command in found:
        arguments = functools.reduce(lambda text, pair: text.replace(*pair), here.items(), command).split()[1:]
        assert not app(arguments, standalone_mode=False), command
    capsys.readouterr()
    assert len(list(folder.glob(f"predictions/*{ENDING}"))) == 2
