"""`open_engine`: the engine of this machine, as the user has set it.

Called by the embedded client and `weaver serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.config import EngineSettings
from weaver.engine.sources import ModelSource
from weaver.engine.torch.engine import TorchEngine

if TYPE_CHECKING:
    from weaver.engine.cluster.pooled import PooledEngine


def open_engine(
    settings: EngineSettings,
    models: Mapping[str, str | Path | ModelSource] | None = None,
    *,
    allow_paths: bool = True,
) -> TorchEngine | PooledEngine:
    """
    Raises:
        ConfigError, MissingDependencyError: see `TorchEngine` and `beside_torch`.
    """
    if settings.sampler == "vllm":
        from weaver.engine.cluster.beside import beside_torch

        return beside_torch(settings, models, allow_paths=allow_paths)
    return TorchEngine.of(settings, models, allow_paths=allow_paths)
