"""What ranks cost: CPU seconds of two, replicated and divided (`fsdp`), against one process.

Two tenants of rank 8 and 16 train over random weights of 33 million parameters, or one in full; the
same datums in all, one step a round, in turns; in full once more with longer datums, since what
dividing costs is of each pass, whatever it has of tokens. Each rank is a process with one thread,
and speaks gloo. Bounds (issue 13): replicas at most 1.1 times, divided at most 1.3; no rank holds
more than 0.55 of the layers' bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.figures import Figure
from tests.benchmarks.peers.shapes import made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from weaver.engine.torch.trainer import TorchTrainer

ROUNDS, DATUMS = 3, 12
START_S, CALL_S = 300, 900
CASES = {"one process": 1, "replicated": 2, "divided": 2}
MODES = {"lora": 160, "full_ft": 160, "full_ft, longer": 640}
"""How many tokens the shortest datum has; the others have 8 more each."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    case: str
    rank: int
    port: int
    folder: str
    model: str
    smoke: bool


def serve(pipe: Connection, setup: Setup) -> None:
    """In a process: a round for each mode that comes, until there is none."""
    import torch

    torch.set_num_threads(1)
    trainer, held = _trainer(setup)
    pipe.send(held)
    while mode := pipe.recv():
        begin = time.process_time()
        norms = _round(trainer, mode, setup.smoke)
        pipe.send((time.process_time() - begin, norms))


def _trainer(setup: Setup) -> tuple[TorchTrainer, float]:
    """One with its runs, and the share of the layers' bytes that it holds."""
    import torch

    from tests.engine.cluster.spmd import join
    from weaver.engine.torch.catalog import Catalog
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.team import ALONE
    from weaver.engine.torch.trainer import TorchTrainer
    from weaver.types import LoraConfig

    size, team, shards = CASES[setup.case], ALONE, None
    if size > 1:
        divided = setup.case == "divided"
        rank = join(setup.rank, size, setup.port, Path(setup.folder), divided=divided)
        team, shards = rank.team, rank.shards if divided else None
    store = ModelStore(
        Catalog({"it": setup.model}, allow_paths=False),
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=1,
        shards=shards,
    )
    trainer = TorchTrainer(store, team=team)
    for name, r in (("a", 8), ("b", 16)):
        lora = LoraConfig(rank=r)
        trainer.create_run(name, "it", training_mode="lora", lora_config=lora, seed=0)
    trainer.create_run("full", "it", training_mode="full_ft", lora_config=None, seed=0)
    parts = trainer._run("full").parts
    if parts is None:
        return trainer, 1.0
    whole = sum(p.numel() for name, p in parts._divided.items() if ".layers." in name)
    held = sum(p.numel() for name, p in parts.trained.items() if ".layers." in name)
    return trainer, held / whole


def _round(trainer: TorchTrainer, mode: str, smoke: bool) -> list[float]:
    """A step; answers the norms of the gradients."""
    from tests.engine.conftest import datum, job, sequences
    from weaver.types import AdamParams

    count, tokens = (4, 16) if smoke else (DATUMS, MODES[mode])
    data = [datum(s) for s in sequences(*[tokens + 8 * i for i in range(count)])]
    half = count // 2
    runs = {"a": data[:half], "b": data[half:]} if mode == "lora" else {"full": data[:half]}
    trainer.forward_backward([job(run, some) for run, some in runs.items()])
    params = AdamParams(learning_rate=1e-4)
    return [trainer.optim_step(run, params).metrics["grad_norm"] for run in runs]


@contextmanager
def ranks(case: str, folder: Path, smoke: bool) -> Iterator[list[Connection]]:
    """The processes of a case; ended behind it."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = str(made("nano" if smoke else "60m-8k"))
    pipes: list[Any] = []
    processes = []
    for rank in range(CASES[case]):
        ours, theirs = context.Pipe()
        setup = Setup(case=case, rank=rank, port=port, folder=str(folder), model=model, smoke=smoke)
        process = context.Process(target=serve, args=(theirs, setup), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list[Connection], within_s: float) -> list[Any]:
    end, told = time.monotonic() + within_s, []
    for pipe in pipes:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            raise TimeoutError(f"a rank has not answered in {within_s:g} s")
        told.append(pipe.recv())
    return told


def figures(smoke: bool) -> Iterator[Figure]:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pipes = {case: stack.enter_context(ranks(case, folder, smoke)) for case in CASES}
        held = {case: _answers(each, START_S) for case, each in pipes.items()}
        yield Figure("bytes of the layers on a rank", (max(held["divided"]),), "of all", 0.55)
        for mode in MODES:
            seconds: dict[str, list[float]] = {case: [] for case in CASES}
            for turn in range(1 + (1 if smoke else ROUNDS)):
                norms = []
                for case, each in pipes.items():
                    for pipe in each:
                        pipe.send(mode)
                    told = _answers(each, CALL_S)
                    norms.append(told[0][1])
                    if turn:  # the first makes what is made once
                        seconds[case].append(sum(spent for spent, _ in told))
                for others in norms[1:]:
                    for ours, theirs in zip(others, norms[0], strict=True):
                        assert abs(ours - theirs) <= 1e-3 * theirs, (mode, norms)
            one = seconds["one process"]
            yield Figure(f"{mode}: one process", tuple(one), "CPU s")
            replicated = 1.1 if mode == "lora" else None  # in full, each has all of the optimizer
            for case, bound in (("replicated", replicated), ("divided", 1.3)):
                ratios = tuple(s / alone for s, alone in zip(seconds[case], one, strict=True))
                yield Figure(f"{mode}: two ranks, {case}, by one process", ratios, "times", bound)
