"""The image under test, and the numbers that its tests measure."""

from __future__ import annotations

import pytest

from support.image import wanted

MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def image() -> str:
    """Name of the image; its tests are skipped where none is asked for."""
    return wanted()


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Takes sentences with a number in them; they are printed after the tests."""
    return pytestconfig.stash.setdefault(MEASURED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if measured := config.stash.get(MEASURED, []):
        terminalreporter.section("measured")
        for sentence in measured:
            terminalreporter.line(sentence)
