"""`SamplingClient`: text and log-probabilities from one set of weights, sync."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from weaver.client.portal import Handle, Portal, documented_by
from weaver.client.sampling import AsyncSamplingClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weaver.client.checks import Prompt, Prompts
    from weaver.tokenizers import PreTrainedTokenizer
    from weaver.types import ModelInfo, SampleResult, SamplingParams


@documented_by(AsyncSamplingClient)
class SamplingClient:
    """Samples from weights as they were when this client was made."""

    def __init__(self, inner: AsyncSamplingClient, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    @property
    def sampler_id(self) -> str:
        return self._inner.sampler_id

    @property
    def base_model(self) -> str:
        return self._inner.base_model

    @property
    def model_info(self) -> ModelInfo:
        return self._inner.model_info

    @property
    def weights_version(self) -> int:
        """The optimizer step of the weights; 0 for a base model."""
        return self._inner.weights_version

    @overload
    def sample(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        wait: Literal[True] = ...,
    ) -> SampleResult: ...
    @overload
    def sample(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        wait: Literal[False],
    ) -> Handle[SampleResult]: ...
    @overload
    def sample(
        self,
        prompt: Prompts,
        sampling_params: SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        wait: Literal[True] = ...,
    ) -> list[SampleResult]: ...
    @overload
    def sample(
        self,
        prompt: Prompts,
        sampling_params: SamplingParams | Mapping[str, object] | None = ...,
        *,
        num_samples: int = ...,
        include_prompt_logprobs: bool = ...,
        wait: Literal[False],
    ) -> Handle[list[SampleResult]]: ...
    def sample(
        self,
        prompt: Any,
        sampling_params: SamplingParams | Mapping[str, object] | None = None,
        *,
        num_samples: int = 1,
        include_prompt_logprobs: bool = False,
        wait: bool = True,
    ) -> Any:
        verb = partial(
            self._inner.sample,
            prompt,
            sampling_params,
            num_samples=num_samples,
            include_prompt_logprobs=include_prompt_logprobs,
        )
        return self._portal.verb(verb, wait)

    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, wait: Literal[True] = ...
    ) -> list[float | None]: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, wait: Literal[False]
    ) -> Handle[list[float | None]]: ...
    def compute_logprobs(self, prompt: Prompt, *, wait: bool = True) -> Any:
        return self._portal.verb(partial(self._inner.compute_logprobs, prompt), wait)

    def get_tokenizer(self) -> PreTrainedTokenizer:
        return self._portal.call(self._inner.get_tokenizer)
