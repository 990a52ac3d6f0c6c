"""config.properties: what Java reads of it, and what ``serve`` writes."""

from __future__ import annotations

import io

import javaproperties
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_torchserve_tools.errors import UsageError
from nnunet_torchserve_tools.properties import Properties


def test_a_replaced_line_stays_as_a_comment_and_others_stay_as_they_are() -> None:
    text, replaced = Properties.parse(b"# why\na=1\n\n#a=7\nb = 2\nd=4\n").merge({"b": 3, "c": "x", "d": 4})
    assert replaced == ["b"]
    assert text == (
        "# why\na=1\n\n#a=7\n# replaced by nnunet-torchserve serve: b = 2\nb=3\nd=4\n"
        "\n# added by nnunet-torchserve serve\nc=x\n"
    )


@pytest.mark.parametrize("line", ["b=2", "b:2", "b 2", "  b\t=  2", "b=\\\n   2", "b\\\n =2", "\\u0062=2", "b=1\nb=2"])
def test_a_key_is_replaced_however_it_is_written(line: str) -> None:
    properties = Properties.parse(line.encode())
    assert properties.get("b") == "2"
    text, replaced = properties.merge({"b": 3})
    assert replaced == ["b"]
    assert javaproperties.loads(text.encode()) == {"b": "3"}


def test_a_key_that_is_given_in_another_way_is_taken_out() -> None:
    text, replaced = Properties.parse(b"load_models=all\na=1").merge({"load_models": None, "model_store": None})
    assert replaced == ["load_models"]
    assert javaproperties.loads(text) == {"a": "1"}


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(_TEXT, _TEXT)
def test_java_reads_the_value_that_was_set(value: str, kept: str) -> None:
    """As Java reads it: bytes, Latin-1."""
    base = javaproperties.join_key_value("kept", kept, ensure_ascii=False)
    text, _ = Properties.parse(base.encode()).merge({"path": value})
    assert text.isascii()
    assert javaproperties.load(io.BytesIO(text.encode())) == {"kept": kept, "path": value}


def test_options_of_the_jvm_are_written_as_torchserves_starter_reads_them() -> None:
    text, _ = Properties.parse(b"").merge({"vmargs": "-Xmx1m -XX:MaxDirectMemorySize=1m"})
    assert "vmargs=-Xmx1m -XX:MaxDirectMemorySize=1m\n" in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_a_file_may_be_utf8_or_latin1(encoding: str) -> None:
    content = "# für die Klinik\r\nkeystore=/schlüssel/ü.p12\r\n".encode(encoding)
    properties = Properties.parse(content)
    assert properties.get("keystore") == "/schlüssel/ü.p12"
    text, _ = properties.merge({})
    assert javaproperties.load(io.BytesIO(text.encode("ascii"))) == {"keystore": "/schlüssel/ü.p12"}


def test_an_environment_variable_in_a_value_is_torchserves_way(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = Properties.parse(b"inference_address=http://$$HERE$$:80", "my.properties")
    monkeypatch.setenv("HERE", "127.0.0.1")
    assert properties.get("inference_address") == "http://127.0.0.1:80"
    monkeypatch.delenv("HERE")
    with pytest.raises(UsageError, match=r"my\.properties: inference_address .* HERE"):
        properties.get("inference_address")


def test_a_wrong_escape_is_explained() -> None:
    with pytest.raises(UsageError, match="backslash"):
        Properties.parse(b"path=C:\\users")
