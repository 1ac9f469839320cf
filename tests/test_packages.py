"""What is published: the sdist, the wheel built from it, and that as a user installs it."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.clients.server import serving

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""One that this machine lacks is skipped by name."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, so that the sdist is known to be whole."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_has_what_runs_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        [metadata] = [wheel.read(name) for name in names if name.endswith("/METADATA")]
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "weaver",
        "weaver_recipes",
        "weaver_rl",
    }
    tracked = subprocess.run(
        ["git", "ls-files", "weaver", "weaver_rl", "recipes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    packed = {re.sub("^weaver_recipes/", "recipes/", name) for name in names}
    assert {name for name in packed if ".dist-info/" not in name} == {*tracked}
    assert built[1].stat().st_size < 3e6
    said = email.message_from_bytes(metadata)
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    page = str(said.get_payload())
    assert page.startswith("# Weaver") and "## Train" in page and "Read on" in page
    assert re.findall(r"\]\((?!https?://)[^)]*\)", page) == []  # an index resolves no relative link
    assert "torch" not in " ".join(
        line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line
    )


def test_the_sdist_has_what_is_read_and_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "docs/quickstart.md",
        "tests/conftest.py",
    } <= names
    assert not [name for name in names if name.startswith(".venv") or "__pycache__" in name]
    assert built[0].stat().st_size < 6e6


def interpreter(version: str) -> str | None:
    """An interpreter of that version, on the path or among pyenv's, that runs."""
    roots = Path(os.environ.get("PYENV_ROOT", Path("~/.pyenv").expanduser()))
    found = [shutil.which(f"python{version}"), *roots.glob(f"versions/{version}.*/bin/python")]
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    return None


def quick_start() -> str:
    """The first blocks of docs/quickstart.md, which train and sample."""
    page = (ROOT / "docs/quickstart.md").read_text()
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2])


@pytest.mark.parametrize("version", PYTHONS)
def test_installed_it_imports_helps_and_trains_on_a_server(
    version: str, built: tuple[Path, Path], tmp_path: Path
) -> None:
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} on this machine")
    place = tmp_path / "env"
    subprocess.run([python, "-m", "venv", place], check=True)
    pip = [place / "bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, built[1]], check=True)

    def run(*command: str | Path, **settings: str) -> str:
        env = {"PATH": f"{place}/bin", "HOME": str(tmp_path), **settings}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    bin = place / "bin"
    assert "recipes" not in os.listdir(next(place.glob("lib/python*/site-packages")))
    run(bin / "python", "-W", "error", "-c", "import weaver, weaver_rl")
    assert "checkpoints" in run(bin / "weaver", "--help")
    subprocess.run([*pip, "transformers", f"{built[1]}[rl]"], check=True)
    assert "--dry-run" in run(bin / "python", "-m", "weaver_recipes.sft", "--help")
    assert "compare" in run(bin / "weaver-rl", "--help")
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server") as settings:
        there = {key: settings[key] for key in ("WEAVER_BASE_URL", "WEAVER_API_KEY")}
        assert "green" in run(bin / "python", "-c", quick_start(), **there)
        assert "run-" in run(bin / "weaver", "runs", "list", **there)
