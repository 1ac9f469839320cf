"""`TrainerGroup`: the ranks that compute the gradients of some runs, started again when one ends.

`ClusterEngine` has one for each `[[trainer]]` of its file. A call goes to all ranks; the first
error of one gives the whole group up, as the others may wait for it for ever. The next run that is
made has ranks started anew; whoever asks for a run that they do not have is told
`EngineLostError`, and the service brings it back from its snapshot and journal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import uuid4

import anyio
from anyio import CancelScope, to_thread

from weaver.boundary import attempt, converting
from weaver.engine.cluster.answers import gather
from weaver.engine.cluster.placement import BURY_S, find_room, in_time
from weaver.engine.cluster.rank import Answer, Facts, Rank, Setup
from weaver.errors import ConfigError, EngineError, EngineLostError

if TYPE_CHECKING:
    from weaver.engine.cluster.config import GroupConfig
    from weaver.engine.cluster.placement import Cluster, Room

logger = logging.getLogger(__name__)
T = TypeVar("T")
State = Literal["stopped", "waiting", "starting", "ready"]
AGREE_S = 10.0
"""In which the other ranks have answered, when one has failed in a way that all can."""


@dataclass(slots=True, eq=False)
class Ranks:
    """Those of one start of a group."""

    actors: list[Any]
    room: Room
    facts: list[Facts] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)
    lost: str | None = None
    """Why they are given up."""
    memory: list[int] = field(default_factory=list)
    longest: dict[str, int | None] = field(default_factory=dict)


class TrainerGroup:
    """
    Args:
        source: of the model, for the ranks.
        proof: a file of the shared folder and what it says, which ranks must read there.
        changed: called when its state has changed.
    """

    def __init__(
        self,
        name: str,
        config: GroupConfig,
        *,
        cluster: Cluster,
        source: str,
        deterministic: bool,
        proof: tuple[Path, str],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.config = config
        self.state: State = "stopped"
        self.since = time.time()
        self.waits_for: str | None = None
        self.starts = 0
        self.last_loss: str | None = None
        self.ranks: Ranks | None = None
        self._cluster = cluster
        self._source = source
        self._deterministic = deterministic
        self._proof = proof
        self._changed = changed
        self._starting = anyio.Lock()
        self._room: Room | None = None

    async def create_run(self, run_id: str, *arguments: Any) -> None:
        """Starts the ranks, if there are none, and makes a run in them.

        Raises:
            EngineError: there was no room for them, or they could not start.
            EngineLostError: one has ended.
        """
        async with self._starting:
            ranks = self.ranks if self.ranks is not None else await self._start()
        await self._call(ranks, "create_run", run_id, *arguments)
        ranks.runs.add(run_id)

    async def call(self, run_ids: Sequence[str], name: str, *arguments: Any) -> Any:
        """What all ranks answer of these runs.

        Raises:
            EngineLostError: a rank has ended or could not be waited for; or did so before, and the
                run has not been made again.
            WeaverError: what all ranks raise.
        """
        ranks = self.ranks
        if ranks is None or not ranks.runs.issuperset(run_ids):
            raise EngineLostError(
                f"the ranks of {self.name} have ended ({self.last_loss or 'they were not started'})"
            )
        return await self._call(ranks, name, *arguments)

    async def forget(self, run_id: str) -> None:
        ranks = self.ranks
        if ranks is not None and run_id in ranks.runs:
            ranks.runs.discard(run_id)
            with suppress(EngineLostError):  # and the run with it
                await self._call(ranks, "delete_run", run_id)

    async def save(self, run_id: str, *, include_optimizer: bool) -> tuple[int, Writer]:
        """Copies a run in its ranks; answers its step, and what writes the copy."""
        copy_id = uuid4().hex
        step = await self.call([run_id], "save", run_id, include_optimizer, copy_id)
        ranks = self.ranks
        if ranks is None:
            raise EngineLostError(f"the ranks of {self.name} have ended ({self.last_loss})")
        return step, partial(self._write, ranks, copy_id)

    def _write(self, ranks: Ranks, copy_id: str, folder: Path) -> None:
        """In any thread; in the first rank it waits for the call that runs there."""
        session = ranks.room.session
        with converting(lambda error: EngineLostError(_why("write", error, self.config.call_s))):
            answer = ranks.actors[0].call.remote("write", (copy_id, str(folder.absolute())))
            done: Answer = session.result(answer, self.config.call_s)
        if done.error is not None:
            raise done.error

    async def _call(self, ranks: Ranks, name: str, *arguments: Any) -> Any:
        import ray

        if ranks.lost is not None:
            raise EngineLostError(f"the ranks of {self.name} have ended ({ranks.lost})")
        given, within_s = arguments, self.config.call_s
        if len(ranks.actors) > 1:
            put = partial(to_thread.run_sync, ray.put, arguments, abandon_on_cancel=True)
            given = await self._asked(ranks, name, put, within_s)
        answers = await self._gather(
            ranks, name, lambda actor: actor.call.remote(name, given), within_s
        )
        ranks.memory = [answer.memory for answer in answers]
        if len({answer.mark for answer in answers}) > 1:
            marks = "; ".join(f"{i}: {answer.mark[:200]}" for i, answer in enumerate(answers))
            raise await self._lose(ranks, f"they do not agree on {name}: {marks}")
        if answers[0].error is not None:
            raise answers[0].error
        return answers[0].value

    async def _gather(
        self, ranks: Ranks, name: str, ask: Callable[[Any], Any], within_s: float
    ) -> list[Any]:
        """What each rank answers, by rank; the first that does not gives all up."""

        async def answers() -> list[Any]:
            return await gather([ask(actor) for actor in ranks.actors], within_s, AGREE_S)

        return await self._asked(ranks, name, answers, within_s)

    async def _asked(
        self, ranks: Ranks, name: str, work: Callable[[], Awaitable[T]], within_s: float
    ) -> T:
        """What comes of work with the ranks; they are given up if that fails, or Ray is lost."""
        try:
            with (
                converting(lambda error: EngineLostError(_why(name, error, within_s))),
                ranks.room.session.needed(),
            ):
                return await work()
        except EngineLostError as lost:
            raise await self._lose(ranks, lost.message) from lost

    async def _lose(self, ranks: Ranks, why: str) -> EngineLostError:
        """Gives all ranks up."""
        if ranks.lost is None:
            ranks.lost = why
            logger.error("the ranks of %s are given up: %s", self.name, why)
            if self.ranks is ranks:
                self.ranks, self.last_loss = None, why
                self._turn("stopped")
            await in_time(ranks.room, bury, ranks)
        return EngineLostError(f"the ranks of {self.name} have ended ({ranks.lost})")

    # --- starting -------------------------------------------------------------------------------

    async def _start(self) -> Ranks:
        room = await self._placed()
        self._turn("starting")
        self.starts += 1
        setups = [
            Setup(
                group=self.name,
                rank=rank,
                size=self.config.ranks,
                config=self.config,
                source=self._source,
                deterministic=self._deterministic,
                folder=str(self._proof[0].parent),
            )
            for rank in range(self.config.ranks)
        ]
        actors = await to_thread.run_sync(room.actors, Rank, [(setup,) for setup in setups])
        ranks = Ranks(actors, room)
        started = False
        try:
            await self._join(ranks)
            started = True
        finally:
            if not started:  # also where this is cancelled
                if ranks.lost is None:
                    with CancelScope(shield=True):
                        await self._lose(ranks, "they could not start")
                self.last_loss = ranks.lost
                self._turn("stopped")
        self.ranks = ranks
        self._turn("ready")
        return ranks

    async def _placed(self) -> Room:
        """Waits for room, saying for what."""
        config, there = self.config, False
        try:
            room = await find_room(
                self.name,
                self._cluster,
                partial(self._cluster.bundle, config),
                config.ranks,
                within_s=config.place_s,
                waiting=lambda what: self._turn("waiting", waits_for=what),
            )
            there = True
            return room
        finally:
            if not there:
                self._turn("stopped")

    async def _join(self, ranks: Ranks) -> None:
        within_s = self.config.start_s
        ask = partial(self._gather, ranks, "start", within_s=within_s)
        ranks.facts = await ask(ask=lambda actor: actor.facts.remote())
        check_alike(ranks.facts)
        file, says = self._proof
        for facts, seen in zip(
            ranks.facts, await ask(ask=lambda actor: actor.sees.remote(str(file))), strict=True
        ):
            if seen != says:
                raise EngineError(
                    f"{facts.host} does not see {file.parent}, which has to be a shared folder.",
                    field="shared",
                    hint="Name a folder that all machines of the cluster mount at that path.",
                )
        [where] = await gather([ranks.actors[0].listen.remote()], within_s, AGREE_S)
        await ask(ask=lambda actor: actor.join.remote(*where))
        ranks.longest = await self._call(ranks, "load_model")

    def _turn(self, state: State, *, waits_for: str | None = None) -> None:
        if (state, waits_for) != (self.state, self.waits_for):
            if state != self.state:
                self.since = time.time()
            self.state, self.waits_for = state, waits_for
            self._changed()

    def close(self) -> None:
        """Blocks until its ranks are told to end; not long, where Ray does not answer."""
        ranks, self.ranks = self.ranks, None
        if ranks is not None and ranks.lost is None:
            ranks.lost = "the engine is closed"
            burying = Thread(target=attempt, args=(bury, ranks), daemon=True)
            burying.start()
            burying.join(BURY_S)


Writer = Callable[[Path], None]


def bury(ranks: Ranks) -> None:
    """Ends processes that may be in the midst of a collective, and gives their places back."""
    ranks.room.give_back(ranks.actors)


def check_alike(facts: Sequence[Facts]) -> None:
    """Raises ConfigError: a rank has another version of what results depend on."""
    first = facts[0]
    for number, one in enumerate(facts):
        for name, found in one.versions.items():
            if found != first.versions[name]:
                raise ConfigError(
                    f"rank {number} on {one.host} has {name} {found}, rank 0 on {first.host} has "
                    f"{first.versions[name]}.",
                    field="trainer",
                    hint="Install the same versions on all machines of the cluster.",
                )
        if (one.device.partition(":")[0], one.dtype) != (
            first.device.partition(":")[0],
            first.dtype,
        ):
            raise ConfigError(
                f"rank {number} on {one.host} computes on {one.device} in {one.dtype}, rank 0 on "
                f"{first.device} in {first.dtype}.",
                field="trainer",
                hint="Set `device` and `dtype` of the group.",
            )


def _why(name: str, error: Exception, within_s: float) -> str:
    """Raised errors of a rank are defects: what users can mend is answered."""
    if isinstance(error, EngineLostError):
        return error.message
    if isinstance(error, TimeoutError):
        return f"not all have answered {name}, of which {within_s:g} s were left at most"
    return f"{name}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    error = getattr(error, "cause", None) or error  # what a rank raised, which Ray has wrapped
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
