"""What docs/security.md says of the code as a whole, and that the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver.errors import ConfigError
from weaver.server.settings import ServerSettings

ROOT = Path(__file__).parents[3]
MODULES = sorted((ROOT / "weaver").rglob("*.py"))
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
"""Calls by which data could become code."""
NEVER_IMPORTED = {"pickle", "marshal", "shelve", "dill", "joblib"}
BETWEEN_RANKS = "engine/cluster/merge.py"
"""It unpickles what ranks of one group tell each other, as Ray does, which has started them."""
STARTING = {
    "cli/harnesses.py": "evaluation tools, beside the command that was typed",
    "engine/cluster/placed_worker.py": "the sampler's workers, where Ray has placed them",
    "engine/cluster/sampler_env.py": "pip, and the interpreter of the sampler's environment",
    "engine/cluster/worker_process.py": "the sampler's workers",
}
"""Modules that start programs, and which; their arguments are no shell's, and no request's."""


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names | modules}


def test_nothing_that_comes_in_becomes_code() -> None:
    loaders = 0
    for path in MODULES:
        tree = ast.parse(path.read_text())
        module = path.relative_to(ROOT / "weaver").as_posix()
        allowed = {"pickle"} if module == BETWEEN_RANKS else set()
        assert imported(tree) & NEVER_IMPORTED == allowed, path
        assert (module in STARTING) == ("subprocess" in imported(tree)), path
        for call in calls(tree):
            where, function = f"{path}:{call.lineno}", ast.unparse(call.func)
            owner, _, name = function.rpartition(".")
            assert function not in NEVER, where
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert "shell" not in keywords, where
            if function == "np.load":
                assert keywords.get("allow_pickle", "False") == "False", where
            if name in ("from_pretrained", "from_config") and owner.startswith("Auto"):
                loaders += 1
                assert keywords.get("trust_remote_code") == "False", where
    assert loaders >= 4


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_without_keys_it_listens_to_this_machine_alone(host: str, home: Path) -> None:
    settings = ServerSettings(home=home, host=host, port=0, auth=False)
    with pytest.raises(ConfigError, match="keys are off"), serving(FakeEngine(), settings):
        pass
    assert (ServerSettings(home=home).host, ServerSettings(home=home).auth) == ("127.0.0.1", True)


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) >= 12
    assert not [name for name in named if not (ROOT / name).exists()]
