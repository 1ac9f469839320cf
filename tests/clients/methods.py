"""The table of docs/tinker.md: made by `make tinker-methods`, held to by test_tinker.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.clients.environments import ROOT, run_tinker
from tests.clients.server import serving

PAGE = ROOT / "docs" / "tinker.md"
BEGIN, END = (
    "<!-- The methods: `make tinker-methods` writes them. -->\n\n",
    "\n<!-- End of the methods. -->",
)


def written(page: str) -> str:
    """The table that the page has."""
    return page.partition(BEGIN)[2].partition(END)[0]


def probed(server: dict[str, str], folder: Path) -> str:
    """The table as it should be."""
    name = "weaver-nano"
    (folder / name).symlink_to(ROOT / "weaver" / "models" / "nano")  # for its tokenizer
    return run_tinker("tinker_methods.py", server=server, cwd=folder, release="0.38.0")


def main() -> None:
    page = PAGE.read_text()
    assert written(page), f"{PAGE} has no place for the table"
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        PAGE.write_text(page.replace(written(page), probed(server, Path(folder))))


if __name__ == "__main__":
    main()
