"""`Run`: what a loop leaves behind, and where it goes on. Loops take one; `Run()` keeps nothing.

With a folder: transcripts of each step, and checkpoints from which a killed run continues exactly.
`open_run` makes one with folder and loggers; `rl.train` and the recipes call it.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, cast

from weaver import (
    AsyncRewardClient,
    AsyncSamplingClient,
    AsyncServiceClient,
    AsyncTrainingClient,
)
from weaver.curves import number_text
from weaver.errors import ConfigError, RunNotFoundError
from weaver.heads import check_asked
from weaver.names import check_run_name, run_name_of
from weaver.types import Head, LoraConfig
from weaver.values import table_html
from weaver_rl import run_folder
from weaver_rl.algorithms.step import Stepped
from weaver_rl.data import digest
from weaver_rl.display import Display, Progress
from weaver_rl.guard import name_of
from weaver_rl.loggers import JsonlLogger, Logger, Loggers
from weaver_rl.plan import Steps
from weaver_rl.run_folder import Finished, Manifest, RunFolder
from weaver_rl.trackers import Tracking
from weaver_rl.transcripts import write_transcripts
from weaver_rl.types import Filtered, Task

__all__ = ["Result", "Run", "open_run"]

log = logging.getLogger(__name__)
P = ParamSpec("P")

TELLING = ("eval/mean", "eval/accuracy", "eval/loss", "reward/mean", "train/loss")
"""Of what a run ended with, the first that there is is told."""
MAY_DIFFER = ("steps", "evaluate_every", "max_failure_rate", "max_logprob_gap", "evaluation")
"""Options that may differ in a run that goes on: they change no step that is done."""


@dataclass(slots=True, kw_only=True)
class Run:
    """`Run(folder=open_run_folder(path, config), loggers=Loggers(Display(steps=60)))`"""

    name: str | None = None
    """What it is called on the service and by trackers."""
    folder: RunFolder | None = None
    finished: Finished | None = None
    """The result that its folder has of just this run, which need not be played again."""
    loggers: Loggers = field(default_factory=Loggers)
    checkpoint_every: int = 10
    """Steps between checkpoints; there is one after the last step as well."""
    exact: bool = True
    """Refuse a loop whose resume would not be bit-identical on this engine; see `off_policy`."""
    samples_every: int = 10
    """Steps between sample tables in the loggers."""
    delete: Callable[[str], Awaitable[object]] | None = None
    """`service.delete_checkpoint`, to free the weights of forgotten checkpoints."""
    waiting_for: Callable[[str], None] = lambda what: None
    """Told what the loop waits for; the display shows it."""
    expect: Callable[[int, int], None] = lambda steps, done: None
    """Told how many steps a loop takes and how many of them are done; the display shows it."""
    introduce: Callable[[str], None] = lambda called: None
    """Told what the run is called, with its id on the service; the display shows it."""
    _asked: Mapping[str, object] = field(default_factory=dict)
    _trainer: AsyncTrainingClient | None = None
    _decode: Callable[[tuple[int, ...]], str] | None = None
    _last: Finished | None = None
    """How far it is, and the numbers of that step."""

    def _repr_html_(self) -> str:
        """In notebooks: what it is called, where it is kept, how far and how good it is."""
        done = self.finished or self._last
        numbers = {} if done is None else done.metrics
        telling = {one: number_text(numbers[one]) for one in TELLING if one in numbers}
        fields: dict[str, object] = {
            "name": self.name,
            "run_id": None if self._trainer is None else self._trainer.model_id,
            "folder": None if self.folder is None else self.folder.path,
            "state": "finished" if self.finished else None,
            "step": None if done is None else done.steps,
            **telling,
            "weights": None if done is None else done.weights,
        }
        return table_html(fields)

    async def open_trainer(
        self,
        service: AsyncServiceClient,
        model: str,
        lora_config: LoraConfig | Mapping[str, object] | None = None,
        *,
        head: Head | None = None,
        seed: int = 0,
    ) -> AsyncTrainingClient:
        """The run's model: that which it has on the service, if it goes on, or a new one.

        So its curve there is one. A new one is made, which is said, where the service does not have
        it any more, or it was ended before its first checkpoint; then it gives the new one its
        place. Arguments and errors are those of `create_model`.
        """
        self.delete = service.delete_checkpoint
        known = None if self.folder is None else run_folder.read_service(self.folder)[0]
        if known is not None and self.folder is not None:
            try:
                if next(run_folder.manifests(self.folder), None) is not None:
                    return await service.attach(known)
                await service.delete_training_run(known)
                log.warning("%s had no checkpoint yet, and is begun anew.", known)
            except RunNotFoundError:
                log.warning(
                    "The service does not have %s any more: a new run goes on in its place, whose "
                    "curve begins behind the last checkpoint. The whole is in %s.",
                    known,
                    self.folder.metrics,
                )
        trainer = await service.create_model(
            model, lora_config, head=head, seed=seed, name=self.name
        )
        if self.folder is not None:
            run_folder.note_service(self.folder, trainer)
        return trainer

    def finish(self, metrics: Mapping[str, float], *, weights: str | None = None) -> None:
        """Keeps the result; the same run is not played again in this folder."""
        if self.folder is not None:
            newest = next(run_folder.manifests(self.folder), Manifest(step=0))
            self.finished = Finished(steps=newest.step, metrics=dict(metrics), weights=weights)
            run_folder.note_finished(self.folder, self.finished, asked=self._asked)

    async def restore(
        self, trainer: AsyncTrainingClient, *, steps: int | None = None
    ) -> tuple[Manifest, int]:
        """Loads the last checkpoint, if there is one; where to go on, and the weights' version.

        `steps` are all that the loop takes, for what shows how far it is.
        """
        self._trainer = trainer
        called = f"{trainer.name} ({trainer.model_id})" if trainer.name else trainer.model_id
        self.introduce(called)
        done = Manifest(step=0)
        if self.folder is not None:
            tokenizer = await trainer.get_tokenizer()
            self._decode = lambda tokens: str(tokenizer.decode(list(tokens)))
            same = run_folder.read_service(self.folder)[0] == trainer.model_id
            restored = await run_folder.restore(self.folder, trainer)
            if restored is not None:
                done = restored
                log.info("Going on behind step %d of %s.", done.step, self.folder.path)
                if same:
                    await trainer.rewind_metrics(done.step)
            run_folder.note_service(self.folder, trainer)
        if steps is not None:
            self.expect(steps, done.step)
        known = done.extra.get("version")
        return done, known if isinstance(known, int) else (await trainer.get_info()).step

    async def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """The numbers of a step, from 1; the service keeps those that are finite with its run."""
        self.loggers.log(metrics, step)
        self._last = Finished(steps=step, metrics=metrics)
        if self._trainer is not None:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            await self._trainer.log_metrics(finite, step=step)

    async def evaluate_first(
        self,
        measure: Callable[[], Awaitable[Mapping[str, float]]] | None,
        plan: Steps,
        *,
        done: int,
        steps: int,
    ) -> dict[str, float]:
        """The evaluation before the first step, where it is due, logged as step 0.

        A run that goes on has its numbers already; one that has no step left takes the last again,
        unlogged.
        """
        if measure is None or 0 < done < steps or not plan.evaluates(done, steps=steps):
            return {}
        metrics = dict(await measure())
        if done == 0 and metrics:
            await self.log(metrics, step=0)
        return metrics

    def log_rollouts(self, chosen: Filtered, stepped: Stepped, *, step: int) -> None:
        """The groups of a step, from 1, and what it made of them."""
        if step % max(1, self.samples_every) == 0 or step == 1:
            self.loggers.log_samples(chosen.kept, step)
        if self.folder is not None and self._decode is not None:
            write_transcripts(
                self.folder.transcripts,
                step,
                groups=chosen.kept,
                dropped=chosen.dropped,
                marks=stepped.marks,
                trained=stepped.trained,
                decode=self._decode,
            )

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a checkpoint follows step `step` (from 1) of `steps`."""
        return self.folder is not None and (step % self.checkpoint_every == 0 or step == steps)

    async def checkpoint(self, trainer: AsyncTrainingClient, manifest: Manifest) -> None:
        """Saves weights, optimizer and manifest behind a step of the loop."""
        if self.folder is not None:
            manifest = replace(manifest, loggers=self.loggers.state())
            await run_folder.save_checkpoint(
                self.folder, trainer, manifest=manifest, delete=self.delete
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a loop ends with."""

    final: AsyncSamplingClient | AsyncRewardClient
    """It samples with the final weights, or of a reward model scores."""
    steps: int
    """All that the loop took; those before a resume included."""
    version: int
    """Optimizer steps of the weights."""
    metrics: Mapping[str, float]
    """Those of the last step, and of the final evaluation."""

    @property
    def sampler(self) -> AsyncSamplingClient:
        """It samples with the final weights. Raises UnsupportedError: they are a reward model's."""
        if isinstance(self.final, AsyncRewardClient):
            check_asked(False, "scalar")
        return cast("AsyncSamplingClient", self.final)

    @property
    def rewards(self) -> AsyncRewardClient:
        """It scores with the final weights. Raises UnsupportedError: they are no reward model's."""
        if not isinstance(self.final, AsyncRewardClient):
            check_asked(True, None)
        return cast("AsyncRewardClient", self.final)


def shows_progress(loop: Callable[P, Awaitable[Result]]) -> Callable[P, Awaitable[Result]]:
    """Decorates a loop: without a run it shows how far it is on standard error."""

    @wraps(loop)
    async def shown(*args: P.args, **kwargs: P.kwargs) -> Result:
        if kwargs.get("run") is not None:
            return await loop(*args, **kwargs)
        progress = Progress()
        kwargs["run"] = Run(
            loggers=Loggers(progress), expect=progress.expect, introduce=progress.introduce
        )
        try:
            return await loop(*args, **kwargs)
        finally:
            progress.close()

    return shown


@contextmanager
def open_run(
    path: Path | None,
    config: Mapping[str, object],
    *,
    tasks: Sequence[Task],
    steps: int | None,
    name: str | None = None,
    resume: bool = False,
    checkpoint_every: int = 10,
    display: bool = True,
    wandb_project: str | None = None,
    track: Sequence[Tracking] = (),
    group: str | None = None,
    tags: Sequence[str] = (),
) -> Iterator[Run]:
    """A run with its folder, `metrics.jsonl`, display and trackers, closed when the block ends.

    Args:
        path: of the folder; None: nothing is kept.
        config: everything that decides the results; goes into `config.json`, a function by its
            name, with a digest of the tasks as `task_set`. In a run that goes on only the names of
            MAY_DIFFER may be others.
        tasks: those that are trained on.
        steps: of the loop, for the display; None: the loop will say.
        name: of the run, on the service and for trackers; None: that of the folder.
        wandb_project: short for `track=[Tracking(wandb_project)]`.
        track: where the numbers go as well; one of a kind.
        group: for trackers that name none; None: the sweep's, in whose folder this one is.
        tags: for trackers that name none, behind the config's `model`.

    Raises:
        ConfigError: two trackers of a kind; `resume` without a folder, or another config or other
            tasks than the run was started with; names the first field that differs. Nothing was
            changed.
        ConflictError: the folder holds a run and `resume` is off, or another process has it.
        StorageError: it cannot be written.
        MissingDependencyError: the display's or the logger's package is not installed.
    """
    if resume and path is None:
        raise ConfigError("is on, and there is no folder.", field="resume", hint="Name its folder.")
    if wandb_project is not None:
        track = [Tracking(wandb_project), *track]
    kinds = [one.to for one in track]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"is of {kinds}.", field="track", hint="Give one of each kind.")
    folder = None
    loggers: list[Logger] = []
    if name is None and path is not None:
        name = run_name_of(path.resolve().name)
    run = Run(name=check_run_name(name), checkpoint_every=checkpoint_every)
    named = {k: name_of(v) for k, v in config.items() if callable(v) or hasattr(v, "__name__")}
    config = {**config, **named}
    with ExitStack() as stack:
        if path is not None:
            config["task_set"] = digest(tasks)
            folder = run_folder.open_run_folder(path, config, resume=resume, may_differ=MAY_DIFFER)
            stack.callback(run_folder.release_run_folder, folder)
            run.folder, run._asked = folder, {one: config.get(one) for one in MAY_DIFFER}
            run.finished = run_folder.read_finished(folder, asked=run._asked)
            if run.finished is not None:
                _tell_finished(path, run.finished, display=display)
                yield run
                return
            loggers.append(JsonlLogger(folder.metrics))
        newest = next(run_folder.manifests(folder), None) if folder is not None else None
        model = [Path(str(config["model"])).name] if "model" in config else []
        for one in track:
            state = newest.loggers.get(one.to) if newest is not None else None
            one = one.named(name=name, group=group or sweep_of(path), tags=[*model, *tags])
            loggers.append(one.open(config=config, folder=path, state=state))
        if display:  # the last, since it takes the terminal until it is closed
            shown = Display(steps=steps)
            run.waiting_for, run.expect = shown.waiting_for, shown.expect
            run.introduce = shown.introduce
            loggers.append(shown)
        run.loggers = Loggers(*loggers)
        stack.callback(run.loggers.close)
        yield run


def sweep_of(folder: Path | None) -> str | None:
    """The name of the sweep that a run's folder belongs to."""
    above = None if folder is None else folder.resolve().parent
    return above.name if above is not None and (above / "results.json").exists() else None


def _tell_finished(path: Path, done: Finished, *, display: bool) -> None:
    named = next((name for name in TELLING if name in done.metrics), None)
    last = f", {named} {number_text(done.metrics[named])}" if named else ""
    text = f"{path} is finished ({done.steps} steps{last}): nothing is to be trained."
    log.info("%s", text)
    if display:
        sys.stdout.write(f"{text}\n")
