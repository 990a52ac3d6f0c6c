"""A PACS to store into: Orthanc with DICOMweb, in a network namespace of its own, which nothing enters or leaves."""

from __future__ import annotations

import email
import email.policy
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.chaos import wait_for

_DICOM_WEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_PORT = 8042
"""Of the namespace, in which there is no other."""

_BOUNDARY = "part-of-a-study"


@dataclass(frozen=True)
class Answer:
    """What Orthanc says to a request."""

    status: int
    content_type: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Orthanc:
    """A running server.

    Attributes:
        pid: of a process in its namespace.
        folder: where it keeps what it is given.
    """

    pid: int
    folder: Path

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """A request by curl, from inside the namespace: GET, or POST where there is a body."""
        command = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "curl", "--silent", "--show-error", "--noproxy", "*"]
        for name, value in headers.items():
            command += ["--header", f"{name.replace('_', '-')}: {value}"]
        if body is not None:
            command += ["--header", "Expect:", "--data-binary", "@-"]
        command += ["--write-out", "\n%{http_code} %{content_type}", f"http://127.0.0.1:{_PORT}/{path}"]
        done = subprocess.run(command, input=body, capture_output=True, check=True)
        content, _, end = done.stdout.rpartition(b"\n")
        status, _, content_type = end.decode().partition(" ")
        return Answer(int(status), content_type, content)

    def store(self, objects: Iterable[bytes]) -> Answer:
        """STOW-RS (PS3.18, 10.5): all objects in one request."""
        start = f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = b"".join(start + each + b"\r\n" for each in objects) + f"--{_BOUNDARY}--\r\n".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={_BOUNDARY}'
        return self.ask("dicom-web/studies", body, Content_Type=kind, Accept="application/dicom+json")

    def retrieve(self, path: str, kind: str = "application/dicom") -> list[bytes]:
        """WADO-RS (PS3.18, 10.4): the objects, or frames, below a path of DICOMweb, encoded as they are stored."""
        answer = self.ask(f"dicom-web/{path}", Accept=f'multipart/related; type="{kind}"; transfer-syntax=*')
        assert answer.status == 200, answer.body
        head = f"Content-Type: {answer.content_type}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + answer.body, policy=email.policy.HTTP).iter_parts()
        found = [part.get_payload(decode=True) for part in parts]
        return [part for part in found if isinstance(part, bytes)]

    def counted(self) -> dict[str, int]:
        """How many patients, studies, series and instances there are, and bytes of them."""
        said = self.ask("statistics").json()
        return {name: int(value) for name, value in said.items() if name.startswith("Count") or name == "TotalDiskSize"}


@contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """A server of its own, empty; the test is skipped where it cannot be had."""
    needed = ("Orthanc", "unshare", "setpriv", "nsenter", "ip", "curl")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing or not _DICOM_WEB.exists():
        pytest.skip(
            f"not installed: {missing}; Debian's orthanc, orthanc-dicomweb, curl, iproute2 and util-linux have it"
        )
    space = ["unshare", "--net", "setpriv", "--pdeathsig", "KILL"]  # it ends with the tests, however they end
    if os.getuid() != 0 or subprocess.run([*space, "ip", "link", "set", "lo", "up"], check=False).returncode != 0:
        pytest.skip("only root can make a network namespace, and this system may not")
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": _PORT,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(_DICOM_WEB)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir()
    (folder / "orthanc.json").write_text(json.dumps(settings))
    start = f'ip link set lo up && exec Orthanc "{folder}/orthanc.json"'
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*space, "sh", "-c", start], stdout=log, stderr=log)
    try:
        server = Orthanc(process.pid, folder)
        wait_for(lambda: "HTTP server listening" in (folder / "log").read_text(errors="replace"))
        yield server
    finally:
        process.terminate()
        process.wait()
