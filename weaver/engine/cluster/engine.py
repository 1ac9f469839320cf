"""`ClusterEngine`: an `Engine` whose gradients are computed by groups of ranks, which Ray places.

`weaver serve --cluster` makes one. Models are known, and samples drawn, by an engine in this
process, which is given weights as folders; `pooled_cluster` has workers of vLLM sample instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING
from uuid import uuid4

from weaver.boundary import blocking
from weaver.engine.base import WeightsRef
from weaver.engine.cluster.config import ClusterConfig, PoolConfig
from weaver.engine.cluster.group import TrainerGroup
from weaver.engine.cluster.lanes import GroupLanes
from weaver.engine.cluster.models import ModelsOf
from weaver.engine.cluster.placed_worker import PlacedWorker
from weaver.engine.cluster.placement import Cluster
from weaver.engine.cluster.status import (
    forget_status,
    status_of_group,
    status_of_placed,
    status_of_pool,
    write_status,
)
from weaver.engine.status import EngineStatus
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import (
    ConfigError,
    ConflictError,
    EngineLostError,
    UnknownModelError,
    nearest,
)
from weaver.files import hold_lock, release_lock

if TYPE_CHECKING:
    from weaver import types
    from weaver.engine.base import GradientJob, SampleJob, SampleProgress
    from weaver.engine.cluster.pool import SamplerPool
    from weaver.errors import WeaverError

FOLDER = "cluster"
"""In the home, where no shared folder is named."""
LIVE = "live-"
"""What snapshots lie in, of one engine alone."""
TELL_S = 5.0
"""How old the file of the status may be, if this process runs at all."""


class ClusterEngine(ModelsOf):
    """
    Args:
        local: knows the models, and samples.
        home: of the server. Ranks write checkpoints there, so that they have to see it.

    Raises:
        ConfigError: a group's model is not known, no Ray answers, what is started has no room, or
            the shared folder cannot be written to.
    """

    def __init__(
        self, local: TorchEngine, config: ClusterConfig, *, home: Path, deterministic: bool = False
    ) -> None:
        super().__init__(local)
        self.local = local
        self.folder = (config.shared or home / FOLDER).absolute()
        named = [(f"trainer.{i}.model", group.model) for i, group in enumerate(config.trainer)]
        named += [(f"pool.{i}.model", pool.model) for i, pool in enumerate(config.pool)]
        for field, model in named:
            try:
                local.facts(model)
            except UnknownModelError as error:
                raise ConfigError(error.message, field=field, hint=error.hint) from None
        with ExitStack() as stack:
            self._live = _a_folder_in(self.folder, stack)
            self._proof = self._live / "proof", uuid4().hex
            self._proof[0].write_text(self._proof[1])
            self._cluster = Cluster.open(config)
            self._opened = stack.pop_all()
        self._pooled = list(config.pools())
        self._writing = threading.Lock()
        self._groups = {
            name: TrainerGroup(
                name,
                group,
                cluster=self._cluster,
                source=local.facts(group.model).source,
                deterministic=deterministic,
                proof=self._proof,
                changed=self._write_status,
            )
            for name, group in config.named().items()
        }
        self._samplers: dict[str, list[PlacedWorker]] = {}
        """By model."""
        self.pools: dict[str, SamplerPool] = {}
        """Those that draw with them, by model, once they are open; only watched here."""
        self._lanes = GroupLanes()
        self._of: dict[str, TrainerGroup] = {}
        """By run."""
        self._snapshots: dict[str, Path] = {}
        """By run, the newest."""
        self._closed = threading.Event()
        self._teller = threading.Thread(target=self._tell, name="weaver-status", daemon=True)
        self._write_status()
        self._teller.start()

    @property
    def description(self) -> str:
        groups = ", ".join(
            f"{name} of {group.config.ranks} ranks" for name, group in self._groups.items()
        )
        sampling = "" if self._pooled else f"; sampling with {self.local.description}"
        return f"{self._cluster.description}: {groups}{sampling}"

    @property
    def counts(self) -> Mapping[str, int]:
        starts = sum(group.starts for group in self._groups.values())
        return {**self.local.counts, "group_starts": starts}

    @property
    def gauges(self) -> Mapping[str, float]:
        ranks = sum(len(group.ranks.actors) for group in self._groups.values() if group.ranks)
        return {**self.local.gauges, "ranks": ranks}

    @property
    def loaded_models(self) -> Collection[str]:
        """Of this process; ranks have the ones that they train."""
        return self.local.loaded_models

    # --- training -------------------------------------------------------------------------------

    def lane(self, run_id: str, base_model: str) -> str:
        groups = [name for name, g in self._groups.items() if g.config.model == base_model]
        return self._lanes.of(run_id, groups) if run_id and groups else ""

    async def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None:
        name = self.lane(run_id, base_model)
        if not name:
            known = sorted({group.config.model for group in self._groups.values()})
            raise UnknownModelError(
                f"no trainer group of the cluster has {base_model!r}.",
                field="base_model",
                hint=nearest(base_model, known),
            )
        group = self._groups[name]
        await group.create_run(run_id, training_mode, lora_config, seed)
        self._lanes.add(run_id)
        self._of[run_id] = group

    def _group(self, run_id: str) -> TrainerGroup:
        if run_id not in self._of:
            raise EngineLostError(f"no ranks have had run {run_id} since the engine began")
        return self._of[run_id]

    async def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        run_ids = [job.run_id for job in jobs]
        answer: Sequence[types.ForwardBackwardResult | WeaverError]
        answer = await self._group(run_ids[0]).call(run_ids, "forward_backward", jobs)
        return answer

    async def optim_step(
        self, steps: Sequence[tuple[str, types.AdamParams]]
    ) -> Sequence[types.OptimStepResult | WeaverError]:
        run_ids = [run_id for run_id, _ in steps]
        answer: Sequence[types.OptimStepResult | WeaverError]
        answer = await self._group(run_ids[0]).call(run_ids, "optim_step", steps)
        return answer

    async def clear_gradients(self, run_id: str) -> None:
        await self._group(run_id).call([run_id], "clear_gradients", run_id)

    async def snapshot(self, run_id: str) -> WeightsRef:
        """As a folder, which is there until the run's next one."""
        group = self._group(run_id)
        step, write = await group.save(run_id, include_optimizer=False)
        folder = self._live / uuid4().hex
        await blocking(folder.mkdir)
        await blocking(write, folder)
        await self._forget_snapshot(run_id)
        self._snapshots[run_id] = folder
        return WeightsRef(base_model=group.config.model, version=step, uri=folder.as_uri())

    async def _forget_snapshot(self, run_id: str) -> None:
        folder = self._snapshots.pop(run_id, None)
        if folder is not None:
            await blocking(partial(rmtree, folder, ignore_errors=True))

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        _, write = await self._group(run_id).save(run_id, include_optimizer=include_optimizer)
        return write

    async def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> int:
        given = (run_id, str(await blocking(folder.absolute)), include_optimizer)
        return int(await self._group(run_id).call([run_id], "load", *given))

    async def delete_run(self, run_id: str) -> None:
        await self._forget_snapshot(run_id)
        self._lanes.discard(run_id)
        group = self._of.pop(run_id, None)
        if group is not None:
            await group.forget(run_id)

    # --- sampling -------------------------------------------------------------------------------

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        return await self.local.publish(weights_id, ref)

    async def release(self, weights_id: str) -> None:
        await self.local.release(weights_id)

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        return self.local.sample(job, tell)

    def has_gpus(self, pool: PoolConfig) -> bool:
        """Whether each of its workers gets one."""
        return "GPU" in self._cluster.bundle(pool)

    def place_workers(
        self,
        pool: PoolConfig,
        command: Sequence[str],
        *,
        environment: Path,
        wanted: Mapping[str, str],
        logs: Path,
    ) -> dict[str, PlacedWorker]:
        """Those of a pool, by name; none is started before it is opened."""
        workers = {
            f"{pool.model}/sampler-{i}": PlacedWorker(
                f"{pool.model}/sampler-{i}",
                cluster=self._cluster,
                bundle=self._cluster.bundle(pool),
                command=command,
                log=logs / f"{i}.log",
                environment=environment,
                wanted=wanted,
                proof=self._proof,
                place_s=pool.place_s,
                changed=self._write_status,
            )
            for i in range(pool.workers)
        }
        self._samplers[pool.model] = list(workers.values())
        return workers

    # --- models ---------------------------------------------------------------------------------

    def prepare(self) -> Sequence[types.ModelInfo]:
        """See `TorchEngine.prepare`; what ranks divide need not fit here, unless it is sampled."""
        groups = [group.config for group in self._groups.values()]
        divided = [group.model for group in groups if group.mode == "fsdp"]
        return self.local.prepare(larger=[*divided, *self._pooled])

    def max_tokens_trained(self, base_model: str, training_mode: types.TrainingMode) -> int | None:
        """Of the smallest ranks; None before any have started."""
        self.local.facts(base_model)
        known = [
            longest
            for group in self._groups.values()
            if group.config.model == base_model
            and group.ranks is not None
            and (longest := group.ranks.longest.get(training_mode)) is not None
        ]
        return min(known, default=None)

    # --- the whole ------------------------------------------------------------------------------

    @property
    def status(self) -> EngineStatus:
        pools = dict(self.pools)
        return EngineStatus(
            ray=self._cluster.description,
            groups=tuple(map(status_of_group, self._groups.values())),
            pools=tuple(map(status_of_pool, pools.values())),
            samplers=tuple(
                status_of_placed(
                    model, worker, pools[model].places[worker.name] if model in pools else None
                )
                for model, workers in list(self._samplers.items())
                for worker in workers
            ),
        )

    def _write_status(self) -> None:
        """For `weaver cluster status`; in the threads of pools, too."""
        with self._writing:
            if not self._closed.is_set():
                write_status(self.folder, self.status)

    def _tell(self) -> None:
        while not self._closed.wait(TELL_S):
            self._cluster.refresh()
            self._write_status()

    def close(self) -> None:
        self._closed.set()
        self._teller.join(TELL_S)  # it may wait for a Ray that has ended
        for group in self._groups.values():
            group.close()
        self._cluster.close()
        self.local.close()
        forget_status(self.folder)
        self._opened.close()


def _a_folder_in(shared: Path, stack: ExitStack) -> Path:
    """An empty one, while no other server has the shared folder, which `stack` lets go of.

    What servers that are gone have left there goes.

    Raises:
        ConfigError: another has it, or it cannot be written to.
    """
    try:
        lock = hold_lock(
            shared,
            what=f"The folder {shared}",
            hint="Each server needs one of its own: name another in its cluster file.",
        )
        stack.callback(release_lock, lock)
        for left in shared.glob(f"{LIVE}*"):
            rmtree(left, ignore_errors=True)
        folder = shared / f"{LIVE}{uuid4().hex}"
        folder.mkdir()
    except ConflictError as error:
        raise ConfigError(error.message, field="shared", hint=error.hint) from None
    except OSError as error:
        raise ConfigError(
            f"{shared} cannot be written to: {error.strerror}.",
            field="shared",
            hint="Name a folder of yours that all machines of the cluster see.",
        ) from None
    stack.callback(rmtree, folder, ignore_errors=True)
    return folder
