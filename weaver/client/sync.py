"""`ServiceClient`: the sync way in.

Each sync class wraps its async twin, whose documentation holds here too. Where a method has `wait`,
True blocks for the result and False returns a `Handle` at once; either way the call fixes the
operation's place in the order. The clients may be used from several threads.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from weaver.client.portal import Portal, documented_by
from weaver.client.service import AsyncServiceClient
from weaver.client.sync_sampling import SamplingClient
from weaver.client.sync_training import TrainingClient

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from types import TracebackType
    from typing import Self

    from weaver.types import (
        CheckpointInfo,
        JsonDict,
        LoraConfig,
        ModelInfo,
        TrainingMode,
        TrainingRun,
    )


@documented_by(AsyncServiceClient)
class ServiceClient:
    """The way in; makes training and sampling clients and manages what is saved.

    Without `base_url` and WEAVER_BASE_URL everything runs in this process, below `home`
    (WEAVER_HOME, ~/.weaver). It works with and without a `with` block; leaving one, or the program,
    fails what is still pending with `ClosedError` and never touches what was saved. The runs of the
    embedded engine end with it, so save what you want to continue.

    Raises:
        ConfigError: a WEAVER_* variable cannot be used.
        MissingDependencyError: embedded, and the `engine` extra is not installed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | PathLike[str] | None = None,
        user_metadata: JsonDict | None = None,
    ) -> None:
        self._inner = AsyncServiceClient(base_url, api_key, home=home, user_metadata=user_metadata)
        self._portal = Portal(self._inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Fails what is pending with `ClosedError` and ends the thread; saved state stays."""
        self._portal.close()

    def create_model(
        self,
        base_model: str,
        lora_config: LoraConfig | Mapping[str, object] | None = None,
        *,
        training_mode: TrainingMode = "lora",
        seed: int = 0,
        user_metadata: JsonDict | None = None,
    ) -> TrainingClient:
        create = partial(
            self._inner.create_model,
            base_model,
            lora_config,
            training_mode=training_mode,
            seed=seed,
            user_metadata=user_metadata,
        )
        return TrainingClient(self._portal.verb(create, True), self._portal)

    create_training_client = create_model

    def attach(self, model_id: str) -> TrainingClient:
        return TrainingClient(
            self._portal.call(partial(self._inner.attach, model_id)), self._portal
        )

    def create_sampling_client(
        self,
        model_path: str | PathLike[str] | CheckpointInfo | None = None,
        base_model: str | None = None,
    ) -> SamplingClient:
        create = partial(self._inner.create_sampling_client, model_path, base_model)
        return SamplingClient(self._portal.verb(create, True), self._portal)

    def list_supported_models(self) -> list[ModelInfo]:
        return self._portal.call(self._inner.list_supported_models)

    def list_training_runs(self) -> list[TrainingRun]:
        return self._portal.call(self._inner.list_training_runs)

    def get_training_run(self, model_id: str) -> TrainingRun:
        return self._portal.call(partial(self._inner.get_training_run, model_id))

    def list_checkpoints(self, model_id: str | None = None) -> list[CheckpointInfo]:
        return self._portal.call(partial(self._inner.list_checkpoints, model_id))

    def delete_checkpoint(self, path: str | CheckpointInfo) -> None:
        self._portal.call(partial(self._inner.delete_checkpoint, path))

    def set_checkpoint_ttl(
        self, path: str | CheckpointInfo, ttl_seconds: int | None
    ) -> CheckpointInfo:
        return self._portal.call(partial(self._inner.set_checkpoint_ttl, path, ttl_seconds))
