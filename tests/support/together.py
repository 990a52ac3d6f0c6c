"""How the processes of ``pytest -n`` share the tests (docs/testing.md).

A file stays together, so that its fixtures are made once. So do the files whose tests share the session's server; one
that is missing in the list costs a second such server, and nothing else.
"""

from __future__ import annotations

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

SHARE_A_SERVER = frozenset(
    {
        "test_attacks.py",
        "test_devices.py",
        "test_docs.py",
        "test_folder_live.py",
        "test_grpc.py",
        "test_live.py",
        "test_live_dicom.py",
        "test_live_recipes.py",
        "test_live_reuse.py",
        "test_predictor.py",
        "test_proxy.py",
        "test_stalled_uploads.py",
        "test_stock_parity.py",
    }
)
"""Files with tests that use the fixture ``server``."""


class Together(LoadScopeScheduling):  # type: ignore[misc]
    """Files in the order of collection; a process that has done one takes the next."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "server" if PurePath(file).name in SHARE_A_SERVER else file
