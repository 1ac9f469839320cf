"""`AsyncSamplingClient`: text and log-probabilities from one set of weights that never changes.

Made by `AsyncServiceClient.create_sampling_client` and
`AsyncTrainingClient.save_weights_and_get_sampling_client`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, overload

from weaver import types
from weaver.checks import (
    Prompt,
    Prompts,
    as_prompt,
    as_value,
    check_num_samples,
    check_targets,
    check_top,
    check_whole,
    is_batch,
)
from weaver.client.handle import OperationHandle
from weaver.client.published import Published
from weaver.client.session import Answer, Session
from weaver.fields import MOST_ALTERNATIVES
from weaver.keywords import suggesting
from weaver.protocol import OpenSampler, Sample, Sampled, SamplerOpened
from weaver.tensors import TensorData

if TYPE_CHECKING:
    import numpy.typing as npt

SAMPLED = Answer(Sampled, lambda result: result.output)


@suggesting
class AsyncSamplingClient(Published):
    """Samples from weights as they were when this client was made.

    Where the weights have no name of their own, they go with the client: when it is closed, or soon
    after nothing refers to it any more.
    """

    @overload
    def sample(
        self,
        prompt: Prompt,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = None,
        *,
        num_samples: int = 1,
        include_prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
    ) -> OperationHandle[types.SampleResult]: ...
    @overload
    def sample(
        self,
        prompt: Prompts,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = None,
        *,
        num_samples: int = 1,
        include_prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
    ) -> OperationHandle[list[types.SampleResult]]: ...
    def sample(
        self,
        prompt: Prompt | Prompts,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = None,
        *,
        num_samples: int = 1,
        include_prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
    ) -> OperationHandle[types.SampleResult] | OperationHandle[list[types.SampleResult]]:
        """Draws `num_samples` continuations of a prompt, or of each prompt of a list.

        A prompt is a `ModelInput`, token ids, text, or a list of chat messages such as
        `{"role": "user", "content": "Hello"}`, to which the model's template is applied. Cancelling
        the handle frees the slots of what is still being sampled.

        Returns:
            A `SampleResult` with `sequences` of length `num_samples`; a list of them, in order, for
            a list of prompts. `include_prompt_logprobs` adds `prompt_logprobs`, one per token of
            the prompt, the first of which is None. `top_logprobs=K` adds the K likeliest tokens, at
            most 256, at each place of each sequence, `prompt_top_logprobs=K` at each of the prompt:
            both are `TopLogprobs`, whatever the temperature.

        Raises:
            InvalidParamsError, InvalidDatumError, TokenOutOfRangeError, ContextLengthError: at the
                call; for text, whose tokens the service counts, from the handle.
        """
        check_num_samples(num_samples)
        batch = is_batch(prompt)
        operations = [
            self._operation(
                one,
                sampling_params,
                num_samples=num_samples,
                include_prompt_logprobs=include_prompt_logprobs,
                top_logprobs=top_logprobs,
                prompt_top_logprobs=prompt_top_logprobs,
                field=f"prompt[{i}]" if batch else "prompt",
            )
            for i, one in enumerate(prompt if batch else [prompt])
        ]
        handles = [self._session.submit(operation, SAMPLED) for operation in operations]
        if not batch:
            return handles[0]

        async def gather() -> list[types.SampleResult]:
            return [await handle for handle in handles]

        return self._session.compose(f"sample of {len(handles)} prompts", [*handles], gather)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: types.SamplingParams | Mapping[str, object] | None = None,
        *,
        num_samples: int = 1,
        top_logprobs: int = 0,
    ) -> AsyncIterator[types.SampleDelta]:
        """Yields the tokens of `sample` as they come; leaving the loop early cancels the rest.

        Each `SampleDelta` says by `index` which sequence it continues; the last one of a sequence
        has its `stop_reason`. Under trio wrap it in `contextlib.aclosing` if you may leave early.

        Raises:
            InvalidParamsError, InvalidDatumError: at the call, or in place of the first item.
            TokenOutOfRangeError, ContextLengthError: the same.
        """
        check_num_samples(num_samples)
        operation = self._operation(
            prompt,
            sampling_params,
            num_samples=num_samples,
            top_logprobs=top_logprobs,
            stream=True,
        )
        return self._session.stream(operation, of=self)

    @overload
    def compute_logprobs(self, prompt: Prompt) -> OperationHandle[list[float | None]]: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int, targets: npt.ArrayLike | None = None
    ) -> OperationHandle[types.SampleResult]: ...
    @overload
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int | None = None, targets: npt.ArrayLike
    ) -> OperationHandle[types.SampleResult]: ...
    def compute_logprobs(
        self, prompt: Prompt, *, top_k: int | None = None, targets: npt.ArrayLike | None = None
    ) -> OperationHandle[list[float | None]] | OperationHandle[types.SampleResult]:
        """The log-probability of each token of a prompt given those before it, in nats.

        The first is None: nothing comes before it.

        Args:
            top_k: also those of the `top_k` likeliest tokens at each place, at most 256.
            targets: also those of these tokens at each place: int64 [T] or [T, K], a row for each
                of the prompt's T tokens. Row i is scored in the place of token i, so that of the
                first nothing is said; -1 asks for nothing.

        Returns:
            A list; with `top_k` or `targets` a `SampleResult` without sequences, which has
            `prompt_logprobs`, `prompt_top_logprobs` and `prompt_target_logprobs`.

        Raises:
            InvalidParamsError, InvalidDatumError, TokenOutOfRangeError, ContextLengthError: at the
                call; for text, whose tokens the service counts, from the handle.
        """
        if top_k is not None:
            hint = f"Give 1 to {MOST_ALTERNATIVES}, or leave it out."
            check_whole(top_k, field="top_k", most=MOST_ALTERNATIVES, hint=hint)
        operation = self._operation(
            prompt,
            {"max_tokens": 1},
            num_samples=0,
            include_prompt_logprobs=True,
            prompt_top_logprobs=top_k or 0,
            targets=targets,
        )
        if top_k is not None or targets is not None:
            return self._session.submit(operation, SAMPLED)
        reply = Answer(Sampled, lambda result: list(result.output.prompt_logprobs or ()))
        return self._session.submit(operation, reply)

    def _operation(
        self,
        prompt: object,
        params: types.SamplingParams | Mapping[str, object] | None,
        *,
        num_samples: int,
        include_prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
        targets: npt.ArrayLike | None = None,
        stream: bool = False,
        field: str = "prompt",
    ) -> Sample:
        self._check_open()
        checked = as_value(types.SamplingParams, params or {}, field="sampling_params")
        max_tokens = checked.max_tokens if num_samples else 0
        check_top(top_logprobs, self.model_info, field="top_logprobs")
        check_top(prompt_top_logprobs, self.model_info, field="prompt_top_logprobs")
        given = as_prompt(prompt, self.model_info, max_tokens=max_tokens, field=field)
        asked = None if targets is None else TensorData(targets, dtype="int64", field="targets")
        if asked is not None and isinstance(given, types.ModelInput):
            check_targets(asked, given.length, self.model_info)
        return Sample(
            sampler_id=self.sampler_id,
            prompt=given,
            params=checked,
            num_samples=num_samples,
            include_prompt_logprobs=include_prompt_logprobs,
            top_logprobs=top_logprobs,
            prompt_top_logprobs=prompt_top_logprobs,
            prompt_targets=asked,
            stream=stream,
        )


def open_sampler(
    session: Session, *, model_path: str | None, base_model: str | None, owned: bool = False
) -> OperationHandle[AsyncSamplingClient]:
    """Queues an `OpenSampler` whose result is a client; with `owned` the weights go with it."""
    reply = Answer(SamplerOpened, lambda opened: AsyncSamplingClient(session, opened, owned=owned))
    return session.submit(OpenSampler(base_model=base_model, model_path=model_path), reply)
