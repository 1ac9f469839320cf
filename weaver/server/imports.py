"""`Imports`: what clients send to have a checkpoint made of it; asked by `View`.

Files come in pieces into a draft below `imports/` in the home, which ends with its process, when a
checkpoint was made of it, or when nothing came for an hour. The engine reads and checks them, and
writes the checkpoint: `weaver://import-<id>/weights/<name>`, of a run that is not there. All
functions block.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.errors import (
    CheckpointCorruptError,
    ConflictError,
    InvalidNameError,
    NameTakenError,
    NotFoundError,
)
from weaver.exchange import Import
from weaver.files import DRAFT, hold_draft, release_lock, sweep_draft
from weaver.names import SAFE_NAME, check_name
from weaver.server.checkpoints import Checkpoints, Location, storage_errors
from weaver.server.manifest import sha256_of
from weaver.types import CheckpointInfo

if TYPE_CHECKING:
    from weaver.engine.base import Engine
    from weaver.server.settings import Limits

IMPORT_ID = re.compile(r"[0-9a-f]{32}")
SUFFIXES = {".json", ".safetensors"}
"""Nothing else is read of an adapter or a model; the tokenizer is the base's."""
SILENT_S = 3600.0


@dataclass(slots=True, eq=False)
class Sent:
    """What has come for one import."""

    project: str
    folder: Path
    lock: int
    sizes: dict[str, int] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)
    changing: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, kw_only=True, eq=False)
class Imports:
    """`check_stored` raises QuotaExceededError where a project may not store so many bytes more."""

    engine: Engine
    checkpoints: Checkpoints
    root: Path
    limits: Limits
    check_stored: Callable[[str, int], None]
    freed_bytes: int = 0
    """Of what was forgotten by sweeps, since this began."""
    _sent: dict[str, Sent] = field(default_factory=dict)
    _opening: threading.Lock = field(default_factory=threading.Lock)

    def put(self, project: str, import_id: str, name: str, data: bytes, *, offset: int) -> None:
        """Keeps a piece of a file; one that comes again takes its own place.

        Raises:
            InvalidNameError: the id or the name cannot be one.
            NotFoundError: the id is another project's.
            ConflictError: what is before the piece has not come.
            TooLargeError, QuotaExceededError, StorageError
        """
        if not IMPORT_ID.fullmatch(import_id):
            raise InvalidNameError(
                f"is {import_id[:80]!r}.", field="import_id", hint="Use 32 hexadecimal digits."
            )
        if not SAFE_NAME.fullmatch(name) or Path(name).suffix not in SUFFIXES:
            raise InvalidNameError(
                f"is {name[:140]!r}.",
                field="name",
                hint="Send the .json and .safetensors files of an adapter or a model.",
            )
        sent = self._open(project, import_id)
        with sent.changing, storage_errors("keeping an import"):
            size = sent.sizes.get(name, 0)
            if offset > size or (size == 0 and len(sent.sizes) >= 1024):
                raise ConflictError(
                    f"{name} has {size} bytes so far, the piece begins at {offset}.",
                    field="offset",
                    hint="Send the pieces of a file in their order, and at most 1,024 files.",
                )
            end = max(size, offset + len(data))
            self.limits.check_import(sum(sent.sizes.values()) - size + end)
            with (sent.folder / name).open("r+b" if size else "wb") as file:
                file.seek(offset)
                file.write(data)
            sent.sizes[name], sent.heard_at = end, time.monotonic()

    def find(self, project: str, import_id: str) -> Sent:
        """Raises NotFoundError: nothing was sent, or it is another project's."""
        sent = self._sent.get(import_id)
        if sent is None or sent.project != project:
            raise NotFoundError(
                f"nothing was sent for the import {import_id[:80]!r}.",
                field="import_id",
                hint="Begin again: what was sent is forgotten an hour later, or in a restart.",
            )
        return sent

    def finish(self, project: str, import_id: str, what: Import) -> CheckpointInfo:
        """Makes the checkpoint, once: a resend gets what the first one made.

        Raises:
            NotFoundError, InvalidNameError
            CheckpointCorruptError: a file has not come as it was sent, or is broken.
            CheckpointMismatchError, UnsupportedError, UnknownModelError, InvalidParamsError: the
                weights are of another model, or are what cannot be trained here.
        """
        location = Location(run_of(import_id), "weights", check_name(what.name))
        if (done := self._made(location, import_id)) is not None:
            return done
        sent = self.find(project, import_id)
        with sent.changing:
            if (done := self._made(location, import_id)) is not None:
                return done
            for file in what.files:
                place = sent.folder / file.name
                whole = sent.sizes.get(file.name) == file.size_bytes
                if not whole or sha256_of(place) != file.sha256:
                    raise CheckpointCorruptError(
                        f"{file.name[:140]} has not come as it was sent.",
                        field="files",
                        hint="Send it again.",
                    )
            for name in sent.sizes.keys() - {file.name for file in what.files}:
                (sent.folder / name).unlink(missing_ok=True)
            self.check_stored(project, sum(file.size_bytes for file in what.files))
            made = self._make(sent, location, what, author=import_id)
        self.drop(project, import_id)
        return made

    def drop(self, project: str, import_id: str) -> None:
        """Forgets what was sent; ignores an id that is unknown or another project's."""
        sent = self._sent.get(import_id)
        if sent is not None and sent.project == project:
            with sent.changing:
                self._forget(import_id)

    def sweep(self) -> None:
        """Forgets what silent clients have sent, and what killed processes have left."""
        silent_since = time.monotonic() - SILENT_S
        for import_id, sent in list(self._sent.items()):
            if sent.heard_at < silent_since and not sent.changing.locked():
                self.freed_bytes += sum(sent.sizes.values())
                self._forget(import_id)
        mine = {sent.folder for sent in self._sent.values()}
        for draft in {*self.root.glob(f"{DRAFT}*")} - mine:
            self.freed_bytes += sweep_draft(draft)

    def _open(self, project: str, import_id: str) -> Sent:
        with self._opening:
            if import_id not in self._sent:
                mine = sum(sent.project == project for sent in self._sent.values())
                self.limits.check_imports(mine)
                self.check_stored(project, 0)
                with storage_errors("keeping an import"):
                    self._sent[import_id] = Sent(project, *hold_draft(self.root))
        return self.find(project, import_id)

    def _forget(self, import_id: str) -> None:
        sent = self._sent.pop(import_id, None)
        if sent is not None:
            shutil.rmtree(sent.folder, ignore_errors=True)
            release_lock(sent.lock)

    def _made(self, location: Location, import_id: str) -> CheckpointInfo | None:
        try:
            manifest = self.checkpoints.manifest(str(location))
        except NotFoundError:
            return None
        if manifest.author != import_id:
            raise NameTakenError(
                f"{location} exists already.", field="import_id", hint="Choose another one."
            )
        return manifest.checkpoint

    def _make(self, sent: Sent, location: Location, what: Import, *, author: str) -> CheckpointInfo:
        draft = self.checkpoints.draft(location)
        try:
            with storage_errors(f"importing {location}"):
                weights = self.engine.import_weights(sent.folder, draft, base_model=what.base_model)
            info = CheckpointInfo(
                path=str(location),
                run_id=location.run_id,
                name=location.name,
                kind="weights",
                base_model=weights.base_model,
                training_mode="lora" if weights.lora_config else "full_ft",
                lora_config=weights.lora_config,
                step=0,
                created_at=datetime.now(UTC),
                size_bytes=0,
                ttl_seconds=what.ttl_seconds,
            )
            return self.checkpoints.commit(draft, info, author=author)
        finally:
            self.checkpoints.discard(draft)


def run_of(import_id: str) -> str:
    """What stands for the run in the paths of what was imported."""
    return f"import-{import_id[:12]}"
