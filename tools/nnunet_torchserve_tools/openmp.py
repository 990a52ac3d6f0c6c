"""How OpenMP's threads wait: PyTorch has some, and other libraries compute beside them on the same cores.

By default they spin, for the next piece of work that may come. On cores that others want, that keeps those from
working: a request has taken up to ten times as long.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def let_threads_sleep(environ: MutableMapping[str, str]) -> None:
    """Have them sleep while they wait, unless somebody has said otherwise.

    Args:
        environ: of a process that has not loaded PyTorch yet: it is read then.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
