"""``nnunet-torchserve predict``: what it asks a server for, what it leaves in a folder, and what it says."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nnunet_torchserve_client.credentials import TOKEN_VARIABLE
from nnunet_torchserve_client.events import Event, Kind
from nnunet_torchserve_client.progress import LINE_EVERY_S, watched
from nnunet_torchserve_tools import predict
from nnunet_torchserve_tools.errors import ToolError, UsageError
from support import peer
from support.chaos import wait_for
from support.peer import DESCRIPTION, Peer, Received, Wire

ENDING = ".nii.gz"
BLOBS = ["-d", "901", "-c", "3d_fullres"]
"""As the tests' model was trained."""

SIDE_FILES = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four cases, named as people name them."""
    folder = tmp_path / "Köpfe von heute"
    folder.mkdir()
    for name in ("Müller groß", "a", "b", "c"):
        (folder / f"{name}_0000{ENDING}").write_bytes(f"image of {name}".encode())
    return folder


@pytest.fixture
def call(server: Peer, images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Predict the folder with further arguments; where the predictions are."""

    def run(*more: str, output: str = "out", model: str | None = "blobs", source: Path = images) -> Path:
        named = [] if model is None else ["--model", model]
        predict.run(["-i", str(source), "-o", str(tmp_path / output), "--server", server.url, *named, *more])
        return tmp_path / output

    return run


def written(folder: Path) -> dict[str, bytes]:
    """The label maps, by case."""
    return {file.name.removesuffix(ENDING): file.read_bytes() for file in folder.glob(f"*{ENDING}")}


def served(name: str, **changes: object) -> dict[str, object]:
    names = ("version", "dataset", "trainer", "plans", "configuration", "folds", "checkpoint", "digest")
    return {"name": name, **{each: DESCRIPTION[each] for each in names}, **changes}


def by_content(replies: Mapping[bytes, peer.Reply]) -> peer.Reply:
    """Another reply for some images."""

    def reply(wire: Wire, received: Received) -> None:
        replies.get(received.body, peer.echo)(wire, received)

    return reply


# --- Folder in, folder out -------------------------------------------------------------------------------------------


def test_every_case_gets_its_file_and_the_folder_nnunets_side_files(call: Callable[..., Path], server: Peer) -> None:
    out = call("-f", "0", "1", "--disable_tta", "-step_size", "0.75")
    assert written(out) == {name: f"image of {name}".encode() for name in ("Müller groß", "a", "b", "c")}
    assert {file.name for file in out.iterdir()} == SIDE_FILES | {f"{name}{ENDING}" for name in written(out)}
    options = server.received[0].options
    assert (options["folds"], options["use_mirroring"], options["tile_step_size"]) == ([0, 1], False, 0.75)
    assert (options["priority"], options["output_format"]) == ("batch", "nii.gz")


def test_what_is_there_is_left_out_if_that_is_wished(call: Callable[..., Path], server: Peer) -> None:
    out = call()
    (out / f"b{ENDING}").unlink()
    (out / f"c{ENDING}").write_bytes(b"kept")
    call("--continue_prediction")
    assert [received.body for received in server.received[4:]] == [b"image of b"]
    assert written(out)["c"] == b"kept"
    call("--c")
    call("--continue_p")  # argparse takes what is unambiguous, as nnU-Net's commands do
    assert len(server.received) == 5
    call()
    assert written(out)["c"] == b"image of c"


def test_parts_are_nnunets_and_write_no_file_of_each_other(call: Callable[..., Path], server: Peer) -> None:
    out = call("-num_parts", "3", "-part_id", "1")
    assert set(written(out)) == {"a"}
    before = {file: file.stat() for file in out.iterdir()}
    call("-num_parts", "3", "-part_id", "0")
    call("-num_parts", "3", "-part_id", "2")
    assert set(written(out)) == {"Müller groß", "a", "b", "c"}
    assert len(server.received) == 4
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in before} == {
        file: (stat.st_mtime_ns, stat.st_ino) for file, stat in before.items()
    }
    assert json.loads((out / "predict_from_raw_data_args.json").read_text())["num_parts"] == 3


def test_the_same_folder_with_another_model_gets_that_ones_side_files(call: Callable[..., Path], server: Peer) -> None:
    call("-num_parts", "2", "-part_id", "0")
    server.description = {**DESCRIPTION, "plans_json": {"plans_name": "other"}}
    out = call("-num_parts", "2", "-part_id", "1")
    assert json.loads((out / "plans.json").read_text()) == {"plans_name": "other"}


def test_a_part_without_cases_is_done(call: Callable[..., Path]) -> None:
    assert written(call("-num_parts", "9", "-part_id", "8")) == {}


def test_channels_are_files_of_their_own(call: Callable[..., Path], server: Peer, tmp_path: Path) -> None:
    server.description = {**DESCRIPTION, "channels": {"0": "T1", "1": "T2"}}
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a_0000", "a_0001", "b_0001", "c_0000", "c_0001", "c_0002"):
        (folder / f"{name}{ENDING}").write_bytes(name.encode())
    server.replies = [by_content({b"b_0001": peer.problem(422, "wrong_channels")})]
    with pytest.raises(ToolError) as caught:
        call(source=folder)
    assert caught.value.exit_code == 1
    assert set(written(tmp_path / "out")) == {"a"}
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())["failed"]
    assert [each["case"] for each in failed] in (["c", "b"], ["b", "c"])
    assert f"missing: b_0000{ENDING} (T1)" in str(caught.value)
    assert "3 of this case" in str(caught.value)


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_cases_that_fail_are_listed_and_the_others_are_predicted(
    call: Callable[..., Path], server: Peer, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / f"b_0000{ENDING}").write_bytes(b"")
    server.replies = [by_content({b"image of a": peer.problem(415, "unknown_format")})]
    with pytest.raises(ToolError, match=r"2 of \d cases failed") as caught:
        call()
    assert caught.value.exit_code == 1
    assert set(written(tmp_path / "out")) == {"Müller groß", "c"}
    listed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert {each["case"]: each["error"] for each in listed["failed"]} == {"a": "UnknownFormat", "b": "UnreadableFile"}
    assert {each["request_id"] for each in listed["failed"]} == {"server-7", None}
    assert "2 of 4 cases predicted" in capsys.readouterr().out
    (images / f"b_0000{ENDING}").write_bytes(b"image of b")
    server.replies = [peer.echo]
    call("--continue_prediction")
    assert not (tmp_path / "out" / "failed.json").exists()
    assert len(written(tmp_path / "out")) == 4


def test_an_interrupted_call_leaves_whole_files_and_is_continued(
    call: Callable[..., Path], server: Peer, tmp_path: Path
) -> None:
    def interrupt(wire: Wire, received: Received) -> None:
        wire.head()
        wire.event(event="progress", stage="network", done=1, total=2)
        wait_for(lambda: written(out) != {})
        for number in once:
            os.kill(os.getpid(), number)
        over.wait(300)

    out, over = tmp_path / "out", threading.Event()
    once = iter([signal.SIGTERM])  # another case may be on its way by then
    server.replies = [peer.echo, interrupt]
    with pytest.raises(ToolError, match="because of an interrupt"):
        call()
    over.set()
    assert written(out) == {"Müller groß": "image of Müller groß".encode()}
    assert {file.name for file in out.iterdir()} == SIDE_FILES | {f"Müller groß{ENDING}", "failed.json"}
    assert json.loads((out / "failed.json").read_text())["not_predicted"] == ["a", "b", "c"]
    server.replies = [peer.echo]
    call("--continue_prediction")
    assert len(written(out)) == 4
    assert [each.body for each in server.received].count("image of Müller groß".encode()) == 1


def test_a_full_disk_ends_the_call_and_loses_nothing_that_was_written(
    server: Peer, images: Path, tmp_path: Path
) -> None:
    (images / f"b_0000{ENDING}").write_bytes(bytes(500_000))
    server.description = {**DESCRIPTION, "limits": {}}

    def fill(wire: Wire, received: Received) -> None:
        wait_for(lambda: written(tmp_path / "out").keys() >= {"Müller groß", "a"})
        peer.echo(wire, received)

    server.replies = [by_content({bytes(500_000): fill})]
    limited = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["nnunet-torchserve", "predict", *{["-i", str(images), "-o", str(tmp_path / "out"), "--model", "blobs"]}]
from nnunet_torchserve_tools.console import main
main()
"""
    environment = {**os.environ, "NNUNET_TORCHSERVE_URL": server.url, TOKEN_VARIABLE: "s3cret"}
    command = [sys.executable, "-c", limited]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    listed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert [each["case"] for each in listed["failed"]] == ["b"]
    there = written(tmp_path / "out")
    assert {"Müller groß", "a"} <= set(there) <= {"Müller groß", "a", "c"}
    assert all(content == f"image of {name}".encode() for name, content in there.items())
    assert listed["not_predicted"] == sorted({"c"} - set(there))  # it may have been on its way
    assert not [file for file in (tmp_path / "out").iterdir() if b"s3cret" in file.read_bytes()]
    assert not list((tmp_path / "out").glob(".*"))
    assert {received.headers["authorization"] for received in server.received} == {"Bearer s3cret"}


def not_found(wire: Wire, _: Received) -> None:
    wire.whole(404, b'{"code": 404, "type": "ModelNotFoundException", "message": "Model not found: blobs"}')


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [(peer.plain(401), 1, "credentials"), (peer.plain(403), 1, "credentials"), (not_found, 2, "Model not found")],
)
def test_what_would_fail_for_every_case_ends_the_call_at_once(
    reply: peer.Reply, code: int, words: str, call: Callable[..., Path], server: Peer, tmp_path: Path
) -> None:
    server.description, server.replies = None, [reply]
    with pytest.raises(ToolError, match=words) as caught:
        call()
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()
    server.description = dict(DESCRIPTION)
    with pytest.raises(ToolError, match="3 were not predicted"):  # the same in the middle
        call()
    assert not written(tmp_path / "out")


def test_no_server(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-i", str(images), "-o", str(tmp_path / "out"), "--model", "blobs"]
    with pytest.raises(ToolError, match="no connection") as caught:
        predict.run([*arguments, "--server", "http://127.0.0.1:1", "--first-contact", "0.1"])
    assert caught.value.exit_code == 1
    monkeypatch.delenv("NNUNET_TORCHSERVE_URL", raising=False)
    with pytest.raises(UsageError, match="NNUNET_TORCHSERVE_URL"):
        predict.run(arguments)


def test_an_output_folder_that_cannot_be_made(call: Callable[..., Path], server: Peer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ToolError, match="cannot be made") as caught:
        call(output="file/out")
    assert caught.value.exit_code == 1
    assert not server.received


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-prev_stage_predictions", "x"], "no cascade"),
        (["-step_size", "1.5"], "0.05 to 1"),
        (["-f", "zero"], "numbers, or all"),
        (["-f", "7"], "without 7"),
        (["-num_parts", "2", "-part_id", "2"], "numbered from 0 to 1"),
        (["-chk", "checkpoint_best.pth"], "checkpoint checkpoint_final.pth, not checkpoint_best.pth"),
        (["-d", "5", "-c", "2d"], "dataset Dataset901_Blobs, not 5"),
        (["-d", "5", "-m", "x"], "give one of them"),
        (["--server", "host:80"], "http"),
        (["--verify", "/nowhere.pem"], "no file of certificate authorities"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_sent(
    more: list[str], words: str, call: Callable[..., Path], server: Peer, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        call(*more)
    assert not server.received
    assert not (tmp_path / "out").exists()


def test_wrong_folders(call: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        call(source=tmp_path / "nowhere")
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "a_0000.nrrd").touch()
    with pytest.raises(UsageError, match=r"no file that ends in .nii.gz.*it has 1 .nrrd"):
        call(source=tmp_path / "slices")
    (tmp_path / "dicom").mkdir()
    for number in range(10):
        (tmp_path / "dicom" / f"1.2.{number}.dcm").touch()
    with pytest.raises(UsageError, match=r"it has 1 [^,]*(, 1 [^,]*){4}, …; a DICOM series is sent as a zip"):
        call(source=tmp_path / "dicom")
    assert not (tmp_path / "out").exists()


def test_a_misspelt_argument_is_wrong_use(call: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit) as caught:
        call("--save_propabilities")
    assert caught.value.code == 2


# --- Which model -----------------------------------------------------------------------------------------------------


def test_the_model_is_found_by_what_it_was_made_of(
    call: Callable[..., Path], server: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.description = {
        **DESCRIPTION,
        "served": [served("other", configuration="2d", digest="sha256:2"), served("brain", version="1.0")],
    }
    call("-d", "Dataset901_Blobs", "-c", "3d_fullres", model=None)
    assert server.paths[0] == "/predictions/Dataset901_Blobs_3d_fullres"
    assert set(server.paths[1:]) == {"/predictions/brain/1.0"}
    (tmp_path / "raw" / "Dataset901_Blobs").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    call(*BLOBS, model=None)
    call("-m", "/not/here/Dataset901_Blobs/nnUNetTrainer__nnUNetPlans__3d_fullres", model=None)
    assert {received.options["folds"] is not None for received in server.received} == {True}
    assert len(server.received) == 12


def test_a_trained_model_folder_says_which_model(
    call: Callable[..., Path], server: Peer, models: dict[str, Path], tmp_path: Path
) -> None:
    server.description = {**DESCRIPTION, "served": [served("brain")]}
    call("-m", f"{models['five_folds']}/", "-f", "0", model=None)
    (tmp_path / "file").touch()
    call("-m", f"{tmp_path}/file/Dataset901_Blobs/nnUNetTrainer__nnUNetPlans__3d_fullres", "-f", "0", model=None)
    assert len(server.received) == 8
    with pytest.raises(UsageError, match="no served model is of dataset Dataset902_BlobsFlat"):
        call("-m", str(models["flat"]), model=None)
    with pytest.raises(UsageError, match="TRAINER__PLANS__CONFIGURATION"):
        call("-m", str(tmp_path), model=None)


def test_more_than_one_that_fits_is_not_guessed(call: Callable[..., Path], server: Peer) -> None:
    two = [served("first"), served("second", digest="sha256:2", folds=[0, 1, 2])]
    server.description = {**DESCRIPTION, "served": two}
    by_name = ["-d", "Dataset901_Blobs", "-c", "3d_fullres"]
    with pytest.raises(UsageError, match=r"more than one .*first 1.0.*second 1.0.*--model"):
        call(*by_name, model=None)
    call(*by_name, "-f", "2", "--continue_prediction", model=None)
    assert server.paths[-1] == "/predictions/second/1.0"
    with pytest.raises(UsageError, match=r"no served model.*with folds 9"):
        call(*by_name, "-f", "9", model=None)


def test_a_model_is_found_by_the_trainer_of_its_folder_and_by_that_of_its_checkpoints(
    call: Callable[..., Path], server: Peer
) -> None:
    """nnU-Net's commands look for a folder; checkpoints may name the trainer whose network they hold."""
    ours = served("ours", folder_trainer="nnUNetTrainerMine")
    by_name = ["-d", "Dataset901_Blobs", "-c", "3d_fullres", "--continue_prediction"]
    server.description = {**DESCRIPTION, "served": [ours]}
    for asked in (["-tr", "nnUNetTrainerMine"], ["-tr", "nnUNetTrainer"], []):
        call(*by_name, *asked, model=None)
        assert server.paths[-1] == "/predictions/ours/1.0"
    with pytest.raises(
        UsageError, match=r"no served model is of .*Other, .*nnUNetTrainerMine__nnUNetPlans__3d_fullres"
    ):
        call(*by_name, "-tr", "nnUNetTrainerOther", model=None)
    stocks = served("stocks", digest="sha256:2", folder_trainer="nnUNetTrainer")
    server.description = {**DESCRIPTION, "served": [ours, stocks]}
    for trainer, name in (("nnUNetTrainerMine", "ours"), ("nnUNetTrainer", "stocks")):
        call(*by_name, "-tr", trainer, model=None)
        assert server.paths[-1] == f"/predictions/{name}/1.0"


def test_a_dataset_that_nobody_can_name(call: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"nobody here knows the name of dataset 901.*--model"):
        call(*BLOBS, model=None)
    with pytest.raises(UsageError, match="which model"):
        call(model=None)
    with pytest.raises(UsageError, match="-d needs -c"):
        call("-d", "1", model=None)


def test_folds_are_nnunets_five_or_what_there_is(
    call: Callable[..., Path], server: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    call()
    assert server.received[-1].options["folds"] == [0, 1]
    assert "all folds that are served: 0, 1" in capsys.readouterr().err
    server.description = {**DESCRIPTION, "folds": [0, 1, 2, 3, 4, 5]}
    call("-npp", "2", "-device", "cuda")
    assert server.received[-1].options["folds"] == [0, 1, 2, 3, 4]
    assert "-npp, -device: the server decides" in capsys.readouterr().err


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_the_summary_is_for_people_or_for_a_program(
    call: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call("--json", "--disable_progress_bar")
    said = capsys.readouterr()
    summary: dict[str, Any] = json.loads(said.out)
    assert (summary["cases"], summary["done"], summary["failed"], summary["interrupted"]) == (4, 4, [], False)
    assert {"transfer", "write"} <= summary["stage_seconds"].keys()
    assert "done after" not in said.err
    call()
    said = capsys.readouterr()
    assert "4 of 4 cases predicted in" in said.out
    assert "Müller groß: done after" in said.err


def test_what_another_backend_answered_is_said(
    call: Callable[..., Path], server: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mask in a folder has no header: whoever takes it for nnU-Net's own must have been told."""

    def other(wire: Wire, received: Received) -> None:
        wire.head()
        backend = "eager" if received.body.endswith(b"of a") else "openvino:float32"
        said = backend if backend == "eager" else f"{backend}; dice=0.9989"
        wire.result(received.body, None, **{"X-Nnunet-Backend": said})
        wire.chunk(b"")

    server.replies = [other]
    call("--json", "--disable_progress_bar")
    assert json.loads(capsys.readouterr().out)["other_backends"] == {"openvino:float32": 3}
    call(output="again")
    assert "openvino:float32 ran the network of 3 cases: a voxel may differ" in capsys.readouterr().out


def test_a_terminal_shows_each_case_in_flight_and_its_place() -> None:
    text = io.StringIO()
    with watched("all", 3, Console(file=text, force_terminal=True, width=110)) as watcher:
        watcher.event(Event("[red]odd\x1b[0m", Kind.QUEUED, position=3))
        watcher.event(Event("b", Kind.PROGRESS, stage="network", done=4, total=16))
        watcher.event(Event("b", Kind.HEARTBEAT))
        watcher.event(Event("c", Kind.ANSWERED))
        watcher.one_done()
        watcher.line("a line")
        watcher._progress.refresh()  # type: ignore[attr-defined]
    shown = text.getvalue()
    assert "[red]odd?[0m" in shown
    assert "waits for memory, 3 before it" in shown
    assert "network 4/16" in shown
    assert "1/3" in shown
    assert "a line" in shown


def test_a_log_gets_lines_and_now_and_then_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = io.StringIO(), [0.0]
    monkeypatch.setattr("nnunet_torchserve_client.progress.time.monotonic", lambda: now[0])
    with watched("all", 3, Console(file=text)) as watcher:
        watcher.event(Event("b", Kind.PROGRESS, stage="network", done=4, total=16))
        assert not text.getvalue()
        now[0] += LINE_EVERY_S
        watcher.event(Event("b", Kind.HEARTBEAT))
    assert text.getvalue() == "0 of 3 done; b network 25 %\n"
