"""`ClusterConfig`: what cluster.toml says. `weaver serve --cluster` reads it, without Ray.

```toml
address = "auto"              # joins the Ray of this machine, else starts one; local; host:port
shared = "/mnt/weaver"        # a folder that this process and all ranks see; default: in the home

[[trainer]]                   # a group of ranks; several for one model take its runs in turn
model = "Qwen/Qwen3-8B"
ranks = 2
device = "cuda"
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


class ClusterConfig(Value):
    address: str = Field("auto", min_length=1)
    shared: Path | None = None
    object_store_mb: int = Field(128, ge=80)
    """Of a Ray that is started here."""
    trainer: tuple[GroupConfig, ...] = Field(min_length=1)

    def named(self) -> dict[str, GroupConfig]:
        """The groups by names of their own: the model, and a number behind it."""
        names: dict[str, GroupConfig] = {}
        for group in self.trainer:
            same = sum(of.model == group.model for of in names.values())
            names[f"{group.model}#{same}"] = group
        return names


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
    tables = given.get("trainer", [])
    groups: list[GroupConfig] = []
    for i, table in enumerate(tables if isinstance(tables, list) else []):
        with _naming(file, f"trainer.{i}."):
            groups.append(GroupConfig(**table))
    with _naming(file, ""):
        return ClusterConfig(**{**given, "trainer": groups})


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
