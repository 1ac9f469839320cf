"""`PooledEngine`: an `Engine` of one that trains, and of pools that sample what it has trained.

Weights go from the one to the other as folders of adapters. The trainer may be any engine: the one
in this process, or groups of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.boundary import blocking
from weaver.engine.base import SampleProgress, WeightsRef
from weaver.engine.cluster.models import ModelsOf
from weaver.engine.cluster.sample_run import Listener, no_weights
from weaver.engine.cluster.status import status_of_pool, status_of_worker
from weaver.engine.cluster.vllm_params import check_structure
from weaver.engine.cluster.weights import STATE
from weaver.errors import InvalidParamsError, UnsupportedError

if TYPE_CHECKING:
    from weaver import types
    from weaver.engine.base import Engine, GradientJob, SampleJob
    from weaver.engine.cluster.pool import SamplerPool
    from weaver.engine.cluster.weights import Shelf
    from weaver.engine.status import EngineStatus
    from weaver.errors import WeaverError


class PooledEngine(ModelsOf):
    """
    Args:
        trainer: also knows the models. It is closed with this.
        open_pool: makes the pool of a base model; raises what `Engine.get_model` does.
        shelf: where snapshots lie until they are published; closed with this.
        prepare: checks and loads the trainer's models before anything is asked of it.
    """

    def __init__(
        self,
        trainer: Engine,
        open_pool: Callable[[str], SamplerPool],
        *,
        shelf: Shelf,
        prepare: Callable[[], Sequence[types.ModelInfo]],
    ) -> None:
        super().__init__(trainer)
        self.trainer = trainer
        self.prepare = prepare
        self._open_pool = open_pool
        self._shelf = shelf
        self._pools: dict[str, SamplerPool] = {}
        self._of: dict[str, SamplerPool] = {}
        """By the id of weights."""
        self._snapshots: dict[str, Path] = {}
        """By run, its newest, until it is published."""

    @property
    def description(self) -> str:
        return f"{self.trainer.description}; sampling by vLLM in processes of its own"

    @property
    def counts(self) -> Mapping[str, int]:
        """The trainer's, and those of all pools together."""
        sampled: Counter[str] = Counter()
        for pool in list(self._pools.values()):
            sampled.update(pool.counts)
        return {**self.trainer.counts, **sampled}

    @property
    def gauges(self) -> Mapping[str, float]:
        """The trainer's, and of the workers how many run and how many jobs wait for one."""
        rooms = [pool.room() for pool in list(self._pools.values())]
        workers, waiting = sum(r.workers for r in rooms), sum(r.waiting for r in rooms)
        return {**self.trainer.gauges, "sampler_workers": workers, "sampler_waiting": waiting}

    @property
    def status(self) -> EngineStatus:
        told = self.trainer.status
        if told.samplers:  # where Ray places them, the cluster tells of its pools, too
            return told
        pools = list(self._pools.values())
        of_pools = {
            "pools": tuple(map(status_of_pool, pools)),
            "samplers": tuple(
                status_of_worker(pool.model.name, place)
                for pool in pools
                for place in pool.places.values()
            ),
        }
        return told.model_copy(update=of_pools)

    @property
    def loaded_models(self) -> Collection[str]:
        return self.trainer.loaded_models

    def pool(self, base_model: str) -> SamplerPool:
        """Made when it is first asked for, and its workers started when they are first needed."""
        if base_model not in self._pools:
            self._pools[base_model] = self._open_pool(base_model)
        return self._pools[base_model]

    # --- training -------------------------------------------------------------------------------

    def lane(self, run_id: str, base_model: str) -> str:
        return self.trainer.lane(run_id, base_model)

    async def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None:
        """Also raises UnsupportedError, InvalidParamsError: what it trains could not be sampled."""
        if lora_config is None:
            raise UnsupportedError(
                "fully trained weights cannot be sampled by vLLM here.",
                field="training_mode",
                hint="Train a LoRA adapter, or sample with torch.",
            )
        if lora_config.head is not None:
            raise UnsupportedError(
                "vLLM gives no scores here.",
                field="head",
                hint="Train the reward model on a server that samples with torch.",
            )
        await self._check_lora(base_model, lora_config)
        await self.trainer.create_run(
            run_id, base_model, training_mode=training_mode, lora_config=lora_config, seed=seed
        )

    async def _check_lora(self, base_model: str, config: types.LoraConfig) -> None:
        pool = self.pool(base_model)
        if config.rank > pool.max_rank:
            raise InvalidParamsError(
                f"is {config.rank}, the sampler's workers take {pool.max_rank} at most.",
                field="lora_config.rank",
                hint="Use a smaller one, or raise --sampler-max-rank.",
            )
        facts = await pool.ready()
        if config.train_unembed and pool.model.head not in facts.modules:
            raise UnsupportedError(
                f"vLLM adapts no {pool.model.head} of {base_model}.",
                field="lora_config.train_unembed",
                hint="Set train_unembed=False, or sample with torch.",
            )

    async def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        return await self.trainer.forward_backward(jobs)

    async def optim_step(
        self, steps: Sequence[tuple[str, types.AdamParams]]
    ) -> Sequence[types.OptimStepResult | WeaverError]:
        return await self.trainer.optim_step(steps)

    async def clear_gradients(self, run_id: str) -> None:
        await self.trainer.clear_gradients(run_id)

    async def snapshot(self, run_id: str) -> WeightsRef:
        """As a folder, which publishing it takes away."""
        write = await self.trainer.save(run_id, include_optimizer=False)
        folder = self._shelf.new()
        await blocking(write, folder)
        state = json.loads((folder / STATE).read_text())
        await self._forget_snapshot(run_id)
        self._snapshots[run_id] = folder
        uri = folder.as_uri()
        return WeightsRef(base_model=state["base_model"], version=state["step"], uri=uri)

    async def _forget_snapshot(self, run_id: str) -> None:
        folder = self._snapshots.pop(run_id, None)
        if folder is not None:
            await blocking(self._shelf.drop, folder)

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        return await self.trainer.save(run_id, include_optimizer=include_optimizer)

    async def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> int:
        return await self.trainer.load(run_id, folder, include_optimizer=include_optimizer)

    async def delete_run(self, run_id: str) -> None:
        await self._forget_snapshot(run_id)
        await self.trainer.delete_run(run_id)

    # --- sampling -------------------------------------------------------------------------------

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        pool = self.pool(ref.base_model)
        version = await pool.publish(weights_id, ref)
        self._of[weights_id] = pool
        for run_id, folder in list(self._snapshots.items()):
            if folder.as_uri() == ref.uri:
                await self._forget_snapshot(run_id)
        return version

    async def release(self, weights_id: str) -> None:
        pool = self._of.pop(weights_id, None)
        if pool is not None:
            await pool.release(weights_id)

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        pool = self._of.get(job.weights_id)
        if pool is not None:
            return pool.sample(job, tell)
        listener = Listener(tell)
        listener.hear(SampleProgress(job_id=job.job_id, error=no_weights(job.weights_id)))
        return listener.leave

    # --- models ---------------------------------------------------------------------------------

    def check_structure(self, base_model: str, params: types.SamplingParams) -> None:
        check_structure(params)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self.trainer.close()
        self._shelf.close()
