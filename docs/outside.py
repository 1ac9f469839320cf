"""Pages that are no file of docs/: `mkdocs build` calls this.

A notebook of docs/notebooks becomes a page, with its outputs as they are kept. A file outside docs/
that a page links to, such as ../recipes/README.md, becomes a page of the site below `files/`. The
links lead there; in a checkout they lead to the file itself.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds notebooks, what pages link to outside docs/, and what the pages among that link to."""
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=_page(notebook)))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for target in LINK.findall(page.content_string):
            path = _path(page.src_uri, target)
            known = path.startswith("docs/") or _uri(path) in files.src_uris
            if known or not (ROOT / path).is_file():
                continue
            text = (ROOT / path).read_text()
            if not path.endswith(".md"):
                text = f"# {path}\n\n````{path.rpartition('.')[2]}\n{text}\n````\n"
            file = File.generated(
                config, _uri(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(file)
            waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links to such files as links inside the site."""
    here = page.file.src_uri

    def inside(link: re.Match[str]) -> str:
        path = _path(here, link[1])
        uri = path.removeprefix("docs/") if path.startswith("docs/") else _uri(path)
        shown = uri.replace(".ipynb", ".md")
        uri = shown if shown in files.src_uris and shown != here else uri  # here: to the file
        known = uri in files.src_uris
        return posixpath.relpath(uri, posixpath.dirname(here) or ".") if known else link[1]

    # SOURCE[,context=TOKENS][,load=start] is no link, though mkdocs-autorefs would read it as one.
    return LINK.sub(inside, markdown).replace("][,", r"]\[,")


def _page(notebook: Path) -> str:
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            said = output.get("data", {}).get("text/plain", output.get("text", ()))
            if output.get("name") != "stderr":
                parts.append(f"```text\n{''.join(said).rstrip()}\n```")
    return "\n\n".join([*parts, f"[The notebook]({notebook.name}), to run and to change."])


def _path(page: str, target: str) -> str:
    """Where a link of a page leads, from the root of the checkout."""
    source = page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"
    source = source if (ROOT / source).is_file() else source.removesuffix(".md")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _uri(path: str) -> str:
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"
