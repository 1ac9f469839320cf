"""One self-contained HTML page: its style, its script and its data in one file, no network.

Reports and the self-test write one. Data travels as JSON in a block that is never executed, and a
content security policy names the one script by its hash: what a model wrote cannot run.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources
from typing import TYPE_CHECKING

from weaver_rl.storage import encode

if TYPE_CHECKING:
    from collections.abc import Mapping


def make_page(template: str, *, title: str, data: Mapping[str, object]) -> str:
    """Fills `templates/<template>.html` with the common style and script, and its own script."""
    script = _read("page.js") + _read(f"{template}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "HASH": f"sha256-{digest}",
        "TITLE": html.escape(title),
        "CSS": _read("page.css"),
        "DATA": json_block(data),
        "SCRIPT": script,
    }
    # Split once: what is filled in is never searched for names again.
    head, *rest = _read(f"{template}.html").split("@@")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return head + "".join(parts[name] + text for name, text in pairs)


def json_block(data: Mapping[str, object]) -> str:
    """JSON that may stand inside a script element: no character there has a meaning in HTML."""
    text = encode(data).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read(name: str) -> str:
    return (resources.files("weaver_rl") / "templates" / name).read_text(encoding="utf-8")
