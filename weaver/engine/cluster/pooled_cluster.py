"""`open_cluster`: the engine that cluster.toml describes, with pools of samplers or without.

Called by `weaver serve --cluster`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from weaver.config import EngineSettings
from weaver.engine.cluster.beside import FOLDER as WEIGHTS
from weaver.engine.cluster.beside import PROGRAM, check_adapter, check_settings, sampled_model
from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig, read_cluster_file
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.cluster.pool import SamplerPool
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.sampler_env import ON_CPU, ON_CUDA, environment_of, python_of
from weaver.engine.cluster.vllm_params import VARIABLES, engine_arguments, rank_bound
from weaver.engine.cluster.weights import Shelf
from weaver.engine.sources import ModelSource
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError, UnknownModelError, nearest


def open_cluster(
    settings: EngineSettings,
    models: Mapping[str, str | Path | ModelSource] | None = None,
    *,
    file: Path | None,
    address: str | None,
    allow_paths: bool = True,
) -> ClusterEngine | PooledEngine:
    """As the user has set it; without a file, a group of one rank for each model.

    Where vLLM is to sample and the file has no pools, each model that is trained gets one.

    Args:
        address: of Ray, in place of the file's.

    Raises:
        ConfigError: see `read_cluster_file` and `ClusterEngine`; or of settings that do not go
            together.
    """
    if settings.quantize != "none":
        raise ConfigError(
            f"is {settings.quantize}, which groups of ranks do not go with yet.",
            field="quantize",
            hint="Leave it out, or leave --cluster and --ray out.",
        )
    local = TorchEngine.of(settings, models, allow_paths=allow_paths)
    if file is not None:
        config = read_cluster_file(file)
    else:
        groups = tuple(GroupConfig(model=model.name) for model in local.list_models())
        config = ClusterConfig(trainer=groups)
    if settings.sampler == "vllm" and not config.pool:
        config = config.model_copy(update={"pool": _pools_by(settings, config)})
    if address is not None:
        config = config.model_copy(update={"address": address})
    if config.pool:
        check_settings(settings)
    engine = ClusterEngine(local, config, home=settings.home, deterministic=settings.deterministic)
    return with_pools(engine, config, settings) if config.pool else engine


def _pools_by(settings: EngineSettings, config: ClusterConfig) -> tuple[PoolConfig, ...]:
    """Raises ConfigError: they name devices, which Ray gives."""
    if settings.sampler_devices:
        raise ConfigError(
            "is set, and in a cluster Ray chooses the device of each worker.",
            field="sampler_devices",
            hint="Leave it out; --sampler-workers says how many there are.",
        )
    return tuple(
        PoolConfig(
            model=model,
            workers=settings.sampler_workers,
            rows=settings.sample_rows,
            cache_gb=settings.kv_cache_gb,
            max_rank=settings.sampler_max_rank,
        )
        for model in dict.fromkeys(group.model for group in config.trainer)
    )


def with_pools(
    engine: ClusterEngine, config: ClusterConfig, settings: EngineSettings
) -> PooledEngine:
    """The engine whose samples are drawn by the pools of its configuration.

    Raises:
        ConfigError: two pools are of one model, or one that is trained has none.
        StorageError: the shared folder cannot be written to.
    """
    pools, place = config.pools(), engine.folder / WEIGHTS
    Shelf.sweep(place)  # the engine holds the folder
    shelf = Shelf(place)
    program = shelf.new() / PROGRAM.name  # alone in its folder: nothing else can be imported
    shutil.copyfile(PROGRAM, program)

    def open_pool(base_model: str) -> SamplerPool:
        facts = engine.local.facts(base_model)
        if base_model not in pools:
            raise UnknownModelError(
                f"no pool of the cluster samples {base_model!r}.",
                field="base_model",
                hint=nearest(base_model, sorted(pools)),
            )
        pool, model = pools[base_model], sampled_model(facts)
        on_cpu = not engine.has_gpus(pool)
        environment = pool.environment or environment_of(settings)
        start = ["env", "-u", "PYTHONPATH", *(f"{k}={v}" for k, v in VARIABLES.items())]
        wanted = ON_CPU if on_cpu else ON_CUDA
        dtype = "float32" if on_cpu else "bfloat16"
        opened = engine.pools[base_model] = SamplerPool(
            model,
            {
                name: worker.open
                for name, worker in engine.place_workers(
                    pool,
                    [*start, str(python_of(environment)), str(program)],
                    environment=environment,
                    wanted=wanted,
                    logs=place / "logs" / base_model.replace("/", "--"),
                ).items()
            },
            start={
                "engine": engine_arguments(
                    model,
                    dtype=dtype if pool.dtype == "auto" else pool.dtype,
                    on_cpu=on_cpu,
                    alone=True,
                    rows=pool.rows,
                    cache_bytes=int(pool.cache_gb * 1e9),
                    max_rank=rank_bound(pool.max_rank),
                )
            },
            shelf=Shelf(place),
            max_rank=pool.max_rank,
            versions=wanted,
            check=partial(check_adapter, facts=facts),
        )
        return opened

    return PooledEngine(engine, open_pool, shelf=shelf, prepare=engine.prepare)
