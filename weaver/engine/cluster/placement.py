"""`Cluster`: the Ray that ranks and samplers are placed on, joined or started here.

`ClusterEngine` opens one. Its calls block but `find_room`; all have a bound.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, to_thread

from weaver.config import environment
from weaver.errors import ConfigError, EngineError, requiring

if TYPE_CHECKING:
    from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig

with requiring("a cluster", "cluster"):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

logger = logging.getLogger(__name__)
ANSWER_S = 5.0
SLICE_S = 2.0
"""So long each look whether there is room takes."""
SAY_S = 30.0
"""How often what waits for room says so in the log."""


class Cluster:
    """`started` says whether it began and ends with this process."""

    def __init__(self, *, started: bool) -> None:
        self.started = started
        self._has: dict[str, float] = {}
        """As it said the last time."""

    @classmethod
    def open(cls, config: ClusterConfig) -> Cluster:
        """Joins the Ray at `config.address`, or starts one on this machine.

        Raises:
            ConfigError: none answers at an address or can be started; or one that was started
                here, and so cannot grow, has no room for the groups together.
        """
        environment().setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "configure_logging": False, "namespace": "weaver"}
        started = config.address == "local" or (config.address == "auto" and not _runs_here())
        if not started:
            _check_answers(config.address)
        try:
            if started:
                ray.init(
                    address="local",
                    num_cpus=os.cpu_count() or 1,
                    include_dashboard=False,
                    object_store_memory=config.object_store_mb * 2**20,
                    **quiet,
                )
            else:
                ray.init(address=config.address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            what = "Ray does not start here" if started else f"no Ray at {config.address!r}"
            hint = (
                "See Ray's own logs in /tmp/ray." if started else "Start one: `ray start --head`."
            )
            raise ConfigError(f"{what}: {error}", field="address", hint=hint) from None
        cluster = cls(started=started)
        cluster.look()
        try:
            cluster._check_room(config)
        except ConfigError:
            cluster.close()
            raise
        return cluster

    def look(self) -> None:
        """Asks what it has; where Ray has ended, that stays as it was."""
        with suppress(ray.exceptions.RayError):
            self._has = ray.cluster_resources()

    @property
    def description(self) -> str:
        how = "started here" if self.started else "joined"
        return f"Ray {ray.__version__} ({how}) with {_said(self._has)}"

    def bundle(self, part: GroupConfig | PoolConfig) -> dict[str, float]:
        """What Ray keeps for each rank or worker."""
        auto = part.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        gpus = {"GPU": 1.0} if auto or part.device == "cuda" else {}
        return {"CPU": part.cpus, **gpus}

    def missing(self, bundle: dict[str, float], count: int) -> str:
        """In words, what a group waits for."""
        free, total = ray.available_resources(), ray.cluster_resources()
        return f"{count} x ({_said(bundle)}); free {_said(free)}, of {_said(total)} in all"

    def _check_room(self, config: ClusterConfig) -> None:
        if not self.started:  # others may leave it, and nodes join
            return
        total = ray.cluster_resources()
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
        ray.shutdown()


class Room:
    """Places for the ranks of one group, kept for them together; or for a sampler's worker."""

    def __init__(self, bundle: dict[str, float], count: int) -> None:
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

    def give_back(self) -> None:
        remove_placement_group(self._group)


async def find_room(
    name: str,
    cluster: Cluster,
    bundle: dict[str, float],
    count: int,
    *,
    within_s: float,
    waiting: Callable[[str], None],
) -> Room:
    """Waits for it, and tells `waiting` for what, in words.

    Raises:
        EngineError: there was none in time.
    """
    room = await to_thread.run_sync(Room, bundle, count)
    end, said, there = time.monotonic() + within_s, -SAY_S, False
    try:
        while not (there := await to_thread.run_sync(room.wait)):
            waits_for = await to_thread.run_sync(cluster.missing, bundle, count)
            waiting(waits_for)
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                logger.warning("%s waits for room: %s", name, waits_for)
            if time.monotonic() > end:
                raise EngineError(
                    f"there was no room for {name} in {within_s:g} s: {waits_for}.",
                    hint="Add nodes, end other groups, or give this one fewer ranks.",
                )
    finally:
        if not there:
            with CancelScope(shield=True):
                await to_thread.run_sync(room.give_back)
    return room


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
