"""The labels of a cascade's first stage, given by the caller: the same calls through nnU-Net's predictor and ours.

With ``preprocess="stock"``, so that probabilities are stock's to the bit (docs/parity.md).
"""

from __future__ import annotations

import asyncio
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve_client import AsyncRemotePredictor, Case, Client, RemotePredictor, errors
from nnunet_torchserve_tools import predict
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import UsageError
from support import core_peer, stock, volumes
from support.odd_models import OddModel
from support.peer import DESCRIPTION, Peer
from support.predictions import assert_same, assert_same_files

ENDING = ".nii.gz"
SHAPE = (20, 22, 18)
NAMES = ("a", "Kopf groß 2")
AFFINE = volumes.oblique((1.5, 1.5, 1.5))
LAST_BITS = 1e-3
"""How far probabilities may be from stock's where the server preprocesses in its own way (docs/parity.md)."""

CASCADE = {"kind": "cascade", "first": {"kind": "single", "member": "3d_lowres"}, "member": "3d_cascade_fullres"}

pytestmark = pytest.mark.filterwarnings("ignore:.*previous_stage", "ignore:Detected old nnU-Net plans")

Predictors = tuple[nnUNetPredictor, RemotePredictor]
Array = npt.NDArray[Any]


@contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """The address of a core that has an archive of the model."""
    [archive] = make_archives(ArchiveRequest(model, folder / "store", name="m"))
    zipfile.ZipFile(archive).extractall(folder / "unpacked")
    bundle = ModelBundle(folder / "unpacked")
    with core_peer.serving(Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)) as peer:
        yield peer.url


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictors]:
    """Of a cascade's last stage alone."""
    folder = tmp_path_factory.mktemp("cascade")
    model = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres").write(folder)
    with served(model, folder) as url, RemotePredictor(url, "m", preprocess="stock") as ours:
        yield stock.loaded(model), ours


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(NAMES):
        image, _ = volumes.blobs(SHAPE, seed)
        volumes.write(folder, f"{name}_0000{ENDING}", volumes.nifti_gz(image.astype(np.int16), AFFINE))
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``nnUNetv2_predict`` leaves them."""
    folder = tmp_path_factory.mktemp("first stage")
    for seed, name in enumerate(NAMES):
        drawn = np.random.default_rng(seed).integers(0, 4, SHAPE).astype(np.uint8)
        volumes.write(folder, f"{name}{ENDING}", volumes.nifti_gz(drawn, AFFINE))
    return folder


@pytest.fixture
def arrays(both: Predictors, images: Path, labels: Path) -> tuple[Array, dict[str, Any], Array]:
    """An image, its properties and labels, as nnU-Net's reader gives them."""
    reader = both[0].plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(images / f"a_0000{ENDING}")])
    return image, properties, reader.read_seg(str(labels / f"a{ENDING}"))[0]


def without_places_for_training(folder: Path) -> Path:
    """Stock notes in a case's properties where each label lies, because it has labels; only training reads that."""
    for file in folder.glob("*.pkl"):
        properties = pickle.loads(file.read_bytes())  # noqa: S301 (our own)
        assert "class_locations" in properties
        del properties["class_locations"]
        file.write_bytes(pickle.dumps(properties))
    return folder


def test_files_with_the_labels_of_a_folder(both: Predictors, images: Path, labels: Path, tmp_path: Path) -> None:
    theirs, ours = both
    (tmp_path / "theirs").mkdir()
    theirs.predict_from_files_sequential(str(images), str(tmp_path / "theirs"), True, True, str(labels))
    ours.predict_from_files_sequential(str(images), str(tmp_path / "ours"), True, True, str(labels))
    assert_same_files(without_places_for_training(tmp_path / "theirs"), tmp_path / "ours")
    one = [[str(images / f"a_0000{ENDING}")]]
    expected = theirs.predict_from_files_sequential(one, None, False, True, str(labels))
    assert_same(expected, ours.predict_from_files(one, None, folder_with_segs_from_prev_stage=str(labels)))


def test_a_folder_by_the_command(both: Predictors, images: Path, labels: Path, tmp_path: Path) -> None:
    theirs, ours = both
    (tmp_path / "theirs").mkdir()
    theirs.predict_from_files_sequential(str(images), str(tmp_path / "theirs"), True, True, str(labels))
    server = ["--server", ours.client.urls[0], "--model", "m", "--save_probabilities"]
    predict.run(["-i", str(images), "-o", str(tmp_path / "ours"), "-prev_stage_predictions", str(labels), *server])
    assert_same_files(without_places_for_training(tmp_path / "theirs"), tmp_path / "ours", LAST_BITS)
    with pytest.raises(UsageError, match="second stage of a cascade"):
        predict.run(["-i", str(images), "-o", str(tmp_path / "none"), *server])
    with pytest.raises(UsageError, match="no folder"):
        predict.run(["-i", str(images), "-o", str(tmp_path / "none"), "-prev_stage_predictions", "/nowhere", *server])
    assert not (tmp_path / "none").exists()


def test_arrays_with_their_labels(both: Predictors, arrays: Any) -> None:
    theirs, ours = both
    image, properties, labels = arrays
    expected = theirs.predict_single_npy_array(image, dict(properties), labels, None, True)
    assert len(np.unique(expected[0])) > 1
    assert_same(expected, ours.predict_single_npy_array(image, dict(properties), labels, None, True))
    others = [labels, np.flip(labels, 1).astype(np.int64)]
    both_expected = [
        theirs.predict_single_npy_array(image, dict(properties), each.astype(np.float32)) for each in others
    ]
    assert np.any(both_expected[0] != both_expected[1]), "labels that change nothing show nothing"
    known = [dict(properties), dict(properties)]
    assert_same(both_expected, ours.predict_from_list_of_npy_arrays([image, image], others, known, None))
    assert_same(both_expected[:1], ours.predict_from_list_of_npy_arrays(image, labels, properties, None))


def test_the_same_to_be_awaited(both: Predictors, arrays: Any) -> None:
    image, properties, labels = arrays

    async def predicted() -> Array:
        async with AsyncRemotePredictor(both[1].client.urls, "m", preprocess="stock") as ours:
            result: Array = await ours.predict_single_npy_array(image, properties, labels)
            return result

    expected = both[0].predict_single_npy_array(image, dict(properties), labels)
    assert_same(expected, asyncio.run(predicted()))


def test_what_is_wrong_raises_what_it_raises_in_stock(
    both: Predictors, arrays: Any, images: Path, tmp_path: Path
) -> None:
    image, properties, labels = arrays
    for each in both:
        with pytest.raises(AssertionError):
            each.predict_from_files_sequential(str(images), None)
        with pytest.raises(AssertionError):
            each.predict_single_npy_array(image, dict(properties), labels[:, 1:])
        with pytest.raises(AssertionError):
            each.predict_single_npy_array(image, dict(properties), labels[0])
        with pytest.raises(RuntimeError):
            each.predict_single_npy_array(image, dict(properties))
        with pytest.raises(RuntimeError):
            each.predict_from_files_sequential(str(images), None, False, True, str(tmp_path))
    with pytest.raises(errors.WrongUse, match=r"2 images.* 1 segmentations"):
        both[1].predict_from_list_of_npy_arrays([image] * 2, [labels], [properties] * 2, None)


def test_labels_for_a_model_that_is_no_cascade_fail_as_in_stock_and_are_not_sent(arrays: Any, tmp_path: Path) -> None:
    image, properties, labels = arrays
    with pytest.raises(RuntimeError, match="channels"):
        stock.loaded(OddModel().write(tmp_path)).predict_single_npy_array(image, dict(properties), labels)
    with Peer().listening() as peer, RemotePredictor(peer.url, "blobs") as ours:
        with pytest.raises(errors.WrongPreviousStage, match=r"no cascade \(3d_fullres\)"):
            ours.predict_single_npy_array(image, properties, labels)
        with pytest.raises(errors.WrongPreviousStage, match="no cascade"):
            ours.predict_from_list_of_npy_arrays([image] * 2, [labels, labels], [properties] * 2, None)
        assert not peer.received


def fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """Of a form."""
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    parts = [part for part in message.walk() if not part.is_multipart()]
    return {str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True) for part in parts}  # type: ignore[misc]


def test_an_archive_with_a_first_stage_of_its_own_is_sent_labels_only_if_they_are_given(
    images: Path, labels: Path, tmp_path: Path
) -> None:
    description = {**DESCRIPTION, "recipe": CASCADE, "limits": {}}
    with Peer(description=description).listening() as peer, RemotePredictor(peer.url, "blobs") as ours:
        image = images / f"a_0000{ENDING}"
        ours.predict_from_files([[str(image)]], [str(tmp_path / "one")])
        ours.predict_from_files([[str(image)]], [str(tmp_path / "two")], folder_with_segs_from_prev_stage=str(labels))
        plain, form = peer.received
    assert plain.body == image.read_bytes()
    sent = fields(form.headers["content-type"], form.body)
    assert sent == {"image": image.read_bytes(), "previous_stage": (labels / f"a{ENDING}").read_bytes()}


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_label_arrays_are_sent_in_the_smallest_type_that_holds_them(largest: int, dtype: type) -> None:
    labels = np.zeros((1, 2, 2, 2), np.float32)
    labels[0, 0, 0, 0] = largest
    with Peer(description={**DESCRIPTION, "recipe": CASCADE}).listening() as peer, Client(peer.url, "blobs") as client:
        client.predict(Case("a", np.zeros((1, 2, 2, 2), np.uint8), previous_stage=labels))
        [received] = peer.received
    sent = fields(received.headers["content-type"], received.body)["previous_stage"]
    head = np.lib.format.header_data_from_array_1_0(labels.astype(dtype))
    assert str(head["descr"]).encode() in sent
    assert sent.endswith(labels.astype(dtype).tobytes())


def test_the_servers_limit_holds_for_images_and_labels_together() -> None:
    with Peer(description={**DESCRIPTION, "recipe": CASCADE}).listening() as peer, Client(peer.url, "blobs") as client:
        client.predict(Case("a", bytes(600), previous_stage=bytes(400)))
        with pytest.raises(errors.BodyTooLarge, match="1001 bytes"):
            client.predict(Case("a", bytes(600), previous_stage=bytes(401)))
