"""What requests of the Weaver REST interface bring, and the operations that are made of it."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasPath, ConfigDict, Field, model_validator

from weaver import errors, protocol, types
from weaver.fields import MOST_ALTERNATIVES
from weaver.server.adapters.weaver_rest.tensors import Body

# --- sessions, models, metrics --------------------------------------------------------------------


class OpenBody(Body):
    scheduling_policy: Any = None


class ModelBody(Body):
    base_model: str
    training_mode: types.TrainingMode | None = None
    lora_config: types.LoraConfig | None = None
    user_metadata: types.JsonDict | None = None


class Point(types.MetricPoint):
    model_config = ConfigDict(extra="ignore")
    _error = errors.InvalidRequestError
    model_id: str


class MetricsBody(Body):
    metrics: tuple[Point, ...] = Field(max_length=10_000, fail_fast=True)


# --- training -------------------------------------------------------------------------------------

TtlSeconds = Annotated[int | None, Field(ge=1, le=2**31)]
SAMPLER_TTL_S = 3600
"""That of an exported sampler whose request names none, as the client's own default."""
MERGED = "export-merged-"
"""How the names of checkpoints begin that were made to be downloaded as whole models."""
LOSSES = {"forward_logprob": "cross_entropy", "ppo_clip": "ppo"}
OPTIONS = {"entropy_coeff": "entropy_coef"}
IGNORED_OPTIONS = ("enable_debug_dump",)
INPUTS_KEPT = {
    "forward_logprob": ("target_tokens",),
    "surrogate": ("target_tokens", "surrogate_weights"),
}
"""Clients send these losses the inputs of another one along."""


class RestDatum(Body):
    kind: str = "datum"
    datum_id: str | None = None
    model_input: types.ModelInput = types.ModelInput()
    loss_fn_inputs: Mapping[str, Any] = Field(default_factory=dict)

    def to_native(self, loss_fn: str) -> types.Datum:
        inputs = {
            name: value.get("data") if isinstance(value, Mapping) else value
            for name, value in self.loss_fn_inputs.items()
            if name in INPUTS_KEPT.get(loss_fn, (name,))
        }
        if loss_fn == "forward_logprob":
            inputs.setdefault("target_tokens", self.model_input.to_ints())
        return types.Datum(model_input=self.model_input, loss_fn_inputs=inputs)


class PassInput(Body):
    loss_fn: str
    data: tuple[RestDatum, ...]
    loss_fn_config: Mapping[str, Any] = Field(default_factory=dict)


class RunBody(Body, ABC):
    """What is posted to a run, to become an operation of it."""

    artifact: ClassVar[bool] = False
    """See `RestNote`."""

    @abstractmethod
    def operation(self) -> protocol.Operation: ...


class PassBody(RunBody):
    given: PassInput

    def operation(self) -> protocol.ForwardBackward:
        given = self.given
        if any(datum.kind == "sample_ref" for datum in given.data):
            raise errors.UnsupportedError(
                "refers to a managed dataset, of which this server has none.",
                field="data",
                hint="Send the tokens.",
            )
        options = {
            OPTIONS.get(name, name): value
            for name, value in given.loss_fn_config.items()
            if name not in IGNORED_OPTIONS
        }
        ids = [datum.datum_id or "" for datum in given.data]
        return protocol.ForwardBackward(
            datums=tuple(datum.to_native(given.loss_fn) for datum in given.data),
            loss_fn=LOSSES.get(given.loss_fn, given.loss_fn),
            loss_fn_config=options,
            backward=isinstance(self, BackwardBody),
            labels=tuple(ids) if any(ids) else (),
        )


class ForwardBody(PassBody):
    given: PassInput = Field(validation_alias=AliasPath("payload", "forward_input"))


class BackwardBody(PassBody):
    given: PassInput = Field(validation_alias=AliasPath("payload", "forward_backward_input"))


class StepBody(RunBody):
    adam_params: types.AdamParams = Field(validation_alias=AliasPath("payload", "adam_params"))

    def operation(self) -> protocol.OptimStep:
        return protocol.OptimStep(params=self.adam_params)


class SamplerBody(RunBody):
    path: str | None = None
    ttl_seconds: TtlSeconds = SAMPLER_TTL_S

    def operation(self) -> protocol.SaveCheckpoint:
        return _sampler(self.path, self.ttl_seconds)


class SaveBody(RunBody):
    type: Literal["weight", "weight_and_optimizer", "sampling"] = "weight"
    name: str | None = None
    ttl_seconds: TtlSeconds = None

    def operation(self) -> protocol.SaveCheckpoint:
        if self.type == "sampling":
            return _sampler(self.name, self.ttl_seconds)
        return protocol.SaveCheckpoint(
            purpose="state",
            name=self.name,
            include_optimizer=self.type == "weight_and_optimizer",
            ttl_seconds=self.ttl_seconds,
        )


class LoadBody(RunBody):
    path: str
    include_optimizer: bool = False

    def operation(self) -> protocol.LoadCheckpoint:
        return protocol.LoadCheckpoint(path=self.path, include_optimizer=self.include_optimizer)


class ExportBody(RunBody):
    artifact = True
    format: Literal["huggingface"] = "huggingface"
    merge_adapter: bool = False
    ttl_seconds: TtlSeconds = None

    def operation(self) -> protocol.SaveCheckpoint:
        return protocol.SaveCheckpoint(
            purpose="state",
            name=f"{MERGED if self.merge_adapter else 'export-'}{secrets.token_hex(4)}",
            include_optimizer=False,
            ttl_seconds=self.ttl_seconds,
        )


def _sampler(name: str | None, ttl_seconds: int | None) -> protocol.SaveCheckpoint:
    """Each export has a path of its own, so that none changes under those who sample from it."""
    unique = f"{name or 'sampler'}-{secrets.token_hex(4)}"
    return protocol.SaveCheckpoint(purpose="sampler", name=unique, ttl_seconds=ttl_seconds)


OF_RUNS: dict[str, type[RunBody]] = {
    "forward-passes": ForwardBody,
    "forward-backward-passes": BackwardBody,
    "optimizer-steps": StepBody,
    "export-sampler": SamplerBody,
    "checkpoints": SaveBody,
    "load": LoadBody,
    "export-hf": ExportBody,
}
"""By the path below /models/{model_id} at which it is posted."""


class TtlBody(Body):
    path: str
    ttl_seconds: TtlSeconds = None


# --- sampling -------------------------------------------------------------------------------------

UNSUPPORTED = (
    "score_centering",
    "return_sampling_mask",
    "return_moe_topk_indices",
    "return_rollout_token_expert",
)


class SamplingSessionBody(Body):
    base_model: str | None = None
    model_path: str | None = None


class PromptBody(Body):
    model_config = ConfigDict(extra="allow")
    prompt: types.ModelInput

    @model_validator(mode="after")
    def _refuse_what_is_not_computed(self) -> Self:
        for name in UNSUPPORTED:
            if (self.model_extra or {}).get(name):
                raise unsupported(name)
        return self


class SampleBody(PromptBody):
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0, le=MOST_ALTERNATIVES)
    return_old_logprob: bool = False


class LogprobsBody(PromptBody):
    loss_fn_config: dict[str, Any] = Field(default_factory=dict)


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


def params_of(given: types.JsonDict) -> types.SamplingParams:
    """Without what newer clients may send beside; `sampling_seed` is another name of `seed`."""
    set_ = {name: value for name, value in given.items() if value is not None}
    if "sampling_seed" in set_:
        set_.setdefault("seed", set_["sampling_seed"])
    return types.SamplingParams(
        **{n: v for n, v in set_.items() if n in types.SamplingParams.model_fields}
    )


def unsupported(field: str) -> errors.UnsupportedError:
    return errors.UnsupportedError("has no counterpart here.", field=field, hint="Leave it out.")
