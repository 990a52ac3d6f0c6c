"""How to install what an extra of the project brings: said in one way, wherever something of it is missing."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """A command for people: the project is on no index.

    >>> how_to_install("openvino")
    "in a clone of the project, pip install '.[openvino]'"
    """
    return f"in a clone of the project, pip install '.[{extra}]'"
