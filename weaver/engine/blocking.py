"""The parts that `ThreadedEngine` makes an engine of: a trainer and a sampler that block.

They are called by one thread, one call at a time, so they need no lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from weaver import types
    from weaver.engine.base import GradientJob, SampleJob, SampleProgress
    from weaver.errors import WeaverError


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


class BlockingTrainer(Protocol):
    """Each method as `Trainer` has it."""

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
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]: ...

    def optim_step(self, run_id: str, params: types.AdamParams) -> types.OptimStepResult:
        """Of one run; raises what `Trainer.optim_step` answers."""

    def clear_gradients(self, run_id: str) -> None: ...

    def step(self, run_id: str) -> int:
        """Optimizer steps taken."""

    def snapshot(self, run_id: str) -> WeightSnapshot: ...

    def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]: ...

    def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> None: ...

    def delete_run(self, run_id: str) -> None: ...


class BlockingSampler(Protocol):
    def publish(self, weights_id: str, snapshot: WeightSnapshot) -> None: ...

    def load(self, weights_id: str, base_model: str, folder: Path | None) -> int:
        """Makes a base model, or a folder's weights on it, sampleable; answers their version."""

    def release(self, weights_id: str) -> None: ...

    def add(self, job: SampleJob) -> None:
        """Queues a job; it joins at a following step."""

    def cancel(self, job_id: str) -> None:
        """Drops a job and frees its slots at once, without progress. Unknown ids are ignored."""

    def step(self) -> Sequence[SampleProgress]:
        """Prefills or decodes once for all running rows. Empty: nothing new yet."""

    @property
    def busy(self) -> bool:
        """Whether `step` has work."""
