"""TorchServe's management API, asked from the server's machine, or from another one with a token of the environment."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from .tokens import Bearer

TOKEN_VARIABLE = "NNUNET_TORCHSERVE_MANAGEMENT_TOKEN"  # noqa: S105 (a variable's name)
"""A management key of a server that has tokens on, for who cannot read its key file."""


def management(url: str, control: Path | None, timeout_s: float) -> httpx.Client:
    """A client of the API.

    Args:
        url: of it.
        control: the server's private directory, beside which its keys are; ``None`` if that is not known.
        timeout_s: of everything.
    """
    headers, auth = {}, None
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        headers["Authorization"] = f"Bearer {token}"
    elif control is not None:
        auth = Bearer(url, control)
    return httpx.Client(base_url=url.rstrip("/"), timeout=timeout_s, trust_env=False, headers=headers, auth=auth)
