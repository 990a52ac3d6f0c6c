"""A wrong path to a model is refused before anything heavy is loaded, and a near one is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_torchserve_tools.errors import UsageError
from nnunet_torchserve_tools.model_folders import MOST_HINTS, check_model_folder, check_sources

HEAVY = ("numpy", "torch", "nnunetv2")


def trained(folder: Path) -> Path:
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text("{}")
    return folder


def test_one_level_too_high_names_the_folders_below(tmp_path: Path) -> None:
    names = [f"nnUNetTrainer__nnUNetPlans__{index}" for index in range(MOST_HINTS + 1)]
    for index, name in enumerate(reversed(names)):
        trained(tmp_path / name)
        with pytest.raises(UsageError, match=r"has no plans\.json; did you mean (.*)\?") as refused:
            check_model_folder(tmp_path)
        named = [each for each in names if f"{tmp_path}/{each}" in str(refused.value)]
        assert named == sorted(names[-1 - index :])[:MOST_HINTS]
    assert str(refused.value).endswith(f"{names[2]}? (there are 4)")


def test_a_fold_names_the_model_that_it_is_of(tmp_path: Path) -> None:
    model = trained(tmp_path / "model")
    with pytest.raises(UsageError, match=f"did you mean {model}\\?$"):
        check_model_folder(model / "fold_0")


def test_no_folder_is_made_up(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"has no plans\.json$"):
        check_model_folder(tmp_path)


def test_what_is_a_file_is_left_to_those_who_open_zips(tmp_path: Path) -> None:
    (tmp_path / "export").touch()
    check_sources([tmp_path / "export"], [trained(tmp_path / "first")])
    with pytest.raises(UsageError, match="does not exist or is no file; name the zip"):
        check_sources([tmp_path / "export"], [tmp_path / "first.zip"])


@pytest.mark.parametrize(("arguments", "said"), [(["nowhere"], "nowhere does not exist"), ([], "name a trained model")])
def test_the_command_loads_nothing_heavy_to_say_so(arguments: list[str], said: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom nnunet_torchserve_tools.console import main\n"
        f"sys.argv[1:] = ['archive', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        f"    sys.exit('loaded ' + ' '.join(sys.modules.keys() & {set(HEAVY)!r}) if end.code == 2 else 'no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    error, *others = done.stderr.splitlines()
    assert error.startswith(f"error: {said}")
    assert others == ["loaded "]
