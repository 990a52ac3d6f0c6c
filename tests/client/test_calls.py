"""Calls of several cases: what one bad case, a changed model or a full disk does to the others."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_torchserve_client import Case, Client, RemotePredictor, errors
from nnunet_torchserve_client.events import Event, Kind
from support import peer
from support.peer import DESCRIPTION, Peer, Received, Wire

PATIENCE_S = 120.0
SPACING = {"spacing": [1.0, 1.0, 1.0]}


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


@pytest.fixture
def predictor(server: Peer) -> Iterator[RemotePredictor]:
    with RemotePredictor(server.url, "blobs") as predictor:
        yield predictor


def labels_by(digest: str) -> peer.Reply:
    """What was sent, as labels, from the model with this digest."""

    def reply(wire: Wire, received: Received) -> None:
        file = io.BytesIO()
        np.savez(file, labels=np.load(io.BytesIO(received.body))[0].astype(np.uint8))
        wire.head()
        wire.result(file.getvalue(), None, **{"X-Nnunet-Model": f"name=blobs; version=1.0; digest={digest}"})
        wire.chunk(b"")

    return reply


def item(value: int, target: str | None = None, properties: object = None) -> dict[str, Any]:
    known = SPACING if properties is None else properties
    return {"data": np.full((1, 2, 3, 4), value, np.uint8), "data_properties": known, "ofile": target}


def values(results: list[Any]) -> list[int | None]:
    return [None if each is None else int(each.max()) for each in results]


# --- The model is another one now ------------------------------------------------------------------------------------


def upgraded(server: Peer, **changes: object) -> None:
    server.description = {**DESCRIPTION, "digest": "sha256:2", **changes}
    server.replies = [labels_by("sha256:2")]


def test_after_an_upgrade_one_call_fails_and_the_next_is_the_new_models(
    server: Peer, predictor: RemotePredictor
) -> None:
    server.replies = [labels_by("sha256:1")]
    assert values(predictor.predict_from_data_iterator([item(3)])) == [3]
    upgraded(server)
    with pytest.raises(errors.WrongModel, match="the server has changed"):
        predictor.predict_from_data_iterator([item(4)])
    assert values(predictor.predict_from_data_iterator([item(5)])) == [5]
    assert predictor.predict_single_npy_array(item(6)["data"], SPACING).max() == 6
    assert (predictor.description.digest, server.described) == ("sha256:2", 2)


def test_what_was_done_before_an_upgrade_is_not_lost(server: Peer, predictor: RemotePredictor) -> None:
    """The third case is answered by another model, once the outcomes of the first two are there."""
    done = threading.Semaphore(0)
    predictor.client.predict_many = counted(predictor.client.predict_many, done)  # type: ignore[method-assign]

    def another(wire: Wire, received: Received) -> None:
        for _ in range(2):
            assert done.acquire(timeout=PATIENCE_S)
        labels_by("sha256:2")(wire, received)

    server.replies = [by_value({3: another})]
    with pytest.raises(errors.WrongModel) as caught:
        predictor.predict_from_data_iterator([item(1), item(2), item(3)])
    assert values(caught.value.results) == [1, 2, None]


def by_value(replies: dict[int, peer.Reply]) -> peer.Reply:
    """Another reply for images of some value."""

    def reply(wire: Wire, received: Received) -> None:
        value = int(np.load(io.BytesIO(received.body)).max())
        replies.get(value, labels_by("sha256:1"))(wire, received)

    return reply


def counted(predict_many: Any, done: threading.Semaphore) -> Any:
    """It tells of each outcome when the next one is asked for."""

    def predict(*arguments: Any, **options: Any) -> Iterator[Any]:
        for outcome in predict_many(*arguments, **options):
            yield outcome
            done.release()

    return predict


def test_an_upgraded_model_is_held_against_the_folder_again(
    server: Peer, predictor: RemotePredictor, tmp_path: Path
) -> None:
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    folder.mkdir()
    (folder / "dataset.json").write_text("{}")
    (folder / "plans.json").write_text('{"dataset_name": "Dataset901_Blobs", "plans_name": "nnUNetPlans"}')
    predictor.initialize_from_trained_model_folder(folder, (0,))
    upgraded(server, dataset="Dataset999_Other")
    with pytest.raises(errors.WrongModel, match="the server has changed"):
        predictor.predict_from_data_iterator([item(1)])
    with pytest.raises(errors.WrongModel, match="dataset Dataset999_Other, not Dataset901_Blobs"):
        predictor.predict_from_data_iterator([item(1)])
    assert len(server.received) == 1
    upgraded(server)
    assert values(predictor.predict_from_data_iterator([item(1)])) == [1], "the folder's model is back"


def test_a_server_that_takes_more_now_is_asked_how_much(server: Peer) -> None:
    with Client(server.url, "blobs") as client:
        with pytest.raises(errors.BodyTooLarge, match="at most 1000"):
            client.predict(Case("head", bytes(2000)))
        server.description = {**DESCRIPTION, "limits": {"body_bytes": 3000}}
        assert len(client.predict(Case("head", bytes(2000))).content) == 2000


def test_sequential_results_are_not_lost_either(server: Peer, predictor: RemotePredictor, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}_0000.nii.gz" for name in "ab"]
    for file in files:
        file.write_bytes(array_file(int(file.name[0] == "b") + 1))
    server.replies = [labels_by("sha256:1"), labels_by("sha256:2")]
    with pytest.raises(errors.WrongModel) as caught:
        predictor.predict_from_files_sequential([[str(file)] for file in files], None)
    assert values(caught.value.results) == [1]


def array_file(value: int) -> bytes:
    file = io.BytesIO()
    np.save(file, item(value)["data"])
    return file.getvalue()


# --- One bad case ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"data_properties": {}}, errors.MissingProperty),
        ({"data_properties": None}, errors.WrongUse),
        ({"data_properties": {"spacing": [0, 1, 1]}}, errors.WrongUse),
        ({"data": np.zeros((2, 3, 4))}, errors.WrongUse),
        ({"data": "/nowhere/image.npy"}, errors.UnreadableFile),
        ({"ofile": 7}, errors.WrongUse),
        ({"ofile": "/nowhere/case"}, errors.MissingProperty),
    ],
)
def test_one_bad_array_fails_alone(
    bad: dict[str, Any], error: type[errors.ClientError], server: Peer, predictor: RemotePredictor
) -> None:
    server.replies = [labels_by("sha256:1")]
    items = [item(1), {**item(2), **bad}, item(3)]
    with pytest.raises(errors.CasesFailed, match=r"1 of 3 cases failed: (image 1|case): ") as caught:
        predictor.predict_from_data_iterator(items)
    assert [type(each) for each in caught.value.failures] == [error]
    assert values(caught.value.results) == [1, None, 3]
    assert len(server.received) == 2
    with pytest.raises(error):
        predictor.predict_from_data_iterator([items[1]])


def test_an_item_without_an_image_fails_alone(server: Peer, predictor: RemotePredictor) -> None:
    server.replies = [labels_by("sha256:1")]
    with pytest.raises(errors.CasesFailed, match="no data and no ofile") as caught:
        predictor.predict_from_data_iterator([{"data_properties": SPACING}, item(3)])
    assert values(caught.value.results) == [None, 3]


def test_what_holds_for_every_item_ends_the_call_at_once(server: Peer, predictor: RemotePredictor) -> None:
    items = iter([item(1, properties={**SPACING, "bbox_used_for_cropping": []}), item(2)])
    with pytest.raises(errors.PreprocessedInput):
        predictor.predict_from_data_iterator(items)
    assert len(list(items)) == 1, "the second was not taken"


def test_a_broken_json_beside_one_stack_fails_that_one(server: Peer, tmp_path: Path) -> None:
    server.description = {**DESCRIPTION, "reader": "Tiff3DIO", "dataset_json": {"file_ending": ".tif"}}
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}_0000.tif").write_bytes(name.encode())
        (tmp_path / "in" / f"{name}.json").write_text('{"spacing": [3, 2, 1]}')
    (tmp_path / "in" / "b.json").write_text("{")
    with RemotePredictor(server.url, "blobs") as predictor:
        with pytest.raises(errors.CasesFailed, match=r"1 of 3 cases failed: b: .*b\.json") as caught:
            predictor.predict_from_files(tmp_path / "in", tmp_path / "out")
        assert isinstance(caught.value.failures[0], errors.UnreadableFile)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.tif")) == ["a.tif", "c.tif"]
    assert [request.options["spacing"] for request in server.received] == [[1.0, 2.0, 3.0]] * 2


# --- The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_ends_the_call(
    number: int, server: Peer, predictor: RemotePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for case in range(100):
        (tmp_path / "in" / f"{case:02d}_0000.nii.gz").write_bytes(b"image")
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if "03.nii.gz" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(errors.UnwritableFile, match=rf"03: .*03\.nii\.gz cannot be written: {os.strerror(number)}"):
        predictor.predict_from_files(tmp_path / "in", tmp_path / "out")
    assert len(server.received) < 100
    assert {file.name for file in (tmp_path / "out").glob(".*")} == set()


def test_a_folder_that_is_not_there_fails_its_own_case(
    server: Peer, predictor: RemotePredictor, tmp_path: Path
) -> None:
    files = []
    for name in "abc":
        files.append([str(tmp_path / f"{name}_0000.nii.gz")])
        Path(files[-1][0]).write_bytes(b"image")
    targets = [str(tmp_path / "a"), str(tmp_path / "nowhere" / "b"), str(tmp_path / "c")]
    with pytest.raises(errors.CasesFailed, match="1 of 3 cases failed: b: "):
        predictor.predict_from_files(files, targets)
    assert (tmp_path / "c.nii.gz").exists()


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_the_part_after_the_last_is_what_it_is_in_nnunet(
    server: Peer, predictor: RemotePredictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """nnU-Net's method lets part_id be num_parts, and cuts as for any other."""
    (tmp_path / "in").mkdir()
    for name in "abcde":
        (tmp_path / "in" / f"{name}_0000.nii.gz").write_bytes(b"image")
    assert predictor.predict_from_files(tmp_path / "in", tmp_path / "five", num_parts=5, part_id=5) is None
    assert not list((tmp_path / "five").glob("*.nii.gz"))
    assert (tmp_path / "five" / "plans.json").exists()
    assert "counts them from 0" in caplog.text
    assert predictor.predict_from_files(tmp_path / "in", tmp_path / "two", num_parts=2, part_id=2) == [None, None]
    assert sorted(file.name for file in (tmp_path / "two").glob("*.nii.gz")) == ["c.nii.gz", "e.nii.gz"]
    for parts, number in ((2, 3), (2, -1), (0, 0)):
        with pytest.raises(AssertionError):
            predictor.predict_from_files(tmp_path / "in", tmp_path / "out", num_parts=parts, part_id=number)


# --- Given up --------------------------------------------------------------------------------------------------------


def test_a_client_that_is_closed_finishes_no_further_answer(server: Peer) -> None:
    finished: list[str] = []
    with Client(server.url, "blobs") as client:

        def close(event: Event) -> None:
            if event.kind is Kind.ANSWERED and event.case == "a":
                client.close()

        outcomes = client.predict_many(
            [Case("a", b"1")], finish=lambda case, _: finished.append(case.name), on_event=close
        )
        [outcome] = outcomes
    assert isinstance(outcome.error, errors.Cancelled)
    assert not finished
