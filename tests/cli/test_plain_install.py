"""Every command without the extras: it works, or says in a line which one it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.cli.test_commands import commands

if TYPE_CHECKING:
    from pathlib import Path

MISSING = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "jinja2",
           "sqlalchemy", "fastapi", "starlette", "uvicorn", "prometheus_client", "psycopg",
           "tyro", "pyarrow", "ray", "lm_eval", "inspect_ai")  # fmt: skip
PLAIN = f"import sys; sys.modules |= dict.fromkeys({MISSING}); "
EACH = """
import contextlib, io, json
from weaver.cli import main
sys.stdin = io.StringIO()
for words in json.loads(sys.argv[1]):
    sys.argv, said, code = ["weaver", *words], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            print(repr(error), file=said)
            code = "raised"
    print(json.dumps([words, code, said.getvalue()]))
"""
INSTALLS = ("cluster", "install-sampler")


def test_each_command_works_or_names_the_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    monkeypatch.setenv("WEAVER_HOME", str(home))
    given = {"create": ["--project=p"], "export": ["--to=x"], "eval": ["--tasks=gsm8k"]}
    called = [
        [*words, *["a"] * needs, *given.get(words[-1], [])]
        for words, command in commands().items()
        if words != INSTALLS
        and (needs := sum(p.required for p in command.params if not p.opts[0].startswith("-"))) >= 0
    ]
    ended = subprocess.run(
        [sys.executable, "-c", PLAIN + EACH, json.dumps(called)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(results) == len(called) > 20
    for words, code, said in results:
        if words[-1] == "doctor":
            assert code == 1 and "needs torch. Run: pip install" in said
        elif words in (["cluster", "status"], ["logs"]):  # they need no extra
            assert code == 1 and "`weaver serve" in said
        elif words in (["checkpoints", "ttl", "a", "a"], ["checkpoints", "delete"]):
            assert code == 1, words  # arguments that are looked at first
        else:
            assert code == 1, (words, said)
            assert said.count("\n") == 1, (words, said)
            assert "Run: pip install" in said or "[eval]" in said, (words, said)


@pytest.mark.parametrize(
    ("program", "extra"),
    [("-m recipes.sft", "all"), ("-m weaver_rl.cli selftest", "engine")],
)
def test_programs_name_it_too(program: str, extra: str, home: Path) -> None:
    code = f"{PLAIN}import runpy; sys.argv = {program.split()!r}; "
    code += (
        "runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=False)"
        if "recipes" in program
        else "from weaver_rl.cli import main; sys.exit(main(['selftest', '--page', '/dev/null']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert f'pip install "weaver-post-training[{extra}]"' in ended.stderr


@pytest.mark.parametrize("recipe", ["sft", "demo", "agent", "preference"])
def test_the_help_of_a_recipe_needs_no_torch(recipe: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"recipes.{recipe}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and "usage: " in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "weaver_rl" in imported
    assert not {"torch", "transformers", "sqlalchemy", "fastapi", "datasets"} & imported
