"""`Rank`: one of the processes of a trainer group, a Ray actor with a trainer and a device.

`TrainerGroup` makes them, and calls all of them alike. A rank computes its own share of the datums;
beyond that all ranks do the same, so that they stay equal.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

from weaver import types
from weaver.boundary import attempt
from weaver.engine.base import GradientJob
from weaver.engine.cluster.merge import Ranks
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.device import DTYPES, choose_device, free_bytes
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.shards import Shards
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import StorageError, WeaverError

if TYPE_CHECKING:
    from weaver.engine.cluster.config import GroupConfig

distributed: Any = torch.distributed
PR_SET_PDEATHSIG = 1
COPIES = 8
"""Copies of runs that a rank holds for writers that have not come yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a rank is told when it is made."""

    group: str
    rank: int
    size: int
    config: GroupConfig
    source: str
    """Of the model: a folder, or a Hugging Face id."""
    deterministic: bool
    folder: str
    """That all ranks see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a rank says of itself."""

    host: str
    pid: int
    device: str
    dtype: str
    versions: dict[str, str]
    """Which have to be the same in all ranks, as results depend on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a call in one rank."""

    value: Any
    """The first rank's; None of the others."""
    error: WeaverError | None
    mark: str
    """The same in all ranks, or they are not equal any more."""
    memory: int
    """Bytes that the process has in main memory."""


class Rank:
    def __init__(self, setup: Setup) -> None:
        die_with_parent()
        self._setup = setup
        config = setup.config
        self._device = choose_device(config.device, config.dtype)
        self._copies: dict[str, Callable[[Path], None]] = {}

    def facts(self) -> Facts:
        return Facts(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self._device.place),
            dtype=self._device.dtype,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "weaver": version("weaver-post-training"),
            },
        )

    def listen(self) -> tuple[str, int]:
        """In the first rank: where the others find it."""
        import ray

        host = ray.util.get_node_ip_address()
        self._store = distributed.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=self._start_s
        )
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Waits for the other ranks, and loads the model."""
        setup, config = self._setup, self._setup.config
        if setup.rank:
            self._store = distributed.TCPStore(host, port, timeout=self._start_s)
        store = distributed.PrefixStore("weaver", self._store)
        group = distributed.ProcessGroupGloo(store, setup.rank, setup.size, self._call_s)
        divided = config.mode == "fsdp"
        team = Ranks(group, rank=setup.rank, size=setup.size, divided=divided)
        place = self._device.place
        memory = int(config.memory_gb * 1e9) or free_bytes(place)
        if memory is not None and place.type == "cpu" and not config.memory_gb:
            memory //= setup.size
        if divided and memory is not None:  # passes are planned alike
            memory = min(team.gather(memory))
        models = Catalog({config.model: setup.source}, allow_paths=False)
        self._models = ModelStore(
            models,
            device=place,
            dtype=DTYPES[self._device.dtype],
            threads=config.threads,
            memory=memory,
            shards=self._shards(team) if divided else None,
        )
        self._trainer = TorchTrainer(
            self._models,
            deterministic=setup.deterministic,
            tokens_per_pass=config.tokens_per_pass,
            recompute=config.recompute,
            team=team,
        )

    def _shards(self, team: Ranks) -> Shards:
        """For FSDP2, which takes collectives from torch's default group."""
        setup, kind = self._setup, self._device.place.type
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=distributed.PrefixStore("shards", self._store),
            rank=setup.rank,
            world_size=setup.size,
            timeout=self._call_s,
        )
        mesh = distributed.init_device_mesh(kind, (setup.size,))
        return Shards(mesh, gather=team.gather, folder=Path(setup.folder))

    @property
    def _call_s(self) -> timedelta:
        return timedelta(seconds=self._setup.config.call_s)

    @property
    def _start_s(self) -> timedelta:
        return timedelta(seconds=self._setup.config.start_s)

    def sees(self, file: str) -> str:
        """What a file of the shared folder says; nothing where it is not there."""
        path = Path(file)
        return path.read_text() if path.is_file() else ""

    def call(self, name: str, arguments: tuple[Any, ...]) -> Answer:
        """Any of the methods below. What a user can mend is answered, a defect is raised."""
        value, error = None, None
        try:
            value = getattr(self, name)(*arguments)
        except WeaverError as raised:
            error = raised
        return Answer(
            value=None if self._setup.rank else value,
            error=error,
            mark=f"{error.code}" if error is not None else _mark(value),
            memory=_resident_bytes(),
        )

    # --- what a group calls ---------------------------------------------------------------------

    def load_model(self) -> dict[str, int | None]:
        """Answers the longest sequence that can be trained, by mode."""
        name = self._setup.config.model
        self._models.base(name)
        modes: tuple[Literal["lora", "full_ft"], ...] = ("lora", "full_ft")
        return {mode: self._trainer.plan(name, mode).longest for mode in modes}

    def create_run(
        self,
        run_id: str,
        mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None:
        name = self._setup.config.model
        self._trainer.create_run(
            run_id, name, training_mode=mode, lora_config=lora_config, seed=seed
        )

    def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        return self._trainer.forward_backward(jobs)

    def optim_step(
        self, steps: Sequence[tuple[str, types.AdamParams]]
    ) -> list[types.OptimStepResult | WeaverError]:
        return [attempt(self._trainer.optim_step, run_id, params) for run_id, params in steps]

    def clear_gradients(self, run_id: str) -> None:
        self._trainer.clear_gradients(run_id)

    def save(self, run_id: str, include_optimizer: bool, copy_id: str) -> int:
        """Copies a run for `write`; answers its step."""
        write = self._trainer.save(run_id, include_optimizer=include_optimizer)
        if self._setup.rank == 0:
            self._copies[copy_id] = write
            for oldest in list(self._copies)[:-COPIES]:
                del self._copies[oldest]
        return self._trainer.step(run_id)

    def write(self, copy_id: str, folder: str) -> None:
        """In the first rank: writes a copy into an empty folder."""
        write = self._copies.pop(copy_id, None)
        if write is None:
            raise StorageError("the rank has let go of that copy.", hint="Save again.")
        write(Path(folder))

    def load(self, run_id: str, folder: str, include_optimizer: bool) -> int:
        self._trainer.load(run_id, Path(folder), include_optimizer=include_optimizer)
        return self._trainer.step(run_id)

    def delete_run(self, run_id: str) -> None:
        self._trainer.delete_run(run_id)


def _mark(value: Any) -> str:
    """Of results, their metrics: ranks that have them alike compute the same."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    marks = [one.code if isinstance(one, WeaverError) else dict(one.metrics) for one in value]
    return repr(marks)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # another system
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def die_with_parent() -> None:
    """On Linux, this process is killed when the one that has started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
