"""The same calls through nnU-Net's predictor and through ours, on the same model and a live server."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_torchserve_client import RemotePredictor, errors
from support import stock, volumes
from support.predictions import assert_same, assert_same_files, write_heads
from support.server import LiveServer

pytestmark = pytest.mark.serve

TOKEN = "s3cret-t0ken"  # noqa: S105 (a test's)
ENDING = ".nii.gz"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(tmp_path_factory.mktemp("images with ümlauts"))


@pytest.fixture(scope="module")
def theirs(models: dict[str, Path]) -> nnUNetPredictor:
    return stock.loaded(models["five_folds"], folds=[0, 1], use_mirroring=False)


@pytest.fixture(scope="module")
def ours(server: LiveServer, models: dict[str, Path]) -> Iterator[RemotePredictor]:
    with RemotePredictor(server.server.inference_url, "five_folds", use_mirroring=False, token=TOKEN) as predictor:
        predictor.initialize_from_trained_model_folder(models["five_folds"], use_folds=(0, 1))
        yield predictor


Predictors = tuple[nnUNetPredictor, RemotePredictor]


@pytest.fixture
def both(theirs: nnUNetPredictor, ours: RemotePredictor) -> Predictors:
    return theirs, ours


@pytest.fixture
def array(images: Path) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """What nnU-Net's reader gives."""
    return SimpleITKIO().read_images([str(images / f"b_0000{ENDING}")])  # type: ignore[no-any-return]


def arguments(method: Callable[..., object]) -> list[tuple[str, object]]:
    return [(name, each.default) for name, each in inspect.signature(method).parameters.items()]


@pytest.mark.parametrize(
    "name",
    [
        "predict_from_files",
        "predict_from_files_sequential",
        "predict_from_list_of_npy_arrays",
        "predict_single_npy_array",
        "get_data_iterator_from_raw_npy_data",
        "predict_from_data_iterator",
        "initialize_from_trained_model_folder",
        "auto_detect_available_folds",
    ],
)
def test_arguments_and_defaults_are_nnunets(name: str) -> None:
    assert arguments(getattr(RemotePredictor, name)) == arguments(getattr(nnUNetPredictor, name))


def test_the_constructor_takes_nnunets_arguments_after_the_address() -> None:
    theirs = [each for each in arguments(nnUNetPredictor) if each[0] != "device"]
    ours = dict(arguments(RemotePredictor))
    assert [(name, ours[name]) for name, _ in theirs] == theirs
    assert list(ours)[2:10] == [name for name, _ in arguments(nnUNetPredictor)]


@pytest.mark.parametrize("probabilities", [False, True])
def test_single_arrays(probabilities: bool, both: Predictors, array: Any) -> None:
    image, properties = array
    results = [each.predict_single_npy_array(image, dict(properties), None, None, probabilities) for each in both]
    assert_same(*results)
    labels = results[1][0] if probabilities else results[1]
    assert np.ptp(labels) > 0


def test_files_into_a_folder(both: Predictors, images: Path, tmp_path: Path) -> None:
    theirs, ours = both
    (tmp_path / "theirs").mkdir()
    assert theirs.predict_from_files_sequential(str(images), str(tmp_path / "theirs"), True) == []
    assert ours.predict_from_files_sequential(str(images), str(tmp_path / "sequential"), True) == []
    assert ours.predict_from_files(images, tmp_path / "ours", True) == [None, None]
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "sequential")
    assert not [file.name for file in (tmp_path / "ours").iterdir() if TOKEN.encode() in file.read_bytes()]


def test_files_whose_results_are_returned(both: Predictors, images: Path) -> None:
    theirs, ours = both
    lists = [[str(images / f"b_0000{ENDING}")]]
    for probabilities in (False, True):
        expected = theirs.predict_from_files_sequential(lists, None, probabilities)
        assert_same(expected, ours.predict_from_files_sequential(lists, None, probabilities))
        assert_same(expected, ours.predict_from_files(lists, None, probabilities))


def test_arrays_into_files(both: Predictors, array: Any, tmp_path: Path) -> None:
    image, properties = array
    for each, folder in zip(both, ("theirs", "ours"), strict=True):
        (tmp_path / folder).mkdir()
        target = str(tmp_path / folder / "case")
        assert each.predict_single_npy_array(image, dict(properties), None, target, True) is None
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_lists_and_iterators_of_arrays(ours: RemotePredictor, theirs: nnUNetPredictor, array: Any) -> None:
    """Stock's own way with lists starts processes; a long test compares with it. Here: with its single arrays."""
    image, properties = array
    images = [image, np.ascontiguousarray(image[:, :, ::-1])]
    expected = [theirs.predict_single_npy_array(each, dict(properties)) for each in images]
    known = [dict(properties) for _ in images]
    assert_same(expected, ours.predict_from_list_of_npy_arrays(images, None, known, None))
    items = ours.get_data_iterator_from_raw_npy_data(images, None, known, None)
    assert_same(expected, ours.predict_from_data_iterator(items))
    own = ({"data": each, "ofile": None, "data_properties": {"spacing": properties["spacing"]}} for each in images)
    assert_same(expected, ours.predict_from_data_iterator(own))
    assert_same(expected[:1], ours.predict_from_list_of_npy_arrays(image, None, properties, None))


def test_options_of_the_server_are_keywords(server: LiveServer, theirs: nnUNetPredictor, array: Any) -> None:
    image, properties = array
    options: dict[str, Any] = {"probability_channels": [2, 0], "probability_dtype": "float16", "preprocess": "stock"}
    url = server.server.inference_url
    with RemotePredictor(url, "five_folds", use_mirroring=False, use_folds=[0, "1"], timeout_s=300, **options) as ours:
        labels, probabilities = ours.predict_single_npy_array(image, properties, None, None, True)
        assert_same(labels, ours.predict_single_npy_array(image, properties))
    expected = theirs.predict_single_npy_array(image, dict(properties), None, None, True)[1]
    assert_same(probabilities, expected[[2, 0]].astype(np.float16))


@pytest.mark.long  # the tests above compare with what runs in this process
def test_what_stock_does_in_processes(
    ours: RemotePredictor, models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    script = [sys.executable, "-m", "support.stock_script", str(models["five_folds"]), str(images), str(tmp_path)]
    folder = Path(__file__).parents[1]
    subprocess.run(script, cwd=folder, check=True, timeout=800, env=os.environ | {"PYTHONPATH": str(folder)})
    assert ours.predict_from_files(images, tmp_path / "our all", True, True, 1, 1) == [None, None]
    assert ours.predict_from_files(images, tmp_path / "our parts", False, True, 1, 1, None, 2, 1) == [None]
    assert ours.predict_from_files(images, tmp_path / "our parts", False, False, 1, 1) == [None]
    for name in ("all", "parts"):
        assert_same_files(tmp_path / name, tmp_path / f"our {name}")
    image, properties = SimpleITKIO().read_images([str(max(images.iterdir()))])
    [results] = ours.predict_from_list_of_npy_arrays([image], None, [properties], None, 1, save_probabilities=True)
    with np.load(tmp_path / "arrays.npz") as expected:
        assert_same((expected["labels"], expected["probabilities"]), results)


def test_parts_share_no_case_and_leave_out_what_is_there(ours: RemotePredictor, images: Path, tmp_path: Path) -> None:
    ours.predict_from_files(images, tmp_path, num_parts=2, part_id=1)
    [first] = tmp_path.glob(f"*{ENDING}")
    assert first.name == f"b{ENDING}", "the second of the sorted names"
    written = first.stat().st_mtime_ns
    assert ours.predict_from_files(images, tmp_path, overwrite=False) == [None]
    assert first.stat().st_mtime_ns == written
    assert ours.predict_from_files(images, tmp_path, overwrite=False) is None
    assert len(list(tmp_path.glob(f"*{ENDING}"))) == 2
    assert not [file.name for file in tmp_path.iterdir() if file.name.endswith(".part")]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda each, image, _: each.predict_single_npy_array(image, {}), KeyError),
        (lambda each, image, properties: each.predict_single_npy_array(image[0], properties), ValueError),
        (lambda each, image, _: each.predict_single_npy_array(image, {"spacing": [0, 1, 1]}), ValueError),
        (lambda each, *_: each.predict_from_files("/no/such/folder", None), FileNotFoundError),
        (lambda each, *_: each.predict_from_files([], None, num_parts=1, part_id=2), AssertionError),
        (lambda each, *_: each.predict_from_files_sequential([["/none.nii.gz"]], None), RuntimeError),
        (lambda each, *_: each.predict_from_files_sequential([[__file__]], None), RuntimeError),
    ],
    ids=["no spacing", "three axes", "a spacing of 0", "no folder", "no such part", "no file", "no image"],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_is_wrong_raises_what_it_raises_in_stock(
    call: Callable[..., object], error: type[Exception], both: Predictors, array: Any
) -> None:
    image, properties = array
    for each in both:
        with pytest.raises(error):
            call(each, image, dict(properties))


def test_one_unreadable_file_does_not_keep_others_from_being_predicted(
    ours: RemotePredictor, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for file in images.iterdir():
        (tmp_path / "in" / file.name).symlink_to(file)
    (tmp_path / "in" / f"a_0000{ENDING}").write_bytes(b"no image")
    with pytest.raises(errors.CasesFailed, match="1 of 3 cases failed: a: ") as caught:
        ours.predict_from_files(tmp_path / "in", tmp_path / "out")
    [failure] = caught.value.failures
    assert isinstance(failure, errors.UnknownFormat)
    assert (failure.case, failure.status) == ("a", 415)
    assert len(list((tmp_path / "out").glob(f"*{ENDING}"))) == 2


def test_what_nnunet_has_preprocessed_is_refused_at_once(ours: RemotePredictor, array: Any) -> None:
    image, properties = array
    item = {"data": image, "ofile": None, "data_properties": {**properties, "bbox_used_for_cropping": [[0, 1]] * 3}}
    with pytest.raises(errors.PreprocessedInput, match="preprocessed by nnU-Net"):
        ours.predict_from_data_iterator([item])


def test_what_is_not_served_is_refused_by_name(ours: RemotePredictor, array: Any, images: Path) -> None:
    image, properties = array
    with pytest.raises(errors.WrongPreviousStage, match=r"no cascade \(3d_fullres\)"):
        ours.predict_single_npy_array(image, properties, image)
    with pytest.raises(errors.WrongPreviousStage, match="no cascade"):
        ours.predict_from_files(images, None, folder_with_segs_from_prev_stage="x")
    with pytest.raises(errors.NotServed, match="archive"):
        ours.manual_initialization(None)
    with pytest.raises(errors.NotServed, match="no logits"):
        ours.predict_logits_from_preprocessed_data(image)
    with pytest.raises(errors.WrongUse, match="output_format"):
        RemotePredictor("http://127.0.0.1:1", "m", output_format="nii")
    with pytest.raises(errors.UnknownOption, match="did you mean use_gaussian"):
        RemotePredictor(ours.client.urls, "five_folds", use_gausian=True, use_proxies=False).predict_from_files(
            [[str(images / f"b_0000{ENDING}")]], None
        )


def test_the_served_model_must_be_the_folders(ours: RemotePredictor, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        errors.WrongModel, match=r"dataset Dataset901_Blobs, not Dataset902_BlobsFlat; .*3d_fullres, not 2d"
    ):
        ours.initialize_from_trained_model_folder(str(models["flat"]), None)
    with pytest.raises(errors.WrongModel, match=r"folds 0, 1, 2, 3, 4, without 7"):
        ours.initialize_from_trained_model_folder(str(models["five_folds"]), (0, 7))
    with pytest.raises(errors.WrongModel, match=r"checkpoint checkpoint_final\.pth, not checkpoint_best\.pth"):
        ours.initialize_from_trained_model_folder(str(models["five_folds"]), (0, 1), "checkpoint_best.pth")
    with pytest.raises(FileNotFoundError):
        ours.initialize_from_trained_model_folder(str(tmp_path), None)
    assert ours.use_folds == (0, 1)


def test_what_the_model_is(both: Predictors) -> None:
    theirs, ours = both
    assert ours.dataset_json == theirs.dataset_json
    assert ours.plans == theirs.plans_manager.plans == ours.plans_manager.plans
    assert (ours.trainer_name, ours.allowed_mirroring_axes) == (theirs.trainer_name, theirs.allowed_mirroring_axes)
    assert ours.configuration_manager.patch_size == theirs.configuration_manager.patch_size
    assert ours.label_manager.foreground_labels == theirs.label_manager.foreground_labels
    assert {model.name for model in ours.description.served or ()} >= {"five_folds", "flat", "regions"}


def test_several_channels_come_from_several_files(server: LiveServer, models: dict[str, Path], images: Path) -> None:
    theirs = stock.loaded(models["regions"], use_mirroring=False)
    files = [[str(images / f"b_0000{ENDING}")] * 2]
    with RemotePredictor(server.server.inference_url, "regions", use_mirroring=False) as ours:
        assert_same(
            theirs.predict_from_files_sequential(files, None, True),
            ours.predict_from_files_sequential(files, None, True),
        )
        with pytest.raises(errors.WrongChannels):
            ours.predict_from_files([files[0][:1]], None)


def test_the_code_of_the_page_works(
    server: LiveServer,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    image, _ = volumes.blobs((20, 22, 18), 1)  # one patch, of 40 passes
    volumes.write(tmp_path / "imagesTs", f"head_0000{ENDING}", volumes.nifti_gz(image, np.diag([1.5, 1.5, 1.5, 1])))
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace("http://127.0.0.1:8080", server.server.inference_url).replace('"brain"', '"five_folds"')
        code = code.replace("nnUNet_results/brain_model", str(models["five_folds"]))
        exec(compile(code, "docs/client.md", "exec"), {"__name__": "__main__"})  # noqa: S102 (the page's own)
    assert "volume_ml" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "predictions").iterdir()}
    assert names >= {f"head{ENDING}", "head.npz", "head.pkl", "plans.json"}
    assert (tmp_path / f"labels of head_0000{ENDING}").stat().st_size
