"""`AsyncRewardClient`: scores of sequences by one reward model that never changes.

Made by `AsyncServiceClient.create_reward_client` and
`AsyncTrainingClient.save_weights_and_get_reward_client`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from weaver import types
from weaver.checks import as_prompt, is_batch
from weaver.client.handle import OperationHandle
from weaver.client.published import Published
from weaver.client.session import Answer, Session
from weaver.errors import InvalidDatumError
from weaver.keywords import suggesting
from weaver.protocol import OpenSampler, Sample, Sampled, SamplerOpened

TokenPrompts = Sequence[types.ModelInput] | Sequence[Sequence[int]]
SCORED = Answer(Sampled, lambda result: cast("float", result.output.score))


@suggesting
class AsyncRewardClient(Published):
    """Scores with weights as they were when this client was made."""

    def score(self, prompts: TokenPrompts) -> OperationHandle[list[float]]:
        """One number for each sequence of tokens, read behind its last one.

        Sequences that begin alike are read once as far as they do.

        Raises:
            InvalidDatumError, TokenOutOfRangeError, ContextLengthError: at the call.
            NonFiniteError: from the handle.
        """
        self._check_open()
        handles = [
            self._session.submit(
                Sample(sampler_id=self.sampler_id, prompt=prompt, num_samples=0, score=True), SCORED
            )
            for prompt in token_prompts(prompts, self.model_info)
        ]

        async def gather() -> list[float]:
            return [await handle for handle in handles]

        return self._session.compose(f"scores of {len(handles)} sequences", [*handles], gather)


def token_prompts(prompts: TokenPrompts, model: types.ModelInfo) -> list[types.ModelInput]:
    """What `score` takes, checked against the model.

    Raises:
        InvalidDatumError, TokenOutOfRangeError, ContextLengthError
    """
    given = prompts if is_batch(prompts) else ()
    checked = [as_prompt(one, model, field=f"prompts[{i}]") for i, one in enumerate(given)]
    tokens = [one for one in checked if isinstance(one, types.ModelInput)]
    if not tokens or len(tokens) < len(checked):
        raise InvalidDatumError(
            "are not sequences of tokens.",
            field="prompts",
            hint="Pass [[1, 2, 3], ...]; get_tokenizer() makes them of text, its "
            "apply_chat_template of messages.",
        )
    return tokens


def open_rewards(
    session: Session, *, model_path: str, base_model: str | None = None, owned: bool = False
) -> OperationHandle[AsyncRewardClient]:
    """Queues an `OpenSampler` whose result is a client; with `owned` the weights go with it."""
    reply = Answer(SamplerOpened, lambda opened: AsyncRewardClient(session, opened, owned=owned))
    operation = OpenSampler(base_model=base_model, model_path=model_path, head="scalar")
    return session.submit(operation, reply)
