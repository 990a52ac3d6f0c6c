"""The private temporary directory of a server."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.temporary import PrivateDir, make_private_dir


def made_below(tmpdir: Path, monkeypatch: pytest.MonkeyPatch, *places: Path) -> tuple[PrivateDir, list[str]]:
    monkeypatch.setenv("TMPDIR", str(tmpdir))
    monkeypatch.setattr(tempfile, "tempdir", None)
    warnings: list[str] = []
    return make_private_dir(warnings.append, tuple(map(str, places)) or ("/tmp",)), warnings


@pytest.mark.parametrize("name", ["x" * 120, "a:b", "ü" * 60, "数" * 40])
def test_a_tmpdir_that_sockets_do_not_fit_below_is_used_through_a_short_link(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    made, warnings = made_below(tmp_path / name, monkeypatch)
    try:
        assert made.path.resolve().parent == (tmp_path / name).resolve()
        assert [folder.stat().st_mode & 0o777 for folder in (*made.made, made.path)] == [0o700] * 3
        with socket.socket(socket.AF_UNIX) as worker:
            worker.bind(str(made.path / ".ts.sock.65535"))
        assert warnings == []
    finally:
        (made.path / ".ts.sock.65535").unlink(missing_ok=True)
        made.path.unlink()
        for folder in made.made:
            folder.rmdir()


@pytest.mark.parametrize("how", ["plain", "link", "with spaces and ü"])
def test_a_tmpdir_that_sockets_fit_below_is_used_as_it_is(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        tmpdir = Path(short) / how
        tmpdir.symlink_to(short) if how == "link" else tmpdir.mkdir()
        made, warnings = made_below(tmpdir, monkeypatch)
        assert made.path.parent == tmpdir
        assert made.made == (made.path,)
        assert warnings == []


def test_a_tmpdir_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, [warning] = made_below(tmp_path / "nowhere", monkeypatch)
    assert f"TMPDIR ({tmp_path / 'nowhere'})" in warning
    for folder in made.made:
        folder.rmdir()


def test_where_no_short_place_is_left_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    with pytest.raises(ToolError, match=r"92 bytes .* TMPDIR"):
        made_below(long, monkeypatch, tmp_path / "nowhere", long)
    assert not list(long.iterdir())
