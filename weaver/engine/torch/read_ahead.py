"""`ReadAhead`: brings a model's files into the system's memory while the engine computes on.

`ModelStore` asks before it loads a large model beside others: from a disk or the hub weights come
in minutes, from the system's memory in seconds, for which the engine's thread then stands still.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download

from weaver.engine.torch.catalog import only_here
from weaver.engine.torch.download import FETCHED, HTTP_ERRORS, LEFT
from weaver.threads import out_at_exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.torch.catalog import ModelFacts

PIECE_BYTES = 2**23


class ReadAhead:
    """Of several models at once, each in a thread of its own."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        """Called in such a thread, once the files of a model are read."""
        self._running: dict[str, bool] = {}
        """By name, whether it is still read."""

    def goes_on(self, facts: ModelFacts) -> bool:
        """Whether its files are still being read, which begins when this is asked first."""
        name = facts.info.name
        if name not in self._running:
            self._running[name] = True
            threading.Thread(
                target=self._read, args=(facts,), name="weaver-read-ahead", daemon=True
            ).start()
        return self._running[name]

    def forget(self, name: str) -> None:
        """It was loaded, or could not be."""
        if not self._running.get(name):
            self._running.pop(name, None)

    def _read(self, facts: ModelFacts) -> None:
        try:
            with suppress(OSError, ValueError, *HTTP_ERRORS):  # the loading says what is wrong
                out_at_exit(lambda: _read_files(facts.source))
        finally:
            self._running[facts.info.name] = False
            self.wake()


def _read_files(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        offline = only_here(source)
        folder = Path(
            snapshot_download(
                source, allow_patterns=FETCHED, ignore_patterns=LEFT, local_files_only=offline
            )
        )
    piece = bytearray(PIECE_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
