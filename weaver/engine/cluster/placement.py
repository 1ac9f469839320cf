"""`Cluster`: the Ray that ranks and samplers are placed on, joined or started here.

`ClusterEngine` opens one. Its calls block but `find_room`; all have a bound. A Ray whose head ends
is joined again when it is back, or started again if it was started here.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVarTuple

import anyio
from anyio import to_thread

from weaver.boundary import attempt, converting, or_raise
from weaver.config import environment
from weaver.errors import ConfigError, EngineError, EngineLostError, WeaverError, requiring

if TYPE_CHECKING:
    from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig

with requiring("a cluster", "cluster"):
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from weaver.engine.cluster.session import Session

logger = logging.getLogger(__name__)
Ts = TypeVarTuple("Ts")
ANSWER_S = 5.0
SLICE_S = 2.0
"""So long each look whether there is room takes."""
PAUSE_S = 1.0
"""Before a Ray that is gone is looked for again."""
BURY_S = 10.0
"""How long the end of what was placed is waited for."""
SAY_S = 30.0
"""How often what waits for room says so in the log."""


class Cluster:
    """`started` says whether it began and ends with this process."""

    def __init__(self, config: ClusterConfig) -> None:
        """Raises ConfigError: none answers at its address, or can be started."""
        self._config = config
        self._joining = threading.Lock()
        auto = config.address == "auto" and not _runs_here()
        self.started = auto or config.address == "local"
        self.session = self._join(config.address)

    @classmethod
    def open(cls, config: ClusterConfig) -> Cluster:
        """Joins the Ray at `config.address`, or starts one on this machine.

        Raises:
            ConfigError: none answers at an address or can be started; or one that was started
                here, and so cannot grow, has no room for the groups together.
        """
        cluster = cls(config)
        try:
            cluster._check_room(config)
        except ConfigError:
            cluster.close()
            raise
        return cluster

    def _join(self, address: str) -> Session:
        environment().setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray._private.auto_init_hook.enable_auto_connect = False  # else a late call starts a Ray
        given: dict[str, Any] = {"address": address}
        if self.started:
            given = {
                "address": "local",
                "num_cpus": os.cpu_count() or 1,
                "include_dashboard": False,
                "object_store_memory": self._config.object_store_mb * 2**20,
            }
        else:
            _check_answers(address)

        def refused(error: Exception) -> Exception:
            ray.shutdown()
            if self.started:
                what, hint = "Ray does not start here", "See Ray's own logs in /tmp/ray."
            else:
                what, hint = f"no Ray at {address!r}", "Start one: `ray start --head`."
            return ConfigError(f"{what}: {error}", field="address", hint=hint)

        with converting(refused):  # a Ray that is not ready in time raises Exception itself
            ray.init(log_to_driver=False, configure_logging=False, namespace="weaver", **given)
            session = Session()
            self._total = _sum([node.total for node in resources(session.address)])
        return session

    def rejoin(self) -> str | None:
        """Joins Ray again if it was lost; answers why it cannot yet. Blocks some seconds."""
        with self._joining:
            lost = self.session
            if lost.fault is None:
                return None
            if not lost.left.wait(SLICE_S):
                return lost.fault
            try:
                self.session = _lasting(self._join, lost.address)
            except WeaverError as error:
                time.sleep(PAUSE_S)
                return f"{lost.fault}; {error.message}"
        logger.warning("Ray is back at %s", self.session.address)
        return None

    @property
    def description(self) -> str:
        how = "started here" if self.started else "joined"
        fault = self.session.fault
        what = f"with {_said(self._total)}" if fault is None else f"which is lost: {fault}"
        return f"Ray {ray.__version__} ({how}) {what}"

    def bundle(self, part: GroupConfig | PoolConfig) -> dict[str, float]:
        """What Ray keeps for each rank or worker."""
        auto = part.device == "auto" and self._total.get("GPU", 0) > 0
        gpus = {"GPU": 1.0} if auto or part.device == "cuda" else {}
        return {"CPU": part.cpus, **gpus}

    def look(self) -> list[Node]:
        """What there is now."""
        nodes = resources(self.session.address)
        self._total = _sum([node.total for node in nodes])
        return nodes

    def refresh(self) -> None:
        """For those who are told what there is; where Ray is gone, that stays as it was."""
        if self.session.fault is None:
            with suppress(ray.exceptions.RayError):
                self.look()

    def missing(self, bundle: dict[str, float], count: int) -> str:
        """In words, what a group waits for."""
        nodes = self.look()
        free = _sum([node.free for node in nodes])
        where = ""
        if len(nodes) > 1:
            most = {kind: max(n.free.get(kind, 0.0) for n in nodes) for kind in free}
            where = f", {_said(most)} at most on one node"
        wanted, total = _said(bundle), _said(self._total)
        return f"{count} x ({wanted}); free {_said(free)}{where}, of {total} in all"

    def _check_room(self, config: ClusterConfig) -> None:
        if not self.started:  # others may leave it, and nodes join
            return
        total = self._total
        wanted: dict[str, float] = {}
        parts: list[tuple[str, str, int, GroupConfig | PoolConfig]] = []
        parts += [(f"trainer.{i}", "ranks", g.ranks, g) for i, g in enumerate(config.trainer)]
        parts += [(f"pool.{i}", "workers", p.workers, p) for i, p in enumerate(config.pool)]
        for field, noun, count, part in parts:
            for kind, amount in self.bundle(part).items():
                wanted[kind] = wanted.get(kind, 0.0) + count * amount
                if wanted[kind] > total.get(kind, 0.0):
                    raise ConfigError(
                        f"asks for {count} {noun}, with which all need {wanted[kind]:g} {kind}; "
                        f"this machine has {total.get(kind, 0.0):g}.",
                        field=f"{field}.{noun}",
                        hint=f"Use fewer {noun}, fewer `cpus` for each, or join a larger Ray.",
                    )

    def close(self) -> None:
        """Leaves it; ends it, if it was started here."""
        self.session.leave()


class Room:
    """Places for the ranks of one group, kept for them together; or for a sampler's worker.

    `session` is the one that has them: when it is lost, so are they.
    """

    def __init__(self, session: Session, bundle: dict[str, float], count: int) -> None:
        self.session = session
        self.bundle = bundle
        self.count = count
        self._group = placement_group([bundle] * count, strategy="PACK")

    def wait(self) -> bool:
        """Whether it is there, after `SLICE_S` at most."""
        return bool(self._group.wait(SLICE_S))

    def actors(self, kind: type, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Starts one in each place. None is ever started again: what it held would be gone."""
        made = []
        for index, given in enumerate(arguments):
            where = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=index
            )
            options = {
                "num_cpus": self.bundle["CPU"],
                "num_gpus": self.bundle.get("GPU", 0.0),
                "max_restarts": 0,
                "max_task_retries": 0,
                "scheduling_strategy": where,
            }
            made.append(ray.remote(kind).options(**options).remote(*given))
        return made

    def give_back(self, actors: Sequence[Any] = ()) -> None:
        """Ends those that are there, whatever they do."""
        if self.session.fault is None:
            for actor in actors:
                ray.kill(actor, no_restart=True)
            remove_placement_group(self._group)


async def find_room(
    name: str,
    cluster: Cluster,
    bundle: Callable[[], dict[str, float]],
    count: int,
    *,
    within_s: float,
    waiting: Callable[[str], None],
) -> Room:
    """Waits for it, and for Ray where that is gone; tells `waiting` for what, in words.

    Raises:
        EngineError: there was none in time.
    """
    said, missing = -SAY_S, "Ray does not answer"
    room: Room | None = None
    found = False
    try:
        with anyio.move_on_after(within_s):
            while not found:
                room, waits_for = await _look(cluster, bundle, count, room)
                found = waits_for is None
                if waits_for is not None:
                    missing = waits_for
                    waiting(missing)
                    if time.monotonic() - said > SAY_S:
                        said = time.monotonic()
                        logger.warning("%s waits for room: %s", name, missing)
    finally:
        if room is not None and not found:
            await in_time(room, room.give_back)
    if room is None or not found:
        raise EngineError(
            f"there was no room for {name} in {within_s:g} s: {missing}.",
            hint="Add nodes, end other groups, or give this one fewer ranks.",
        )
    return room


async def in_time(room: Room, work: Callable[[*Ts], None], *given: *Ts) -> None:
    """Ends or gives back what is in a room, in a thread; Ray goes on with what takes longer."""
    with (
        anyio.move_on_after(BURY_S, shield=True),
        suppress(EngineLostError),
        room.session.needed(),
    ):
        await to_thread.run_sync(attempt, work, *given, abandon_on_cancel=True)


async def _look(
    cluster: Cluster, bundle: Callable[[], dict[str, float]], count: int, room: Room | None
) -> tuple[Room | None, str | None]:
    """The room that is waited for, and in words what it lacks; None when it is there."""
    thread = partial(to_thread.run_sync, abandon_on_cancel=True)
    gone = await thread(cluster.rejoin)
    if gone is not None:
        return None, gone
    session = cluster.session

    def lost(error: Exception) -> Exception:
        return error if session.fault is None else EngineLostError(session.fault)

    try:
        with converting(lost), session.needed():
            if room is None or room.session is not session:
                await thread(cluster.look)
                room = await thread(Room, session, bundle(), count)
            there = await thread(room.wait)
            return room, None if there else await thread(cluster.missing, room.bundle, count)
    except (EngineLostError, ray.exceptions.RayError) as error:
        await anyio.sleep(PAUSE_S)
        return room, str(error)


@dataclass(frozen=True, slots=True)
class Node:
    """Of a Ray: what it has, by kind, and what of that is free."""

    total: dict[str, float]
    free: dict[str, float]


def resources(address: str) -> list[Node]:
    """The nodes of the Ray whose head is there. Blocks for some seconds at most.

    `ray.available_resources` has no bound, and ends the process if the head is another by then.
    """
    status = get_cluster_status(address, timeout=ANSWER_S)
    nodes = []
    for one in (*status.active_nodes, *status.idle_nodes):
        usage = one.resource_usage.usage if one.resource_usage else []
        nodes.append(
            Node(
                total={of.resource_name: of.total for of in usage},
                free={of.resource_name: of.total - of.used for of in usage},
            )
        )
    return nodes


def _sum(each: Sequence[dict[str, float]]) -> dict[str, float]:
    kinds = {kind for of in each for kind in of}
    return {kind: sum(of.get(kind, 0.0) for of in each) for kind in kinds}


def _lasting(work: Callable[[*Ts], Session], *given: *Ts) -> Session:
    """What comes of work in a thread that stays: on Linux what Ray has started ends with it."""
    answers = SimpleQueue[Session | WeaverError]()

    def stay() -> None:
        answers.put(attempt(work, *given))
        threading.Event().wait()

    threading.Thread(target=stay, daemon=True).start()
    return or_raise(answers.get())


def _runs_here() -> bool:
    from ray._private.services import find_gcs_addresses

    return bool(environment().get("RAY_ADDRESS") or find_gcs_addresses())


def _check_answers(address: str) -> None:
    """Raises ConfigError: nothing listens at `host:port`, for which Ray itself waits minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and "/" not in host):
        return
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"nothing listens at {address!r}: {error}.",
            field="address",
            hint="Start it with `ray start --head --port PORT`, or use `auto` or `local`.",
        ) from None


def _said(resources: dict[str, float]) -> str:
    known = {kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    return ", ".join(
        f"{amount:g} {kind}" for kind, amount in known.items() if amount or kind == "CPU"
    )
