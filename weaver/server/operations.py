"""What each operation does to engine and disk. Called by the executor, in a worker thread."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.engine.base import GradientJob
from weaver.errors import (
    CheckpointMismatchError,
    GradientsDiscardedError,
    InvalidParamsError,
    UnsupportedError,
    WeaverError,
)
from weaver.loss_specs import check_loss
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
from weaver.types import CheckpointInfo, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from weaver.engine.base import Engine
    from weaver.protocol import Operation, Result
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.sampling import Samplers


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The engine and what operations need beside it."""

    engine: Engine
    checkpoints: Checkpoints
    samplers: Samplers
    runs: dict[str, Run]
    now: Callable[[], datetime]

    def execute(
        self, work: Sequence[tuple[Run | None, Operation]]
    ) -> Sequence[Result | WeaverError]:
        """One operation, or several `forward_backward` that share a pass."""
        gradients = [
            (run, operation)
            for run, operation in work
            if run is not None and isinstance(operation, ForwardBackward)
        ]
        if gradients:
            done = attempt(lambda: self._forward_backward(gradients))
            return [done] * len(work) if isinstance(done, WeaverError) else done
        run, operation = work[0]
        return [attempt(lambda: self._one(run, operation))]

    def forget_all(self) -> None:
        """Frees what this service holds of the engine."""
        self.samplers.clear()
        for run_id in self.runs:
            self.engine.trainer.delete_run(run_id)

    def _one(self, run: Run | None, operation: Operation) -> Result:
        match operation:
            case CreateModel():
                return self._create_model(operation)
            case OpenSampler():
                return self.samplers.open(operation)
        assert run is not None, operation.kind
        match operation:
            case OptimStep():
                return self._optim_step(run, operation)
            case SaveCheckpoint():
                return self._save(run, operation)
            case LoadCheckpoint():
                return self._load(run, operation)
        raise AssertionError(operation.kind)

    def _create_model(self, operation: CreateModel) -> ModelCreated:
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
            run_id=f"run-{secrets.token_hex(6)}",
            model=model,
            training_mode=mode,
            lora_config=lora,
            created_at=now,
            last_request_at=now,
            user_metadata=operation.user_metadata,
        )
        seed = operation.seed if lora is None or lora.seed is None else lora.seed
        self.engine.trainer.create_run(
            run.run_id, model.name, training_mode=mode, lora_config=lora, seed=seed
        )
        self.runs[run.run_id] = run
        return ModelCreated(run=run.describe(), model=model)

    def _forward_backward(
        self, work: Sequence[tuple[Run, ForwardBackward]]
    ) -> Sequence[GradientsDone | WeaverError]:
        outputs = self.engine.trainer.forward_backward(
            [
                GradientJob(
                    run_id=run.run_id,
                    datums=operation.datums,
                    loss_fn=operation.loss_fn,
                    loss_fn_config=check_loss(operation.loss_fn, operation.loss_fn_config),
                    backward=operation.backward,
                )
                for run, operation in work
            ]
        )
        return [
            output if isinstance(output, WeaverError) else GradientsDone(output=output)
            for output in outputs
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

    def _save(self, run: Run, operation: SaveCheckpoint) -> CheckpointSaved:
        trainer, sampler = self.engine.trainer, operation.purpose == "sampler"
        run.step = trainer.step(run.run_id)
        if operation.name is None:
            kind = "unnamed" if sampler else f"step-{run.step}"
            name = f"{kind}-{secrets.token_hex(4)}"
        else:
            name = operation.name
        location = Location(run.run_id, "sampler" if sampler else "weights", name)
        optimizer = operation.include_optimizer and not sampler

        def describe(now: datetime) -> CheckpointInfo:
            return CheckpointInfo(
                path=str(location),
                run_id=run.run_id,
                name=name,
                kind="sampler" if sampler else "weights_and_optimizer" if optimizer else "weights",
                base_model=run.model.name,
                training_mode=run.training_mode,
                lora_config=run.lora_config,
                step=run.step,
                created_at=now,
                size_bytes=0,
                ttl_seconds=operation.ttl_seconds,
            )

        unnamed = sampler and operation.name is None
        info = describe(self.now())
        if not unnamed:
            info = self.checkpoints.write(
                location,
                lambda folder: trainer.save(run.run_id, folder, include_optimizer=optimizer),
                describe=describe,
                overwrite=operation.overwrite,
            )
        if sampler:
            self.samplers.publish(
                str(location),
                trainer.snapshot(run.run_id),
                pinned=unnamed,
                expires_at=info.expires_at,
            )
        return CheckpointSaved(checkpoint=info)

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
