"""The protocol: operations, their results, and the `Service` that carries them out.

Clients speak it, `LocalService` implements it in process and `HttpService` over a socket; one
contract suite runs over both.

Order. A run's operations carry `seq` = 1, 2, 3 ... per (session, run), stamped when the client's
method is called; the service runs them strictly in that order. A refused or cancelled operation
still takes its place. Operations without a run (sampling, creating a model) have no seq.

Exactly once. `Submission.id` is made by the client. A resend with the same id gets the first
answer; the same (session, run, seq) or id with another body is a `ConflictError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from weaver import fields, types
from weaver.errors import WeaverError, from_code

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from weaver.exchange import Export, Import, Selection

# --- operations ---------------------------------------------------------------------------------


class CreateModel(types.Value):
    kind: Literal["create_model"] = "create_model"
    base_model: fields.PathText
    training_mode: types.TrainingMode = "lora"
    lora_config: types.LoraConfig | None = None
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seeds the adapter's initial values, where `lora_config.seed` is None."""
    user_metadata: fields.JsonDict = Field(default_factory=dict)
    name: fields.ShortText | None = None
    """Of the run, which gets a number behind it where the project has one of that name; None: that
    in `user_metadata`, if there is one."""


class ForwardBackward(types.Value):
    """`backward=False` is the verb `forward`: no gradient is kept."""

    kind: Literal["forward_backward"] = "forward_backward"
    datums: Annotated[tuple[types.Datum, ...], Field(fail_fast=True)]
    loss_fn: fields.ShortText
    loss_fn_config: fields.Options = Field(default_factory=dict)
    backward: bool = True
    labels: tuple[fields.ShortText, ...] = ()
    """The submitter's own, for its datums: the result brings them back."""


class OptimStep(types.Value):
    kind: Literal["optim_step"] = "optim_step"
    params: types.AdamParams


class SaveCheckpoint(types.Value):
    """Saves the run. `purpose` "state" can be loaded again, "sampler" can be sampled from.

    Without a name the service makes one; a sampler without a name lives until it is released, or as
    long as its session.
    """

    kind: Literal["save_checkpoint"] = "save_checkpoint"
    purpose: Literal["state", "sampler"]
    name: fields.ShortText | None = None
    include_optimizer: bool = True
    ttl_seconds: int | None = Field(default=None, ge=1, le=2**31, strict=True)
    overwrite: bool = False


class LoadCheckpoint(types.Value):
    kind: Literal["load_checkpoint"] = "load_checkpoint"
    path: fields.PathText
    """`weaver://...` or a folder that `save_state` wrote."""
    include_optimizer: bool = False


class OpenSampler(types.Value):
    """Makes weights ready to sample; both None is refused."""

    kind: Literal["open_sampler"] = "open_sampler"
    base_model: fields.PathText | None = None
    model_path: fields.PathText | None = None
    """`weaver://...` or a folder: an adapter in PEFT's layout, or a whole model."""
    head: types.Head | None = None
    """The head that the weights must have; None: that for tokens."""


class Sample(types.Value):
    kind: Literal["sample"] = "sample"
    sampler_id: fields.PathText
    prompt: (
        types.ModelInput
        | fields.LongText
        | Annotated[tuple[types.Message, ...], Field(fail_fast=True)]
    )
    """Text is encoded with the model's tokenizer; messages with its chat template."""
    params: types.SamplingParams = types.SamplingParams()
    num_samples: int = Field(default=1, ge=0, le=4096)
    """0 only scores the prompt: the verb `compute_logprobs`."""
    include_prompt_logprobs: bool = False
    top_logprobs: fields.Alternatives = 0
    """So many of the likeliest tokens are told of, at each place of the samples."""
    prompt_top_logprobs: fields.Alternatives = 0
    """As `top_logprobs`, at each place of the prompt."""
    prompt_targets: fields.IntegerArray | None = None
    """int64 [T] or [T, K]: tokens to be scored at each place of the prompt; -1 asks for nothing."""
    score: bool = False
    """The verb `score`, of a scalar head, which does nothing else; `num_samples` is 0 then."""
    stream: bool = False

    @property
    def prepared(self) -> bool:
        """Whether the prompt is of tokens, and the samples keep to nothing."""
        return isinstance(self.prompt, types.ModelInput) and not self.params.structured


class ReleaseSampler(types.Value):
    """Lets go of a sampler without a name that this session made; samples of it that were submitted
    before are finished."""

    kind: Literal["release_sampler"] = "release_sampler"
    sampler_id: fields.PathText


Operation = Annotated[
    CreateModel
    | ForwardBackward
    | OptimStep
    | SaveCheckpoint
    | LoadCheckpoint
    | OpenSampler
    | Sample
    | ReleaseSampler,
    Field(discriminator="kind"),
]


# --- results ------------------------------------------------------------------------------------


class ModelCreated(types.Value):
    kind: Literal["model_created"] = "model_created"
    run: types.TrainingRun
    model: types.ModelInfo


class GradientsDone(types.Value):
    kind: Literal["gradients_done"] = "gradients_done"
    output: types.ForwardBackwardResult
    labels: tuple[fields.ShortText, ...] = ()


class StepDone(types.Value):
    kind: Literal["step_done"] = "step_done"
    output: types.OptimStepResult


class CheckpointSaved(types.Value):
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    checkpoint: types.CheckpointInfo


class CheckpointLoaded(types.Value):
    kind: Literal["checkpoint_loaded"] = "checkpoint_loaded"
    checkpoint: types.CheckpointInfo
    """What was loaded; `step` is where the run now stands."""


class SamplerOpened(types.Value):
    kind: Literal["sampler_opened"] = "sampler_opened"
    sampler_id: str
    model: types.ModelInfo
    weights_version: int


class Sampled(types.Value):
    kind: Literal["sampled"] = "sampled"
    output: types.SampleResult


class SamplerReleased(types.Value):
    kind: Literal["sampler_released"] = "sampler_released"


Result = Annotated[
    ModelCreated
    | GradientsDone
    | StepDone
    | CheckpointSaved
    | CheckpointLoaded
    | SamplerOpened
    | Sampled
    | SamplerReleased,
    Field(discriminator="kind"),
]


# --- envelopes ----------------------------------------------------------------------------------


class ErrorInfo(types.Value):
    """A `WeaverError` as data."""

    code: str
    message: str
    field: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: WeaverError) -> ErrorInfo:
        return cls(code=error.code, message=error.message, field=error.field, hint=error.hint)

    def to_error(self) -> WeaverError:
        return from_code(self.code, self.message, field=self.field, hint=self.hint)


Name = Annotated[str, Field(strict=True, max_length=256, pattern=r"^[^\x00]*$")]
"""What every database can keep."""


class Submission(types.Value):
    """One operation on its way in. `run_id` and `seq` are set for a run's ordered operations.

    `operation=None` is a tombstone: the place `seq` of an operation that was withdrawn unsent.
    """

    id: Name
    operation: Operation | None
    run_id: Name | None = None
    seq: int | None = Field(default=None, ge=1, lt=2**63)
    lost_gradient: bool = False
    """Set in the tombstone of a gradient pass, without which the run's batch lacks a part: the next
    `optim_step` fails with `GradientsDiscardedError`, as after a pass that was refused."""
    note: Annotated[str, Field(strict=True, max_length=1024)] | None = None
    """The submitter's own: the outcome brings it back, also after a restart."""

    @property
    def kind(self) -> str:
        """That of its operation, or `withdrawn`."""
        return self.operation.kind if self.operation else "withdrawn"


class Outcome(types.Value):
    """What became of a submission: a result or an error, never both.

    `cursor` grows by one with each outcome of a session.
    """

    submission_id: str
    cursor: int
    result: Result | None = None
    error: ErrorInfo | None = None
    note: str | None = None


class SessionInfo(types.Value):
    session_id: str
    description: str
    """What answers, for the log: `embedded engine, cpu, float32`."""
    deterministic: bool = False
    """No number depends on what else is computed, or on when."""


class SessionState(types.Value):
    """An open session, in a list of them."""

    session_id: str
    project: str
    pending: int
    """Operations without an outcome."""
    unnamed_samplers: int
    """Samplers that live as long as the session."""
    user_metadata: fields.JsonDict = Field(default_factory=dict)
    """What its client gave when it opened it."""


MEDIA_TYPE = "application/vnd.weaver"
"""Over HTTP, of the messages of `weaver.wire`."""
LONGEST_POLL_S = 25.0
"""Below the 30 s after which common proxies give up on a silent answer."""
NEXT_OFFSET = "weaver-next-offset"
"""The header that says where the rest of a long answer begins."""


class Service(Protocol):
    """What a client needs. Every method may raise `WeaverError`; none waits without a bound."""

    async def open_session(
        self, *, user_metadata: fields.JsonDict | None = None
    ) -> SessionInfo: ...

    async def close_session(self, session_id: str) -> None:
        """Cancels the session's samples and forgets its unnamed samplers; its runs stay."""

    async def list_sessions(self) -> Sequence[SessionState]: ...

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        """Accepts all of them, durably, or raises. A refused operation becomes an outcome."""

    async def collect(self, session_id: str, *, after: int, timeout_s: float) -> Sequence[Outcome]:
        """Outcomes with a cursor above `after`, oldest first; waits until there is one.

        Empty after `timeout_s`. Outcomes up to `after` may be forgotten.
        """

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        """Asks: what has not begun, and any sample, ends as `cancelled`; ignores unknown ids."""

    def stream(self, session_id: str, submission_id: str) -> AsyncIterator[types.SampleDelta]:
        """The pieces of a sample submitted with `stream=True`, to its end or its error."""

    async def list_models(self) -> Sequence[types.ModelInfo]: ...

    async def get_model(self, base_model: str) -> types.ModelInfo: ...

    async def tokenizer(self, base_model: str) -> Any | None:
        """The engine's transformers tokenizer, not to be changed; None where it is elsewhere."""

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        """File names and contents from which transformers can load the tokenizer."""

    async def list_runs(self) -> Sequence[types.TrainingRun]: ...

    async def get_run(self, run_id: str) -> types.TrainingRun: ...

    async def rename_run(self, run_id: str, name: str) -> types.TrainingRun:
        """Gives a run another name, with a number where another run of its project has it."""

    async def stop_run(self, run_id: str) -> types.TrainingRun:
        """Cancels what waits for a run and takes it out of memory, if it can be brought back.

        An operation that has begun ends first. The run's next operation brings it back.
        """

    async def delete_run(self, run_id: str, *, checkpoints: bool = False) -> None:
        """Stops and forgets a run and its metrics; its checkpoints too only if that is asked."""

    async def list_checkpoints(
        self, run_id: str | None = None
    ) -> Sequence[types.CheckpointInfo]: ...

    async def get_checkpoint(self, path: str) -> types.CheckpointInfo: ...

    async def delete_checkpoint(self, path: str) -> None: ...

    async def delete_checkpoints(
        self, which: Selection, *, dry_run: bool = False
    ) -> Sequence[types.CheckpointInfo]:
        """Those that were deleted, or would be with `dry_run`; oldest first."""

    async def set_checkpoint_ttl(
        self, path: str, ttl_seconds: int | None
    ) -> types.CheckpointInfo: ...

    async def export_checkpoint(self, path: str, *, merge: bool = False) -> Export:
        """The files of an adapter in PEFT's layout, or of a whole model in transformers'.

        `merge` makes a whole model of an adapter: W + scale·B·A in the base model's dtype.
        """

    async def read_exported(
        self, path: str, name: str, *, merge: bool = False, offset: int = 0
    ) -> bytes:
        """The next bytes of a file of `export_checkpoint`; none at its end."""

    async def put_import(self, import_id: str, name: str, data: bytes, *, offset: int) -> None:
        """Keeps a piece of a file for `import_checkpoint`; a file's pieces come in their order.

        `import_id` is the client's, of 32 hexadecimal digits, and lives for an hour of silence.
        """

    async def import_checkpoint(self, import_id: str, what: Import) -> types.CheckpointInfo:
        """Makes a checkpoint, of a run that is not there, of all that was sent under this id."""

    async def drop_import(self, import_id: str) -> None:
        """Forgets what was sent; ignores an unknown id."""

    async def log_metrics(self, run_id: str, points: Sequence[types.MetricPoint]) -> None: ...

    async def rewind_metrics(self, run_id: str, step: int) -> None:
        """Forgets the numbers of a run that has gone back, for its curves to go on from there.

        Those that were logged for steps behind `step`, and those that operations answered behind
        the optimizer step at which it now stands.
        """

    async def read_metrics(
        self, run_id: str, *, name: str | None = None
    ) -> Sequence[types.MetricPoint]: ...

    async def aclose(self) -> None:
        """Ends all work within a bounded time; saved state stays."""
