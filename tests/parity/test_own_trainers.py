"""Somebody's own trainers, networks, preprocessors and label managers, packed into the archive: as stock has them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nnunetv2.preprocessing.normalization import default_normalization_schemes
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.resampling import no_resampling
from nnunetv2.utilities.label_handling import label_handling
from typer.testing import CliRunner

from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.previous_stage import labels_of
from nnunet_torchserve.pricing import mean_in_blocks
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.model_card import Shape, lines, model_card
from nnunet_torchserve_tools.model_store import find_archives
from support import stock, volumes
from support.odd_models import OddModel
from support.server import running

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* goes into the archive as code",
    "ignore:Trainer .* uses the old",
    "ignore:The model's own label manager",
    "ignore:Network class",
    "ignore:.torch.jit:FutureWarning",  # of packages that nnU-Net's trainers import
)

CPU = torch.device("cpu")
SPACING = (1.5, 1.5, 3.0)

NETWORK = """
import torch

class Mine(torch.nn.Module):
    def __init__(self, inputs, outputs, kernel=3, dimensions=2):
        super().__init__()
        convolution = torch.nn.Conv2d if dimensions == 2 else torch.nn.Conv3d
        self.first = convolution(inputs, 6, kernel, padding=kernel // 2)
        self.last = convolution(6, outputs, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * {factor})
"""

TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerMine(nnUNetTrainer):
    {decorator}
    def build_network_architecture({arguments}, num_input_channels, num_output_channels, enable_deep_supervision=True):
        network = Mine(num_input_channels, num_output_channels, {kernel})
        return network if not {lists} else torch.nn.Sequential(network, Both())

class Both(torch.nn.Module):
    def forward(self, x):
        return [x, x]
"""

NEW, OLD = (
    "plans_manager, configuration_manager",
    "architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import",
)
KERNELS = {NEW: 'configuration_manager.configuration["architecture"]["arch_kwargs"]["kernel_sizes"][0][0]',
           OLD: 'arch_init_kwargs["kernel_sizes"][0][0]'}  # fmt: skip


def trainer(signature: str = NEW, decorator: str = "@staticmethod", factor: float = 1.0, *, lists: bool = False) -> str:
    """The text of a file with a trainer and its network."""
    first = {"@staticmethod": "", "@classmethod": "cls, ", "": "self, "}[decorator]
    text = TRAINER.format(decorator=decorator, arguments=first + signature, kernel=KERNELS[signature], lists=lists)
    return NETWORK.format(factor=factor) + text


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def image(shape: tuple[int, int, int] = (24, 26, 4)) -> bytes:
    """Blobs with an empty rim, which nnU-Net crops."""
    array, _ = volumes.blobs(shape, seed=3)
    array[:3] = array[-2:] = 0
    return volumes.nifti_gz(array.astype(np.float32), volumes.oblique(SPACING, angle=0.0))


def make(model: Path, folder: Path, *files: Path, name: str = "m", **fields: Any) -> Path:
    [archive] = make_archives(ArchiveRequest(model, folder / "store", name=name, trainer_files=files, **fields))
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    zipfile.ZipFile(archive).extractall(folder)
    return folder


def served(model: Path, folder: Path, *files: Path, **fields: Any) -> Pipeline:
    """The pipeline of a worker that serves the archive."""
    bundle = ModelBundle(unpack(make(model, folder, *files, **fields), folder / "unpacked"))
    return Pipeline(bundle, LocalEngine(bundle, CPU), Limits(), 600.0)


def ask(pipeline: Pipeline, **options: object) -> dict[str, npt.NDArray[Any]]:
    parts = {"image": image(), "options": json.dumps({"output_format": "npz"} | options).encode()}
    response = pipeline.answer(Request(parts, {}))
    assert response.status is HTTPStatus.OK, response.body
    with np.load(io.BytesIO(response.body)) as answer:
        return dict(answer)


def problem(pipeline: Pipeline, **options: object) -> dict[str, Any]:
    parts = {"image": image(), "options": json.dumps(options).encode()}
    refused: dict[str, Any] = json.loads(pipeline.answer(Request(parts, {})).body)
    return refused


def stock_of(model: Path, folder: Path, *, probabilities: bool = False) -> stock.StockAnswer:
    answer = stock.predict(model, [volumes.write(folder, "case_0000.nii.gz", image())], probabilities=probabilities)
    assert len(np.unique(answer.labels)) > 1, "labels that are all the same prove nothing"
    return answer


@contextmanager
def in_nnunetv2(file: Path, **places: ModuleType) -> Iterator[None]:
    """The file's classes as they are found where somebody has copied them into the installed package."""
    spec = importlib.util.spec_from_file_location("copied_by_hand", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        for name, place in places.items():
            patch.setattr(place, name, getattr(module, name), raising=False)
        yield


@contextmanager
def external(*folders: Path) -> Iterator[None]:
    """nnU-Net's variable for trainers outside of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", ":".join(map(str, folders)))
        yield


MINE = OddModel(2, trainer="nnUNetTrainerMine")


@pytest.mark.parametrize(
    ("signature", "decorator"),
    [
        (NEW, "@staticmethod"),
        (OLD, "@classmethod"),
        pytest.param(NEW, "@classmethod", marks=pytest.mark.long),
        pytest.param(OLD, "@staticmethod", marks=pytest.mark.long),
    ],
    ids=["new, static", "old, of the class", "new, of the class", "old, static"],
)
def test_a_trainer_that_builds_its_own_network(
    signature: str, decorator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Served where nnUNet_extTrainer has another trainer of that name, which nobody looks at."""
    file = written(tmp_path / "trainers", trainer(signature, decorator))
    with external(file.parent):
        model = MINE.write(tmp_path)
        expected = stock_of(model, tmp_path).labels
    trap = written(tmp_path / "trap", "raise RuntimeError('a served archive has looked at nnUNet_extTrainer')")
    with external(trap.parent):
        pipeline = served(model, tmp_path, file)
        np.testing.assert_array_equal(ask(pipeline)["labels"], expected)
    assert pipeline.bundle.lead.description.network_trainer == "nnUNetTrainerMine"
    assert "mine" not in sys.modules


def test_a_method_of_an_object_is_refused_as_nnunets_predictor_has_only_the_class(tmp_path: Path) -> None:
    file = written(tmp_path / "trainers", trainer(decorator=""))
    sound = written(tmp_path / "sound", trainer())
    with external(sound.parent):
        model = MINE.write(tmp_path)
    with external(file.parent), pytest.raises(TypeError):
        stock_of(model, tmp_path)
    with pytest.raises(ToolError, match="static method or a class method"):
        served(model, tmp_path, file)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("raise NotImplementedError('causal_conv1d: Expected x.is_cuda() to be true')", "runs on CUDA only"),
        ("raise OSError('no file weights.bin')", r"fails on a patch on the CPU: OSError no file weights\.bin$"),
    ],
    ids=["cuda", "another reason"],
)
def test_a_network_that_fails_on_a_cpu_is_not_taken_for_wrong_files(fails: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "trainers", trainer().replace("return self.last", f"{fails}; return self.last"))
    with external(file.parent):
        model = MINE.write(tmp_path)
    with pytest.raises(ToolError, match=said) as error:
        served(model, tmp_path, file)
    assert str(error.value).startswith("the network of 2d was built, and fails on a patch on the CPU: ")


def test_a_network_that_is_built_on_cuda_only_is_named(tmp_path: Path) -> None:
    sound = written(tmp_path / "sound", trainer())
    with external(sound.parent):
        model = MINE.write(tmp_path)
    built = "super().__init__(); raise AssertionError('Torch not compiled with CUDA enabled')"
    file = written(tmp_path / "trainers", trainer().replace("super().__init__()", built))
    with pytest.raises(ToolError, match=r"of 2d make no network: AssertionError .*runs on CUDA only"):
        served(model, tmp_path, file)


def test_a_network_that_gives_a_list_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "trainers", trainer(lists=True))
    with external(file.parent):
        model = MINE.write(tmp_path)
    with pytest.raises(ToolError, match=r"makes a list of a patch.*deep supervision"):
        served(model, tmp_path, file)


def test_without_the_file_the_error_names_the_flag(tmp_path: Path) -> None:
    file = written(tmp_path / "trainers", trainer())
    with external(file.parent):
        model = MINE.write(tmp_path)
        with pytest.raises(ToolError, match=rf"--trainer-file {file}"):
            served(model, tmp_path)
    with pytest.raises(ToolError, match=r"nnUNetTrainerMine is not part of nnunetv2; .*--trainer-file"):
        served(model, tmp_path)


def test_two_models_whose_files_have_one_name_in_one_process(tmp_path: Path) -> None:
    pipelines, answers = [], []
    for factor in (1.0, -1.0):
        folder = tmp_path / f"times {factor}"
        file = written(folder, trainer(factor=factor))
        with external(file.parent):
            model = MINE.write(folder)
            answers.append(stock_of(model, folder).labels)
        pipelines.append(served(model, folder, file))
    assert (answers[0] != answers[1]).any()
    for pipeline, expected in zip(pipelines, answers, strict=True):
        np.testing.assert_array_equal(ask(pipeline)["labels"], expected)


def named_network(plans: dict[str, Any]) -> None:
    for configuration in plans["configurations"].values():
        configuration["architecture"] = {
            "network_class_name": "networks_of_mine.FromPlans",
            "arch_kwargs": {"kernel": 3, "act": "networks_of_mine.Act"},
            "_kw_requires_import": ["act"],
        }


FROM_PLANS = """
import helper_of_mine
from helper_of_mine import Act

class FromPlans(helper_of_mine.Mine):
    def __init__(self, input_channels, num_classes, kernel, act, deep_supervision):
        super().__init__(input_channels, num_classes, kernel)
        assert not deep_supervision
        self.act = act()

    def forward(self, x):
        return self.act(super().forward(x))
"""


def test_a_network_that_the_plans_name_and_files_that_import_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    helper = NETWORK.format(factor=1.0) + "\nclass Act(torch.nn.Tanh):\n    pass\n"
    files = (written(folder, FROM_PLANS, "networks_of_mine.py"), written(folder, helper, "helper_of_mine.py"))
    alone = written(tmp_path / "trainers", trainer())
    with external(alone.parent):
        model = MINE.but(trainer="nnUNetTrainerMine").write(tmp_path)
    plans = json.loads((model / "plans.json").read_text())
    named_network(plans)
    (model / "plans.json").write_text(json.dumps(plans))
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    torch.save(content | {"trainer_name": "nnUNetTrainer"}, checkpoint)
    with pytest.raises(ToolError, match=r"networks_of_mine.*--trainer-file"):
        served(model, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        expected = stock_of(model, tmp_path).labels
        for name in ("networks_of_mine", "helper_of_mine"):
            del sys.modules[name]
    np.testing.assert_array_equal(ask(served(model, tmp_path, *files))["labels"], expected)


OWN_STEPS = """
import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

class RankNormalization(ImageNormalization):
    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = True

    def run(self, image, seg=None):
        outside = seg < 0
        image = np.sqrt(np.abs(image.astype(self.target_dtype, copy=False)))
        image -= np.median(image[~outside])
        image[outside] = -3
        return image

class NoisyPreprocessor(DefaultPreprocessor):
    def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
        data += 1
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)

    def _normalize(self, data, seg, configuration_manager, foreground_intensity_properties_per_channel):
        data = super()._normalize(data, seg, configuration_manager, foreground_intensity_properties_per_channel)
        return np.clip(data, -2, 2).astype(np.float64)

class ReadingPreprocessor(DefaultPreprocessor):
    def run_case(self, *arguments):
        return super().run_case(*arguments)

def shared_resampling(data, new_shape, current_spacing, new_spacing, **how):
    data = np.asarray(data)
    values = resample_data_or_seg_to_shape(data, new_shape, current_spacing, new_spacing, is_seg=False, order=1)
    return values - 2 * values.mean(0, keepdims=True, dtype=np.float32) ** 2

def array_resampling(data, new_shape, current_spacing, new_spacing, **how):
    return data.astype(np.float32).clip(-0.2, 0.2)
"""


def changed(**settings: Any) -> Callable[[dict[str, Any]], None]:
    """Plans whose configurations have other settings."""

    def change(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            configuration.update(settings)

    return change


def test_a_normalisation_is_called_as_stock_calls_it(tmp_path: Path) -> None:
    file = written(tmp_path / "own", OWN_STEPS)
    model = OddModel(2, schemes=("RankNormalization",)).write(tmp_path)
    with in_nnunetv2(file, RankNormalization=default_normalization_schemes):
        expected = stock_of(model, tmp_path).labels
    pipeline = served(model, tmp_path, file)
    np.testing.assert_array_equal(ask(pipeline)["labels"], expected)
    np.testing.assert_array_equal(ask(pipeline, preprocess="stock")["labels"], expected)
    assert (expected != stock_of(OddModel(2).write(tmp_path / "plain"), tmp_path).labels).any()


def test_a_preprocessor_is_called_as_stock_calls_it(tmp_path: Path) -> None:
    file = written(tmp_path / "own", OWN_STEPS)
    names = {"preprocessor_name": "NoisyPreprocessor", "normalization_schemes": ["RankNormalization"]}
    model = OddModel(2, change_plans=changed(**names)).write(tmp_path)
    with pytest.raises(ToolError, match=r"preprocessor_name .*'NoisyPreprocessor'.*--trainer-file"):
        served(model, tmp_path)
    places = {"NoisyPreprocessor": default_preprocessor, "RankNormalization": default_normalization_schemes}
    with in_nnunetv2(file, **places):
        expected = stock_of_file(model, tmp_path)
    np.testing.assert_array_equal(ask(served(model, tmp_path, file))["labels"], expected)


def test_an_ensemble_with_a_preprocessor_that_crops_its_own_way_is_charged_for_whole_probabilities(
    tmp_path: Path,
) -> None:
    """It crops no empty rim, as nothing is 0 any more: the mean is then not made in blocks, nor is that the price."""
    file = written(tmp_path / "own", OWN_STEPS)
    noisy = OddModel(2, change_plans=changed(preprocessor_name="NoisyPreprocessor"), plans_name="others").write(
        tmp_path
    )
    both = served(OddModel(2).write(tmp_path), tmp_path, file, others=(noisy,))
    assert ask(both, save_probabilities=True)["probabilities"].shape[0] == both.bundle.lead.classes
    assert not mean_in_blocks(both.bundle)


def stock_of_file(model: Path, folder: Path) -> npt.NDArray[Any]:
    """As ``nnUNetv2_predict``: its preprocessing gives float32 whatever the preprocessor gives, its export an array."""
    predictor = stock.loaded(model)
    file = volumes.write(folder, "case_0000.nii.gz", image())
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(
        [str(file)], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data).to(torch.float32))
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    labels: npt.NDArray[Any] = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.cpu().detach().numpy(),
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
    )
    return labels


def test_a_preprocessor_that_reads_files_its_own_way_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "own", OWN_STEPS)
    model = OddModel(2, change_plans=changed(preprocessor_name="ReadingPreprocessor")).write(tmp_path)
    with pytest.raises(ToolError, match="ReadingPreprocessor has a run_case of its own"):
        served(model, tmp_path, file)


def test_a_resampling_function_gets_all_classes_as_in_stock(tmp_path: Path) -> None:
    file = written(tmp_path / "own", OWN_STEPS)
    names = {"resampling_fn_probabilities": "shared_resampling", "resampling_fn_data": "shared_resampling"}
    model = OddModel(2, change_plans=changed(**names, resampling_fn_data_kwargs={})).write(tmp_path)
    with in_nnunetv2(file, shared_resampling=no_resampling):
        expected = stock_of(model, tmp_path, probabilities=True)
    pipeline = served(model, tmp_path, file)
    np.testing.assert_array_equal(ask(pipeline)["labels"], expected.labels)
    both = ask(pipeline, save_probabilities=True)
    np.testing.assert_array_equal(both["probabilities"], expected.probabilities)
    assert problem(pipeline, export="linear")["code"] == "bad_option"


def test_a_resampling_function_gets_an_array_as_from_nnunetv2_predict(tmp_path: Path) -> None:
    """One that knows arrays only, and leaves the grid as it is: the network's has the image's voxels here."""
    file = written(tmp_path / "own", OWN_STEPS)
    model = OddModel(2, change_plans=changed(resampling_fn_probabilities="array_resampling")).write(tmp_path)
    with in_nnunetv2(file, array_resampling=no_resampling):
        expected = stock_of_file(model, tmp_path)
    assert len(np.unique(expected)) > 1, "labels that are all the same prove nothing"
    np.testing.assert_array_equal(ask(served(model, tmp_path, file))["labels"], expected)


LABELS = """
import sys
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

sys.own_label_managers = getattr(sys, "own_label_managers", 0) + 1

class SureLabelManager(LabelManager):
    def apply_inference_nonlin(self, logits):
        return torch.sigmoid(torch.as_tensor(logits).float())

    def convert_probabilities_to_segmentation(self, predicted_probabilities):
        values = torch.as_tensor(predicted_probabilities)
        largest, label = values.max(0)
        return torch.where(largest > 0.55, 7 * label, 0)

    def convert_logits_to_segmentation(self, predicted_logits):
        return self.convert_probabilities_to_segmentation(self.apply_inference_nonlin(predicted_logits))
"""


def test_a_label_manager_is_called_as_stock_calls_it_and_read_without_being_run(tmp_path: Path) -> None:
    file = written(tmp_path / "own", LABELS)
    model = OddModel(2, change_plans=lambda plans: plans.update(label_manager="SureLabelManager")).write(tmp_path)
    with pytest.raises(ToolError, match=r"label_manager .*--trainer-file"):
        served(model, tmp_path)
    with in_nnunetv2(file, SureLabelManager=label_handling):
        expected = stock_of(model, tmp_path, probabilities=True)
    pipeline = served(model, tmp_path, file)
    np.testing.assert_array_equal(ask(pipeline)["labels"], expected.labels)
    assert expected.labels.max() > 6
    assert expected.labels.max() in labels_of(pipeline.bundle.lead), "a next stage would be given it"
    both = ask(pipeline, save_probabilities=True)
    np.testing.assert_array_equal(both["labels"], expected.labels)
    np.testing.assert_array_equal(both["probabilities"], expected.probabilities)
    assert problem(pipeline, export="nearest")["code"] == "bad_option"
    parts = {"image": image(), "options": b'{"output_format": "json"}'}
    report = json.loads(pipeline.answer(Request(parts, {})).body)
    assert {structure["voxels"] for structure in report["structures"]} == {None}
    assert "SureLabelManager" in report["remarks"][0]

    runs = sys.own_label_managers  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("nnunet_torchserve_code_")]:
        del sys.modules[name]
    card = model_card(tmp_path / "store" / "m.mar", Shape((30, 20, 10), (1.0, 1.0, 1.0)))
    assert sys.own_label_managers == runs  # type: ignore[attr-defined]
    description = json.loads(pipeline.answer(Request({}, {"describe": "True"})).body)
    [described] = card["code"]["files"]
    assert described == {
        "file": "mine.py",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "names": [{"kind": "label_manager", "name": "SureLabelManager"}],
    }
    same = ("code", "classes", "probability_channels", "labels")
    assert [card[key] for key in same] == [description[key] for key in same]
    assert any("code that its servers run: mine.py" in line for line in lines(card))


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with a trainer of its own, that says what it needs."""
    folder = tmp_path_factory.mktemp("archived")
    file = written(folder / "trainers", trainer())
    with external(file.parent):
        model = MINE.write(folder)
    shutil.copytree(model, folder / "model")
    return make(model, folder, file, requires=(f"packaging=={importlib.metadata.version('packaging')}",))


def test_a_server_is_told_which_archives_bring_code(
    archived: Path, archive_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in (archived, archive_of("flat")):
        shutil.copy(file, tmp_path)
    assert [(each.file, each.code) for each in find_archives(tmp_path, ["all"])] == [
        ("flat.mar", ()),
        ("m.mar", ("mine.py",)),
    ]


def test_a_file_that_was_changed_is_not_run(archived: Path, tmp_path: Path) -> None:
    unpacked = unpack(archived, tmp_path)
    (unpacked / "code" / "mine.py").write_text("raise SystemExit")
    with pytest.raises(BundleError, match=r"code/mine\.py has sha256"):
        ModelBundle(unpacked)


def test_what_is_missing_or_another_on_a_server_is_named(archived: Path, tmp_path: Path) -> None:
    unpacked = unpack(archived, tmp_path)
    document = json.loads((unpacked / BUNDLE_FILE).read_text())
    for requires, reason in (
        ({"no-such-package-anywhere": "==1.0"}, "own code needs no-such-package-anywhere==1.0, which is not installed"),
        ({"packaging": "==0.0.1"}, r"own code needs packaging==0\.0\.1; \d+.* is installed"),
    ):
        document["code"]["requires"] = requires
        (unpacked / BUNDLE_FILE).write_text(json.dumps(document))
        with pytest.raises(BundleError, match=reason):
            ModelBundle(unpacked)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--requires", "packaging==1"], "there is none"),
        (["--trainer-file", "mine.py", "--requires", "packaging"], "PACKAGE==VERSION"),
        (["--trainer-file", "mine.py", "--requires", "packaging==0.0.1"], "needs packaging==0.0.1; "),
        (["--trainer-file", "mine.py", "--requires", "no-such-package==1"], "which is not installed"),
        (["--trainer-file", "nothing.py"], "No such file"),
        (["--trainer-file", "."], "is a folder"),
        (["--trainer-file", "my-trainer.py"], "name of a Python module"),
        (["--trainer-file", "mine.py", "--trainer-file", "again/mine.py"], "two files are called mine.py"),
        (["--trainer-file", "mine.py", "--trainer-file", "unused.py"], "unused.py: it has nothing"),
        (["--trainer-file", "broken.py"], "broken.py is no Python"),
        (["--trainer-file", "imports.py"], "imports no_such_module, which is not installed"),
        (["--trainer-file", "mine.py", "--trainer-file", "other.py"], "different things of the name nnUNetTrainerMine"),
    ],
)
def test_what_cannot_be_meant_is_said(
    flags: list[str], reason: str, archived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "again/mine.py", "other.py"):
        file = written(tmp_path / Path(name).parent, trainer(), Path(name).name)
    file.write_text(trainer(factor=2.0))
    written(tmp_path, "def nothing(): pass", "unused.py")
    written(tmp_path, "def :", "broken.py")
    written(tmp_path, "import no_such_module", "imports.py")
    model = archived.parents[1] / "model"
    done = CliRunner().invoke(app, ["archive", str(model), "--output", str(tmp_path / "out"), *flags])
    assert done.exit_code in {1, 2}
    assert reason in " ".join(done.output.split())


def test_the_command_says_aloud_that_it_is_code(archived: Path, tmp_path: Path) -> None:
    file = archived.parents[1] / "trainers" / "mine.py"
    zipped = tmp_path / "export.zip"
    model = archived.parents[1] / "model"
    with zipfile.ZipFile(zipped, "w") as export:
        for each in sorted(each for each in model.rglob("*") if each.is_file()):
            inside = Path("Dataset950_Odd", "nnUNetTrainerMine__nnUNetPlans__2d", each.relative_to(model))
            export.write(each, inside.as_posix())
    options = ["--trainer-file", str(file), "--output", str(tmp_path), "--name", "m"]
    done = CliRunner().invoke(app, ["archive", str(zipped), *options])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "mine.py goes into the archive as code: every server that serves this archive will run it" in said
    assert "trainer nnUNetTrainerMine" in said
    assert CliRunner().invoke(app, ["archive", str(zipped), "--output", str(tmp_path)]).exit_code == 1
    shown = CliRunner().invoke(app, ["describe", str(archived)])
    assert "code that its servers run: mine.py" in shown.output
    assert "that code needs packaging==" in shown.output


def test_a_name_that_nnunetv2_has_too_is_taken_by_nobody(tmp_path: Path) -> None:
    file = written(tmp_path / "trainers", trainer().replace("nnUNetTrainerMine", "nnUNetTrainerBN"))
    model = OddModel(2, trainer="nnUNetTrainerBN").write(tmp_path)
    with pytest.raises(ToolError, match="which nnU-Net would take; rename it"):
        served(model, tmp_path, file)


@pytest.mark.long
def test_a_trainer_that_changes_only_the_training_is_not_run_by_servers(tmp_path: Path) -> None:
    text = (
        "import sys\nfrom nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "sys.own_trainers = getattr(sys, 'own_trainers', 0) + 1\nclass nnUNetTrainerShort(nnUNetTrainer):\n    pass\n"
    )
    file = written(tmp_path / "trainers", text)
    with external(file.parent):
        model = OddModel(2, trainer="nnUNetTrainerShort").write(tmp_path)
        expected = stock_of(model, tmp_path).labels
    archive = make(model, tmp_path, file)
    for name in [name for name in sys.modules if name.startswith("nnunet_torchserve_code_")]:
        del sys.modules[name]
    runs = sys.own_trainers  # type: ignore[attr-defined]
    bundle = ModelBundle(unpack(archive, tmp_path / "unpacked"))
    np.testing.assert_array_equal(ask(Pipeline(bundle, LocalEngine(bundle, CPU), Limits(), 600.0))["labels"], expected)
    assert sys.own_trainers == runs  # type: ignore[attr-defined]


def test_the_engine_process_and_its_worker_have_the_code(archived: Path, tmp_path: Path) -> None:
    """The archive's folder is gone when the engine has loaded, as where TorchServe has unregistered the model."""
    bundle = ModelBundle(unpack(archived, tmp_path / "unpacked"))
    expected = ask(Pipeline(bundle, LocalEngine(bundle, CPU), Limits(), 600.0))["labels"]
    engine = RemoteEngine(bundle, CPU)
    try:
        pipeline = Pipeline(bundle, engine, Limits(), 600.0)
        pipeline.dry_run()
        shutil.rmtree(tmp_path / "unpacked" / "code")
        np.testing.assert_array_equal(ask(pipeline)["labels"], expected)
    finally:
        engine.disconnect()


@pytest.mark.long
def test_files_serve_all_members_of_a_recipe(tmp_path: Path) -> None:
    """A cascade of a trainer and a normalisation of one's own, in an ensemble with the trainer's flat network."""
    file = written(tmp_path / "own", trainer().replace(", kernel=3, dimensions=2)", ", kernel=3, dimensions=3)"))
    norm = written(tmp_path / "own", OWN_STEPS, "steps.py")
    odd = OddModel(trainer="nnUNetTrainerMine", schemes=("RankNormalization",), mirroring=(0,))
    with external(file.parent):
        first = odd.but(named="3d_lowres", spacing=3.0).write(tmp_path)
        last = odd.but(named="3d_cascade_fullres", previous_stage="3d_lowres").write(tmp_path)
        other = odd.but(named="3d_fullres").write(tmp_path)
        case = volumes.write(tmp_path, "case_0000.nii.gz", image())
        with in_nnunetv2(norm, RankNormalization=default_normalization_schemes):
            labels = stock.predict(first, [case], probabilities=False).labels
            predictor = stock.loaded(last)
            array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(case)])
            _, cascade = predictor.predict_single_npy_array(
                array, properties, labels.astype(np.float32)[None], None, save_or_return_probabilities=True
            )
            alone = stock.predict(other, [case], probabilities=True).probabilities
    mean = np.mean([cascade, alone], axis=0, dtype=np.float32)
    pipeline = served(last, tmp_path, file, norm, others=(other,), previous_stages=(first,))
    answer = ask(pipeline, save_probabilities=True)
    np.testing.assert_array_equal(answer["probabilities"], mean)
    np.testing.assert_array_equal(answer["labels"], mean.argmax(0))


@pytest.mark.long
@pytest.mark.serve
def test_torchserve_serves_it_whatever_lies_in_the_environment(archived: Path, tmp_path: Path) -> None:
    bundle = ModelBundle(unpack(archived, tmp_path / "unpacked"))
    expected = ask(Pipeline(bundle, LocalEngine(bundle, CPU), Limits(), 600.0))["labels"]
    trap = written(tmp_path / "trap", "raise RuntimeError('a served archive has looked at nnUNet_extTrainer')")
    with external(trap.parent), running(archived.parent, tmp_path / "server", models=["m.mar"]) as live:
        answer = live.predict("m", image(), options='{"output_format": "npz"}')
        described = live.describe("m")
    assert answer.status_code == HTTPStatus.OK, answer.content
    with np.load(io.BytesIO(answer.content)) as arrays:
        np.testing.assert_array_equal(arrays["labels"], expected)
    assert "nnUNetTrainerMine" in json.dumps(described)
