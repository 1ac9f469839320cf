"""`ServiceClient`, `TrainingClient`, `SamplingClient`, `RewardClient`: the sync way in.

Each wraps its async twin, whose documentation holds here too. Where a method has `wait`, True
blocks for the result and False returns a `Handle` at once; either way the call fixes the
operation's place in the order. The clients may be used from several threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from weaver import types
from weaver.checks import CheckpointPath, LossConfig, Prompt, Prompts
from weaver.client.custom_loss import CustomLoss
from weaver.client.portal import Handle, Portal, Twin, blocking, making, queued
from weaver.client.rewards import AsyncRewardClient, TokenPrompts
from weaver.client.sampling import AsyncSamplingClient
from weaver.client.service import AsyncServiceClient
from weaver.client.training import AsyncTrainingClient
from weaver.keywords import suggesting

if TYPE_CHECKING:
    import numpy.typing as npt

Now = Literal[True]
Later = Literal[False]


class SamplingClient(Twin[AsyncSamplingClient]):
    """Samples from weights as they were when this client was made."""

    def __init__(self, inner: AsyncSamplingClient, portal: Portal) -> None:
        super().__init__(inner, portal)
        self.sampler_id = inner.sampler_id
        self.base_model = inner.base_model
        self.model_info = inner.model_info
        self.weights_version = inner.weights_version
        """The optimizer step of the weights; 0 for a base model."""

    @overload
    def sample(
        self,
        prompt: Prompt,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        top_logprobs: int = ...,
        prompt_top_logprobs: int = ...,
        wait: Now = ...,
    ) -> types.SampleResult: ...
    @overload
    def sample(
        self,
        prompt: Prompt,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        top_logprobs: int = ...,
        prompt_top_logprobs: int = ...,
        wait: Later,
    ) -> Handle[types.SampleResult]: ...
    @overload
    def sample(
        self,
        prompt: Prompts,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        top_logprobs: int = ...,
        prompt_top_logprobs: int = ...,
        wait: Now = ...,
    ) -> list[types.SampleResult]: ...
    @overload
    def sample(
        self,
        prompt: Prompts,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        top_logprobs: int = ...,
        prompt_top_logprobs: int = ...,
        wait: Later,
    ) -> Handle[list[types.SampleResult]]: ...
    @queued(AsyncSamplingClient.sample, wait=True)
    def sample(self, *args: Any, **kwargs: Any) -> Any: ...

    @overload
    def compute_logprobs(self, prompt: Prompt, *, wait: Now = ...) -> list[float | None]: ...
    @overload
    def compute_logprobs(self, prompt: Prompt, *, wait: Later) -> Handle[list[float | None]]: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int, targets: npt.ArrayLike | None = ..., wait: Now = ...
    ) -> types.SampleResult: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int, targets: npt.ArrayLike | None = ..., wait: Later
    ) -> Handle[types.SampleResult]: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int | None = ..., targets: npt.ArrayLike, wait: Now = ...
    ) -> types.SampleResult: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int | None = ..., targets: npt.ArrayLike, wait: Later
    ) -> Handle[types.SampleResult]: ...
    @queued(AsyncSamplingClient.compute_logprobs, wait=True)
    def compute_logprobs(self, *args: Any, **kwargs: Any) -> Any: ...

    get_tokenizer = blocking(AsyncSamplingClient.get_tokenizer)
    close = blocking(AsyncSamplingClient.close)


class RewardClient(Twin[AsyncRewardClient]):
    """Scores with weights as they were when this client was made."""

    def __init__(self, inner: AsyncRewardClient, portal: Portal) -> None:
        super().__init__(inner, portal)
        self.sampler_id = inner.sampler_id
        self.base_model = inner.base_model
        self.model_info = inner.model_info
        self.weights_version = inner.weights_version

    @overload
    def score(self, prompts: TokenPrompts, *, wait: Now = ...) -> list[float]: ...
    @overload
    def score(self, prompts: TokenPrompts, *, wait: Later) -> Handle[list[float]]: ...
    @queued(AsyncRewardClient.score, wait=True)
    def score(self, *args: Any, **kwargs: Any) -> Any: ...

    get_tokenizer = blocking(AsyncRewardClient.get_tokenizer)
    close = blocking(AsyncRewardClient.close)


class TrainingClient(Twin[AsyncTrainingClient]):
    """Trains one run; several clients of one service client may share a run and its order."""

    def __init__(self, inner: AsyncTrainingClient, portal: Portal) -> None:
        super().__init__(inner, portal)
        self.model_id = inner.model_id
        self.name = inner.name
        self.base_model = inner.base_model
        self.model_info = inner.model_info
        self.deterministic = inner.deterministic
        self.head = inner.head

    get_tokenizer = blocking(AsyncTrainingClient.get_tokenizer)
    get_info = blocking(AsyncTrainingClient.get_info)

    @overload
    def forward(
        self,
        datums: Sequence[types.Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Later = ...,
    ) -> Handle[types.ForwardBackwardResult]: ...
    @overload
    def forward(
        self,
        datums: Sequence[types.Datum],
        loss_fn: str = ...,
        *,
        loss_fn_config: LossConfig | None = ...,
        wait: Now,
    ) -> types.ForwardBackwardResult: ...
    @queued(AsyncTrainingClient.forward, wait=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    forward_backward = queued(AsyncTrainingClient.forward_backward, wait=False)(forward)

    @overload
    def forward_backward_custom(
        self, datums: Sequence[types.Datum], loss_fn: CustomLoss, *, wait: Later = ...
    ) -> Handle[types.ForwardBackwardResult]: ...
    @overload
    def forward_backward_custom(
        self, datums: Sequence[types.Datum], loss_fn: CustomLoss, *, wait: Now
    ) -> types.ForwardBackwardResult: ...
    @queued(AsyncTrainingClient.forward_backward_custom, wait=False)
    def forward_backward_custom(self, *args: Any, **kwargs: Any) -> Any: ...

    score = queued(AsyncTrainingClient.score, wait=True)(RewardClient.score)

    @overload
    def optim_step(
        self, adam_params: types.AdamParams | Mapping[str, object], *, wait: Later = ...
    ) -> Handle[types.OptimStepResult]: ...
    @overload
    def optim_step(
        self, adam_params: types.AdamParams | Mapping[str, object], *, wait: Now
    ) -> types.OptimStepResult: ...
    @queued(AsyncTrainingClient.optim_step, wait=False)
    def optim_step(self, *args: Any, **kwargs: Any) -> Any: ...

    @overload
    def save_state(
        self,
        name: str | None = ...,
        *,
        include_optimizer: bool = ...,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Now = ...,
    ) -> types.CheckpointInfo: ...
    @overload
    def save_state(
        self,
        name: str | None = ...,
        *,
        include_optimizer: bool = ...,
        ttl_seconds: int | None = ...,
        overwrite: bool = ...,
        wait: Later,
    ) -> Handle[types.CheckpointInfo]: ...
    @queued(AsyncTrainingClient.save_state, wait=True)
    def save_state(self, *args: Any, **kwargs: Any) -> Any: ...

    @overload
    def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = ..., overwrite: bool = ..., wait: Now = ...
    ) -> types.CheckpointInfo: ...
    @overload
    def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = ..., overwrite: bool = ..., wait: Later
    ) -> Handle[types.CheckpointInfo]: ...
    @queued(AsyncTrainingClient.save_weights_for_sampler, wait=True)
    def save_weights_for_sampler(self, *args: Any, **kwargs: Any) -> Any: ...

    save_weights_and_get_sampling_client = making(
        AsyncTrainingClient.save_weights_and_get_sampling_client, SamplingClient
    )
    save_weights_and_get_reward_client = making(
        AsyncTrainingClient.save_weights_and_get_reward_client, RewardClient
    )

    @overload
    def load_state(
        self, path: CheckpointPath, *, wait: Later = ...
    ) -> Handle[types.CheckpointInfo]: ...
    @overload
    def load_state(self, path: CheckpointPath, *, wait: Now) -> types.CheckpointInfo: ...
    @queued(AsyncTrainingClient.load_state, wait=False)
    def load_state(self, *args: Any, **kwargs: Any) -> Any: ...

    load_state_with_optimizer = queued(AsyncTrainingClient.load_state_with_optimizer, wait=False)(
        load_state
    )

    list_checkpoints = blocking(AsyncTrainingClient.list_checkpoints)
    log_metrics = blocking(AsyncTrainingClient.log_metrics)
    read_metrics = blocking(AsyncTrainingClient.read_metrics)
    rewind_metrics = blocking(AsyncTrainingClient.rewind_metrics)


class ServiceClient(Twin[AsyncServiceClient]):
    """The way in; makes training and sampling clients and manages what is saved.

    Without `base_url` and WEAVER_BASE_URL everything runs in this process, below `home`
    (WEAVER_HOME, ~/.weaver). It works with and without a `with` block; leaving one, or the program,
    fails what is still pending with `ClosedError` and never touches what was saved. A run stays as
    it is after its last step, for `attach` in this process or a later one on the same home.

    Raises:
        ConfigError: a WEAVER_* variable cannot be used.
        MissingDependencyError: embedded, and the `engine` extra is not installed.
    """

    @suggesting
    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | PathLike[str] | None = None,
        deterministic: bool = False,
        user_metadata: types.JsonDict | None = None,
    ) -> None:
        inner = AsyncServiceClient(
            base_url, api_key, home=home, deterministic=deterministic, user_metadata=user_metadata
        )
        super().__init__(inner, Portal(inner))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Fails what is pending with `ClosedError` and ends the thread; saved state stays."""
        self._portal.close()

    create_model = making(AsyncServiceClient.create_model, TrainingClient)
    create_training_client = create_model
    create_training_client_from_state = making(
        AsyncServiceClient.create_training_client_from_state, TrainingClient
    )
    create_training_client_from_state_with_optimizer = making(
        AsyncServiceClient.create_training_client_from_state_with_optimizer, TrainingClient
    )
    attach = making(AsyncServiceClient.attach, TrainingClient)
    create_sampling_client = making(AsyncServiceClient.create_sampling_client, SamplingClient)
    create_reward_client = making(AsyncServiceClient.create_reward_client, RewardClient)
    list_supported_models = blocking(AsyncServiceClient.list_supported_models)
    list_training_runs = blocking(AsyncServiceClient.list_training_runs)
    get_training_run = blocking(AsyncServiceClient.get_training_run)
    rename_training_run = blocking(AsyncServiceClient.rename_training_run)
    delete_training_run = blocking(AsyncServiceClient.delete_training_run)
    list_checkpoints = blocking(AsyncServiceClient.list_checkpoints)
    delete_checkpoint = blocking(AsyncServiceClient.delete_checkpoint)
    set_checkpoint_ttl = blocking(AsyncServiceClient.set_checkpoint_ttl)
    delete_checkpoints = blocking(AsyncServiceClient.delete_checkpoints)
    import_checkpoint = blocking(AsyncServiceClient.import_checkpoint)
    export_checkpoint = blocking(AsyncServiceClient.export_checkpoint)
