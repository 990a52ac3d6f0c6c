"""JSON files of nnU-Net's that the user has named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ToolError, UsageError


def read_object(file: Path, missing: str) -> dict[str, Any]:
    """The object that a file holds.

    Args:
        file: JSON.
        missing: what to say to the user if it cannot be read.

    Raises:
        UsageError: it cannot be read.
        ToolError: it is no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(missing) from error
    except ValueError as error:
        msg = f"{file} is no valid JSON"
        raise ToolError(msg) from error
    if not isinstance(content, dict):
        msg = f"{file} holds no JSON object"
        raise ToolError(msg)
    return content
