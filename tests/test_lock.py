"""The lock, constraints.txt: it pins all that is installed, and everything installs with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()[1:]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {
    text
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
    if not text.startswith(PROJECT["name"])
}


@pytest.mark.parametrize("text", sorted(WANTED))
def test_each_requirement_has_a_pin_that_satisfies_it(text: str) -> None:
    wanted = Requirement(text)
    pins = [Requirement(line) for line in LINES]
    found = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(wanted.name)]
    assert found
    for pin in found:
        [exact] = pin.specifier
        assert exact.operator == "=="
        assert wanted.specifier.contains(exact.version, prereleases=True)


def test_the_lock_names_no_place() -> None:
    assert not [line for line in LINES if re.search(r"[/\\@]|^-|\+", line)]


def test_everything_installs_with_it() -> None:
    makefile, dockerfile = (ROOT / name for name in ("Makefile", "deploy/Dockerfile"))
    assert re.search(r"^PIP :=.* -c constraints\.txt$", makefile.read_text(), re.MULTILINE)
    [install] = re.findall(r"^RUN .*pip install.*$", dockerfile.read_text(), re.MULTILINE)
    assert " -c constraints.txt " in install
    for image in re.findall(r"^FROM (\S+)", dockerfile.read_text(), re.MULTILINE):
        assert re.fullmatch(r"python:[\w.-]+@sha256:[0-9a-f]{64}", image)
