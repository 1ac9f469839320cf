"""`python -m tests.server.console.pictures FOLDER`: every page as a picture, to be looked at.

Light and dark, 390 and 1440 px wide; also the main pages of the documentation, where `make docs`
has built `site/`.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any

from tests.server.console.site import site_at
from tests.server.console.stages import run_of, stages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.browser import Browser

WIDTHS = (390, 1440)
BUILT = Path(__file__).parents[3] / "site"
DOCUMENTS = ("index", "jobs", "quickstart", "concepts", "gallery", "errors", "reference/weaver")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def documents(built: Path = BUILT) -> Iterator[str]:
    """The address of the built documentation."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(built)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def open_anew(browser: Browser, address: str) -> None:
    """A page of the documentation, which has no scheme in mind."""
    browser.open("about:blank")
    browser.wait("location.href == 'about:blank'")
    browser.send("Storage.clearDataForOrigin", origin=address, storageTypes="local_storage")
    browser.open(address)
    browser.wait(f"location.href == '{address}' && document.readyState == 'complete'")


def take(browser: Browser, folder: Path, name: str, *, address: str | None = None) -> None:
    """`address`: opened anew for each picture, as the documentation keeps its first scheme."""
    for width in WIDTHS:
        for dark in (False, True):
            browser.screen(width=width, dark=dark)
            if address is not None:
                open_anew(browser, address)
            browser.value("new Promise(done => setTimeout(done, 200))")  # layout, transitions
            browser.picture(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as home, site_at(Path(home)) as site:
        run, path = run_of(site)
        for name, browser in stages(site, run=run, path=path):
            take(browser, folder, name)
        if not BUILT.is_dir():
            sys.stderr.write("no documentation: make docs builds it\n")
            return
        with documents() as address:
            for place in DOCUMENTS:
                name = f"docs-{place.replace('/', '-')}"
                take(site.browser, folder, name, address=f"{address}/{place}.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
