"""A server that the published clients of other projects are tried on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.clients.server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What clients of this project's have in their environment; without what others have made."""
    with serving(tmp_path_factory.mktemp("server")) as environment:
        yield environment
