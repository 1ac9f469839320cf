"""Tokenizers from the files that a service hands out, so that they are the same near and far.

The clients' `get_tokenizer` uses it. transformers is imported when a tokenizer is asked for.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio
import anyio.to_thread

from weaver.errors import InvalidNameError, requiring

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from weaver.protocol import Service

    PreTrainedTokenizer: TypeAlias = PreTrainedTokenizerBase

FILE_NAME = re.compile(r"\w[\w.-]*")


class TokenizerCache:
    """The tokenizers of one client, each fetched and loaded once."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        self._folder = folder
        self._loaded: dict[str, PreTrainedTokenizer] = {}
        self._lock = anyio.Lock()

    async def get(self, base_model: str) -> PreTrainedTokenizer:
        """Raises UnknownModelError, or MissingDependencyError without transformers."""
        async with self._lock:
            if base_model not in self._loaded:
                files = await self._service.tokenizer_files(base_model)
                self._loaded[base_model] = await anyio.to_thread.run_sync(
                    load_tokenizer, files, self._folder
                )
            return self._loaded[base_model]


def load_tokenizer(files: Mapping[str, bytes], folder: Path) -> PreTrainedTokenizer:
    """A transformers tokenizer from file contents, kept below `folder` under their hash.

    Raises:
        MissingDependencyError: transformers is not installed.
        InvalidNameError: a file name that leads elsewhere.
    """
    with requiring("a tokenizer", "engine"):
        from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(
        store_tokenizer(files, folder), local_files_only=True, trust_remote_code=False
    )


def store_tokenizer(files: Mapping[str, bytes], folder: Path) -> Path:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        if not FILE_NAME.fullmatch(name):
            raise InvalidNameError(f"the service sent a tokenizer file called {name!r}.")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    target = folder / digest.hexdigest()[:32]
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder))
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        try:
            unfinished.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return target
