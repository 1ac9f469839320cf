"""The values that users build and receive: data, parameters, results, and what describes a run.

All are frozen pydantic models that also read as the documented mappings: `sequence.tokens` and
`sequence["tokens"]` are the same. A bad field raises a `WeaverError` that names it. Shapes use
T for the tokens of one sequence; log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from weaver import fields
from weaver.errors import InvalidDatumError, InvalidParamsError, InvalidRequestError
from weaver.fields import JsonDict as JsonDict
from weaver.tensors import TensorData, as_token_ids
from weaver.values import Value as Value

__all__ = ["Datum", "EncodedTextChunk", "Message", "ModelInput"]
__all__ += ["AdamParams", "ForwardBackwardResult", "LoraConfig", "OptimStepResult"]
__all__ += ["SampleDelta", "SampleResult", "SampledSequence", "SamplingParams", "TopLogprobs"]
__all__ += ["CheckpointInfo", "MetricPoint", "ModelInfo", "TrainingRun"]

TrainingMode = Literal["lora", "full_ft"]
StopReason = Literal["stop", "length"]
Quantize = Literal["none", "int8", "nf4"]
Head = Literal["scalar"]
CheckpointKind = Literal["weights", "weights_and_optimizer", "sampler"]


# --- data ---------------------------------------------------------------------------------------

TokenIds = Annotated[tuple[int, ...], BeforeValidator(as_token_ids)]


class EncodedTextChunk(Value):
    """Token ids of a piece of text: `EncodedTextChunk(tokens=[1, 2, 3])`."""

    _error = InvalidDatumError
    type: Literal["encoded_text"] = "encoded_text"
    tokens: TokenIds

    @property
    def length(self) -> int:
        return len(self.tokens)


class ModelInput(Value):
    """A sequence of tokens in chunks: `ModelInput.from_ints([1, 2, 3])`."""

    _error = InvalidDatumError
    chunks: Annotated[tuple[EncodedTextChunk, ...], Field(fail_fast=True)] = ()

    @classmethod
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        """From token ids: a list, a numpy array or a torch tensor of shape [T]."""
        return cls(chunks=(EncodedTextChunk(tokens=tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        return ModelInput(chunks=(*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk(tokens=(token,)))

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """T, in tokens."""
        return sum(chunk.length for chunk in self.chunks)


def _as_input(value: object) -> object:
    """Tokens, too, are taken for a `ModelInput`."""
    if isinstance(value, Mapping):  # a ModelInput is one, too
        return value
    return ModelInput(chunks=(EncodedTextChunk(tokens=value),))


def _as_arrays(value: object) -> object:
    if not isinstance(value, Mapping):
        raise InvalidDatumError(
            "must map names to arrays.",
            field="loss_fn_inputs",
            hint='Such as {"target_tokens": [...]}.',
        )
    return {
        name: TensorData(
            data,
            dtype="int64" if name == "target_tokens" else "float32",
            field=f"loss_fn_inputs[{name!r}]",
        )
        for name, data in value.items()
    }


class Datum(Value):
    """One training sequence and what its loss needs.

    `loss_fn_inputs` maps a name to an array of shape [T], T the length of `model_input`; position i
    predicts token i+1. Some losses take K targets at each position, all arrays being [T, K] then.
    `target_tokens` is int64, everything else float32; lists, numpy arrays and torch tensors are
    accepted. Example::

        Datum(model_input=ModelInput.from_ints([5, 6, 7]),
              loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 1.0]})

    Raises:
        InvalidDatumError: an input is not an array of the right dtype.
    """

    _error = InvalidDatumError
    model_input: Annotated[ModelInput, BeforeValidator(_as_input)]
    loss_fn_inputs: Annotated[
        Mapping[fields.ShortText, TensorData],
        BeforeValidator(fields.few),
        BeforeValidator(_as_arrays),
    ] = Field(default_factory=dict)


class Message(Value):
    """One chat message: `{"role": "user", "content": "Hello"}`."""

    role: fields.ShortText
    content: fields.LongText
    tool_calls: fields.Calls = ()
    """Calls that the model has made in it, in the form that chat templates take."""


# --- parameters ---------------------------------------------------------------------------------


class AdamParams(Value):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101): decoupled decay, bias-corrected moments."""

    learning_rate: float = Field(default=1e-4, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """Global L2 norm to which gradients are clipped; 0 is off."""


def check_text(text: str, *, field: str) -> None:
    """Raises InvalidRequestError for half a surrogate pair: JSON can write it, no text has it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"has half a surrogate pair at character {error.start}.",
            field=field,
            hint="Read the text again from its source, or leave that character out.",
        ) from None


def _stop_strings(value: object) -> object:
    strings = (value,) if isinstance(value, str) else value
    if strings is None:
        return ()
    if isinstance(strings, Sequence) and "" in strings:
        raise InvalidParamsError(
            "has an empty string.", field="stop", hint="Leave it out, or give the text to stop at."
        )
    for string in strings if isinstance(strings, Sequence) else ():
        if isinstance(string, str):
            check_text(string, field="stop")
    return tuple(strings) if isinstance(strings, list) else strings


class SamplingParams(Value):
    """How tokens are drawn.

    The order is: logit bias, repetition penalty, frequency and presence penalty, temperature,
    top-k, top-p, min-p; what a schema or a grammar does not allow is left out before temperature.
    Temperature 0 is greedy. None of this changes `logprobs`: they are the policy's.
    """

    max_tokens: int = Field(default=100, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    """0 or -1: off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drops tokens less likely than `min_p` times the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides positive and multiplies negative logits of tokens seen (arXiv:1909.05858)."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Is taken from the logits of tokens that the sample has already, not of the prompt's."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """The same, as many times as the sample has the token."""
    logit_bias: fields.Biases = ()
    """Is added to the logits of these tokens: `{token: -100 to 100}`, of at most 1,024."""
    stop: Annotated[fields.StopTexts, BeforeValidator(_stop_strings), Field(max_length=256)] = ()
    """Strings that end a sequence; `tokens` keeps what completed them, `text` ends before them.

    They may be or contain special tokens ("<|im_end|>"), though `text` has none.
    """
    stop_token_ids: TokenIds = ()
    """Tokens that end a sequence, beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Whether the model's own end-of-sequence tokens end nothing."""
    json_schema: fields.SchemaText | None = None
    """A JSON schema, a mapping or its JSON, that the text keeps to; `{"type": "object"}` is any."""
    grammar: fields.GrammarText | None = None
    """A grammar that the text keeps to, in llguidance's form of Lark: `start: "yes" | /no+/`."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Makes the samples reproducible, whatever else runs beside them."""

    @property
    def structured(self) -> bool:
        """Whether the text keeps to a schema or a grammar."""
        return self.json_schema is not None or self.grammar is not None

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        if self.json_schema is not None and self.grammar is not None:
            raise InvalidParamsError(
                "is given beside json_schema.", field="grammar", hint="Give one of them."
            )
        return self


class LoraConfig(Value):
    """A LoRA adapter (Hu et al., arXiv:2106.09685); its scale is alpha / rank."""

    rank: int = Field(default=32, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    head: Head | None = None
    """With "scalar" it gives one number a sequence, no tokens: nothing is unembedded."""


# --- results ------------------------------------------------------------------------------------


class ForwardBackwardResult(Value):
    """What `forward` and `forward_backward` answer; also reads as `{"result": {...}}`.

    `loss_fn_outputs[i]["logprobs"]` is a float32 array for datum i, one value for each of its
    `target_tokens` and in their shape: [T], or [T, K]. Of a scalar head it is `scores`, [1].
    """

    _also = ("result",)
    loss_fn_outputs: tuple[Mapping[str, TensorData], ...]
    metrics: Mapping[str, float]

    @property
    def result(self) -> ForwardBackwardResult:
        return self


class OptimStepResult(Value):
    """`metrics` holds `grad_norm` (before clipping), `learning_rate` and `step` (from 1)."""

    _also = ("result",)
    metrics: Mapping[str, float]

    @property
    def result(self) -> OptimStepResult:
        return self


class TopLogprobs(Value):
    """The likeliest tokens at each of N places, likeliest first: two arrays [N, K].

    `top.tokens[i]` are those at place i and `top.logprobs[i]` their log-probabilities. Before the
    first token of a prompt there is nothing: tokens are -1 there, and log-probabilities NaN.
    """

    tokens: fields.IntegerArray
    logprobs: fields.FloatArray
    """Under the policy: untempered, unfiltered; in nats."""


class SampledSequence(Value):
    """One continuation. All lists have one entry for each of its tokens."""

    tokens: fields.Integers
    """What was sampled, with the tokens that completed a stop."""
    text: str
    """The decoded tokens, without special tokens and without the stop string."""
    logprobs: fields.Floats
    """Log-probabilities under the policy: untempered, unfiltered."""
    sampling_logprobs: fields.Floats
    """Log-probabilities in the distribution that was drawn from: after all of `SamplingParams`."""
    stop_reason: StopReason
    weights_version: int = 0
    """The optimizer step of the weights that sampled it; 0 for a base model."""
    top_logprobs: TopLogprobs | None = None
    """Of each of its tokens' places, if asked for."""


class SampleResult(Value):
    """What became of a prompt. What is said of the prompt itself is there if it was asked for."""

    sequences: tuple[SampledSequence, ...]
    prompt_tokens: fields.Integers = ()
    prompt_logprobs: fields.SomeFloats | None = None
    """Of each token given those before it; None for the first."""
    prompt_top_logprobs: TopLogprobs | None = None
    prompt_target_logprobs: fields.FloatArray | None = None
    """Those of the targets, in their shape; NaN for the first place, and where a target is -1."""
    score: float | None = None
    """What a scalar head says of the prompt, if asked for."""


class SampleDelta(Value):
    """A piece of a streamed sample: the new tokens of sequence `index`."""

    index: int
    tokens: fields.Integers
    text: str
    logprobs: fields.Floats
    sampling_logprobs: fields.Floats = ()
    stop_reason: StopReason | None = None
    """Set in the last piece of a sequence."""
    top_logprobs: TopLogprobs | None = None
    """At the places of these tokens, if asked for."""


# --- descriptions -------------------------------------------------------------------------------


class ModelInfo(Value):
    """A base model that can be trained and sampled."""

    name: str
    architecture: str
    vocab_size: int
    context_length: int
    """The most tokens of one sequence."""
    num_parameters: int
    training_modes: tuple[TrainingMode, ...] = ("lora", "full_ft")
    dtype: Literal["float32", "bfloat16"] = "float32"
    """That of the weights that are sampled from; what is trained is float32."""
    quantize: Quantize = "none"
    """How the frozen layers of attention and MLP are kept; they compute in `dtype`."""
    size_bytes: int = 0
    """What the frozen model takes in memory, at most; 0 where that is not told."""
    loaded: bool | None = None
    """Whether it is in memory, as lists of models say; else it is loaded with its next use."""


class CheckpointInfo(Value):
    """A saved state: `path` is what `load_state` and `create_sampling_client` take."""

    path: str
    """`weaver://<run_id>/<weights|sampler>/<name>`"""
    run_id: str
    name: str
    kind: CheckpointKind
    base_model: str
    training_mode: TrainingMode
    lora_config: LoraConfig | None
    step: int
    created_at: datetime
    size_bytes: int
    ttl_seconds: int | None = None
    expires_at: datetime | None = None
    folder: str | None = None
    """Where it lies on this machine; None when a server keeps it."""


class TrainingRun(Value):
    """One model in training."""

    run_id: str
    name: str | None = None
    """What people call it, as no other run of its project is called; None: nothing."""
    base_model: str
    training_mode: TrainingMode
    lora_config: LoraConfig | None
    step: int
    status: Literal["active", "idle", "stopped"]
    created_at: datetime
    last_request_at: datetime
    user_metadata: JsonDict = Field(default_factory=dict)
    project: str = "default"
    """Whose it is, on a server with keys."""


class MetricPoint(Value):
    """One logged number: `MetricPoint(name="reward", value=0.5, step=3)`."""

    name: fields.ShortText = Field(pattern=r"^[^\x00]*$")
    value: float
    step: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    occurred_at: datetime | None = None
