"""Somebody's own files are imported under names of their own."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import traceback
from functools import partial

import pytest
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_simple

from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.own_code import OwnCode
from nnunet_torchserve.resampling import is_somebodys_own


def code(**files: str) -> OwnCode:
    return OwnCode({f"{stem}.py": text.encode() for stem, text in files.items()})


def test_files_of_one_name_do_not_meet() -> None:
    one, other = code(trainer="value = 1"), code(trainer="value = 2")
    assert (one.module("trainer.py").value, other.module("trainer.py").value) == (1, 2)
    assert "trainer" not in sys.modules
    assert importlib.util.find_spec("trainer") is None


def test_equal_files_are_one_module() -> None:
    assert code(a="value = object()").module("a.py") is code(a="value = object()").module("a.py")


@pytest.mark.parametrize(
    "line",
    [
        "import helper",
        "from . import helper",
        "import json, helper, os",
        "import helper as other; helper = other",
        "from helper import value; import helper",
        "from .helper import value; from . import helper",
    ],
)
def test_files_may_import_each_other_as_in_a_folder_of_trainers(line: str) -> None:
    module = code(main=f"{line}\nfound = helper.value", helper="value = 'ours'").module("main.py")
    assert module.found == "ours"
    assert "helper" not in sys.modules


def test_a_file_takes_the_place_of_no_module_of_pythons_or_of_a_package() -> None:
    files = code(json="import json\nvalue = json.loads('1')", numpy="import numpy\nimport json\nsame = json")
    assert files.module("json.py").value == 1
    assert files.module("numpy.py").same is json
    assert files.module("numpy.py").numpy is sys.modules["numpy"]


def test_nothing_of_it_is_looked_for_on_disk() -> None:
    """Imports at a time when the archive's folder has long been gone."""
    late = code(main="def load():\n    import helper\n    return helper.value", helper="value = 3").module("main.py")
    assert late.load() == 3


def test_a_future_import_and_the_text_of_a_function_survive() -> None:
    text = "'''What it is for.'''\nfrom __future__ import annotations\ndef f(x: Unknown): return 1 / x\n"
    module = code(main=text).module("main.py")
    assert module.__doc__ == "What it is for."
    assert inspect.getsource(module.f) == "def f(x: Unknown): return 1 / x\n"
    with pytest.raises(ZeroDivisionError) as failure:
        module.f(0)
    assert "return 1 / x" in "".join(traceback.format_exception(failure.value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_package", r"main\.py imports no_such_package, which is not installed here"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("def :", "cannot be imported: SyntaxError"),
        ("import helper.part", "imports helper"),
        ("from .missing import value", r"main\.py imports missing, which is not installed here"),
        ("from . import missing", "ImportError cannot import name 'missing' from 'the folder of it'"),
    ],
)
def test_what_keeps_a_file_from_being_imported_is_said(text: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        code(main=text, helper="").module("main.py")


def test_what_a_file_imports_is_known_without_running_it() -> None:
    text = "import helper, numpy.linalg\nfrom os import path\nfrom . import other\nraise SystemExit"
    assert code(main=text, helper="", other="").imports("main.py") == ({"helper.py", "other.py"}, {"numpy", "os"})


def test_a_function_that_nnunet_does_not_come_with_is_somebodys_own_wherever_it_lies() -> None:
    def copied(*_: object) -> None:
        pass

    copied.__module__ = "nnunetv2.preprocessing.resampling.mine"
    assert is_somebodys_own(partial(copied))
    assert not is_somebodys_own(partial(resample_torch_simple))
