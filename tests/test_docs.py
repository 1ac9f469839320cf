"""Every ```python block of the README and of docs/ runs, each page from top to bottom.

A block with a title is a file, which is written. `test_blocks` has all other blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.journeys import cell
from tests.journeys.page import blocks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            cell.run("\n" * block.line + block.text, page.name, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
