"""How tests are collected and shared; the fixtures are in support/fixtures.py."""

from __future__ import annotations

import gc
import os
import warnings

import pytest

from support.examples import register_profiles

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")  # servers that live for a minute
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # engines and workers compile our modules once, not each

_NAMED_BY_BYTES = 16

register_profiles()
gc.disable()  # until all is imported and collected: nearly all of it stays, and looking through it costs a fifth


def pytest_configure(config: pytest.Config) -> None:
    """The process of ``pytest -n`` that hands tests to others does without PyTorch, and the others begin sooner."""
    hands_over = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_over:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # torch-model-archiver leaves a file open
            config.pluginmanager.import_plugin("support.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers begin first: they wait a lot, and another process fills the time. Files of little work end."""
    items.sort(key=lambda item: (item.get_closest_marker("serve") is None, item.path.parent.name == "tools"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Files are not named by their bytes: a compressor writes the time into them, and processes must agree on names."""
    return argname if isinstance(val, bytes) and len(val) > _NAMED_BY_BYTES else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """How the processes of ``pytest -n`` share the tests."""
    from support.together import Together

    config.option.loadscopereorder = False  # but as collected
    return Together(config, log)
