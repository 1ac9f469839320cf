"""`Served`: the models of a server, by name; asked by `ScopedService`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.errors import UnknownModelError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Service
    from weaver.types import ModelInfo


class Served:
    """The models of a server: fixed for its life, so its engine is asked once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._models: Sequence[ModelInfo] | None = None

    async def all(self) -> Sequence[ModelInfo]:
        if self._models is None:
            self._models = await self._service.list_models()
        return self._models

    async def get(self, base_model: str) -> ModelInfo:
        """Raises UnknownModelError."""
        models = {model.name: model for model in await self.all()}
        if base_model not in models:
            raise UnknownModelError(
                f"this server does not serve {base_model[:200]!r}.",
                field="base_model",
                hint=nearest(base_model, models),
            )
        return models[base_model]
