"""TorchServe's own tokens on a live server: everybody else is refused, and our commands work as without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve_tools import drain, launcher
from nnunet_torchserve_tools.list_models import Sources, list_models, of_state_dir
from nnunet_torchserve_tools.tokens import key_file
from support.chaos import Case, wait_for
from support.foreground import foreground

pytestmark = [pytest.mark.serve, pytest.mark.long]  # tests/tools/test_tokens.py has them without a server

CASE = Case((40, 38, 6))


def test_with_tokens_on_others_are_refused_and_our_commands_work(
    archive_of: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["--models", "flat.mar", "--workers", "1", "--tokens", "--management-host", "0.0.0.0"]
    with foreground(archive_of("flat").parent, tmp_path, *arguments) as serve:
        serve.wait_until_ready()
        wait_for(lambda: serve.says("ready", "ok"))
        server = launcher.read_state(serve.state_dir)
        assert server is not None
        file = key_file(Path(server.control_dir))
        assert file.stat().st_mode & 0o777 == 0o600
        for url in (f"{server.management_url}/models", f"{server.inference_url}/ping"):
            assert httpx.get(url, trust_env=False).status_code == 400

        for api in ("management", "inference"):
            old = json.loads(file.read_text())
            old[api]["expiration time"] = "2020-01-01T00:00:00.123456789Z"  # TorchServe itself writes all it knows
            file.write_text(json.dumps(old))
            listed = list_models(of_state_dir(serve.state_dir, Sources(None)))
            assert [(each.name, each.workers, each.digest is not None) for each in listed.models] == [
                ("flat", {"READY": 1}, True)
            ]
            assert listed.not_seen == []
            fresh = json.loads(file.read_text())
            assert fresh[api]["key"] != old[api]["key"]

        target = drain.find_target(serve.state_dir, server.management_url, "flat")
        drain.drain(target, 300, 1)
        assert serve.says("ready", "draining")
        drain.resume(target)
        shown = {"Authorization": f"Bearer {fresh['inference']['key']}", "X-Nnunet-Options": CASE.options}
        url = f"{server.inference_url}/predictions/flat"
        assert httpx.post(url, content=CASE.body, headers=shown, timeout=300, trust_env=False).status_code == 200
        wait_for(lambda: serve.says("ready", "ok"))
        serve.signal()
        assert serve.end()[0] == 0
        assert not file.exists()
