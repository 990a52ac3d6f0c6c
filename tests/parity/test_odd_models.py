"""Sound models of rare kinds: archived, and answered as stock answers them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nnunetv2.preprocessing.resampling import no_resampling, resample_torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants import network_architecture
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.golden import check_golden, read_golden
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.network import Networks
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.errors import ModelWarning, ToolError, UsageError
from nnunet_torchserve_tools.plans_check import network_builder
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support import stock, volumes
from support.odd_models import OddModel, old_format, resampled_by
from support.packaged import pipeline_of

SPACING = (1.5, 1.5, 1.5)
UNIT = {"min": 0.0, "max": 1.0, "mean": 0.4, "std": 0.3, "median": 0.4, "percentile_00_5": 0.0, "percentile_99_5": 1.0}
HOUNSFIELD = (
    UNIT
    | {"min": -1024.0, "max": 3071.0, "mean": 40.0, "std": 120.0}
    | {"percentile_00_5": -950.0, "percentile_99_5": 900.0}
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected old nnU-Net plans",
    "ignore:Network class",
    "ignore:Trainer .* uses the old",
    "ignore:The values in the label map",
    "ignore:.torch.jit:FutureWarning",  # of packages that nnU-Net's trainers import
)


def labels_of(pipeline: Pipeline, *bodies: bytes) -> npt.NDArray[Any]:
    """The served segmentation (Z, Y, X) of one image, or of one for each channel."""
    several = len(bodies) > 1
    parts: dict[str, object] = {f"image_{k:04d}" if several else "image": body for k, body in enumerate(bodies)}
    parts |= {"options": json.dumps({"output_format": "nii"}).encode()}
    response = pipeline.answer(Request(parts, {}))
    assert response.status is HTTPStatus.OK, response.body
    return np.asarray(nib.Nifti1Image.from_bytes(response.body).dataobj).T


def assert_as_stock(
    model: Path, folder: Path, *bodies: bytes, name: str = "case_{:04d}.nii.gz", **fields: Any
) -> Pipeline:
    """Archive, serve, compare; returns what served."""
    pipeline = pipeline_of(model, folder, **fields)
    files = [volumes.write(folder, name.format(k), body) for k, body in enumerate(bodies)]
    expected = stock.predict(model, files, probabilities=False).labels
    served = labels_of(pipeline, *bodies)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(served.reshape(expected.shape), expected)
    return pipeline


def image(
    shape: tuple[int, int, int] = (24, 26, 20), spacing: tuple[float, float, float] = SPACING, scale: float = 1.0
) -> bytes:
    """An image of the kind that the demo model's fingerprint describes, times ``scale``."""
    array, _ = volumes.blobs(shape, seed=3)
    return volumes.nifti_gz((array * scale).astype(np.float32), volumes.oblique(spacing, angle=0.0))


def test_pictures_of_three_colours(tmp_path: Path) -> None:
    """nnU-Net's normalisation of pictures refuses what is no 8-bit picture: a trial with other data proves nothing."""
    odd = OddModel(
        2,
        ("R", "G", "B"),
        ("RGBTo01Normalization",) * 3,
        spacing=1.0,
        reader="NaturalImage2DIO",
        more_dataset={"file_ending": ".png"},
    )
    picture = np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    assert_as_stock(
        odd.write(tmp_path), tmp_path, iio.imwrite("<bytes>", picture, extension=".png"), name="case_{:04d}.png"
    )


@pytest.mark.parametrize(
    ("scheme", "seen", "scale"),
    [("NoNormalization", UNIT, 1 / 500), ("CTNormalization", HOUNSFIELD, 1.0), ("RescaleTo01Normalization", UNIT, 1.0)],
)
def test_every_normalisation_with_data_of_its_own(
    scheme: str, seen: dict[str, float], scale: float, tmp_path: Path
) -> None:
    odd = OddModel(schemes=(scheme,), intensities=(seen,))
    assert_as_stock(odd.write(tmp_path), tmp_path, image(scale=scale))


def overflow_above(greatest: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Weights of a network with batch norm that leaves float16 for images with greater values."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "running_var" in name:
                tensor.fill_(1.0)
            if ".seg_layers." in name and name.endswith("weight"):
                tensor.mul_(100 / greatest)

    return change


def test_batch_norm_without_normalisation_on_data_from_0_to_1(tmp_path: Path) -> None:
    """Such a network's logits overflow float16 on a scanner's numbers, which it never sees."""
    odd = OddModel(
        schemes=("NoNormalization",), intensities=(UNIT,), trainer="nnUNetTrainerBN", change_weights=overflow_above(1.0)
    )
    model = odd.write(tmp_path)
    served = assert_as_stock(model, tmp_path, image(scale=1 / 500))
    refused = served.answer(Request({"image": image(scale=100.0)}, {}))
    assert json.loads(refused.body)["code"] == "case_failed", "the network does overflow, on other data"


def test_logits_that_are_not_finite_in_the_trial_prove_nothing(
    tmp_path: Path,
) -> None:
    """The fingerprint says 0 to 1000 where this model's images have 0 to 1."""
    odd = OddModel(
        schemes=("NoNormalization",),
        intensities=(UNIT | {"percentile_99_5": 1e6},),
        trainer="nnUNetTrainerBN",
        change_weights=overflow_above(1.0),
    )
    with pytest.warns(ModelWarning, match="not finite"):
        assert_as_stock(odd.write(tmp_path), tmp_path, image(scale=1 / 500))


@pytest.mark.parametrize(
    "seen",
    [
        {"percentile_00_5": None, "percentile_99_5": None, "min": None, "max": "nan"},
        {"percentile_00_5": 0, "percentile_99_5": 3e38},
        {"percentile_00_5": 5, "percentile_99_5": 5, "min": 5, "max": 5},
        {},
    ],
)
def test_a_fingerprint_that_says_nothing_is_no_reason_to_refuse(seen: dict[str, Any], tmp_path: Path) -> None:
    odd = OddModel(2, schemes=("NoNormalization",), intensities=(seen,))
    assert_as_stock(odd.write(tmp_path), tmp_path, image(scale=1 / 500))


def test_the_golden_patch_stays_in_the_range_of_a_gpu(tmp_path: Path) -> None:
    """Under float16 autocast, which this CPU can do too, the model's own data would overflow."""
    odd = OddModel(
        schemes=("NoNormalization",),
        intensities=(UNIT | {"percentile_99_5": 4e4},),
        trainer="nnUNetTrainerBN",
        change_weights=overflow_above(1.0),
    )
    with pytest.warns(ModelWarning, match="not finite"):
        bundle = pipeline_of(odd.write(tmp_path), tmp_path).bundle
    networks = Networks(bundle, torch.device("cpu"))
    with torch.autocast("cpu", torch.float16):
        check_golden(networks, read_golden(bundle))


def test_what_is_no_picture_is_refused_by_a_model_of_pictures(tmp_path: Path) -> None:
    odd = OddModel(2, ("R",), ("RGBTo01Normalization",), spacing=1.0)
    served = pipeline_of(odd.write(tmp_path), tmp_path)
    for options in ({}, {"preprocess": "stock"}):
        parts = {"image": image(), "options": json.dumps(options).encode()}
        problem = json.loads(served.answer(Request(parts, {})).body)
        assert (problem["status"], problem["code"]) == (422, "wrong_range")
        assert "0 to 255" in problem["detail"]


def test_a_model_of_pictures_may_be_limited_to_one_slice(tmp_path: Path) -> None:
    settings = ServingSettings(limits={"passes": 4, "voxels": 200})
    pipeline_of(OddModel(2).write(tmp_path), tmp_path, serving=settings)


def test_weights_that_give_nothing_finite_are_refused(tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        for tensor in weights.values():
            tensor.fill_(float("nan"))

    with pytest.raises(ToolError, match="fold 0 give no finite logit"):
        pipeline_of(OddModel(change_weights=spoil).write(tmp_path), tmp_path)


def test_more_channels_than_a_file_may_usually_have(tmp_path: Path) -> None:
    many = 70
    odd = OddModel(2, tuple(f"band {k}" for k in range(many)), ("ZScoreNormalization",) * many)
    served = pipeline_of(odd.write(tmp_path), tmp_path)
    limits = Limits().for_model(served.bundle.lead.channels)
    body = volumes.nifti(np.random.default_rng(0).random((20, 20, 1, many), np.float32), np.diag([1.5, 1.5, 1.5, 1]))
    assert labels_of(Pipeline(served.bundle, served.engine, limits, 600.0), body).shape == (1, 20, 20)


def test_a_trial_that_fails_names_stage_and_reason(tmp_path: Path) -> None:
    odd = OddModel(2, ("R",), ("RGBTo01Normalization",)).write(tmp_path)
    settings = ServingSettings(limits={"voxels": 100})
    with pytest.raises(ToolError, match=r"dry run failed in the stage decode: .*100") as failure:
        pipeline_of(odd, tmp_path, serving=settings)
    assert "dry-run" not in str(failure.value)
    with pytest.raises(UsageError, match="no limit has the name voxel;"):
        pipeline_of(odd, tmp_path, serving=ServingSettings(limits={"voxel": 100}))


def named(name: str) -> Callable[[dict[str, Any]], None]:
    """Plans that have another name for their network."""

    def change(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            configuration["architecture"]["network_class_name"] = name

    return change


@pytest.mark.parametrize(
    ("odd", "change"),
    [
        (OddModel(), old_format),
        (OddModel(residual=True), old_format),
        (
            OddModel(residual=True),
            named("dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"),
        ),
        (OddModel(2), named("PlainConvUNet")),
        (OddModel(2), named("a_package_that_nobody_has.unet.PlainConvUNet")),
    ],
    ids=["old plans", "old plans, residual", "a class that has moved", "a bare name", "a fork that is not installed"],
)
def test_networks_are_found_as_stock_finds_them(
    odd: OddModel, change: Callable[[dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_as_stock(odd.but(change_plans=change).write(tmp_path), tmp_path, image())


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "json.JSONDecoder",
        "NoSuchNetwork",
        "torch.nn.functional.relu",
        "antigravity",
        "__main__.PlainConvUNet",
        7,
    ],
)
def test_other_names_are_refused_and_not_imported(name: object, tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(ToolError, match="only network parts"):
        pipeline_of(OddModel(2, change_plans=named(name)).write(tmp_path), tmp_path)  # type: ignore[arg-type]
    assert "antigravity" not in sys.modules
    assert all(each.startswith(("nnunetv2.", "dynamic_network_architectures.")) for each in set(sys.modules) - before)


def test_a_trainer_with_the_older_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people have copied them into nnunetv2's own folder of trainers."""

    class nnUNetTrainerOfOld(nnUNetTrainer):  # type: ignore[misc] # noqa: N801 (nnU-Net's names)
        @staticmethod
        def build_network_architecture(
            architecture_class_name: str,
            arch_init_kwargs: dict[str, Any],
            arch_init_kwargs_req_import: list[str],
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = True,
        ) -> torch.nn.Module:
            arch_init_kwargs = arch_init_kwargs | {"conv_bias": False}
            return get_network_from_plans(  # type: ignore[no-any-return]
                architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import,
                num_input_channels, num_output_channels, True, enable_deep_supervision,
            )  # fmt: skip

    nnUNetTrainerOfOld.__module__ = network_architecture.nnUNetTrainerBN.__name__
    monkeypatch.setattr(network_architecture.nnUNetTrainerBN, "nnUNetTrainerOfOld", nnUNetTrainerOfOld, raising=False)
    odd = OddModel(2, trainer="nnUNetTrainerOfOld")
    assert_as_stock(odd.write(tmp_path), tmp_path, image())


def test_a_trainer_of_ones_own_on_a_network_of_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class lies outside of nnunetv2, what builds its network does not."""
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN\n"
        "class nnUNetTrainerMine(nnUNetTrainerBN):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    model = OddModel(2, trainer="nnUNetTrainerMine").write(tmp_path)
    served = assert_as_stock(model, tmp_path, image())
    assert served.bundle.lead.description.network_trainer == "nnUNetTrainerBN"


@pytest.mark.parametrize("builder", ["nnUNetTrainer", "nnUNetTrainerBN"])
def test_a_trainer_of_ones_own_that_borrows_what_builds_its_network(
    builder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "borrowed.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN\n"
        "class nnUNetTrainerBorrowed(nnUNetTrainer):\n"
        f"    build_network_architecture = staticmethod({builder}.build_network_architecture)\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    assert_as_stock(OddModel(2, trainer="nnUNetTrainerBorrowed").write(tmp_path), tmp_path, image())


def test_a_broken_file_beside_a_trainer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "aaa.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    with pytest.raises(ToolError, match=r"nnUNet_extTrainer.*no_such_package_anywhere"):
        network_builder("nnUNetTrainerMine")


def test_what_is_not_resampled_is_neither_too_thin_nor_too_large(tmp_path: Path) -> None:
    model = OddModel(change_plans=resampled_by("no_resampling_hack")).write(tmp_path)
    assert_as_stock(model, tmp_path, image((30, 30, 3), (0.2, 0.2, 0.1)))
    served = Pipeline(
        (bundle := ModelBundle(tmp_path / "unpacked")), LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0
    )
    huge = image((24, 24, 24), (150, 150, 150))
    file = volumes.write(tmp_path, "huge_0000.nii.gz", huge)
    np.testing.assert_array_equal(labels_of(served, huge), stock.predict(model, [file], probabilities=False).labels)


GROWTH = [1, 2]
"""By which somebody's own function makes an image larger: a fraction."""


def half_the_grid(data: Any, new_shape: Any, current_spacing: Any, new_spacing: Any) -> Any:
    """Somebody's own function: to half of an image that is large, and back to what is asked for."""
    large = data.shape[1] > 20
    shape = [n * GROWTH[0] // GROWTH[1] for n in data.shape[1:]] if large else new_shape
    return resample_torch.resample_torch_simple(data, shape)


def test_no_guess_about_an_unknown_function_refuses_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_the_grid.__module__ = no_resampling.__name__
    monkeypatch.setattr(no_resampling, "half_the_grid", half_the_grid, raising=False)
    model = OddModel(change_plans=resampled_by("half_the_grid")).write(tmp_path)
    served = assert_as_stock(model, tmp_path, image((44, 40, 36), (0.01, 0.01, 0.01)))
    body = image((44, 40, 36), (200, 200, 200))
    assert labels_of(served, body).shape == (36, 40, 44)
    few = Pipeline(served.bundle, served.engine, Limits(grid_voxels=1000), 600.0)
    refused = json.loads(few.answer(Request({"image": body}, {})).body)
    assert (refused["code"], refused["detail"].split(" voxels")[0].split()[-1]) == ("too_large", str(18 * 20 * 22))
    assert charged(served, body, monkeypatch) < charged(served, body, monkeypatch, [1, 1])
    assert charged(served, body, monkeypatch, [3, 2]) > charged(served, body, monkeypatch, [1, 1])


def charged(served: Pipeline, body: bytes, monkeypatch: pytest.MonkeyPatch, growth: Sequence[int] = (1, 2)) -> int:
    """Bytes that a case is charged for while it is predicted; what its header tells is the same each time."""
    seen = []
    engine = served.engine
    assert isinstance(engine, LocalEngine)
    with monkeypatch.context() as watched:
        watched.setitem(globals(), "GROWTH", list(growth))
        predict = engine.predict

        def watching(*arguments: Any) -> Any:
            seen.append(engine._admission.charged_bytes)
            return predict(*arguments)

        watched.setattr(engine, "predict", watching)
        assert served.answer(Request({"image": body}, {})).status is HTTPStatus.OK
    assert engine._admission.charged == 0
    [size] = seen
    return int(size)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"background": "0", "tumour": "1", "node": "2"}, ["background", "tumour", "node"]),
        ({"background": 0, "node": 2.0, "tumour": True}, ["background", "tumour", "node"]),
        ({"background": 0, "tumour": [1], "node": ["2"]}, ["background", "tumour", "node"]),
        ({"background": 0, "left": 1, "right": 1, "node": 2}, ["background", "left / right", "node"]),
        ({"background": 0, "whole": ["1", "2"], "core": 2, "regions": True}, ["whole", "core"]),
        ({"background": 0, "a": 1, "b": 2, "unused": []}, ["background", "a", "b"]),
        ({"background": 0, "a": -1, "b": 2}, ["a", "background", "b"]),
    ],
)
def test_label_values_of_any_type_that_stock_reads(labels: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    regions = {"regions_class_order": [1, 2]} if labels.pop("regions", False) else {}
    odd = OddModel(2, labels=labels, more_dataset=regions)
    served = assert_as_stock(odd.write(tmp_path), tmp_path, image())
    description = served.answer(Request({}, {"describe": "True"}))
    assert description.status is HTTPStatus.OK, description.body
    assert json.loads(description.body)["probability_channels"] == names
    options = {"save_probabilities": True, "probability_channels": [9]}
    refused = served.answer(Request({"image": image(), "options": json.dumps(options).encode()}, {}))
    assert json.loads(refused.body)["code"] == "bad_option"
    report = served.answer(Request({"image": image(), "options": b'{"output_format": "json"}'}, {}))
    painted = labels_of(served, image())
    for structure in json.loads(report.body)["structures"]:
        assert structure["voxels"] == np.isin(painted, structure["labels"]).sum()


def test_modality_counts_where_there_are_both_names(tmp_path: Path) -> None:
    odd = OddModel(2, more_dataset={"modality": {"0": "T1"}, "channel_names": {"0": "a", "1": "b"}})
    served = assert_as_stock(odd.write(tmp_path), tmp_path, image())
    assert served.bundle.lead.channel_names == {"0": "T1"}
