"""What an archive does not carry: the packager, the launcher and the command line."""

from __future__ import annotations
