"""peft and hypothesis; where one is not installed, what needs it is skipped by that name.

The tests of the engine take them from here, because `make gpu` runs in environments without them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class _Missing:
    """Skips the test, or the module, that asks for something of a package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest looks at what a module has
            raise AttributeError(name)
        pytest.skip(f"{self._package} is not installed", allow_module_level=True)


class _Unused:
    """What strategies are where nothing draws from them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        return self


peft: Any = import_module("peft") if find_spec("peft") else _Missing("peft")

given: Any
settings: Any
st: Any
if find_spec("hypothesis"):
    from hypothesis import given, settings
    from hypothesis import strategies as st
else:
    st = _Unused()

    def given(*_: object, **__: object) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="hypothesis is not installed")

    settings = given
