"""Without the packages of others, their adapters name them; with them, see `tests/clients`."""

from __future__ import annotations

from importlib.util import find_spec

import anyio
import pytest

import weaver_rl as rl
from weaver.errors import MissingDependencyError


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_verifiers_is_named() -> None:
    async def opened() -> None:
        async with rl.from_verifiers(object()):
            pass

    with pytest.raises(MissingDependencyError, match=r'pip install "verifiers>=0\.4"'):
        anyio.run(opened)


@pytest.mark.skipif(find_spec("openenv") is not None, reason="openenv-core is installed")
def test_openenv_is_named() -> None:
    with pytest.raises(MissingDependencyError, match="pip install openenv-core"):
        rl.from_openenv("http://127.0.0.1:8000", say=str, act=dict)
