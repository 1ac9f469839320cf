"""What requests of Tinker's protocol bring, and the operations that are made of it.

They are JSON, but for training passes: `passes.py` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AliasChoices, Field

from weaver import errors, protocol, types
from weaver.fields import MOST_ALTERNATIVES
from weaver.server.adapters.tinker.tensors import JsonTensor, Tensors
from weaver.server.http.body import Body
from weaver.tensors import TensorData

Name = Annotated[str, Field(min_length=1, max_length=128)]
Seq = Annotated[int, Field(ge=0, lt=2**62)]
Ttl = Annotated[int | None, Field(ge=1, le=2**31)]


# --- sessions and models --------------------------------------------------------------------------


class SessionBody(Body):
    user_metadata: types.JsonDict | None = None
    display_name: str | None = Field(None, max_length=1024)


class OfSession(Body):
    session_id: Name


class Lora(Body):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ModelBody(OfSession):
    model_seq_id: Seq
    base_model: str
    user_metadata: types.JsonDict | None = None
    lora_config: Lora = Lora()
    optimizer_config: Mapping[str, Any] = Field(default_factory=dict)

    def operation(self, model_id: str) -> protocol.CreateModel:
        if self.optimizer_config.get("type", "adamw") != "adamw":
            raise errors.UnsupportedError(
                "is not AdamW.", field="optimizer_config", hint="Leave it out."
            )
        return protocol.CreateModel(
            base_model=self.base_model,
            lora_config=types.LoraConfig(**self.lora_config.model_dump()),
            user_metadata={**(self.user_metadata or {}), "tinker": {"model_id": model_id}},
        )


class OfModel(Body):
    model_id: Annotated[str, Field(min_length=1, max_length=256)]


# --- training -------------------------------------------------------------------------------------


class InTurn(OfModel):
    seq_id: Seq


class Adam(Body):
    type: str = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class StepBody(InTurn):
    params: Adam = Field(
        Adam(), validation_alias=AliasChoices("adam_params", "optimizer_params", "optim_params")
    )

    def operation(self) -> protocol.OptimStep:
        if self.params.type not in ("adamw", "adam"):
            raise errors.UnsupportedError(
                f"has the type {self.params.type[:80]!r}.",
                field="optimizer_params",
                hint="Use AdamParams.",
            )
        return protocol.OptimStep(
            params=types.AdamParams(**self.params.model_dump(exclude={"type"}))
        )


class SaveBody(InTurn):
    path: Name
    ttl_seconds: Ttl = None
    overwrite: bool = False

    def operation(self) -> protocol.SaveCheckpoint:
        return protocol.SaveCheckpoint(
            purpose="state",
            name=self.path,
            ttl_seconds=self.ttl_seconds,
            overwrite=self.overwrite,
        )


class ExternalBody(InTurn):
    path: Name
    ttl_seconds: Ttl = None
    age_encryption_recipients: Sequence[str] | None = None

    def operation(self, name: str) -> protocol.SaveCheckpoint:
        """Weights without the optimizer, under a name of this server's."""
        if self.age_encryption_recipients:
            raise errors.UnsupportedError(
                "is given, and this server encrypts nothing.",
                field="age_encryption_recipients",
                hint="Leave it out, and encrypt what you download.",
            )
        return protocol.SaveCheckpoint(
            purpose="state", name=name, include_optimizer=False, ttl_seconds=self.ttl_seconds
        )


class SamplerBody(InTurn):
    path: Name | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl = None

    def operation(self) -> protocol.SaveCheckpoint:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise errors.InvalidRequestError(
                "needs either path or sampling_session_seq_id.", field="body"
            )
        return protocol.SaveCheckpoint(
            purpose="sampler", name=self.path, ttl_seconds=self.ttl_seconds
        )


class LoadBody(Body):
    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: Seq | None = None
    session_id: str | None = None
    model_seq_id: Seq | None = None
    user_metadata: types.JsonDict | None = None


# --- sampling -------------------------------------------------------------------------------------


class Chunk(Body):
    type: str = "encoded_text"
    tokens: Any = ()


class Prompt(Body):
    chunks: Annotated[tuple[Chunk, ...], Field(fail_fast=True)] = ()

    def to_ints(self) -> list[int]:
        if any(chunk.type != "encoded_text" for chunk in self.chunks):
            raise no_images()
        chunks = [types.EncodedTextChunk(tokens=chunk.tokens) for chunk in self.chunks]
        return types.ModelInput(chunks=tuple(chunks)).to_ints()


def no_images() -> errors.UnsupportedError:
    return errors.UnsupportedError(
        "has a chunk that is not text.", field="model_input", hint="Send tokens alone."
    )


class SamplingSessionBody(OfSession):
    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None


class Params(Body):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def native(self, *, room: int) -> types.SamplingParams:
        """`room` is the most tokens for which there is place behind the prompt."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        strings = tuple(s for s in stop if isinstance(s, str))
        return types.SamplingParams(
            max_tokens=self.max_tokens or max(room, 1),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=strings,
            stop_token_ids=tuple(s for s in stop if isinstance(s, int)),
            ignore_eos=self.stop is not None,
        )


Top = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)]


class SampleBody(Body):
    sampling_session_id: Name
    seq_id: Seq = 0
    num_samples: int = Field(1, ge=1, le=4096)
    prompt: Prompt
    sampling_params: Params = Params()
    prompt_logprobs: bool | None = False
    topk_prompt_logprobs: Top = 0
    topk_sample_logprobs: Top = 0
    prompt_alt_tokens_k: int = 0
    target_prompt_logprobs: JsonTensor | None = None
    prompt_logprobs_last_n: int | None = None

    def operation(self, *, sampler_id: str, context: int) -> protocol.Sample:
        if self.prompt_alt_tokens_k:
            raise errors.UnsupportedError(
                "is not computed here.",
                field="prompt_alt_tokens_k",
                hint="Ask for topk_prompt_logprobs.",
            )
        tokens, last = self.prompt.to_ints(), self.prompt_logprobs_last_n
        if last is not None and not (self.prompt_logprobs and 1 <= last < len(tokens)):
            raise errors.InvalidParamsError(
                f"is {last}.",
                field="prompt_logprobs_last_n",
                hint="Give 1 to len(prompt) - 1, with prompt_logprobs.",
            )
        return protocol.Sample(
            sampler_id=sampler_id,
            prompt=types.ModelInput.from_ints(tokens),
            params=self.sampling_params.native(room=context - len(tokens)),
            num_samples=self.num_samples,
            include_prompt_logprobs=bool(self.prompt_logprobs),
            top_logprobs=self.topk_sample_logprobs,
            prompt_top_logprobs=self.topk_prompt_logprobs,
            prompt_targets=self._targets(len(tokens)),
        )

    @property
    def sparse_targets(self) -> bool:
        """The answer has their layout."""
        given = self.target_prompt_logprobs
        return given is not None and given.sparse_crow_indices is not None

    def _targets(self, length: int) -> TensorData | None:
        """A row for the first token, too, of which nothing is asked."""
        if self.target_prompt_logprobs is None:
            return None
        field = "target_prompt_logprobs"
        given = Tensors().of_json(self.target_prompt_logprobs, dtype="int64", field=field, fill=-1)
        if given.ndim != 2 or len(given) != length - 1:
            raise errors.InvalidDatumError(
                f"has the shape {list(given.shape)}, the prompt has {length} tokens.",
                field=field,
                hint="Send [len(prompt) - 1, K]; -1 asks for nothing.",
            )
        return TensorData(np.pad(given, ((1, 0), (0, 0)), constant_values=-1))


# --- futures and checkpoints ----------------------------------------------------------------------


class FutureBody(Body):
    request_id: Annotated[str, Field(min_length=1, max_length=256)]


class Target(Body):
    sampling_session_id: Name
    cloned_sampler_id: int | None = None


class FuturesBody(Body):
    target: Target
    prev_cursor: int | None = None
    timeout: float | None = None


class PathBody(Body):
    tinker_path: str


class TtlBody(Body):
    ttl_seconds: Ttl = None


Kind = Literal["weights", "sampler_weights", "external_weights"]
