"""`TorchTrainer`: gradients and optimizer steps of many runs over shared base models.

`ThreadedEngine` calls it, one call at a time.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_

from weaver import errors, types
from weaver.boundary import attempt
from weaver.engine.base import GradientJob
from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch import checkpoints
from weaver.engine.torch.catalog import is_out_of_memory
from weaver.engine.torch.device import ADAM_COPIES
from weaver.engine.torch.files import check_finite, set_weights
from weaver.engine.torch.lora import choose_targets, new_adapter
from weaver.engine.torch.memory import Plan, Planner, Recompute, check_full_training
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.objective import Objective
from weaver.engine.torch.packing import Share, split_passes
from weaver.engine.torch.part_files import save_parts
from weaver.engine.torch.passes import Alive, Task, run_pass
from weaver.engine.torch.scalar import check_scalar
from weaver.engine.torch.shards import Parts
from weaver.engine.torch.team import ALONE, Team
from weaver.engine.torch.training_run import Run

logger = logging.getLogger(__name__)


class TorchTrainer:
    """With `deterministic` a pass holds one job, so that no result depends on the other jobs.

    `tokens_per_pass`, `head_rows` and `recompute` are chosen by `make_plan` where 0 and `auto`.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        deterministic: bool = False,
        tokens_per_pass: int = 0,
        head_rows: int = 0,
        recompute: Recompute = "auto",
        team: Team = ALONE,
    ) -> None:
        self._store = store
        self._team = team
        self._deterministic = deterministic
        self._planner = Planner(
            store,
            tokens=tokens_per_pass,
            head_rows=head_rows,
            recompute=recompute,
            deterministic=deterministic,
        )
        self._runs: dict[str, Run] = {}
        self.repeated_passes = 0
        """Those that found no memory the first time."""

    def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None:
        """Makes a run at step 0; for LoRA, `lora_config` None takes the defaults.

        Raises:
            UnknownModelError, UnsupportedError, InvalidParamsError, EngineError
        """
        if training_mode == "full_ft":
            facts = self._store.catalog.facts(base_model)
            self._store.agreed(partial(check_full_training, facts, self._store))
            self._runs[run_id] = Run(facts, own=self._store.own(base_model))
            return
        config = lora_config or types.LoraConfig()
        facts = self._store.catalog.facts(base_model)
        targets = choose_targets(
            facts.targets.values(), config, model=base_model, fused_experts=facts.fused_experts
        )
        if config.head is not None:
            check_scalar(facts)
        adapter = new_adapter(
            targets,
            config,
            seed=seed if config.seed is None else config.seed,
            device=self._store.device,
            hidden_size=facts.config.hidden_size,
        )
        self._store.base(base_model)  # what is wrong with it is said before there is a run
        self._runs[run_id] = run = Run(facts, config, adapter, quantize=self._store.quantize)
        self._store.room.adapters[run_id] = ADAM_COPIES * sum(p.nbytes for p in run.parameters())

    def plan(self, base_model: str, training_mode: types.TrainingMode) -> Plan:
        """How passes of such runs are laid out; the model need not be loaded, and no call runs.

        Errors: see `Catalog.facts`.
        """
        return self._planner.plan(base_model, training_mode)

    def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | errors.WeaverError]:
        """See the protocol. Jobs of one model, one kind of head and one `backward` share passes."""
        runs = [self._run(job.run_id) for job in jobs]
        tasks = [Task(j, r, Objective(j, r.head)) for j, r in zip(jobs, runs, strict=True)]
        groups: dict[tuple[object, ...], list[Task]] = {}
        for task in tasks:
            task.error = attempt(check_finite, task.run.named_parameters())
            key = task.run.shares, task.run.head, task.job.backward
            groups.setdefault(key, []).append(task)
        for group in groups.values():
            self._compute(group)
        self._team.settle(tasks)
        return [task.finish() for task in tasks]

    def optim_step(self, run_id: str, params: types.AdamParams) -> types.OptimStepResult:
        """AdamW on the accumulated gradient, clipped to a global norm. Errors: see the protocol."""
        run = self._run(run_id)
        if run.gradient is None:
            raise errors.NoGradientsError(
                f"run {run_id} has no gradient.", hint="Call forward_backward first."
            )
        self._store.turn_to(run.own or run.facts)
        gradient, run.gradient = run.gradient, None
        norm = self._team.norm(gradient, divided=run.parts is not None)
        if not torch.isfinite(norm):
            raise errors.NonFiniteError(
                f"the gradient's norm is {norm.item()}; the step was not taken.",
                hint="The gradient is cleared. Check the data, or lower the learning rate.",
            )
        parameters = run.parameters()
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        if params.grad_clip_norm > 0:
            clip_grads_with_norm_(parameters, params.grad_clip_norm, norm)
        run.optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        rate, step = params.learning_rate, float(run.step)
        return types.OptimStepResult(
            metrics={"grad_norm": float(norm), "learning_rate": rate, "step": step}
        )

    def clear_gradients(self, run_id: str) -> None:
        self._run(run_id).gradient = None

    def step(self, run_id: str) -> int:
        return self._run(run_id).step

    def snapshot(self, run_id: str) -> WeightSnapshot:
        """A copy that no later step changes."""
        run = self._run(run_id)
        return WeightSnapshot(
            base_model=run.facts.info.name,
            lora_config=run.lora_config,
            version=run.step,
            tensors={n: p.detach().clone() for n, p in run.named_parameters().items()},
        )

    def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        """Errors: see `copy_of` and, of what is answered, `Copy.write`.

        Of a divided model all ranks write their parts here, and one of them calls the answer.
        """
        run = self._run(run_id)
        optimizer = run.optimizer if include_optimizer else None
        if run.parts is not None:
            return save_parts(run, optimizer)
        return checkpoints.copy_of(
            run.state(),
            facts=run.facts,
            module=None if run.own is None else run.own.module,
            parameters=run.named_parameters(),
            optimizer=optimizer,
        ).write

    def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> None:
        """See the protocol.

        Raises:
            CheckpointMismatchError: of another base model, mode, rank or scale, or without
                optimizer state where it is asked; before anything changed.
            CheckpointCorruptError: a file is missing or broken; before anything changed.
        """
        run = self._run(run_id)
        run.state().check_same(checkpoints.read_state(folder))
        parameters = run.named_parameters()

        def read() -> tuple[WeightSnapshot, checkpoints.Moments]:
            snapshot = checkpoints.read_snapshot(
                folder, facts=run.facts, quantize=run.quantize, parts=run.parts
            )
            if not include_optimizer:
                return snapshot, {}
            return snapshot, checkpoints.read_optimizer(folder, parameters, parts=run.parts)

        snapshot, moments = read() if run.parts is None else self._store.agreed(read)
        set_weights(parameters, snapshot.tensors)
        run.step, run.gradient = snapshot.version, None
        run.reset_optimizer()
        run.optimizer.state.update(moments)

    def delete_run(self, run_id: str) -> None:
        self._runs.pop(run_id, None)
        self._store.room.adapters.pop(run_id, None)

    def close(self) -> None:
        for run_id in list(self._runs):
            self.delete_run(run_id)

    def _run(self, run_id: str) -> Run:
        if run_id not in self._runs:
            raise errors.RunNotFoundError(
                f"the engine has no run {run_id!r}.", field="run_id", hint="Create it first."
            )
        return self._runs[run_id]

    def _compute(self, tasks: list[Task]) -> None:
        """Runs all passes of jobs that share a model, the kind of head and `backward`.

        A pass that finds no memory is repeated once, in halves and with all layers recomputed, as
        are those that follow. With `deterministic` it is not halved, which would change bits.
        """
        run = tasks[0].run
        model = self._store.base(run.facts.info.name) if run.own is None else run.own
        self._store.turn_to(model)
        plan = self.plan(run.facts.info.name, run.training_mode)
        lengths = [task.objective.lengths for task in tasks]
        passes = self._team.plan(lengths, budget=plan.tokens, merge=not self._deterministic)
        if model.parts is not None:
            self._compute_together(tasks, passes, model, plan=plan, parts=model.parts)
            return
        repeated = False
        while passes:
            first, *passes = passes
            alive = [(tasks[s.job], s) for s in first if tasks[s.job].error is None]
            if not alive or self._has_memory(alive, model, plan):
                continue
            tokens = sum(lengths[share.job][datum] for share in first for datum in share.datums)
            said = f"not enough memory on {self._store.device} for a pass of {tokens} tokens"
            if repeated:
                hint = "Shorten the sequences, or set WEAVER_TOKENS_PER_PASS to fewer."
                for task, _ in alive:
                    task.error = errors.EngineError(f"{said}, all layers recomputed.", hint=hint)
                continue
            repeated, plan, passes = True, replace(plan, recompute="all"), [first, *passes]
            self.repeated_passes += 1
            logger.warning("%s: it is repeated in halves, with all layers recomputed", said)
            if not self._deterministic:
                passes = split_passes(passes, lengths, budget=tokens // 2)

    def _compute_together(
        self,
        tasks: list[Task],
        passes: Sequence[tuple[Share, ...]],
        model: LoadedModel,
        *,
        plan: Plan,
        parts: Parts,
    ) -> None:
        """Of a divided model: every process makes as many passes, and none can repeat one alone.

        What is raised here ends the group.
        """
        backward = tasks[0].job.backward
        with torch.set_grad_enabled(backward):
            for shares in passes:
                alive = [(tasks[s.job], s) for s in shares if tasks[s.job].error is None]
                run_pass(alive, model, plan)
        if backward and model.trainable:
            [task] = tasks
            task.gradient = parts.take_gradients()
            task.check_gradient()

    def _has_memory(self, alive: Alive, model: LoadedModel, plan: Plan) -> bool:
        """Runs a pass; one that finds no memory leaves nothing behind, and is answered False."""
        before = [(task, deepcopy(task.objective.totals)) for task, _ in alive]
        try:
            with torch.set_grad_enabled(alive[0][0].job.backward):
                run_pass(alive, model, plan)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        for task, totals in before:
            task.objective.totals, task.error = totals, None
        gc.collect()  # now that the frames of the error are gone, and what they held with them
        if self._store.device.type == "cuda":
            torch.cuda.empty_cache()
        return False
