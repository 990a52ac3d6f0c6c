"""``nnunet-torchserve list``: which models a server has, what they are made of, and how busy they are.

Three sources, each of which sees something else. A model itself says what it is and which others the server was started
with; TorchServe's management port has workers and queues, and models that came later; the metrics port has the cases
that workers hold. What the sources that were given cannot see is said. A state directory needs ``[server]``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from nnunet_torchserve_client.choosing import listed_folds
from nnunet_torchserve_client.client import URL_VARIABLE, Client
from nnunet_torchserve_client.description import Description, ServedModel, recipe_in_words
from nnunet_torchserve_client.errors import ClientError, UnknownModel, WrongUse
from nnunet_torchserve_client.progress import printable

from .errors import ToolError, UsageError
from .management import management

_PATIENCE_S = 30.0
"""For a description, which may wait in a queue behind cases."""

_DESCRIBED = (
    "dataset", "trainer", "folder_trainer", "plans", "configuration", "folds", "checkpoint", "channels", "labels",
    "digest", "recipe", "members", "postprocessing",
)  # fmt: skip
"""Keys of a description that are listed."""

_NOT_WRITTEN_DOWN = ("channels", "labels", "members", "postprocessing")
"""Those that ``serve`` does not know."""

_CASES = re.compile(r"^nnunet_cases_(in_flight|waiting)\{(.*)\} ([0-9.eE+]+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(slots=True)
class Listed:
    """A model and version; ``None`` is what was not seen.

    Attributes:
        name, version: in the URL of a prediction.
        is_default: whether the name alone means this version.
        dataset, trainer, plans, configuration, folds, checkpoint: nnU-Net's; ``trainer`` is the checkpoints' word.
        folder_trainer: the trainer that nnU-Net's folder was named after.
        channels, labels: nnU-Net's, by number and by name.
        recipe: how one answer is made of the members.
        members: what each of them is, by name; of an archive of several the names above are those of one.
        postprocessing: what is removed from the labels.
        digest: of the archive.
        workers: how many there are of each status.
        requests_queued: that no worker has taken.
        cases_held: that hold memory, and
        cases_waiting: that wait for it.
        own_name: the archive's, by which its metrics go.
    """

    name: str
    version: str
    is_default: bool | None = None
    dataset: str | None = None
    trainer: str | None = None
    folder_trainer: str | None = None
    plans: str | None = None
    configuration: str | None = None
    folds: list[int | str] | None = None
    checkpoint: str | None = None
    channels: dict[str, str] | None = None
    labels: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    members: dict[str, dict[str, Any]] | None = None
    postprocessing: dict[str, Any] | None = None
    digest: str | None = None
    workers: dict[str, int] | None = None
    requests_queued: int | None = None
    cases_held: int | None = None
    cases_waiting: int | None = None
    own_name: str | None = None

    def take(self, model: ServedModel) -> None:
        """What ``serve`` wrote down."""
        self.dataset, self.trainer, self.plans = model.dataset, model.trainer, model.plans
        self.folder_trainer = model.trained_by
        self.configuration, self.folds = model.configuration, list(model.folds)
        self.checkpoint, self.digest = model.checkpoint, model.digest
        self.recipe = None if model.recipe is None else dict(model.recipe)

    def take_description(self, raw: Mapping[str, Any]) -> None:
        """What the model says of itself."""
        for name in _DESCRIBED:
            if raw.get(name) is not None:
                setattr(self, name, raw[name])
        self.own_name = raw.get("name", self.own_name)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where to look.

    Attributes:
        urls: base URLs of the inference port, with spaces between them; ``None`` if they are not known.
        model: a model of the server, through which it is asked.
        management_url, metrics_url: of the server; ``None`` leaves that out.
        verify: see the client.
        control: the server's private directory, beside which its tokens are.
    """

    urls: str | None
    model: str | None = None
    management_url: str | None = None
    metrics_url: str | None = None
    verify: str | None = None
    control: Path | None = None


@dataclass(slots=True)
class Listing:
    """A server's models.

    Attributes:
        models: by name and version.
        not_seen: what the sources could not tell, and what would.
    """

    models: list[Listed] = field(default_factory=list)
    not_seen: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        for each in self.models:
            yield printable(f"{each.name} {each.version}" + (" (default version)" if each.is_default else ""))
            yield from map(printable, _made_of(each))
            if each.postprocessing is not None:
                yield "  labels are postprocessed, unless a request says otherwise"
            if each.channels is not None:
                yield printable(f"  channels: {', '.join(each.channels.values())}")
            if each.labels is not None:
                yield printable(f"  labels: {', '.join(f'{name} {value}' for name, value in each.labels.items())}")
            if each.workers is not None:
                workers = ", ".join(f"{count} {status}" for status, count in sorted(each.workers.items())) or "none"
                cases = "" if each.cases_held is None else f", {each.cases_held} with workers"
                cases += f", {each.cases_waiting} of them wait for memory" if each.cases_waiting else ""
                yield printable(f"  workers: {workers}; requests: {each.requests_queued} in the queue{cases}")
        for what in self.not_seen:
            yield printable(f"not seen: {what}")


def _made_of(model: Listed) -> Iterator[str]:
    """What a model was trained as; of several members, the recipe and each of them."""
    members = model.members or {}
    if len(members) > 1 or (model.recipe or {}).get("kind") == "cascade":
        yield f"  {model.dataset}, {recipe_in_words(model.recipe or {})}{':' if members else ''}"
        for name, member in members.items():
            yield f"    {name}: {_trained(member)}"
    elif model.dataset is not None:
        yield f"  {model.dataset}, {_trained(asdict(model))}"


def _trained(model: Mapping[str, Any]) -> str:
    made = f"{model.get('folder_trainer') or model.get('trainer')}__{model.get('plans')}__{model.get('configuration')}"
    return f"{made}, folds {listed_folds(model.get('folds') or ())}, {model.get('checkpoint')}"


def addresses(given: Sequence[str] | None) -> str | None:
    """The inference ports that were given, or those of the environment; ``None`` if there are none."""
    return " ".join(given) if given else os.environ.get(URL_VARIABLE) or None


def of_state_dir(state_dir: Path, sources: Sources) -> Sources:
    """The addresses of a server that was started there.

    Raises:
        UsageError: none runs.
    """
    from .server import read_state

    server = read_state(state_dir)
    if server is None or server.process() is None:
        msg = f"no server of {state_dir.resolve()} is running"
        raise UsageError(msg)
    urls = sources.urls or server.inference_url
    control = Path(server.control_dir)
    return Sources(urls, sources.model, server.management_url, server.metrics_url, sources.verify, control)


def list_models(sources: Sources) -> Listing:
    """Ask all sources.

    Raises:
        UsageError: none was given, or the server does not have the model.
        ToolError: the server does not answer.
    """
    listing = Listing()
    if sources.management_url is not None:
        listing.models = _managed(sources.management_url, sources.control)
        if sources.model is not None and sources.model not in [each.name for each in listing.models]:
            msg = f"the server has no model {sources.model}"
            raise UsageError(msg)
        _describe_managed(sources, listing)
    elif sources.model is None:
        msg = (
            "TorchServe's inference port has no list of models: name one of them with --model, which knows the others, "
            "or give --management-url or --state-dir"
        )
        raise UsageError(msg)
    else:
        _ask_models(sources, listing)
        listing.not_seen.append("workers and requests in hand: --management-url or --state-dir")
    if sources.metrics_url is not None:
        _count_cases(sources.metrics_url, listing)
    elif sources.management_url is not None:
        listing.not_seen.append("cases that workers have: --state-dir, on the server's machine")
    return listing


def _ask_models(sources: Sources, listing: Listing) -> None:
    """Through a model: itself, and those that it knows of."""
    try:
        first = _description(sources, str(sources.model), None)
    except ClientError as error:
        kind = UsageError if isinstance(error, UnknownModel | WrongUse) else ToolError
        raise kind(str(error)) from error
    if first.served is None:
        listing.models = [Listed(str(sources.model), first.model.version)]
        listing.models[0].take_description(first.raw)
        listing.not_seen.append("other models: the server was not started by nnunet-torchserve serve")
        return
    for model in first.served:
        listed = Listed(model.name, model.version)
        listed.take(model)
        listing.models.append(listed)
        if model.digest == first.digest:
            listed.take_description({name: first.raw.get(name) for name in _NOT_WRITTEN_DOWN})
        else:
            _describe(sources, listed, listing)
    listing.not_seen.append("models that were registered after the server's start: --management-url or --state-dir")


def _describe_managed(sources: Sources, listing: Listing) -> None:
    for listed in listing.models:
        if not (listed.workers or {}).get("READY"):
            listing.not_seen.append(f"what {listed.name} {listed.version} is: it has no worker that is READY")
        elif sources.urls is not None:
            _describe(sources, listed, listing)
        else:
            _describe_by_management(sources, listed, listing)


def _describe(sources: Sources, listed: Listed, listing: Listing) -> None:
    try:
        listed.take_description(_description(sources, listed.name, listed.version).raw)
    except ClientError as error:
        listing.not_seen.append(f"what {listed.name} {listed.version} is: {error}")


def _description(sources: Sources, model: str, version: str | None) -> Description:
    verify = True if sources.verify is None else sources.verify
    with Client(
        sources.urls,
        model,
        version,
        token=_token(sources),
        verify=verify,
        deadline_s=_PATIENCE_S,
        first_contact_s=5.0,
    ) as client:
        return client.describe()


def _token(sources: Sources) -> str | None:
    """TorchServe's own key for predictions, where the server has one; ``None`` takes that of the environment."""
    if sources.control is None or sources.management_url is None:
        return None
    from .tokens import inference_token

    try:
        return inference_token(sources.management_url, sources.control)
    except httpx.HTTPError as error:
        msg = f"{sources.management_url} gives no new token: {type(error).__name__}"
        raise ToolError(msg) from error


def _describe_by_management(sources: Sources, listed: Listed, listing: Listing) -> None:
    with suppress(ToolError, KeyError, TypeError, IndexError):
        path = f"/models/{listed.name}/{listed.version}"
        [state] = _get(str(sources.management_url), sources.control, path, customized="true")
        metadata = state["customizedMetadata"]
        listed.take_description(metadata)
        return
    listing.not_seen.append(f"what {listed.name} {listed.version} is: no worker described it")


def _managed(url: str, control: Path | None) -> list[Listed]:
    """The models of the management port, with workers and queues."""
    found = []
    for each in _get(url, control, "/models", limit="1000")["models"]:
        name = str(each["modelName"])
        default = str(_get(url, control, f"/models/{name}")[0]["modelVersion"])
        for state in _get(url, control, f"/models/{name}/all"):
            listed = Listed(name, str(state["modelVersion"]), str(state["modelVersion"]) == default)
            statuses = [str(worker["status"]) for worker in state["workers"]]
            listed.workers = {status: statuses.count(status) for status in set(statuses)}
            listed.requests_queued = int((state.get("jobQueueStatus") or {}).get("pendingRequests", 0))
            found.append(listed)
    return found


def _get(url: str, control: Path | None, path: str, **parameters: str) -> Any:
    try:
        with management(url, control, _PATIENCE_S) as client:
            answer = client.get(path, params=parameters)
            answer.raise_for_status()
            return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        what = str(error) or type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            what = f"HTTP {error.response.status_code}"
        msg = f"{url} does not answer as TorchServe's management port (8081) does: {what}"
        raise ToolError(msg) from error


def _count_cases(url: str, listing: Listing) -> None:
    """What the engines hold, by the archives' own names, which are matched by model and version."""
    try:
        text = httpx.get(f"{url.rstrip('/')}/metrics", timeout=_PATIENCE_S, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        listing.not_seen.append(f"cases that workers have: the metrics port does not answer ({type(error).__name__})")
        return
    for listed in listing.models:
        counts = {"in_flight": 0, "waiting": 0}
        for what, labels, value in _CASES.findall(text):
            known = dict(_LABEL.findall(labels))
            if (known.get("model_name"), known.get("model_version")) == (
                listed.own_name or listed.name,
                listed.version,
            ):
                counts[what] += int(float(value))
        listed.cases_held, listed.cases_waiting = counts["in_flight"], counts["waiting"]
