"""What the service asks of an engine: the `Trainer`, `Sampler` and `Engine` protocols.

All methods block; the service calls them from worker threads, one call at a time per engine, so an
implementation needs no lock. They raise `WeaverError` for what a user can mend; anything else is a
defect and reaches the user as `EngineError`. Inputs were validated by the service.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weaver import types
    from weaver.errors import WeaverError


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientJob:
    """One `forward_backward` (or `forward`) of one run; jobs of several runs share a pass."""

    run_id: str
    datums: Sequence[types.Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str]
    """Filled in by `check_loss`."""
    backward: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightSnapshot:
    """Weights that never change again.

    For LoRA, `tensors` maps PEFT's names (`base_model.model....lora_A.weight`) to torch tensors;
    for full fine-tuning the model's own parameter names.
    """

    base_model: str
    lora_config: types.LoraConfig | None
    """None after full fine-tuning."""
    version: int
    """The run's optimizer step."""
    tensors: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    job_id: str
    weights_id: str
    prompt: Sequence[int]
    params: types.SamplingParams
    num_samples: int
    """0: only score the prompt."""
    include_prompt_logprobs: bool = False
    stream: bool = False
    """Whether `SampleProgress.deltas` is wanted."""
    tenant: str = ""
    """Tenants get places in turn, however many jobs each has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """What one step of the sampler did for one job; the last one has a result or an error."""

    job_id: str
    deltas: Sequence[types.SampleDelta] = ()
    result: types.SampleResult | None = None
    error: WeaverError | None = None


class Trainer(Protocol):
    def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None: ...

    def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        """Adds each job's gradient to its run. A job that fails adds nothing to any run.

        The jobs are of different runs on one base model.
        """

    def optim_step(self, run_id: str, params: types.AdamParams) -> types.OptimStepResult:
        """One AdamW step on the accumulated gradient, which is then cleared.

        Raises:
            NoGradientsError: nothing was accumulated.
            NonFiniteError: the gradient has NaN or infinity; it is cleared, weights untouched.
        """

    def clear_gradients(self, run_id: str) -> None: ...

    def step(self, run_id: str) -> int:
        """Optimizer steps taken."""

    def snapshot(self, run_id: str) -> WeightSnapshot: ...

    def save(self, run_id: str, folder: Path, *, include_optimizer: bool) -> None:
        """Writes into an empty folder: PEFT's layout (or a model folder for full fine-tuning).

        With the optimizer also `optimizer.safetensors`. The accumulated gradient is not saved.
        """

    def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> None:
        """Replaces weights, step and (or resets) optimizer state; clears the gradient.

        Raises:
            CheckpointMismatchError, CheckpointCorruptError: before anything changed.
        """

    def delete_run(self, run_id: str) -> None: ...


class Sampler(Protocol):
    def publish(self, weights_id: str, snapshot: WeightSnapshot) -> None:
        """Makes a trainer's snapshot sampleable under an id.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """

    def load(self, weights_id: str, base_model: str, folder: Path | None) -> int:
        """Makes a base model, or a folder's weights on it, sampleable; answers their version.

        Raises:
            UnknownModelError, CheckpointMismatchError, CheckpointCorruptError
        """

    def release(self, weights_id: str) -> None:
        """Forgets the weights, once running jobs are done with them. Unknown ids are ignored."""

    def add(self, job: SampleJob) -> None:
        """Queues a job; it joins at a following step."""

    def cancel(self, job_id: str) -> None:
        """Drops a job and frees its slots at once, without progress. Unknown ids are ignored."""

    def step(self) -> Sequence[SampleProgress]:
        """Prefills or decodes once for all running rows. Empty list: nothing new yet."""

    @property
    def busy(self) -> bool:
        """Whether `step` has work."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that services use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


class Engine(Protocol):
    @property
    def trainer(self) -> Trainer: ...

    @property
    def sampler(self) -> Sampler: ...

    @property
    def description(self) -> str:
        """For the log: `torch 2.13 on cpu, float32, 2 threads`."""

    def list_models(self) -> Sequence[types.ModelInfo]: ...

    def get_model(self, base_model: str) -> types.ModelInfo:
        """Reads a model's configuration; cheap, loads no weights.

        Raises:
            UnknownModelError: with the known names.
            UnsupportedError: the architecture or format cannot run here, and why.
        """

    def encode(self, base_model: str, prompt: str | Sequence[types.Message]) -> list[int]:
        """Tokens of a text (with special tokens) or of a chat (with the generation prompt).

        Like `get_model` it may run beside other methods, in any number of threads.

        Raises:
            ContextLengthError: it cannot fit the model's context, however it is encoded.
            UnsupportedError: messages, and the tokenizer has no chat template.
            InvalidRequestError: the template or the tokenizer refuses it, with its words.
        """

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]: ...

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        """Writes the whole model with the adapter of a checkpoint folder into an empty folder.

        It may run beside others, once `get_model` has answered for the base.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, UnsupportedError, StorageError
        """

    def close(self) -> None: ...
