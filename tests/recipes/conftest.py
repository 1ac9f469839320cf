"""Every recipe's test runs in a folder and a home of its own, without a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
