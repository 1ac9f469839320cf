"""`on_policy` and `off_policy`: reinforcement learning. `rl.train` and recipes call them.

Each step: 1. publish the weights; 2. play P tasks G times with them, or take what older weights
have played (`Pipeline`); 3. drop failed rollouts, and groups that teach nothing if so planned;
4. credit, datums, passes of forward_backward and optim_step (`policy_step`); 5. metrics,
transcripts, checkpoint. Importance sampling with group-centred advantages is the default: at the
first pass r = 1, and the gradient is that of REINFORCE with a baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup
from pydantic import TypeAdapter

from weaver import AsyncSamplingClient, AsyncTrainingClient
from weaver.errors import ConfigError
from weaver_rl import rollouts
from weaver_rl.agent import derive_seed
from weaver_rl.algorithms.run import Result, Run, shows_progress
from weaver_rl.algorithms.step import policy_step
from weaver_rl.clock import Stopwatch
from weaver_rl.credit.marks import models_of
from weaver_rl.credit.models import check_vocabulary
from weaver_rl.curriculum import Picked, Picker, outcomes
from weaver_rl.data import check_tasks
from weaver_rl.evaluation import Evaluate
from weaver_rl.guard import task_group
from weaver_rl.in_flight import InFlight, unfollowed
from weaver_rl.metrics import rollout_metrics
from weaver_rl.plan import Move, Plan, ZeroVariance
from weaver_rl.rollouts import Environment, GroupEnvironment
from weaver_rl.run_folder import Manifest
from weaver_rl.types import Filtered, Group, Task

__all__ = ["off_policy", "on_policy"]

PENDING: TypeAdapter[dict[int, Filtered]] = TypeAdapter(dict[int, Filtered])


async def on_policy(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains for `plan.steps` steps, or what is left of them in a run that goes on.

    Args:
        environment: an async function of (agent, task), or `single_turn(reward)`.
        reference: the model of the objective's KL penalty; the KL to it is logged.
        evaluate: called with the weights before the first step, behind every
            `plan.evaluate_every` steps and at the end; its numbers are logged as they are.

    Raises:
        ConfigError: the plan is asynchronous, lacks its reference, or its credit asks a model of
            another vocabulary.
        InvalidRequestError: no tasks, or one without a field that the environment needs.
        RolloutsFailedError, LogprobGapError: see `Plan`.
    """
    if plan.max_staleness:
        raise ConfigError("is above 0.", field="max_staleness", hint="Use off_policy.")
    return await off_policy(
        trainer, tasks, environment, plan, run=run, reference=reference, evaluate=evaluate
    )


@shows_progress
async def off_policy(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
    choose: Callable[[Filtered], Filtered] = lambda found: found,
) -> Result:
    """`on_policy` with rollouts up to `plan.max_staleness` steps old; at 0 it is `on_policy`.

    Training and sampling overlap, and rollouts that are under way go on with newer weights as
    `plan.in_flight` says.

    Args:
        choose: what of a step's rollouts is learned, and the metrics of that; all by default.

    Other arguments and errors are those of `on_policy`.

    Raises:
        ConfigError: the run has a folder, `run.exact` is on, rollouts overlap training, and the
            engine is not deterministic or weights are to move in flight; sampling that
            cannot go on from one request into the next, where they move within replies.
    """
    run = run or Run()
    _check(trainer, plan, run, reference)
    played = rollouts.as_group_environment(environment)
    check_tasks(tasks, fields=played.fields)
    tokenizer = await trainer.get_tokenizer()
    if plan.max_staleness and plan.in_flight == "reply":
        if name := unfollowed(plan.sampling, tokenizer):
            raise ConfigError(
                "goes by all tokens of a reply, and in_flight='reply' asks for it in parts.",
                field=f"sampling.{name}",
                hint="Leave it out (special tokens: stop_token_ids), or use in_flight='turn'.",
            )
    await check_vocabulary(models_of(plan.credited), tokenizer)
    await check_vocabulary([reference] if reference else [], tokenizer, field="reference")
    done, version = await run.restore(trainer, steps=plan.steps)
    sampler = await trainer.save_weights_and_get_sampling_client()
    measure = evaluate and partial(evaluate, sampler)
    metrics = await run.evaluate_first(measure, plan, done=done.step, steps=plan.steps)
    async with task_group() as group:
        moves: Move = "never"  # without staleness, nothing is under way where weights move
        if plan.max_staleness:
            moves = plan.in_flight or ("never" if trainer.deterministic else "turn")
        pipeline = Pipeline(
            tasks, played, plan, sampler=sampler, moves=moves, group=group, kept=done.extra
        )
        tokens = int(done.extra.get("tokens", 0))
        for step in range(done.step, plan.steps):
            begin = time.monotonic()
            run.waiting_for(f"rollouts of step {step + 1}")
            found = await pipeline.play(step)
            chosen, collected, drawing = choose(found), time.monotonic(), pipeline.drawing.seconds
            run.waiting_for(f"training of step {step + 1}")
            stepped = await policy_step(
                trainer, chosen.kept, plan, step=step, version=version, reference=reference
            )
            sampled, now = found.kept + found.dropped, time.monotonic()
            counted = rollout_metrics(sampled, weights_version=version, seconds=now - begin)
            tokens += int(counted.get("tokens/sampled", 0))
            metrics = {
                **counted,
                "tokens/total": float(tokens),
                **chosen.metrics,
                **stepped.metrics,
                "time/rollout_s": collected - begin,
                "time/train_s": now - collected,
                "time/overlap_s": pipeline.drawing.seconds - drawing,
                "time/step_s": now - begin,
            }
            version = stepped.version
            run.log_rollouts(chosen, stepped, step=step + 1)
            sampler = await trainer.save_weights_and_get_sampling_client()
            pipeline.move(sampler)
            if evaluate is not None and plan.evaluates(step + 1, steps=plan.steps):
                run.waiting_for(f"the evaluation behind step {step + 1}")
                metrics |= await evaluate(sampler)
            await run.log(metrics, step=step + 1)
            if run.is_due(step + 1, plan.steps):
                extra = {"version": version, "tokens": tokens}
                await run.checkpoint(trainer, await pipeline.drain(step + 1, extra=extra))
    return Result(final=sampler, steps=plan.steps, version=version, metrics=metrics)


def _check(
    trainer: AsyncTrainingClient, plan: Plan, run: Run, reference: AsyncSamplingClient | None
) -> None:
    if plan.loss.needs_reference and reference is None:
        raise ConfigError(
            "the objective has a KL penalty, and there is no reference.",
            field="reference",
            hint="Pass reference=await service.create_sampling_client(base_model=...).",
        )
    if not plan.max_staleness or run.folder is None or not run.exact:
        return
    if plan.in_flight in ("turn", "reply"):
        raise ConfigError(
            f"is {plan.in_flight!r}: which weights draw which token depends on what is faster, and "
            "a run that was killed would not go on exactly.",
            field="in_flight",
            hint='Use "never", or do without, by Run(exact=False).',
        )
    if not trainer.deterministic:
        raise ConfigError(
            "is above 0: on this engine a run that was killed would not go on exactly.",
            field="max_staleness",
            hint="Use AsyncServiceClient(deterministic=True), WEAVER_DETERMINISTIC=1 or "
            "`weaver serve --deterministic`; or do without, by Run(exact=False).",
        )


class Pipeline:
    """The rollouts that are under way, by step: which are played when and with which weights.

    Step t trains on rollouts that were begun max_staleness steps before, with the weights of then
    and as `moves` says newer ones, while those of the steps behind it are being played; at 0
    playing and training take turns. One step's rollouts are admitted for each step that is trained
    on, so at most max_staleness + 1 of them are under way; those of a step are waited for, none is
    dropped, and the age of the oldest token is bounded by construction.

    Which tasks are played and every sampling seed come from (seed, step, round). So while weights
    never move, what is trained on at which step depends on the seed alone, not on which rollout was
    faster, and a resumed run plays what an uninterrupted one does. A checkpoint waits for the
    rollouts under way and keeps them; but only a deterministic engine repeats those that overlap,
    since elsewhere the last bits depend on what shares a batch. It lives in the task group that
    plays them.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        environment: GroupEnvironment,
        plan: Plan,
        *,
        sampler: AsyncSamplingClient,
        moves: Move,
        group: TaskGroup,
        kept: Mapping[str, Any],
    ) -> None:
        """
        Args:
            kept: the `extra` of `drain`'s manifest, after a journey through JSON; {} at the start.
        """
        self._picker = Picker(
            tasks,
            plan.curriculum,
            seed=plan.seed,
            count=plan.groups_per_step,
            state=kept.get("curriculum", {}),
        )
        self.drawing = Stopwatch()
        """Runs while anything is under way."""
        self._sampler = sampler
        self._in_flight = None if moves == "never" else InFlight(sampler, within=moves == "reply")
        self._environment = environment
        self._plan = plan
        self._group = group
        self._watch = rollouts.FailureWatch(plan.max_failure_rate)
        self._found = PENDING.validate_python(kept.get("pending", {}))
        self._finished = {step: anyio.Event() for step in self._found}
        for event in self._finished.values():
            event.set()

    def move(self, sampler: AsyncSamplingClient) -> None:
        """Rollouts to come begin with these weights, and those that are to go on with them do."""
        self._sampler = sampler
        if self._in_flight is not None:
            self._in_flight.move(sampler)

    async def play(self, step: int) -> Filtered:
        """Begins all rollouts that may begin with these weights; answers those of `step`, from 0.

        Raises:
            ConfigError, InvalidRequestError: the curriculum does not fit the tasks.

        Raises through the task group:
            RolloutsFailedError: too many failed.
            WeaverError: the service failed.
        """
        for ahead in range(step, min(step + self._plan.max_staleness + 1, self._plan.steps)):
            if ahead not in self._finished:
                self._finished[ahead] = anyio.Event()
                begun = ahead, self._in_flight or self._sampler, *self._picker.begin(ahead)
                self._group.start_soon(self._collect, *begun)
        await self._finished[step].wait()
        del self._finished[step]
        found = self._found.pop(step)
        self._picker.learn(found.outcomes)
        return found

    async def drain(self, step: int, *, extra: Mapping[str, Any]) -> Manifest:
        """Waits for all that is under way, and keeps it for a run that goes on behind `step`.

        The weights that sampled it will be gone. `extra` is kept beside it.
        """
        for event in self._finished.values():
            await event.wait()
        pending = PENDING.dump_python(self._found, mode="json")
        kept = {**extra, "pending": pending, "curriculum": self._picker.state()}
        return Manifest(step=step, data_position=step * self._plan.groups_per_step, extra=kept)

    async def _collect(
        self,
        step: int,
        sampler: AsyncSamplingClient | InFlight,
        picked: Picked,
        tasks: Sequence[Task],
    ) -> None:
        with self.drawing:
            self._found[step] = await self._played(step, sampler, picked, tasks)
        self._finished[step].set()

    async def _played(
        self,
        step: int,
        sampler: AsyncSamplingClient | InFlight,
        picked: Picked,
        tasks: Sequence[Task],
    ) -> Filtered:
        """Plays and filters the groups of a step; resamples those that teach nothing, if asked."""
        plan, count = self._plan, self._plan.groups_per_step
        groups: list[Group] = []
        found = Filtered(kept=())
        rounds = plan.resample_rounds if plan.zero_variance == "resample" else 1
        for number in range(rounds):
            seed, missing = derive_seed(plan.seed, step, number), count - len(found.kept)
            if number:
                more = self._picker.more(picked, missing, step=step, number=number, seed=seed)
            new = await rollouts.sample_groups(
                sampler,
                more if number else tasks,
                self._environment,
                group_size=plan.group_size,
                sampling=plan.sampling,
                seed=seed,
            )
            self._watch.check(new)
            groups += new
            found = filtered(groups, plan.zero_variance)
            if len(found.kept) == count:
                break
        if picked.indices:
            found = replace(found, outcomes=outcomes(picked.indices, groups))
        if rounds > 1:
            found.metrics["groups/rounds"] = number + 1.0
        return found


def filtered(groups: Sequence[Group], zero_variance: ZeroVariance = "keep") -> Filtered:
    """Sorts groups into kept and dropped; one in which every rollout failed is never kept.

    Resampling is the pipeline's: here it means to drop.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    for group in groups:
        wanted = bool(group.rewards) and (zero_variance == "keep" or not group.zero_variance)
        (kept if wanted else dropped).append(group)
    metrics = {
        "groups/kept": float(len(kept)),
        "groups/dropped": float(len(dropped)),
        "groups/empty": float(sum(not group.rewards for group in groups)),
    }
    return Filtered(kept=tuple(kept), dropped=tuple(dropped), metrics=metrics)
