"""`Exports`: what other programs read of a checkpoint; asked by the service.

That is the checkpoint's own folder without what only Weaver reads (PEFT's layout, or transformers'
after full fine-tuning), or a whole model merged from the base and the adapter, with a card. Such a
model is made at first need and goes with its checkpoint; the newest few are kept for a day. All
functions block.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio import CapacityLimiter

from weaver.errors import NotFoundError
from weaver.exchange import Export, ExportedFile
from weaver.server.card import write_card

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.base import Engine
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.manifest import Manifest
    from weaver.types import JsonDict

INTERNAL = frozenset({"weaver_state.json", "optimizer.safetensors"})
CHUNK_BYTES = 8 * 2**20
MERGED_KEPT, MERGED_KEPT_S = 8, 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """What `checkpoints` offer, as they are or merged."""

    engine: Engine
    checkpoints: Checkpoints
    merged: Checkpoints
    """Merged models, each at the place of its checkpoint."""
    merging: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """For calls of `describe` with `merge`: a resend finds what the first one made, and those that
    wait do not hold the threads of others."""

    def describe(
        self,
        path: str,
        *,
        merge: bool,
        metadata: JsonDict | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Export:
        """Its files; the card of a model that is merged now tells the run's metadata and metrics.

        Raises:
            CheckpointNotFoundError, InvalidNameError
            CheckpointCorruptError, CheckpointMismatchError, UnsupportedError, StorageError:
                it cannot be merged.
        """
        manifest = self.checkpoints.manifest(path)
        if merge and manifest.checkpoint.training_mode == "lora":
            manifest = self._merge(manifest, metadata=metadata or {}, metrics=metrics or {})
        folder = manifest.folder
        files = tuple(
            ExportedFile(name=name, size_bytes=(folder / name).stat().st_size, sha256=sha256)
            for name, sha256 in manifest.sha256.items()
            if name not in INTERNAL
        )
        return Export(files=files, folder=str(folder))

    def read(self, path: str, name: str, *, merge: bool, offset: int) -> bytes:
        """At most `CHUNK_BYTES`.

        Raises:
            NotFoundError: the export has no such file, or was not described before.
        """
        manifest = self.checkpoints.manifest(path)
        if merge and manifest.checkpoint.training_mode == "lora":
            manifest = self.merged.manifest(path)
        if name not in manifest.sha256.keys() - INTERNAL:
            raise NotFoundError(f"{path} has no file {name[:80]!r}.", field="name")
        with (manifest.folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    def sweep(self) -> None:
        """Deletes merged models whose checkpoint is gone, and what a killed merge has left."""
        self.merged.sweep()
        merged = self.merged.list()  # before the others: what is made meanwhile is kept
        kept = {info.path for info in self.checkpoints.list()}
        for info in merged:
            if info.path not in kept:
                self.merged.delete(info.path)
                self.merged.freed_bytes += info.size_bytes

    @property
    def freed_bytes(self) -> int:
        """Of merged models that have gone, since this began."""
        return self.merged.freed_bytes

    def _merge(
        self, manifest: Manifest, *, metadata: JsonDict, metrics: Mapping[str, float]
    ) -> Manifest:
        info = manifest.checkpoint

        def fill(empty: Path) -> None:
            _, adapter = self.checkpoints.open(info.path)  # with its files verified
            self.engine.merge_adapter(info.base_model, adapter, empty)
            origin = self.engine.origin(info.base_model)
            write_card(empty, info, origin=origin, metadata=metadata, metrics=metrics)

        others = [other for other in self.merged.list() if other.path != info.path]
        for oldest in others[: max(0, len(others) - MERGED_KEPT + 1)]:
            self.merged.delete(oldest.path)
        content = json.dumps(dict(manifest.sha256), sort_keys=True).encode()
        self.merged.write(
            info.model_copy(update={"ttl_seconds": MERGED_KEPT_S}),
            fill,
            author=hashlib.sha256(content).hexdigest(),
            overwrite=True,
        )
        return self.merged.manifest(info.path)
