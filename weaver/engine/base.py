"""What the service asks of an engine: the `Trainer`, `Sampler` and `Engine` protocols.

An engine owns its device or devices: who waits for whom on them is its own affair, so its methods
may be called at any time. Values are plain, so that an engine may be in another process. Methods
raise `WeaverError` for what a user can mend; anything else is a defect and reaches the user as
`EngineError`. Inputs were validated by the service. `weaver.engine.threaded` makes an engine of
parts that block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from weaver import types
    from weaver.engine.status import EngineStatus
    from weaver.errors import WeaverError
    from weaver.tensors import TensorData


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientJob:
    """One `forward_backward` (or `forward`) of one run; jobs of several runs share a pass."""

    run_id: str
    datums: Sequence[types.Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str]
    """Filled in by `check_loss`."""
    backward: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRef:
    """Where weights are that never change again."""

    base_model: str
    version: int = 0
    """The run's optimizer step; 0 for a base model."""
    uri: str | None = None
    """`mem:...` of the engine that answered it, `file:///...` of a folder (an adapter in PEFT's
    layout, or a checkpoint); None is the base model itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    job_id: str
    weights_id: str
    prompt: Sequence[int]
    params: types.SamplingParams
    num_samples: int
    """0: only score the prompt."""
    score: bool = False
    """What a scalar head says of the prompt is wanted, and nothing else: it draws no tokens."""
    include_prompt_logprobs: bool = False
    top_logprobs: int = 0
    """So many of the likeliest tokens are wanted at each place of the samples."""
    prompt_top_logprobs: int = 0
    """As `top_logprobs`, at each place of the prompt."""
    prompt_targets: TensorData | None = None
    """int64 [T] or [T, K]: tokens to be scored at each place of the prompt; -1 asks for nothing."""
    stream: bool = False
    """Whether `SampleProgress.deltas` is wanted."""
    tenant: str = ""
    """Tenants get places in turn, however many jobs each has."""

    @property
    def scores_prompt(self) -> bool:
        """Whether anything is wanted of each place of the prompt."""
        some = self.include_prompt_logprobs or self.prompt_top_logprobs > 0
        return some or self.prompt_targets is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """What was done for one job since the last; the last one of a job has a result or an error."""

    job_id: str
    deltas: Sequence[types.SampleDelta] = ()
    result: types.SampleResult | None = None
    error: WeaverError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedWeights:
    """What kind of run can load them."""

    base_model: str
    lora_config: types.LoraConfig | None
    """None: a whole model, for full fine-tuning."""


class Trainer(Protocol):
    """Calls of one lane are made one at a time; lanes do not wait for each other.

    Any may raise or answer EngineLostError: the part of the engine that had the run has ended,
    with the run's weights and gradient. `create_run` makes it anew, in a part that was started
    again.
    """

    def lane(self, run_id: str, base_model: str) -> str:
        """Where the calls of a run wait for each other: always the same for a run.

        Asked before it is created, too. Both may be empty, for calls of no run, or of no base
        model.
        """

    async def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None: ...

    async def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        """Adds each job's gradient to its run. A job that fails adds nothing to any run.

        The jobs are of different runs of one lane on one base model.
        """

    async def optim_step(
        self, steps: Sequence[tuple[str, types.AdamParams]]
    ) -> Sequence[types.OptimStepResult | WeaverError]:
        """One AdamW step of each run on its accumulated gradient, which is then cleared.

        The runs are different ones of one lane, and none depends on the others. An answer's metrics
        have `step`: the optimizer steps that the run has taken. Errors: NoGradientsError where
        nothing was accumulated; NonFiniteError where the gradient has NaN or infinity, which is
        then cleared and the weights untouched.
        """

    async def clear_gradients(self, run_id: str) -> None: ...

    async def snapshot(self, run_id: str) -> WeightsRef:
        """The weights as they are now, to be published; until the run's next snapshot."""

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        """Copies the run as it is now; what is answered writes that copy into an empty folder.

        It blocks, in any thread and beside whatever the engine does: PEFT's layout (or a model
        folder for full fine-tuning), with the optimizer also `optimizer.safetensors`. The
        accumulated gradient is not saved.
        """

    async def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> int:
        """Replaces weights, step and (or resets) optimizer state; clears the gradient.

        Answers the run's step, in optimizer steps taken.

        Raises:
            CheckpointMismatchError, CheckpointCorruptError: before anything changed.
        """

    async def delete_run(self, run_id: str) -> None: ...


class Sampler(Protocol):
    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        """Makes weights sampleable under an id that was never used; answers their version.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            UnknownModelError, CheckpointMismatchError, CheckpointCorruptError
        """

    async def release(self, weights_id: str) -> None:
        """Forgets the weights, once running jobs are done with them. Unknown ids are ignored."""

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        """Begins a job, behind those that were begun before; called on an event loop.

        `tell` is called there, later, with what is done as it is done. The last of it has a result,
        or the error for which the job cannot be done. What is answered drops the job, of which
        nothing is told any more; it does not wait for that, and does nothing to one that has ended.
        """


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that services use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


class Engine(Trainer, Sampler, Protocol):
    """Beside training and sampling it knows its models: from files, and without their weights.

    What it says of models blocks, and may be asked in any number of threads at once.
    """

    @property
    def description(self) -> str:
        """For the log: `torch 2.13 on cpu (as set), float32, 2 threads`."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What it counts from its beginning on, for the metrics: `{"repeated_passes": 1}`.

        `prompt_tokens` of samples, and of them `reused_prompt_tokens`, whose keys and values were
        there, so that they were not read.
        """

    @property
    def gauges(self) -> Mapping[str, float]:
        """What there is of it now, for the metrics: `{"base_models": 2}`."""

    @property
    def status(self) -> EngineStatus:
        """What it has in other processes; none is asked for it."""

    @property
    def loaded_models(self) -> Collection[str]:
        """Those base models that it lists and has in memory."""

    def list_models(self) -> Sequence[types.ModelInfo]: ...

    def get_model(self, base_model: str) -> types.ModelInfo:
        """Reads a model's configuration.

        Raises:
            UnknownModelError: with the known names.
            UnsupportedError: the architecture or format cannot run here, and why.
        """

    def max_tokens_trained(self, base_model: str, training_mode: types.TrainingMode) -> int | None:
        """Tokens of the longest sequence whose gradient fits its memory; None if not known.

        Errors: see `get_model`.
        """

    def encode(
        self,
        base_model: str,
        prompt: str | Sequence[types.Message],
        *,
        tools: Sequence[types.JsonDict] = (),
    ) -> list[int]:
        """Tokens of a text (with special tokens) or of a chat (with the generation prompt).

        Raises:
            ContextLengthError: it cannot fit the model's context, however it is encoded.
            UnsupportedError: messages, and the tokenizer has no chat template; tools, of which its
                template shows nothing.
            InvalidRequestError: the template or the tokenizer refuses it, with its words.
        """

    def check_structure(self, base_model: str, params: types.SamplingParams) -> None:
        """Prepares for samples whose text keeps to a schema or a grammar, as these ask.

        Raises:
            InvalidParamsError: it cannot be understood, or is too large.
            UnsupportedError, MissingDependencyError: not for this model, or not installed.
        """

    def tokenizer(self, base_model: str) -> Any | None:
        """The transformers tokenizer that it works with, if it does; not to be changed."""

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]: ...

    def origin(self, base_model: str) -> str:
        """Where others find a model, as adapters and model cards say: a hub id, or a folder.

        Errors: see `get_model`.
        """

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        """Writes the whole model with the adapter of a checkpoint folder into an empty folder.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, UnsupportedError, StorageError
        """

    def import_weights(
        self, source: Path, folder: Path, *, base_model: str | None
    ) -> ImportedWeights:
        """Writes into an empty folder what `load` reads, of a folder of PEFT's or transformers'.

        The step is 0. Without `base_model` it is the one that the adapter names.

        Raises:
            CheckpointCorruptError: a file is missing, broken or not finite.
            CheckpointMismatchError, UnknownModelError: of another base, or of one that is not here.
            InvalidParamsError: it does not name its base.
            UnsupportedError: a variant of LoRA, or a setting or tensor that is not known.
            StorageError
        """

    def close(self) -> None:
        """Forgets everything, behind what still runs. The engine is not used again."""
