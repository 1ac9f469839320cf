"""What each operation does to engine and disk. Called by the executor, in a worker thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.checks import check_loss
from weaver.engine.base import GradientJob
from weaver.errors import (
    CheckpointMismatchError,
    GradientsDiscardedError,
    InvalidParamsError,
    UnsupportedError,
    WeaverError,
)
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    CreateModel,
    ForwardBackward,
    GradientsDone,
    LoadCheckpoint,
    ModelCreated,
    OpenSampler,
    OptimStep,
    SaveCheckpoint,
    StepDone,
)
from weaver.server.attempt import attempt
from weaver.server.checkpoints import Location
from weaver.server.runs import Run
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from weaver.engine.base import Engine
    from weaver.protocol import Result
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.known import Known
    from weaver.server.limits import Limits
    from weaver.server.sampling import Samplers
    from weaver.server.sessions import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The engine and what operations need beside it."""

    engine: Engine
    checkpoints: Checkpoints
    kept_samplers: Checkpoints | None
    """Where samplers without a name outlive the process, if they are to."""
    limits: Limits
    samplers: Samplers
    known: Known
    now: Callable[[], datetime]

    def execute(self, batch: Sequence[tuple[Run | None, Ticket]]) -> Sequence[Result | WeaverError]:
        """One operation and its run, or several `forward_backward` that share a pass."""
        gradients = [
            (gradient_job(run.run_id, operation), operation.labels)
            for run, ticket in batch
            if run is not None
            and isinstance(operation := ticket.submission.operation, ForwardBackward)
        ]
        if gradients:
            done = attempt(lambda: self._forward_backward(gradients))
            return [done] * len(batch) if isinstance(done, WeaverError) else done
        return [attempt(lambda: self._one(*batch[0]))]

    def forget_all(self) -> None:
        """Frees what this service holds of the engine."""
        self.samplers.clear()
        for run in self.known.runs.values():
            if run.loaded:
                self.engine.trainer.delete_run(run.run_id)

    def _one(self, run: Run | None, ticket: Ticket) -> Result:
        match ticket.submission.operation:
            case CreateModel() as operation:
                return self._create_model(operation, ticket)
            case OpenSampler() as operation:
                return self.samplers.open(operation)
            case OptimStep() as operation if run is not None:
                return self._optim_step(run, operation)
            case SaveCheckpoint() as operation if run is not None:
                return self._save(run, operation, ticket)
            case LoadCheckpoint() as operation if run is not None:
                return self._load(run, operation)
        raise AssertionError(ticket.job_id)

    def _create_model(self, operation: CreateModel, ticket: Ticket) -> ModelCreated:
        run_id, project = f"run-{ticket.token}", ticket.session.caller.project
        mine = [run for run in list(self.known.runs.values()) if run.project == project]
        self.limits.check_runs(len(mine))
        model = self.engine.get_model(operation.base_model)
        mode, lora = operation.training_mode, operation.lora_config
        if mode not in model.training_modes:
            raise UnsupportedError(
                f"{model.name} cannot be trained with {mode}.",
                field="training_mode",
                hint=f"Use {' or '.join(model.training_modes)}.",
            )
        if mode == "full_ft" and lora is not None:
            raise InvalidParamsError(
                "has no meaning for full fine-tuning.", field="lora_config", hint="Leave it out."
            )
        if mode == "lora" and lora is None:
            lora = LoraConfig()
        now = self.now()
        run = Run(
            run_id=run_id,
            model=model,
            training_mode=mode,
            lora_config=lora,
            created_at=now,
            last_request_at=now,
            user_metadata=operation.user_metadata,
            project=project,
            seed=operation.seed if lora is None or lora.seed is None else lora.seed,
        )
        self.engine.trainer.create_run(
            run_id, model.name, training_mode=mode, lora_config=lora, seed=run.seed
        )
        self.known.runs[run_id], self.known.owners[run_id] = run, run.project
        return ModelCreated(run=run.describe(), model=model)

    def _forward_backward(
        self, labelled: Sequence[tuple[GradientJob, tuple[str, ...]]]
    ) -> Sequence[GradientsDone | WeaverError]:
        outputs = self.engine.trainer.forward_backward([job for job, _ in labelled])
        return [
            output
            if isinstance(output, WeaverError)
            else GradientsDone(output=output, labels=labels)
            for output, (_, labels) in zip(outputs, labelled, strict=True)
        ]

    def _optim_step(self, run: Run, operation: OptimStep) -> StepDone:
        trainer, reason = self.engine.trainer, run.lane.discard_reason
        if reason is not None:
            trainer.clear_gradients(run.run_id)
            run.lane.discard_reason = None
            raise GradientsDiscardedError(
                f"part of this batch is missing, so no step was taken ({reason})",
                hint="The gradient is cleared: repeat the batch's forward_backward calls.",
            )
        output = trainer.optim_step(run.run_id, operation.params)
        run.step = trainer.step(run.run_id)
        return StepDone(output=output)

    def _save(self, run: Run, operation: SaveCheckpoint, ticket: Ticket) -> CheckpointSaved:
        trainer, sampler = self.engine.trainer, operation.purpose == "sampler"
        run.step = trainer.step(run.run_id)
        if operation.name is None:
            kind = "unnamed" if sampler else f"step-{run.step}"
            name = f"{kind}-{ticket.token}"
        else:
            name = operation.name
        location = Location(run.run_id, "sampler" if sampler else "weights", name)
        optimizer = operation.include_optimizer and not sampler
        info = run.checkpoint(
            str(location),
            "sampler" if sampler else "weights_and_optimizer" if optimizer else "weights",
            step=run.step,
            ttl_seconds=operation.ttl_seconds,
        )
        unnamed = sampler and operation.name is None
        disk = self.kept_samplers if unnamed else self.checkpoints

        def fill(folder: Path) -> None:
            self._check_stored(run.project)
            trainer.save(run.run_id, folder, include_optimizer=optimizer)

        if disk is not None:
            info = disk.write(info, fill, author=ticket.job_id, overwrite=operation.overwrite)
        if sampler:
            self.samplers.publish(
                str(location),
                trainer.snapshot(run.run_id),
                pinned=disk is None,
                expires_at=info.expires_at,
            )
        return CheckpointSaved(
            checkpoint=info.model_copy(update={"folder": None}) if unnamed else info
        )

    def _check_stored(self, project: str) -> None:
        """Raises QuotaExceededError. Snapshots do not count: they are the server's own."""
        if self.limits.stored_bytes is None:
            return
        stored = 0
        for run_id in [
            run_id for run_id, owner in list(self.known.owners.items()) if owner == project
        ]:
            unnamed = self.kept_samplers.list(run_id) if self.kept_samplers else []
            kept = [info for info in unnamed if info.kind == "sampler"]
            stored += sum(info.size_bytes for info in (*self.checkpoints.list(run_id), *kept))
        self.limits.check_stored(stored)

    def _load(self, run: Run, operation: LoadCheckpoint) -> CheckpointLoaded:
        info, folder = self.checkpoints.open(operation.path)
        wrong = run.mismatch(info)
        if wrong is None and operation.include_optimizer and info.kind != "weights_and_optimizer":
            wrong = "it has no optimizer state"
        if wrong is not None:
            raise CheckpointMismatchError(
                f"{operation.path} does not fit {run.run_id}: {wrong}.",
                field="path",
                hint="Create a model of the same kind, or use load_state for weights alone.",
            )
        self.engine.trainer.load(run.run_id, folder, include_optimizer=operation.include_optimizer)
        run.step = self.engine.trainer.step(run.run_id)
        run.lane.discard_reason = None  # loading cleared the gradient
        return CheckpointLoaded(checkpoint=info.model_copy(update={"step": run.step}))


def gradient_job(run_id: str, operation: ForwardBackward) -> GradientJob:
    return GradientJob(
        run_id=run_id,
        datums=operation.datums,
        loss_fn=operation.loss_fn,
        loss_fn_config=check_loss(operation.loss_fn, operation.loss_fn_config),
        backward=operation.backward,
    )
