"""Every ```python block of the README and of docs/ runs, each page from top to bottom.

A block with a title is a file, which is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.journeys import cell

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(python|\w+ title="([^"]+)")\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(page.read_text()):
        _, file, source = block.groups()
        if file is not None:
            Path(file).write_text(source)
            continue
        line = page.read_text()[: block.start()].count("\n") + 1
        cell.run("\n" * line + source, page.name, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
