"""Where others find a model: what adapters and model cards call it, told by `ModelFacts`."""

from __future__ import annotations

import re
from pathlib import Path

CACHED = re.compile(r"/models--((?:(?!--)[\w.-])+)--([\w.-]+)/snapshots/[^/]+/?$")
"""A folder of the hub's cache: `.../models--owner--name/snapshots/0123abc`."""


def origin_of(source: str) -> str:
    """An id of the hub, of what lies in its cache, too, or the whole path of a folder."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    cached = CACHED.search(folder.absolute().as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else str(folder.absolute())
