"""Errors of the command line: one sentence for the user, no traceback.

::

    ToolError           exit code 1
    ├── UsageError      exit code 2
    └── Lost            exit code 3
"""

from __future__ import annotations

from typing import ClassVar


class ToolError(Exception):
    """The command could not do what was asked."""

    exit_code: ClassVar[int] = 1


class ModelWarning(UserWarning):
    """A model that is archived has something that its users should know."""


class UsageError(ToolError):
    """The command was asked for something that cannot be meant."""

    exit_code = 2


class Lost(ToolError):
    """A server was stopped although not everything was answered."""

    exit_code = 3
