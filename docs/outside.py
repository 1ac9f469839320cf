"""Links of pages to files outside docs/, such as ../recipes/README.md: `mkdocs build` calls this.

Such a file becomes a page of the site below `files/`, and the links lead there; in a checkout they
lead to the file itself.
"""

from __future__ import annotations

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
    """Adds what pages link to outside docs/, and what the pages among that link to."""
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
        known = uri in files.src_uris
        return posixpath.relpath(uri, posixpath.dirname(here) or ".") if known else link[1]

    # SOURCE[,context=TOKENS][,load=start] is no link, though mkdocs-autorefs would read it as one.
    return LINK.sub(inside, markdown).replace("][,", r"]\[,")


def _path(page: str, target: str) -> str:
    """Where a link of a page leads, from the root of the checkout."""
    source = page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"
    source = source if (ROOT / source).is_file() else source.removesuffix(".md")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _uri(path: str) -> str:
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"
