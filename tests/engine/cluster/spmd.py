"""Tests that several processes run at once, each as one rank of a group that divides its models.

`in_ranks` starts them; `rank` is what such a process has. A test that fails in one of them leaves
the others waiting for `TIMEOUT` at most.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from weaver.engine.cluster.merge import Ranks
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.shards import Shards
from weaver.engine.torch.trainer import TorchTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.engine.torch.catalog import Catalog

TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class Rank:
    number: int
    size: int
    team: Ranks
    shards: Shards

    def store(self, catalog: Catalog, *, dtype: torch.dtype = torch.float32) -> ModelStore:
        place = torch.device("cpu")
        return ModelStore(catalog, device=place, dtype=dtype, threads=1, shards=self.shards)

    def trainer(self, store: ModelStore, **options: Any) -> TorchTrainer:
        return TorchTrainer(store, team=self.team, **options)


def join(number: int, size: int, port: int, folder: Path, *, divided: bool = True) -> Rank:
    """Waits for the others; the first listens at the port."""
    store = distributed.TCPStore(
        "127.0.0.1", port, is_master=number == 0, wait_for_workers=False, timeout=TIMEOUT
    )
    distributed.init_process_group(
        "gloo",
        store=distributed.PrefixStore("fsdp", store),
        rank=number,
        world_size=size,
        timeout=TIMEOUT,
    )
    group = distributed.ProcessGroupGloo(
        distributed.PrefixStore("team", store), number, size, TIMEOUT
    )
    team = Ranks(group, rank=number, size=size, divided=divided)
    mesh = distributed.init_device_mesh("cpu", (size,))
    shards = Shards(mesh, gather=team.gather, folder=folder)
    return Rank(number=number, size=size, team=team, shards=shards)


@cache
def this_rank() -> Rank:
    """Of a process that `in_ranks` has started."""
    number, size, port = (int(os.environ[f"SPMD_{name}"]) for name in ("RANK", "SIZE", "PORT"))
    return join(number, size, port, Path(os.environ["SPMD_FOLDER"]))


def in_ranks(size: int, folder: Path, arguments: Sequence[str], *, within_s: float) -> list[str]:
    """Runs pytest with these arguments in so many processes; answers what each has said.

    All have to succeed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {"SPMD_SIZE": str(size), "SPMD_PORT": str(port), "SPMD_FOLDER": str(folder)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    files = [(folder / f"rank-{rank}.txt").open("w+") for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [*command, f"--basetemp={folder / f'rank-{rank}'}"],
            env={**os.environ, **given, "SPMD_RANK": str(rank)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        for rank, file in enumerate(files)
    ]
    end = time.monotonic() + within_s
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read())
            file.close()
    assert not any(codes), "\n\n".join(one[-4000:] for one in said)
    return said
