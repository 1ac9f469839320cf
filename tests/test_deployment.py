"""The files of deploy/: read by the tools that know their formats, and their options are ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from weaver.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
FILES = ("Dockerfile", "compose.yaml", "weaver.service")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    run(BIN / "hadolint", DEPLOY / "Dockerfile")


def test_the_compose_file_is_one() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(BIN / "check-jsonschema", *schema, DEPLOY / "compose.yaml")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_one_and_is_hardened(tmp_path: Path) -> None:
    text = (DEPLOY / "weaver.service").read_text()
    unit = tmp_path / "weaver.service"
    unit.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={BIN / 'weaver'}", text))
    run("systemd-analyze", "verify", unit)
    run("systemd-analyze", "security", "--offline=true", "--threshold=25", unit)


@pytest.mark.parametrize("name", FILES)
def test_its_variables_are_options_of_the_server(name: str) -> None:
    serve = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    envvars = [parameter.envvar for parameter in serve.params]
    known = {name for one in envvars for name in (one if isinstance(one, list) else [one])}
    used = set(re.findall(r"\b(WEAVER_[A-Z_]+)", (DEPLOY / name).read_text()))
    assert used <= known
    assert used


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_in_it(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert not re.search(r"wv-|://\w+:[^@\s]+@", text)
    for line in re.findall(r"^.*PASSWORD.*$", text, re.MULTILINE):
        assert "${DATABASE_PASSWORD:?" in line or line.startswith("#"), line


def test_everything_that_the_image_is_built_from_reaches_the_builder() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
