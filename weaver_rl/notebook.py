"""`open_area`: a place in the output of a notebook's cell that is drawn again and again.

Displays of loops ask for one, as a notebook is no terminal, and would get a line for each step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from html import escape
from typing import Any

EVERY_S = 0.25
"""Between two pictures: each is a message to the browser."""


class Area:
    """Shows HTML in the cell in which it was made, in place of what it has shown before."""

    def __init__(self, update: Callable[[str], object]) -> None:
        self._update = update
        self._shown_at = -EVERY_S
        self._held: str | None = None

    def show(self, html: str) -> None:
        """At once, unless it has just been drawn; then it is held, and drawn by a later call."""
        self._held = html
        if time.monotonic() - self._shown_at >= EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Draws what is held."""
        if self._held is not None:
            self._update(self._held)
            self._held, self._shown_at = None, time.monotonic()


def open_area() -> Area | None:
    """None where this is no notebook, such as in IPython's terminal."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Any = ipython.display
    handle = display.display(display.HTML(""), display_id=True)
    return Area(lambda html: handle.update(display.HTML(html)))


def text_html(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
