"""The private directory of a server, seen from outside: orders to its workers, and what they report.

The workers' side is :mod:`nnunet_torchserve.draining`.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nnunet_torchserve.draining import ORDERS, REPORTS, order_name

from .errors import ToolError, UsageError
from .management import management

_ANSWER_S = 30.0
_LONGEST_ANSWER_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be drained.

    Attributes:
        management_url: of the server.
        control: its private directory.
        model: TorchServe's name; ``None`` is every model.
        version: ``None`` is every version.
    """

    management_url: str
    control: Path
    model: str | None = None
    version: str | None = None

    @property
    def order(self) -> Path:
        """The file that orders it."""
        return self.control / ORDERS / order_name(self.model, self.version)

    @property
    def name(self) -> str:
        """For messages."""
        if self.model is None:
            return "every model"
        return self.model if self.version is None else f"{self.model}/{self.version}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker wrote last.

    Attributes:
        number: it counts up while an order stands.
        idle: it has no request, and none is on its way to or from it.
        works: it has one that it took before the order.
        refused: how many it has refused since it loaded.
    """

    number: int
    idle: bool
    works: bool
    refused: int


def give_order(target: Target, content: Mapping[str, int]) -> None:
    """Let the workers refuse from their next request on; in one step."""
    unfinished = target.order.with_name(f".{target.order.name}")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(target.order)


def reports(control: Path) -> dict[int, Report]:
    """What the workers reported last, by process id."""
    found = {}
    for file in (control / REPORTS).glob("[0-9]*"):
        try:
            content = json.loads(file.read_text())
            idle = bool(content["idle"])
            works, refused = content.get("works", not idle), content.get("refused", 0)  # older archives say less
            found[int(file.name)] = Report(int(content["report"]), idle, bool(works), int(refused))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # gone, or of a worker that ends
    return found


def versions(target: Target, timeout_s: float = _ANSWER_S) -> list[dict[str, Any]]:
    """The management API's description of each model version of a target.

    On a GPU machine it runs ``nvidia-smi`` once for each worker to give it.

    Args:
        target: which.
        timeout_s: for each answer.

    Raises:
        UsageError: the API does not answer, or has no such model.
        ToolError: it answered something else.
    """
    try:
        with management(target.management_url, target.control, timeout_s) as client:
            if target.model is not None:
                return _described(client, target.model, target.version)
            listed = client.get("/models", params={"limit": 1000})
            listed.raise_for_status()
            names = [str(each["modelName"]) for each in listed.json()["models"]]
            return [state for name in names for state in _described(client, name, None)]
    except httpx.TransportError as error:
        msg = f"the management API at {target.management_url} does not answer: {type(error).__name__}"
        raise UsageError(msg) from error
    except (httpx.HTTPStatusError, KeyError, ValueError) as error:
        msg = f"the management API at {target.management_url} gave no list of models"
        raise ToolError(msg) from error


class Descriptions:
    """The same, asked for by a thread: it may take long, or for ever where a GPU's driver hangs.

    Each such question holds one of TorchServe's few threads. So there is never more than one: the next is asked when
    the last has been answered, or its connection is lost. Who takes waits for others who do, so that nobody gets an
    answer that somebody else waits for.
    """

    def __init__(self, target: Target) -> None:
        """Of which nothing is asked yet."""
        self.target = target
        self._answers: queue.SimpleQueue[list[dict[str, Any]] | ToolError] = queue.SimpleQueue()
        self._is_asked = False
        self._lock = threading.Lock()

    def take(self, wait_s: float = 0.0) -> list[dict[str, Any]] | ToolError | None:
        """An answer that has come, or why there is none; ``None`` while it is awaited.

        Args:
            wait_s: for it.
        """
        with self._lock, suppress(queue.Empty):
            if not self._is_asked:
                self._is_asked = True
                threading.Thread(target=self._ask, name="management", daemon=True).start()
            answer = self._answers.get(timeout=wait_s) if wait_s else self._answers.get_nowait()
            self._is_asked = False
            return answer
        return None

    def _ask(self) -> None:
        try:
            self._answers.put(versions(self.target, _LONGEST_ANSWER_S))
        except ToolError as error:
            self._answers.put(error)
        except Exception as error:  # noqa: BLE001 (whoever waits must hear of it)
            self._answers.put(ToolError(f"the management API's answer cannot be read: {error}"))


def _described(client: httpx.Client, model: str, version: str | None) -> list[dict[str, Any]]:
    answer = client.get(f"/models/{model}/{version or 'all'}")
    if answer.status_code == httpx.codes.NOT_FOUND:
        msg = f"the server has no model {model if version is None else f'{model}/{version}'}"
        raise UsageError(msg)
    answer.raise_for_status()
    states: list[dict[str, Any]] = answer.json()
    return states
