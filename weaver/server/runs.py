"""A run: one model in training, as the service knows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio

from weaver import types
from weaver.server.lanes import Lane

if TYPE_CHECKING:
    from collections import Counter

    from weaver.server.records import RunRecord
    from weaver.server.sessions import Ticket


@dataclass(slots=True, eq=False)
class Run:
    run_id: str
    model: types.ModelInfo
    training_mode: types.TrainingMode
    lora_config: types.LoraConfig | None
    created_at: datetime
    last_request_at: datetime
    user_metadata: types.JsonDict
    project: str
    name: str | None = None
    step: int = 0
    """Optimizer steps taken; written by the operation that runs, read by anyone."""
    loaded: bool = True
    """Whether the engine has it; if not, its next operation brings it back."""
    heard_at: float = field(default_factory=lambda: time.monotonic())
    """When its last request came, by the clock that durations are taken from."""
    stopped: bool = False
    """Whether it was told to stop, and nothing has come since."""
    seed: int = 0
    executed: int = 0
    """The number of the last operation that was executed."""
    last_seqs: dict[str, int] = field(default_factory=dict)
    """By session, the last seq that was executed."""
    unsaved_bytes: int = 0
    """About, of its gradient passes that no snapshot holds, so that the journal does."""
    metric_counts: Counter[str] | None = None
    """How many points it has of each name; None until some are added."""
    snapshot_step: int = 0
    snapshot_at: float = field(default_factory=lambda: time.monotonic())
    snapshot_cost_s: float = 0.0
    """What the last snapshot took: of the engine, and beside it."""
    computed_s: float = 0.0
    """Its share of the engine's passes and steps since then, which a replay would take again."""
    committing: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while a snapshot goes to the disk."""
    lock: int | None = None
    """Held while this process has it loaded: a descriptor of its lock file."""
    lane: Lane = field(default_factory=Lane)

    @property
    def head(self) -> types.Head | None:
        """None: that for tokens."""
        return self.lora_config.head if self.lora_config else None

    @classmethod
    def of(cls, record: RunRecord) -> Run:
        """A run that is not loaded."""
        run = record.run
        return cls(
            run_id=run.run_id,
            model=record.model,
            training_mode=run.training_mode,
            lora_config=run.lora_config,
            created_at=run.created_at,
            last_request_at=run.last_request_at,
            user_metadata=run.user_metadata,
            project=run.project,
            name=run.name,
            step=run.step,
            loaded=False,
            seed=record.seed,
            unsaved_bytes=record.unsaved_bytes,
        )

    def heard(self, now: datetime) -> None:
        """Notes that a request came."""
        self.last_request_at, self.heard_at, self.stopped = now, time.monotonic(), False

    def execute(self, ticket: Ticket) -> int:
        """Counts an operation that was executed; answers its number."""
        self.executed += 1
        if ticket.submission.seq is not None:
            self.last_seqs[ticket.session.session_id] = ticket.submission.seq
        return self.executed

    def describe(self, *, sampled: bool = False) -> types.TrainingRun:
        """As clients see it; `sampled` says that its weights sample now."""
        return types.TrainingRun(
            run_id=self.run_id,
            name=self.name,
            base_model=self.model.name,
            training_mode=self.training_mode,
            lora_config=self.lora_config,
            step=self.step,
            status="active" if sampled or self.lane.busy else "stopped" if self.stopped else "idle",
            created_at=self.created_at,
            last_request_at=self.last_request_at,
            user_metadata=self.user_metadata,
            project=self.project,
        )

    def checkpoint(
        self, path: str, kind: types.CheckpointKind, *, step: int, ttl_seconds: int | None = None
    ) -> types.CheckpointInfo:
        """What is to be written; its times and size are set when it is."""
        return types.CheckpointInfo(
            path=path,
            run_id=self.run_id,
            name=path.rpartition("/")[2],
            kind=kind,
            base_model=self.model.name,
            training_mode=self.training_mode,
            lora_config=self.lora_config,
            step=step,
            created_at=datetime.now(UTC),
            size_bytes=0,
            ttl_seconds=ttl_seconds,
        )

    def mismatch(self, checkpoint: types.CheckpointInfo) -> str | None:
        """In which way a checkpoint is of another architecture than this run; None if it fits."""
        pairs: list[tuple[str, object, object]] = [
            ("base_model", checkpoint.base_model, self.model.name),
            ("training_mode", checkpoint.training_mode, self.training_mode),
        ]
        if checkpoint.lora_config is not None and self.lora_config is not None:
            pairs += [
                (name, checkpoint.lora_config[name], self.lora_config[name])
                for name in ("head", "rank", "alpha", "train_attn", "train_mlp", "train_unembed")
            ]
        wrong = (f"{name} is {its}, not {ours}" for name, its, ours in pairs if its != ours)
        return next(wrong, None)
