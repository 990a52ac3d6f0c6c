"""Early deaths of workers, as TorchServe's log shows them; its words are those of TorchServe 0.12.0."""

from __future__ import annotations

import itertools

import pytest

from nnunet_torchserve_tools.worker_log import Death, early_deaths, load_failure

WORKER = "W-20000-brain_1.0"
BEGIN = ["s_name_part0=/tmp/.ts.sock, s_name_part1=20000, pid=5", "[PID]5", "Torch worker started."]
TRACEBACK = [
    "Backend worker process died.",
    "Traceback (most recent call last):",
    '  File "model_service_worker.py", line 301, in <module>',
    "    worker.run_server()",
    "OSError: AF_UNIX path too long",
]


def said(*lines: str, stream: str = "stdout") -> list[str]:
    return [f"2026-01-01T00:00:00,000 [INFO ] {WORKER}-{stream} MODEL_LOG - {line}" for line in lines]


def changes(*states: str) -> list[str]:
    """TorchServe writes such lines twice."""
    head = f"2026-01-01T00:00:00,000 [DEBUG] {WORKER} org.pytorch.serve.wlm.WorkerThread - {WORKER}"
    pairs = itertools.pairwise(states)
    return [f"{head} State change {before} -> {after}" for before, after in pairs for _ in range(2)]


STARTED = changes("null", "WORKER_STARTED")
DIED = changes("WORKER_STARTED", "WORKER_STOPPED")
LOADED = changes("WORKER_STARTED", "WORKER_MODEL_LOADED")


def test_a_worker_that_loads_is_not_dead_however_long_it_takes() -> None:
    assert early_deaths([*said(*BEGIN), *STARTED, *said("still loading")]) == []


def test_a_traceback_is_the_reason() -> None:
    [death] = early_deaths([*said(*BEGIN), *said(*TRACEBACK), *DIED])
    assert (death.worker, death.count) == ("worker 20000 of brain 1.0", 1)
    assert death.reason == "OSError: AF_UNIX path too long"


def test_words_that_reach_the_log_after_the_death_count_too() -> None:
    [death] = early_deaths([*said(*BEGIN), *DIED, *said(*TRACEBACK)])
    assert death.reason == "OSError: AF_UNIX path too long"


def test_the_reason_of_an_earlier_death_is_kept() -> None:
    [death] = early_deaths([*said(*BEGIN), *said(*TRACEBACK), *DIED, *said(*BEGIN), *STARTED])
    assert (death.reason, death.count) == ("OSError: AF_UNIX path too long", 1)


@pytest.mark.parametrize(
    "line",
    [
        "Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding",
        "/opt/venv/bin/python3: can't open file '/ts/model_service_worker.py': [Errno 2] No such file or directory",
        "model_service_worker.py: error: unrecognized arguments: --metrics-config",
        "Backend worker did not receive connection in: 30",
    ],
)
def test_what_python_says_without_a_traceback_is_a_reason(line: str) -> None:
    [death] = early_deaths([*said(line, stream="stderr"), *changes("null", "WORKER_STOPPED")])
    assert death.reason == line


def test_an_exception_of_several_lines_is_one() -> None:
    [death] = early_deaths([*said(*TRACEBACK[:-1], "ValueError: one", "two"), *DIED])
    assert death.reason == "ValueError: one two"


def test_a_worker_that_was_killed_has_no_reason_and_its_last_line_is_a_hint() -> None:
    [death] = early_deaths([*said(*BEGIN), *said("UserWarning: old driver", stream="stderr"), *DIED])
    assert (death.reason, death.hint) == ("", "UserWarning: old driver")
    assert early_deaths([*said(*BEGIN), *DIED])[0].hint == ""


def test_deaths_of_one_worker_are_counted() -> None:
    again = changes("WORKER_STOPPED", "WORKER_STARTED", "WORKER_STOPPED")
    [death] = early_deaths([*said(*BEGIN), *DIED, *again, *changes("WORKER_STOPPED", "WORKER_STOPPED")])
    assert death.count == 3


def test_a_worker_that_serves_after_a_death_is_forgiven_and_a_later_end_is_no_early_death() -> None:
    served = [*said(*BEGIN), *said(*TRACEBACK), *DIED, *said(*BEGIN), *STARTED, *LOADED]
    assert early_deaths(served) == []
    assert early_deaths([*served, *changes("WORKER_MODEL_LOADED", "WORKER_STOPPED")]) == []


def test_a_worker_that_is_scaled_away_has_not_died() -> None:
    assert early_deaths([*STARTED, *changes("WORKER_STARTED", "WORKER_SCALED_DOWN", "WORKER_STOPPED")]) == []


def test_what_torchserve_says_of_a_worker_that_it_could_not_start_is_a_hint() -> None:
    error = [
        f"2026-01-01T00:00:00,000 [ERROR] {WORKER} org.pytorch.serve.wlm.WorkerThread - Backend worker error",
        "org.pytorch.serve.wlm.WorkerInitializationException: Failed start worker process",
        "\tat org.pytorch.serve.wlm.WorkerLifeCycle.startWorker(WorkerLifeCycle.java:10)",
        'Caused by: java.io.IOException: Cannot run program "python": error=2, No such file or directory',
        "\tat java.lang.ProcessBuilder.start(ProcessBuilder.java:1143)",
    ]
    [death] = early_deaths([*error, *changes("null", "WORKER_STOPPED")])
    assert death == Death(
        "worker 20000 of brain 1.0",
        1,
        "",
        'java.io.IOException: Cannot run program "python": error=2, No such file or directory',
    )


def test_a_handlers_own_words_are_found() -> None:
    assert (
        load_failure(said("NNUNET_TORCHSERVE_LOAD_FAILED BundleError: it is damaged")) == "BundleError: it is damaged"
    )
    assert load_failure(said(*TRACEBACK)) is None
