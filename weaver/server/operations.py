"""What each operation does to engine and disk. Called by the executor, on the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from weaver import errors, protocol
from weaver.boundary import attempt_async, blocking
from weaver.checks import check_loss
from weaver.engine.base import GradientJob
from weaver.names import run_name_of
from weaver.server.card import write_card
from weaver.server.checkpoints import Location
from weaver.server.runs import Run
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from weaver.engine.base import Engine
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.registry import Registry
    from weaver.server.sampling import Samplers
    from weaver.server.sessions import Ticket
    from weaver.server.settings import Limits
    from weaver.types import AdamParams, CheckpointInfo, OptimStepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The engine and what operations need beside it."""

    engine: Engine
    checkpoints: Checkpoints
    kept_samplers: Checkpoints | None
    """Where samplers without a name outlive the process, if they are to."""
    limits: Limits
    samplers: Samplers
    registry: Registry
    now: Callable[[], datetime]

    async def execute(
        self, batch: Sequence[tuple[Run | None, Ticket]]
    ) -> Sequence[protocol.Result | errors.WeaverError]:
        """One operation and its run, or several that share a call: see `lanes.Head`."""
        gradients = [
            (gradient_job(run.run_id, operation), operation.labels)
            for run, ticket in batch
            if run is not None
            and isinstance(operation := ticket.submission.operation, protocol.ForwardBackward)
        ]
        if gradients:
            done = await attempt_async(self._forward_backward, gradients)
            return [done] * len(batch) if isinstance(done, errors.WeaverError) else done
        steps = [
            (run, operation.params)
            for run, ticket in batch
            if run is not None
            and isinstance(operation := ticket.submission.operation, protocol.OptimStep)
        ]
        if steps:
            taken = await attempt_async(self._optim_step, steps)
            return [taken] * len(batch) if isinstance(taken, errors.WeaverError) else taken
        return [await attempt_async(self._one, *batch[0])]

    async def forget_all(self) -> None:
        """Frees what this service holds of the engine."""
        await self.samplers.clear()
        for run in self.registry.runs.values():
            if run.loaded:
                await self.engine.delete_run(run.run_id)

    async def _one(self, run: Run | None, ticket: Ticket) -> protocol.Result:
        match ticket.submission.operation:
            case protocol.CreateModel() as operation:
                return await self._create_model(operation, ticket)
            case protocol.OpenSampler() as operation:
                return await self.samplers.open(operation)
            case protocol.SaveCheckpoint() as operation if run is not None:
                return await self._save(run, operation, ticket)
            case protocol.LoadCheckpoint() as operation if run is not None:
                return await self._load(run, operation)
        raise AssertionError(ticket.job_id)

    async def _create_model(
        self, operation: protocol.CreateModel, ticket: Ticket
    ) -> protocol.ModelCreated:
        run_id, project = run_id_of(ticket), ticket.session.caller.project
        self.limits.check_runs(len(self.registry.runs_of(project)))
        model = await blocking(self.engine.get_model, operation.base_model)
        mode, lora = operation.training_mode, operation.lora_config
        if mode not in model.training_modes:
            raise errors.UnsupportedError(
                f"{model.name} cannot be trained with {mode}.",
                field="training_mode",
                hint=f"Use {' or '.join(model.training_modes)}.",
            )
        if mode == "full_ft" and lora is not None:
            raise errors.InvalidParamsError(
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
            name=operation.name or run_name_of(operation.user_metadata.get("name")),
            seed=operation.seed if lora is None or lora.seed is None else lora.seed,
        )
        await self.engine.create_run(
            run_id, model.name, training_mode=mode, lora_config=lora, seed=run.seed
        )
        self.registry.runs[run_id], self.registry.owners[run_id] = run, run.project
        return protocol.ModelCreated(run=run.describe(), model=model)

    async def _forward_backward(
        self, labelled: Sequence[tuple[GradientJob, tuple[str, ...]]]
    ) -> Sequence[protocol.GradientsDone | errors.WeaverError]:
        outputs = await self.engine.forward_backward([job for job, _ in labelled])
        return [
            output
            if isinstance(output, errors.WeaverError)
            else protocol.GradientsDone(output=output, labels=labels)
            for output, (_, labels) in zip(outputs, labelled, strict=True)
        ]

    async def _optim_step(
        self, steps: Sequence[tuple[Run, AdamParams]]
    ) -> Sequence[protocol.StepDone | errors.WeaverError]:
        lost = {run.run_id: reason for run, _ in steps if (reason := run.lane.discard_reason)}
        asked = [(run.run_id, params) for run, params in steps if run.run_id not in lost]
        outputs = iter(await self.engine.optim_step(asked) if asked else ())
        return [
            await attempt_async(self._discard, run, lost[run.run_id])
            if run.run_id in lost
            else _stepped(run, next(outputs))
            for run, _ in steps
        ]

    async def _discard(self, run: Run, reason: str) -> protocol.StepDone:
        await self.engine.clear_gradients(run.run_id)
        run.lane.cleared()
        raise errors.GradientsDiscardedError(
            f"part of this batch is missing, so no step was taken ({reason})",
            hint="The gradient is cleared: repeat the batch's forward_backward calls.",
        )

    async def _save(
        self, run: Run, operation: protocol.SaveCheckpoint, ticket: Ticket
    ) -> protocol.CheckpointSaved:
        sampler = operation.purpose == "sampler"
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
        if disk is not None:
            info = await self._write(disk, info, operation, ticket, optimizer=optimizer)
        if sampler:
            await self.samplers.publish(
                str(location),
                await self.engine.snapshot(run.run_id),
                model=run.model,
                head=run.head,
                pinned=disk is None,
                expires_at=info.expires_at,
            )
        return protocol.CheckpointSaved(
            checkpoint=info.model_copy(update={"folder": None}) if unnamed else info
        )

    async def _write(
        self,
        disk: Checkpoints,
        info: CheckpointInfo,
        operation: protocol.SaveCheckpoint,
        ticket: Ticket,
        *,
        optimizer: bool,
    ) -> CheckpointInfo:
        author, overwrite = ticket.job_id, operation.overwrite
        done = await blocking(partial(disk.written, info, author=author, overwrite=overwrite))
        if done is not None:
            return done
        await blocking(self.check_stored, ticket.session.caller.project)
        fill = await self.engine.save(info.run_id, include_optimizer=optimizer)
        if info.training_mode == "full_ft":  # a whole model
            origin = await blocking(self.engine.origin, info.base_model)
            metadata = self.registry.runs[info.run_id].user_metadata
            card = partial(write_card, info=info, origin=origin, metadata=metadata)
            fill = partial(_both, fill, card)
        return await blocking(partial(disk.write, info, fill, author=author, overwrite=overwrite))

    def check_stored(self, project: str, more: int = 0) -> None:
        """Raises QuotaExceededError: there is no room for `more` bytes, or one.

        Snapshots do not count: they are the server's own.
        """
        if self.limits.stored_bytes is None:
            return
        stored = 0
        for run_id, owner in list(self.registry.owners.items()):
            if owner == project:
                unnamed = self.kept_samplers.list(run_id) if self.kept_samplers else []
                kept = [info for info in unnamed if info.kind == "sampler"]
                stored += sum(info.size_bytes for info in (*self.checkpoints.list(run_id), *kept))
        self.limits.check_stored(stored + max(0, more - 1))

    async def _load(
        self, run: Run, operation: protocol.LoadCheckpoint
    ) -> protocol.CheckpointLoaded:
        info, folder = await blocking(self.checkpoints.open, operation.path)
        wrong = run.mismatch(info)
        if wrong is None and operation.include_optimizer and info.kind != "weights_and_optimizer":
            wrong = "it has no optimizer state"
        if wrong is not None:
            raise errors.CheckpointMismatchError(
                f"{operation.path} does not fit {run.run_id}: {wrong}.",
                field="path",
                hint="Create a model of the same kind, or use load_state for weights alone.",
            )
        optimizer = operation.include_optimizer
        run.step = await self.engine.load(run.run_id, folder, include_optimizer=optimizer)
        run.lane.cleared()
        return protocol.CheckpointLoaded(checkpoint=info.model_copy(update={"step": run.step}))


def run_id_of(ticket: Ticket) -> str:
    """That of the run which it creates, known before: its lane of the engine depends on it."""
    return f"run-{ticket.token}"


def _both(fill: Callable[[Path], None], also: Callable[[Path], None], folder: Path) -> None:
    fill(folder)
    also(folder)


def _stepped(
    run: Run, output: OptimStepResult | errors.WeaverError
) -> protocol.StepDone | errors.WeaverError:
    if isinstance(output, errors.WeaverError):
        return output
    run.step = int(output.metrics["step"])
    return protocol.StepDone(output=output)


def gradient_job(run_id: str, operation: protocol.ForwardBackward) -> GradientJob:
    return GradientJob(
        run_id=run_id,
        datums=operation.datums,
        loss_fn=operation.loss_fn,
        loss_fn_config=check_loss(operation.loss_fn, operation.loss_fn_config),
        backward=operation.backward,
    )
