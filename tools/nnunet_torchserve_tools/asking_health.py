"""``nnunet-torchserve health``: one probe, for who cannot ask over HTTP. Imports only what it uses: it starts fast."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from .errors import UsageError
from .probes import Probe, Verdict
from .server import read_state

_PATIENCE_S = 2.0
_OK = 200


def ask(url: str | None, state_dir: Path, *, live: bool) -> Verdict:
    """Ask the server in the foreground; one in the background is looked at from here.

    From here nobody knows since when a worker has been away: that the JVM answers is enough to be live then.

    Args:
        url: of the health port.
        state_dir: else of the server.
        live: whether it need not be restarted; else, whether it takes requests.

    Raises:
        UsageError: the URL is none.
    """
    probe = Probe.LIVE if live else Probe.READY
    if url is None:
        server = read_state(state_dir)
        if server is None:
            return Verdict(False, "front_end", f"no server of {state_dir.resolve()} is running")
        url = server.health_url
    if url is not None:
        return _asked(url, probe)
    from .health import Health

    with closing(Health(state_dir)) as health:
        if probe is Probe.READY:
            health.look()
        else:
            health.look_at_front_end()
        return health.verdict(probe)


def _asked(url: str, probe: Probe) -> Verdict:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        msg = f"--url {url}: http://ADDRESS:PORT of the health port was expected"
        raise UsageError(msg)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", f"/{probe}")
        answer = connection.getresponse()
        document = json.loads(answer.read())
        return Verdict(answer.status == _OK, str(document.get("code", "unknown")), str(document["detail"]))
    except (OSError, HTTPException, ValueError, KeyError) as error:
        return Verdict(False, "unknown", f"the health port does not answer: {type(error).__name__}")
    finally:
        connection.close()
