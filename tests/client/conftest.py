"""The client tests never find a server by accident."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
