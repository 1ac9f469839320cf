"""`ModelsOf`: what engines of several parts say of models, which is what one of the parts says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaver import types
    from weaver.engine.base import Engine, ImportedWeights


class ModelsOf:
    """That part of `Engine` which neither trains nor samples; `knowing` answers."""

    def __init__(self, knowing: Engine) -> None:
        self._knowing = knowing

    def list_models(self) -> Sequence[types.ModelInfo]:
        return self._knowing.list_models()

    def get_model(self, base_model: str) -> types.ModelInfo:
        return self._knowing.get_model(base_model)

    def origin(self, base_model: str) -> str:
        return self._knowing.origin(base_model)

    def max_tokens_trained(self, base_model: str, training_mode: types.TrainingMode) -> int | None:
        return self._knowing.max_tokens_trained(base_model, training_mode)

    def encode(
        self,
        base_model: str,
        prompt: str | Sequence[types.Message],
        *,
        tools: Sequence[types.JsonDict] = (),
    ) -> list[int]:
        return self._knowing.encode(base_model, prompt, tools=tools)

    def check_structure(self, base_model: str, params: types.SamplingParams) -> None:
        self._knowing.check_structure(base_model, params)

    def tokenizer(self, base_model: str) -> Any | None:
        return self._knowing.tokenizer(base_model)

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return self._knowing.tokenizer_files(base_model)

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        self._knowing.merge_adapter(base_model, adapter, folder)

    def import_weights(
        self, source: Path, folder: Path, *, base_model: str | None
    ) -> ImportedWeights:
        return self._knowing.import_weights(source, folder, base_model=base_model)
