"""Loggers of experiment trackers: Weights & Biases, MLflow, Trackio. `open_run` opens them.

`Tracking` says which and under what name; `rl.train(track=[rl.Tracking("reverse", to="mlflow")])`.
All three work without a network: wandb offline, MLflow and Trackio in files of their own. Curves
are logged by step; the metric `tokens/total` is there to be chosen as another axis. Of the metrics
of BEST each keeps the best value beside the last: wandb in the run's summary, the others as
`best/<name>`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from weaver.errors import ConfigError, requiring
from weaver_rl.loggers import SAMPLE_COLUMNS, Logger, sample_rows
from weaver_rl.storage import flattened, plain
from weaver_rl.types import Group

__all__ = ["MlflowLogger", "Tracking", "TrackioLogger", "WandbLogger"]

BEST: Mapping[str, Callable[[float, float], float]] = {
    "reward/mean": max,
    "reward/pass_rate": max,
    "eval/mean": max,
    "eval/accuracy": max,
    "eval/loss": min,
}
"""Of these the best value is kept."""
Tracker = Literal["wandb", "mlflow", "trackio"]
LONGEST_TAG = 64
"""wandb takes no longer one."""


@dataclass(frozen=True, slots=True)
class Tracking:
    """`Tracking("reverse", to="wandb", group="ppo", tags=("lora", "seed-0"), entity="lab")`

    Raises:
        ConfigError: at construction; names the field.
    """

    project: str
    """wandb's and Trackio's project, MLflow's experiment."""
    to: Tracker = "wandb"
    name: str | None = None
    """Of the run; None: the run's own, and without one the tracker invents it."""
    group: str | None = None
    """Runs of a group stand together; None: the recipe's or the sweep's."""
    tags: tuple[str, ...] = ()
    """Empty: the base model and what is done with it."""
    entity: str | None = None
    """wandb's user or team."""
    uri: str | None = None
    """MLflow's server or store; None: MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        if self.to not in get_args(Tracker):
            hint = "wandb, mlflow or trackio."
            raise ConfigError(f"is {self.to!r}.", field="track.to", hint=hint)
        for field, owner in (("entity", "wandb"), ("uri", "mlflow")):
            if getattr(self, field) is not None and self.to != owner:
                raise ConfigError(
                    f"is of {owner}, not of {self.to}.", field=f"track.{field}", hint="Leave it."
                )
        if isinstance(self.tags, str):
            raise ConfigError(f"is {self.tags!r}.", field="track.tags", hint="Give several texts.")

    def named(self, *, name: str | None, group: str | None, tags: Sequence[str]) -> Tracking:
        """With these where it has none of its own."""
        return replace(
            self,
            name=self.name or name,
            group=self.group or group,
            tags=self.tags or tuple(tag[:LONGEST_TAG] for tag in tags),
        )

    def open(
        self,
        *,
        config: Mapping[str, object],
        folder: Path | None = None,
        state: Mapping[str, str] | None = None,
    ) -> Logger:
        """
        Args:
            folder: of the run, where wandb keeps its files.
            state: of the run to go on with, from the manifest.

        Raises:
            MissingDependencyError: the tracker's package is not installed.
        """
        shared: dict[str, Any] = {"config": config, "state": state, "group": self.group}
        named = self.name or (folder.resolve().name if folder is not None else None)
        shared |= {"tags": self.tags, "run_name": named}
        if self.to == "mlflow":
            return MlflowLogger(self.project, uri=self.uri, **shared)
        if self.to == "trackio":
            return TrackioLogger(self.project, **shared)
        return WandbLogger(self.project, folder=folder, entity=self.entity, **shared)


class WandbLogger(Logger):
    """Weights & Biases, online or offline; samples as a media table.

    A resumed run goes on under the same id. Online, wandb itself ignores steps that it has; an
    offline run makes a new folder of the same id, to be joined by `wandb sync --append`.
    """

    name = "wandb"

    def __init__(
        self,
        project: str,
        *,
        config: Mapping[str, object] | None = None,
        folder: Path | None = None,
        mode: Literal["online", "offline"] | None = None,
        run_name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        entity: str | None = None,
        state: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            folder: where wandb keeps its files; its default is the working directory.
            mode: None leaves it to WANDB_MODE, and that to online.
            state: of the run to go on with, from the manifest.

        Raises:
            MissingDependencyError: wandb is not installed.
        """
        with requiring("WandbLogger", "wandb"):
            import wandb
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        run_id = (state or {}).get("run_id")
        offline = mode == "offline" or (mode is None and wandb.setup().settings.mode == "offline")
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            group=group,
            tags=list(tags) or None,
            config=plain(config or {}),
            dir=folder and folder.absolute(),  # wandb's own process keeps its first directory
            id=run_id,
            # Offline there is nobody to ask whether the run exists.
            resume="allow" if run_id and not offline else None,
            mode=mode,
            name=run_name,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        for metric, better in BEST.items():
            self._run.define_metric(metric, summary=f"{better.__name__},last")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        rows = sample_rows(groups, step)
        table = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])
        self._run.log({"samples": table}, step=step)

    def state(self) -> Mapping[str, str]:
        return {"run_id": self._run.id}

    def close(self) -> None:
        self._run.finish()


class MlflowLogger(Logger):
    """MLflow: a server, a database, or files; the config as parameters, samples as JSON artifacts.

    A resumed run goes on under the same id; a step that is repeated is a second point of its curve.
    """

    name = "mlflow"

    def __init__(
        self,
        project: str,
        *,
        uri: str | None = None,
        config: Mapping[str, object] | None = None,
        run_name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        state: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            uri: of the server or store, such as `sqlite:///mlflow.db`; None: MLFLOW_TRACKING_URI.
            group: a tag of the run.
            tags: others, with the value "true".
            state: of the run to go on with, from the manifest.

        Raises:
            MissingDependencyError: mlflow is not installed.
        """
        with requiring("MlflowLogger", "mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        self._metric = Metric
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._best = json.loads((state or {}).get("best", "{}"))
        if state and "run_id" in state:
            self._id = state["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(project)
        place = known.experiment_id if known else self._client.create_experiment(project)
        marked = {**dict.fromkeys(tags, "true"), **({"group": group} if group else {})}
        self._id = self._client.create_run(place, run_name=run_name, tags=marked).info.run_id
        params = [Param(_allowed(k), v[:500]) for k, v in flattened(plain(config or {}))]
        for begin in range(0, len(params), 100):  # the most that a request may hold
            self._client.log_batch(self._id, params=params[begin : begin + 100])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        rows = {**metrics, **dict(_best(self._best, metrics))}
        logged = [self._metric(_allowed(name), float(v), now, step) for name, v in rows.items()]
        for begin in range(0, len(logged), 1000):
            self._client.log_batch(self._id, metrics=logged[begin : begin + 1000])

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        rows = {"columns": SAMPLE_COLUMNS, "data": sample_rows(groups, step)}
        self._client.log_dict(self._id, plain(rows), f"samples/{step:06d}.json")

    def state(self) -> Mapping[str, str]:
        return {"run_id": self._id, "best": json.dumps(self._best)}

    def close(self) -> None:
        self._client.set_terminated(self._id)


class TrackioLogger(Logger):
    """Trackio: a local database that `trackio show` opens; TRACKIO_DIR says where.

    A resumed run goes on under the same name; a step that is repeated is a second point.
    """

    name = "trackio"

    def __init__(
        self,
        project: str,
        *,
        config: Mapping[str, object] | None = None,
        run_name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        state: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            tags: stand in the run's config.
            state: of the run to go on with, from the manifest.

        Raises:
            MissingDependencyError: trackio is not installed.
        """
        with requiring("TrackioLogger", "trackio"):
            import trackio
        self._best = json.loads((state or {}).get("best", "{}"))
        named = (state or {}).get("run_name", run_name)
        with redirect_stdout(StringIO()):  # the terminal is the display's
            self._run: Any = trackio.init(
                project=project,
                name=named,
                group=group,
                config={**plain(config or {}), **({"tags": list(tags)} if tags else {})},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, **dict(_best(self._best, metrics))}, step=step)

    def state(self) -> Mapping[str, str]:
        return {"run_name": self._run.name, "best": json.dumps(self._best)}

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()


def _best(known: dict[str, float], metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """`best/<name>` of those of BEST that are among the metrics; updates `known`."""
    for name, better in BEST.items():
        if name in metrics:
            known[name] = better(known.get(name, metrics[name]), metrics[name])
            yield f"best/{name}", known[name]


def _allowed(name: str) -> str:
    """MLflow takes letters, digits and `_-./ ` in names."""
    return re.sub(r"[^\w\-./ ]", "_", name)
