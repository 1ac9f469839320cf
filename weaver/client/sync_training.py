"""`TrainingClient`: one model in training, sync. Made by `ServiceClient.create_model`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from weaver.client.portal import Handle, Portal, documented_by
from weaver.client.sync_sampling import SamplingClient
from weaver.client.training import AsyncTrainingClient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from weaver.client.custom_loss import CustomLoss
    from weaver.loss_specs import LossConfig
    from weaver.tokenizers import PreTrainedTokenizer
    from weaver.types import (
        AdamParams,
        CheckpointInfo,
        Datum,
        ForwardBackwardResult,
        MetricPoint,
        ModelInfo,
        OptimStepResult,
        TrainingRun,
    )


@documented_by(AsyncTrainingClient)
class TrainingClient:
    """Trains one run; several clients of one service client may share a run and its order."""

    def __init__(self, inner: AsyncTrainingClient, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    @property
    def model_id(self) -> str:
        return self._inner.model_id

    @property
    def base_model(self) -> str:
        return self._inner.base_model

    @property
    def model_info(self) -> ModelInfo:
        return self._inner.model_info

    def get_tokenizer(self) -> PreTrainedTokenizer:
        return self._portal.call(self._inner.get_tokenizer)

    def get_info(self) -> TrainingRun:
        return self._portal.call(self._inner.get_info)

    @overload
    def forward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Literal[False] = ...,
    ) -> Handle[ForwardBackwardResult]: ...
    @overload
    def forward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Literal[True],
    ) -> ForwardBackwardResult: ...
    def forward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        *,
        loss_fn_config: LossConfig | None = None,
        wait: bool = False,
    ) -> Any:
        verb = partial(self._inner.forward, datums, loss_fn, loss_fn_config=loss_fn_config)
        return self._portal.verb(verb, wait)

    @overload
    def forward_backward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Literal[False] = ...,
    ) -> Handle[ForwardBackwardResult]: ...
    @overload
    def forward_backward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Literal[True],
    ) -> ForwardBackwardResult: ...
    def forward_backward(
        self,
        datums: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        *,
        loss_fn_config: LossConfig | None = None,
        wait: bool = False,
    ) -> Any:
        verb = partial(self._inner.forward_backward, datums, loss_fn, loss_fn_config=loss_fn_config)
        return self._portal.verb(verb, wait)

    @overload
    def forward_backward_custom(
        self, datums: Sequence[Datum], loss_fn: CustomLoss, *, wait: Literal[False] = ...
    ) -> Handle[ForwardBackwardResult]: ...
    @overload
    def forward_backward_custom(
        self, datums: Sequence[Datum], loss_fn: CustomLoss, *, wait: Literal[True]
    ) -> ForwardBackwardResult: ...
    def forward_backward_custom(
        self, datums: Sequence[Datum], loss_fn: CustomLoss, *, wait: bool = False
    ) -> Any:
        verb = partial(self._inner.forward_backward_custom, datums, loss_fn)
        return self._portal.verb(verb, wait)

    @overload
    def optim_step(
        self, adam_params: AdamParams | Mapping[str, object], *, wait: Literal[False] = ...
    ) -> Handle[OptimStepResult]: ...
    @overload
    def optim_step(
        self, adam_params: AdamParams | Mapping[str, object], *, wait: Literal[True]
    ) -> OptimStepResult: ...
    def optim_step(
        self, adam_params: AdamParams | Mapping[str, object], *, wait: bool = False
    ) -> Any:
        return self._portal.verb(partial(self._inner.optim_step, adam_params), wait)

    @overload
    def save_state(
        self,
        name: str | None = ...,
        *,
        include_optimizer: bool = ...,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Literal[True] = ...,
    ) -> CheckpointInfo: ...
    @overload
    def save_state(
        self,
        name: str | None = ...,
        *,
        include_optimizer: bool = ...,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Literal[False],
    ) -> Handle[CheckpointInfo]: ...
    def save_state(
        self,
        name: str | None = None,
        *,
        include_optimizer: bool = True,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        wait: bool = True,
    ) -> Any:
        verb = partial(
            self._inner.save_state,
            name,
            include_optimizer=include_optimizer,
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
        )
        return self._portal.verb(verb, wait)

    @overload
    def save_weights_for_sampler(
        self,
        name: str,
        *,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Literal[True] = ...,
    ) -> CheckpointInfo: ...
    @overload
    def save_weights_for_sampler(
        self,
        name: str,
        *,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Literal[False],
    ) -> Handle[CheckpointInfo]: ...
    def save_weights_for_sampler(
        self,
        name: str,
        *,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        wait: bool = True,
    ) -> Any:
        verb = partial(
            self._inner.save_weights_for_sampler, name, ttl_seconds=ttl_seconds, overwrite=overwrite
        )
        return self._portal.verb(verb, wait)

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        verb = partial(self._inner.save_weights_and_get_sampling_client, name)
        return SamplingClient(self._portal.verb(verb, True), self._portal)

    @overload
    def load_state(
        self, path: str | PathLike[str] | CheckpointInfo, *, wait: Literal[False] = ...
    ) -> Handle[CheckpointInfo]: ...
    @overload
    def load_state(
        self, path: str | PathLike[str] | CheckpointInfo, *, wait: Literal[True]
    ) -> CheckpointInfo: ...
    def load_state(self, path: str | PathLike[str] | CheckpointInfo, *, wait: bool = False) -> Any:
        return self._portal.verb(partial(self._inner.load_state, path), wait)

    @overload
    def load_state_with_optimizer(
        self, path: str | PathLike[str] | CheckpointInfo, *, wait: Literal[False] = ...
    ) -> Handle[CheckpointInfo]: ...
    @overload
    def load_state_with_optimizer(
        self, path: str | PathLike[str] | CheckpointInfo, *, wait: Literal[True]
    ) -> CheckpointInfo: ...
    def load_state_with_optimizer(
        self, path: str | PathLike[str] | CheckpointInfo, *, wait: bool = False
    ) -> Any:
        return self._portal.verb(partial(self._inner.load_state_with_optimizer, path), wait)

    def list_checkpoints(self) -> list[CheckpointInfo]:
        return self._portal.call(self._inner.list_checkpoints)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        self._portal.call(partial(self._inner.log_metrics, metrics, step=step))

    def read_metrics(self, name: str | None = None) -> list[MetricPoint]:
        return self._portal.call(partial(self._inner.read_metrics, name))
