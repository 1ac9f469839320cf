"""Where a run's numbers and samples go: JSONL, TensorBoard, or anything with four methods.

Loops hold a `Loggers`, several at once. The terminal's is `weaver_rl.display.Display`, those of
wandb, MLflow and Trackio are in `weaver_rl.trackers`. What a
logger needs to go on after a resume, such as wandb's run id, is its `state`, kept in the manifest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from weaver.errors import WeaverError, requiring
from weaver_rl.guard import attempt
from weaver_rl.storage import append_line
from weaver_rl.types import Group, Rollout, Task

__all__ = ["JsonlLogger", "Logger", "Loggers", "TensorBoardLogger"]

log = logging.getLogger(__name__)

SAMPLE_COLUMNS = ("step", "prompt", "reply", "reward", "stop_reason", "failure")
SAMPLED_GROUPS = 8
SampleRow = tuple[int, str, str, float | None, str, str]


class Logger(Protocol):
    """One destination. Methods block shortly and are called from one task, steps ascending."""

    name: str
    """Unique among the loggers of a run; the key of its state."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        """The groups of some steps; a logger that does not say otherwise leaves them out."""
        return

    def state(self) -> Mapping[str, str]:
        """What it needs to go on with the same run; {} for nothing."""
        return {}

    def close(self) -> None:
        """Writes what is left; called once, also after an error of the run."""
        return


class Loggers:
    """Several loggers as one: `Loggers(JsonlLogger(path), Display())`.

    What a third party's logger raises is shown once, with its name and traceback, and counted in
    `failed`; the others and the run go on. A `WeaverError`, such as a full disk under
    `metrics.jsonl`, is raised after all others were called.
    """

    def __init__(self, *loggers: Logger) -> None:
        self.failed: Counter[str] = Counter()
        """Calls that raised, by the logger's name."""
        self._loggers = loggers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each(lambda logger: logger.log(metrics, step))

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        self._each(lambda logger: logger.log_samples(groups, step))

    def state(self) -> dict[str, dict[str, str]]:
        """The states that are not empty, by name, for the manifest."""
        states: dict[str, dict[str, str]] = {}
        self._each(lambda logger: states.update({logger.name: dict(logger.state())}))
        return {name: state for name, state in states.items() if state}

    def close(self) -> None:
        self._each(lambda logger: logger.close())
        for name, count in self.failed.items():
            log.warning("The logger %r failed %d times; what it shows is incomplete.", name, count)

    def _each(self, call: Callable[[Logger], None]) -> None:
        raised: list[WeaverError] = []
        for logger in self._loggers:
            try:
                failure = attempt(partial(call, logger), "logger", through=(WeaverError,))
            except WeaverError as error:
                raised.append(error)
                continue
            if failure is not None:
                self.failed[logger.name] += 1
                if self.failed[logger.name] == 1:
                    said = "The logger %r failed; the run goes on.\n%s"
                    log.error(said, logger.name, failure.traceback)
        if raised:
            raise raised[0]


class JsonlLogger(Logger):
    """`metrics.jsonl`: a line a step, `{"step": 3, "time": 1730000000.1, "reward/mean": 0.5}`."""

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Raises StorageError: the file cannot be written."""
        append_line(self._path, {"step": step, "time": round(time.time(), 3), **metrics})


class TensorBoardLogger(Logger):
    """TensorBoard event files, without TensorFlow or torch; samples as a text table."""

    name = "tensorboard"

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """
        Args:
            resume_step: the manifest's step; what earlier files hold beyond it is not shown.

        Raises:
            MissingDependencyError: tensorboard is not installed.
        """
        with requiring("TensorBoardLogger", "tensorboard"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.plugins.scalar.summary import scalar_pb
            from tensorboard.plugins.text.summary import text_pb
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self._event, self._scalar, self._text = Event, scalar_pb, text_pb
        self._writer: Any = EventFileWriter(str(folder))
        # A second start in a folder makes TensorBoard forget the steps from there on.
        self._add((resume_step or 0) + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._add(step, summary=self._scalar(name, value))
        self._writer.flush()

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        rows = [SAMPLE_COLUMNS, ("---",) * len(SAMPLE_COLUMNS), *sample_rows(groups, step)]
        cells = [[str(v).replace("|", "\\|").replace("\n", " ") for v in row] for row in rows]
        self._add(step, summary=self._text("samples", "\n".join(map("|".join, cells))))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **what))


def sample_rows(groups: Sequence[Group], step: int) -> list[SampleRow]:
    """The best and the worst rollout of the first groups, as rows of SAMPLE_COLUMNS."""
    rows: list[SampleRow] = []
    for group in groups[:SAMPLED_GROUPS]:
        ranked = sorted(group.rollouts, key=lambda r: (r.failure is not None, -r.reward))
        rows += [_row(rollout, step) for rollout in (ranked[:1] + ranked[1:][-1:])]
    return rows


def prompt_text(task: Task) -> str:
    """A task's prompt for people: the text, or the messages with their roles."""
    prompt = task.get("prompt", "")
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _row(rollout: Rollout, step: int) -> SampleRow:
    failure = rollout.failure
    return (
        step,
        prompt_text(rollout.task),
        rollout.text,
        rollout.reward if failure is None else None,
        rollout.trajectory.stop_reason,
        "" if failure is None else f"{failure.where}: {failure.message}",
    )
