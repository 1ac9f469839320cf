"""`beside_torch`: an engine that trains here, in torch, and samples by vLLM in worker processes.

Made by `open_engine` where the settings say `sampler = "vllm"`, on a machine with one or two
devices. Nothing of Ray is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from transformers import GenerationConfig

from weaver import errors
from weaver.config import EngineSettings
from weaver.engine.cluster.pool import SamplerPool
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.sampled_model import SampledModel
from weaver.engine.cluster.sampler_env import (
    ON_CPU,
    ON_CUDA,
    check_environment,
    environment_of,
    python_of,
)
from weaver.engine.cluster.vllm_params import VARIABLES, engine_arguments, rank_bound
from weaver.engine.cluster.weights import Shelf
from weaver.engine.cluster.worker_process import Opener, WorkerProcess
from weaver.engine.sources import ModelSource
from weaver.engine.torch.catalog import ModelFacts, only_here
from weaver.engine.torch.checkpoints import read_snapshot
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.models import first_ends

PROGRAM = Path(__file__).with_name("vllm_worker.py")
FOLDER = "sampler"
"""In the home: weights that are sampled from, and what the workers print."""


def beside_torch(
    settings: EngineSettings,
    models: Mapping[str, str | Path | ModelSource] | None = None,
    *,
    allow_paths: bool = True,
) -> PooledEngine:
    """
    Raises:
        ConfigError: of settings that do not go together, or the environment is not there.
    """
    check_settings(settings)
    trainer = TorchEngine.of(settings, models, allow_paths=allow_paths)
    on_cpu = trainer.device.place.type == "cpu"
    environment, wanted = environment_of(settings), ON_CPU if on_cpu else ON_CUDA
    check_environment(environment, wanted)
    devices = _devices(settings)
    if not on_cpu and not devices and not settings.memory_gb:
        raise errors.ConfigError(
            "is not set, and trainer and sampler share one device.",
            field="memory_gb",
            hint="Say what the trainer may use, or give workers others by --sampler-devices.",
        )
    shelf = Shelf(settings.home / FOLDER)
    program = shelf.new() / PROGRAM.name  # alone in its folder: nothing else can be imported
    shutil.copyfile(PROGRAM, program)

    def open_pool(base_model: str) -> SamplerPool:
        facts = trainer.facts(base_model)
        model = sampled_model(facts)
        max_rank = rank_bound(settings.sampler_max_rank)
        arguments = engine_arguments(
            model,
            dtype=trainer.device.dtype,
            on_cpu=on_cpu,
            alone=bool(devices),
            rows=settings.sample_rows,
            cache_bytes=int(settings.kv_cache_gb * 1e9),
            max_rank=max_rank,
        )
        logs = settings.home / FOLDER / "logs" / base_model.replace("/", "--")
        return SamplerPool(
            model,
            _workers(
                [str(python_of(environment)), str(program)],
                logs=logs,
                devices=devices or [""] * settings.sampler_workers,
            ),
            start={"engine": arguments},
            shelf=Shelf(settings.home / FOLDER),
            max_rank=settings.sampler_max_rank,
            versions=wanted,
            check=partial(check_adapter, facts=facts),
        )

    return PooledEngine(trainer, open_pool, shelf=shelf, prepare=trainer.prepare)


def check_settings(settings: EngineSettings) -> None:
    """Raises ConfigError: vLLM does not go with them."""
    rank_bound(settings.sampler_max_rank)
    if settings.quantize != "none":
        raise errors.ConfigError(
            f"is {settings.quantize}, and vLLM would sample from another base than is trained.",
            field="quantize",
            hint="Leave it out, or sample with torch.",
        )
    if settings.deterministic:
        raise errors.ConfigError(
            "is on, and what vLLM draws may depend on what else runs.",
            field="deterministic",
            hint="Leave it out, or sample with torch.",
        )


def _devices(settings: EngineSettings) -> list[str]:
    return [name for part in settings.sampler_devices.split(",") if (name := part.strip())]


def _workers(command: list[str], *, logs: Path, devices: list[str]) -> dict[str, Opener]:
    """One for each device; "" is whatever vLLM finds."""
    workers: dict[str, Opener] = {}
    for number, device in enumerate(devices):
        variables = VARIABLES | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        given = [f"{name}={value}" for name, value in variables.items()]
        process = WorkerProcess(
            command=["env", "-u", "PYTHONPATH", *given, *command], log=logs / f"{number}.log"
        )
        workers[f"worker-{number}"] = process.open
    return workers


def sampled_model(facts: ModelFacts) -> SampledModel:
    head = next(path for path, target in facts.targets.items() if target.role == "unembed")
    return SampledModel(
        name=facts.info.name,
        source=facts.source,
        context_length=facts.info.context_length,
        head=head.rpartition(".")[2],
        read_tokenizer=lambda: facts.tokenizer,
        read_ends=cache(partial(_ends, facts)),
    )


def _ends(facts: ModelFacts) -> frozenset[int]:
    """As `LoadedModel` and the tokenizer have them, without the weights."""
    settings = None
    with suppress(OSError):  # there is no such file
        settings = GenerationConfig.from_pretrained(
            facts.source, local_files_only=only_here(facts.source)
        )
    return first_ends(settings, facts.config) | facts.end_token_ids


def check_adapter(folder: Path, *, facts: ModelFacts) -> None:
    """Raises what `read_snapshot` does: of shapes and values, those that are not finite, too."""
    read_snapshot(folder, facts=facts, quantize="none")
