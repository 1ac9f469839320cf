"""The program of vLLM's workers can be run where there is no weaver."""

from __future__ import annotations

import ast
import sys

from tests.engine.cluster.standin import PROGRAM


def test_it_imports_nothing_of_weaver() -> None:
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"vllm"}
