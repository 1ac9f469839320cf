"""Reads a line of the shell as the programs that it names would, and runs none of them.

`tests/test_blocks.py` reads the lines of the docs. What a program does not know is an error, and so
is a program that is not known here.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer.main
import tyro
import yaml
from packaging.requirements import Requirement

from weaver.cli import app

ROOT = Path(__file__).parents[1]
WEAVER = typer.main.get_command(app)
PLAIN = {"chmod", "curl", "cut", "echo", "export", "tail"}
"""Of the system: their words are not looked at."""
UNREAD = {"vllm"}
"""What has an environment of its own (`make test-vllm`)."""
PACKAGES = {"tinker_cookbook"}
"""The same of what `python -m` names (`make test-cookbook`)."""


def lines(text: str) -> Iterator[str]:
    """The lines of a block as they are typed, without remarks."""
    for line in text.splitlines():
        if typed := re.sub(r"(^|\s+)#.*", "", line).strip():
            yield typed


def read(line: str) -> None:
    """
    Raises:
        AssertionError, SystemExit, or what the program's parser raises.
    """
    for words in commands(line):
        program, *rest = words
        if program in PLAIN or program in UNREAD:
            continue
        if "/" in program:
            assert os.access(ROOT / program, os.X_OK), f"{program} is no program"
        else:
            assert program in READERS, f"{program!r} is not known to tests/commands.py"
            READERS[program](rest)


def commands(line: str) -> Iterator[Sequence[str]]:
    """The words of each command of a line; variables before it must be those that Weaver reads."""
    lexer = shlex.shlex(line.replace("$'", "'"), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            assert words, f"nothing between two commands: {line}"
            while words and (named := re.match(r"(\w+)=", words[0])):
                _variable(named[1])
                del words[0]
            if words[:1] == ["export"]:
                for one in words[1:]:
                    _variable(one.partition("=")[0])
            if words:
                yield words
            words = []
        else:
            words.append(word)


def _variable(name: str) -> None:
    if name.startswith("WEAVER_"):
        assert name in _variables(), f"Weaver reads no variable {name}"


def _variables() -> set[str]:
    found = {"WEAVER_API_KEY", "WEAVER_BASE_URL"}
    for parameter in WEAVER.commands["serve"].params:  # type: ignore[attr-defined]
        given = parameter.envvar
        found |= {*given} if isinstance(given, list) else {given}
    return found


def _weaver(words: Sequence[str]) -> None:
    """By the parser of the command line, which fills a context and calls no command."""
    command: Any = WEAVER
    if any(one.callback and words[0] in one.opts for one in command.params):
        return  # such as --install-completion, which the parser itself would do
    context = command.make_context("weaver", [*words])
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def _python(words: Sequence[str]) -> None:
    if words[0] == "your_program.py":
        return
    assert words[0] == "-m", f"python {words[0]} is no file that the docs speak of"
    package, _, recipe = words[1].partition(".")
    if package in PACKAGES:
        return
    assert package == "recipes", f"{words[1]} is no module that the docs speak of"
    module = importlib.import_module(f"recipes.{recipe}")
    if hasattr(module, "Flags"):
        tyro.cli(module.Flags, args=words[2:])
        return

    @wraps(module.main)
    def parsed(**given: object) -> None:
        """In place of `main`, which would run."""

    tyro.cli(parsed, args=words[2:])


def _make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*words} <= {*targets}, words
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _pip(words: Sequence[str]) -> None:
    """Packages may be installed; ours with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    action, *wanted = words
    assert action == "install"
    for one in map(Requirement, wanted):
        if one.name == extras["name"]:
            assert one.extras <= {*extras["optional-dependencies"]}, one


def _docker(words: Sequence[str]) -> None:
    """Its files and services are there; what runs in a container is read in turn."""
    if words[0] == "compose":
        [file] = [after for word, after in pairwise(words) if word == "-f"]
        services = yaml.safe_load((ROOT / file).read_text())["services"]
        rest = words[3:]
        assert rest[0] in ("up", "exec"), rest
        if rest[0] == "exec":
            assert rest[1] in services, rest
            read(shlex.join(rest[2:]))
    elif words[0] == "exec":
        read(shlex.join(words[2:]))
    else:
        assert words[0] in ("build", "run"), words
        for word, after in pairwise(words):
            assert word != "-f" or (ROOT / after).exists(), after


def _sbatch(words: Sequence[str]) -> None:
    assert (ROOT / words[-1]).exists(), words


READERS = {
    "docker": _docker,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "sbatch": _sbatch,
    "weaver": _weaver,
}
