"""`ClusterConfig`: what cluster.toml says. `weaver serve --cluster` reads it, without Ray.

```toml
address = "auto"              # joins the Ray of this machine, else starts one; local; host:port
shared = "/mnt/weaver"        # a folder that this process and all ranks see; default: in the home

[[trainer]]                   # a group of ranks; several for one model take its runs in turn
model = "Qwen/Qwen3-8B"
ranks = 2
device = "cuda"

[[pool]]                      # workers of vLLM that sample a model; without any, this process does
model = "Qwen/Qwen3-8B"
workers = 4
```
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from weaver.errors import ConfigError, InvalidRequestError
from weaver.values import Value


class GroupConfig(Value):
    """A trainer group: ranks that compute the gradients of the same runs together."""

    model: str
    """As the server knows it."""
    ranks: int = Field(1, ge=1, le=1024)
    mode: Literal["replicated", "fsdp"] = "replicated"
    """Each rank holds the whole base, or a part of each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of each rank, which has it for itself; auto: CUDA where Ray has GPUs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cpus: float = Field(1.0, gt=0)
    """That Ray keeps for each rank."""
    threads: int = Field(0, ge=0)
    """Of torch in each rank; 0 chooses by the model's size."""
    memory_gb: float = Field(0.0, ge=0)
    """Of each rank; 0: what is free on its device, on CPUs divided by all ranks of the group."""
    tokens_per_pass: int = Field(0, ge=0)
    recompute: Literal["auto", "off", "all"] = "auto"
    place_s: float = Field(600.0, gt=0)
    """How long an operation waits for room for the group."""
    start_s: float = Field(600.0, gt=0)
    """In which ranks have started and loaded the model."""
    call_s: float = Field(1800.0, gt=0)
    """In which any call of the ranks has ended; else they are given up and started anew."""


class PoolConfig(Value):
    """Workers that sample a base model by vLLM, each in a process that Ray finds room for."""

    model: str
    """As the server knows it."""
    workers: int = Field(1, ge=1, le=1024)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of each worker, which has it for itself; auto: CUDA where Ray has GPUs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, else float32."""
    cpus: float = Field(1.0, gt=0)
    """That Ray keeps for each worker."""
    rows: int = Field(0, ge=0)
    """Samples that a worker draws at once; 0: 64 on a CPU, else 256."""
    cache_gb: float = Field(0.0, ge=0)
    """For keys and values, of each worker; 0: 1 GiB on a CPU, else 0.9 of the GPU."""
    max_rank: int = Field(64, ge=1, le=512)
    """The largest rank of adapters."""
    environment: Path | None = None
    """vLLM's, on each machine with a worker; as the server has it where it is not named."""
    place_s: float = Field(600.0, gt=0)
    """How long room for a worker is waited for, before what needs one fails."""


class ClusterConfig(Value):
    address: str = Field("auto", min_length=1)
    shared: Path | None = None
    object_store_mb: int = Field(128, ge=80)
    """Of a Ray that is started here."""
    trainer: tuple[GroupConfig, ...] = Field(min_length=1)
    pool: tuple[PoolConfig, ...] = ()

    def named(self) -> dict[str, GroupConfig]:
        """The groups by names of their own: the model, and a number behind it."""
        names: dict[str, GroupConfig] = {}
        for group in self.trainer:
            same = sum(of.model == group.model for of in names.values())
            names[f"{group.model}#{same}"] = group
        return names

    def pools(self) -> dict[str, PoolConfig]:
        """By model.

        Raises:
            ConfigError: two are of one model, or a model that is trained has none while others do.
        """
        pools: dict[str, PoolConfig] = {}
        for i, pool in enumerate(self.pool):
            if pool.model in pools:
                raise ConfigError(
                    f"is {pool.model}, which has a pool already.",
                    field=f"pool.{i}.model",
                    hint="Raise the `workers` of that one.",
                )
            pools[pool.model] = pool
        for i, group in enumerate(self.trainer):
            if pools and group.model not in pools:
                raise ConfigError(
                    f"is {group.model}, which no pool samples.",
                    field=f"trainer.{i}.model",
                    hint="Write a [[pool]] for it, too; without any, the server itself samples.",
                )
        return pools


def read_cluster_file(file: Path) -> ClusterConfig:
    """
    Raises:
        ConfigError: it cannot be read, or something in it is unknown or out of bounds; names it.
    """
    try:
        given = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", field="cluster", hint="It has to be a TOML file."
        ) from None
    parts: dict[str, list[Value]] = {}
    for name, kind in (("trainer", GroupConfig), ("pool", PoolConfig)):
        tables, parts[name] = given.get(name, []), []
        for i, table in enumerate(tables if isinstance(tables, list) else []):
            with _naming(file, f"{name}.{i}."):
                parts[name].append(kind(**table))
    with _naming(file, ""):
        return ClusterConfig(**{**given, **parts})


@contextmanager
def _naming(file: Path, table: str) -> Iterator[None]:
    try:
        yield
    except (InvalidRequestError, TypeError) as error:
        field, hint = getattr(error, "field", None), getattr(error, "hint", None)
        raise ConfigError(
            f"{file}: {getattr(error, 'message', error)}",
            field=f"cluster: {table}{field or ''}",
            hint=hint,
        ) from None
