"""What `weaver_rl` exports: what its modules list, each name once."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import weaver_rl


def test_every_name_has_one_home() -> None:
    tree = ast.parse(Path(weaver_rl.__file__).read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    starred = [str(node.module) for node in nodes if node.names[0].name == "*"]
    homes = [(name, module) for module in starred for name in import_module(module).__all__]
    assert len({name for name, _ in homes}) == len(homes) > 50
    for name, module in homes:
        assert getattr(weaver_rl, name) is getattr(import_module(module), name)
