"""Every fenced block of the docs that `test_docs` does not run is read by what it is written for.

Its language says by what: LANGUAGES. Lines of the shell are read by the parsers of the programs
that they name (`tests.commands`), and those of PLAYED are typed, as tests/journeys types docs/jobs.
What no test can run is named in UNRUN or, of lines, in NOT_RUN of `tests.journeys.play`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import weaver_rl as rl
from tests import commands
from tests.clients.server import serving
from tests.journeys import cell
from tests.journeys.page import Job, blocks
from tests.journeys.play import Player, not_run
from tests.test_deployment import OLDEST_KUBERNETES, pods, resources
from tests.test_docs import PAGES, ROOT, name_of
from weaver.cli.serve import parse_config
from weaver.engine.cluster.config import read_cluster_file
from weaver.errors import from_code
from weaver.server.http.errors import ErrorAnswer

PLAYED = {
    "README.md": "embedded",
    "docs/cli.md": "embedded",
    "docs/cluster.md": "embedded",
    "docs/export.md": "on a server",
    "docs/serving.md": "embedded",
}
"""Pages whose lines are typed, and where; some start a server themselves."""
UNRUN = {
    "text": "drawings, and lists of files",
    "caddy": "needs Caddy and a domain",
    "nginx": "needs nginx and a certificate",
    "py": "needs packages, servers or a kernel that are not here: names and arguments are checked",
}
"""Languages of blocks that are not run, with the reason."""
PROGRAM = """
from weaver import ServiceClient

sampler = ServiceClient().create_sampling_client(base_model="weaver-nano")
print(sampler.sample("rev:stone=", {"max_tokens": 8}).sequences[0].text)
"""
"""A reader's own, where a page says `your_program.py`."""
REST = [page for page in PAGES if page.name != "jobs.md"]  # which tests/journeys plays


def shell(text: str, page: str, _: Path) -> None:
    for line in commands.lines(text):
        commands.read(line)
        known = page in PLAYED or line.startswith("export ") or "your_program.py" in line
        assert known or not_run(line), f"{line}\nis neither typed (PLAYED) nor in NOT_RUN"


def python(text: str, page: str, _: Path) -> None:
    """What of `weaver_rl` it calls takes such arguments."""
    for call in ast.walk(ast.parse(text)):
        match call:
            case ast.Call(ast.Attribute(ast.Name("rl"), name), given, named):
                keywords = {str(one.arg): None for one in named}
                inspect.signature(getattr(rl, name)).bind_partial(*given, **keywords)


def toml(text: str, page: str, folder: Path) -> None:
    """A part of a cluster's file is read behind what stands above it."""
    file = folder / "read.toml"
    if page != "docs/cluster.md":
        file.write_text(text)
        assert parse_config(file)
        return
    with file.open("a") as whole:
        whole.write(text)
    assert read_cluster_file(file).named()


def yaml_of(text: str, page: str, folder: Path) -> None:
    if page == "docs/evaluation.md":  # lm-eval's, which tests/clients/test_eval.py has
        assert {"task", "dataset_path", "output_type"} <= {*yaml.safe_load(text)}
        return
    (folder / "mine").mkdir()
    (folder / "weaver").symlink_to(ROOT)
    (folder / "mine/kustomization.yaml").write_text(text)
    found = resources(folder / "mine")
    assert all(yaml.safe_load(one["patch"]) for one in yaml.safe_load(text)["patches"])
    for pod in [pod for one in found for pod in pods(one)]:
        whole = {"apiVersion": "v1", "kind": "Pod", **pod}
        kubernetes_validate.validate(whole, OLDEST_KUBERNETES, strict=True)


def answer(text: str, page: str, _: Path) -> None:
    """An error, as servers answer one."""
    error = ErrorAnswer.model_validate(json.loads(text)).error
    assert from_code(error.code, error.message).code == error.code


def mermaid(text: str, page: str, _: Path) -> None:
    """A chart whose lines have a value for each place of the axis."""
    assert text.startswith("xychart-beta\n")
    [places] = re.findall(r"^ +x-axis .*(\[.*\])$", text, re.MULTILINE)
    lines = re.findall(r"^ +line (\[.*\])$", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert len(json.loads(line)) == len(json.loads(places))


LANGUAGES: Mapping[str, Callable[[str, str, Path], None]] = {
    "bash": shell,
    "json": answer,
    "mermaid": mermaid,
    "py": python,
    "toml": toml,
    "yaml": yaml_of,
}


@pytest.mark.parametrize("page", REST, ids=name_of)
def test_blocks_are_read(page: Path, tmp_path: Path) -> None:
    text, name = page.read_text(), name_of(page)
    found = blocks(text)
    assert len(re.findall(r"^ *(```|~~~)", text, re.MULTILINE)) == 2 * len(found), "of other form"
    for block in found:
        if block.language == "python" or block.file is not None:
            continue  # test_docs runs it
        assert block.language in {*LANGUAGES, *UNRUN}, f"{name}:{block.line} is read by no test"
        if reader := LANGUAGES.get(block.language):
            reader(block.text, name, tmp_path)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "weaver serve --prot 8000"),
        ("bash", "weaver runs lst"),
        ("bash", "python -m recipes.sft --step 3"),
        ("bash", "python -m recipes.custom_reward --steps many"),
        ("bash", "make tests"),
        ("bash", 'pip install "weaver-post-training[servr]"'),
        ("bash", "docker compose -f deploy/compose.yaml exec server weaver keys crate"),
        ("bash", "WEAVER_PROT=8000 weaver serve --model Qwen/Qwen3-8B"),
        ("bash", "sudo weaver serve"),
        ("py", "rl.python_tool(image='python')"),
        ("toml", "prot = 8100"),
        ("json", '{"error": {"code": "no_code", "message": "", "request_id": ""}}'),
        ("mermaid", 'xychart-beta\n    x-axis "a" [1, 2]\n    line [1]\n'),
    ],
)
def test_what_is_wrong_is_found(language: str, text: str, tmp_path: Path) -> None:
    with pytest.raises((Exception, SystemExit)):
        LANGUAGES[language](text, "README.md", tmp_path)  # of which any line may stand


def test_a_line_that_is_neither_typed_nor_listed_is_found(tmp_path: Path) -> None:
    shell("weaver doctor", "README.md", tmp_path)
    with pytest.raises(AssertionError, match="neither typed"):
        shell("weaver doctor", "docs/page.md", tmp_path)


def test_a_reason_is_of_the_lines_that_it_is_meant_for() -> None:
    export = "export WEAVER_BASE_URL=http://127.0.0.1:8000 WEAVER_API_KEY=wv-..."
    recipe = "python -m weaver_recipes.sft --tasks chat.jsonl"
    for line in (export, recipe, "weaver serve", "weaver doctor", "vllm serve model"):
        assert not_run(line) is None
    assert not_run("vllm serve BASE --enable-lora")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PLAYED)
def test_lines_are_typed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as a reader would; of a page at a server with its Python between."""
    (tmp_path / "your_program.py").write_text(PROGRAM)
    found = blocks((ROOT / page).read_text())
    if PLAYED[page] == "embedded":
        player = Player(tmp_path)
        player.play(Job(page, tuple(one for one in found if one.language == "bash")))
    else:
        with serving(tmp_path) as server, monkeypatch.context() as patched:
            player = Player(tmp_path, server)
            patched.chdir(tmp_path)
            patched.setenv("WEAVER_BASE_URL", server["WEAVER_BASE_URL"])
            patched.setenv("WEAVER_API_KEY", server["WEAVER_API_KEY"])
            namespace: dict[str, object] = {"__name__": "__main__"}
            for block in found:
                if block.language == "python":
                    cell.run("\n" * block.line + block.text, page, namespace)
                else:
                    player.play(Job(page, (block,)))
    missed = [line for line in player.skipped if not not_run(line) and not line.startswith("vllm")]
    assert not missed
