"""`weaver doctor` with a server: both sides' versions, device, memory and disk."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple

import pytest
from typer.testing import CliRunner

from tests.cli.test_commands import saved, weaver
from weaver.cli import app
from weaver.cli.server_side import compare
from weaver.errors import UnsupportedError
from weaver.exchange import ServerInfo

__all__ = ["saved"]  # a fixture
Usage = namedtuple("Usage", "total used free")
INSTALL = 'pip install "weaver-post-training==9.9.9"'
SERVER = ServerInfo(
    version="9.9.9",
    python="3.12.0",
    platform="Linux",
    torch="2.13.0",
    protocol=1,
    device="torch 2.13 on cpu",
    disk_bytes=10**12,
    disk_free_bytes=10**11,
)


def test_both_sides_are_shown(saved: tuple[str, str]) -> None:
    said = dict(re.findall(r"^(.{14}) (.*)$", weaver("doctor"), re.MULTILINE))
    said = {name.strip(): state for name, state in said.items()}
    assert re.fullmatch(r"weaver [\d.]+, protocol 1", said["server"])
    assert re.fullmatch(r"3\.[\d.]+ on .*, torch .*", said["its python"])
    assert said["its device"] == "fake engine" and said["both sides"] == "go together"
    for name in ("memory", "disk", "its memory", "its disk"):
        assert re.fullmatch(r"[\d.]+ of [\d.]+ GB free", said[name])
    assert said["protocol"] == "1" and {"weaver", "python", "torch"} <= said.keys()


def test_what_does_not_go_together_says_what_to_do() -> None:
    assert compare(SERVER, version="9.9.9", protocol=1) == "go together"
    assert compare(SERVER, version=None, protocol=1) == "go together"
    other = compare(SERVER, version="0.1.0", protocol=1)
    said = "0.1.0 here and 9.9.9 there; to be alike: "
    assert other.endswith(f"{said}{INSTALL}")
    said = f"protocol 1, this client 2. Run here: {INSTALL}"
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        compare(SERVER, version="0.1.0", protocol=2)


def test_each_fault_of_a_side_is_named(
    saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 10**10, 5 * 10**6))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "answers:" not in result.stdout
    assert "the home's disk has 5 MB left. Delete checkpoints" in result.stdout
    assert "its disk       FAILED: the server's disk has 5 MB left." in result.stdout
    monkeypatch.setenv("WEAVER_BASE_URL", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert re.search(r"server +FAILED: .*127.0.0.1:9", result.stdout)
