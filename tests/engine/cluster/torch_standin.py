"""A worker that stands in for vLLM's and computes with our own torch engine, from the same frames.

Started in place of the worker's Python; see `an_environment`. A piece of a stream comes when its
sample has ended.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.engine.cluster.standin import the_worker
from weaver.engine.base import SampleJob, WeightsRef
from weaver.engine.cluster.sampler_env import ON_CPU
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import WeaverError
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from weaver.engine.base import SampleProgress

ROOT = Path(__file__).parents[3]
SHAPING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
PENALTIES = {"presence_penalty", "frequency_penalty"}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def an_environment(folder: Path) -> Path:
    """One that looks as it should, and whose Python is this program."""
    for name, version in ON_CPU.items():
        info = folder / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    program = f"PYTHONPATH={ROOT} exec {sys.executable} -m tests.engine.cluster.torch_standin"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    return folder


class TorchStandIn:
    def __init__(self, pipe: Any, how: dict[str, Any]) -> None:
        self._pipe = pipe
        self._model = how["model"]
        self._engine = TorchEngine(device="cpu", dtype=how["dtype"], deterministic=True)
        self._published: set[str] = set()
        self._drops: dict[tuple[int, int], Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, rows: int) -> None:
        await self._publish(None)
        told = {"rows": rows, "tokens": 4096, "modules": MODULES, "both": True}
        self._pipe.say("ready", versions=dict(ON_CPU), **told)
        while (frame := await self._pipe.read()) is not None:
            if frame["do"] == "stop":
                for (job, index), drop in list(self._drops.items()):
                    if job == frame["job"] and frame.get("index") in (None, index):
                        drop()
            else:
                task = asyncio.create_task(self._do(frame))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _do(self, frame: dict[str, Any]) -> None:
        if frame["do"] == "sample":
            await self._publish(frame["adapter"])
            for index, seed in enumerate(frame["seeds"]):
                self._row(frame, index, seed)
        elif "ask" in frame:
            error = {}
            try:
                if frame["do"] == "load":
                    await self._publish(frame["adapter"])
            except WeaverError as refused:
                error["error"] = str(refused)
            self._pipe.say("answer", ask=frame["ask"], **error)

    async def _publish(self, adapter: dict[str, Any] | None) -> None:
        name = adapter["name"] if adapter else ""
        if name not in self._published:
            self._published.add(name)
            uri = f"file://{adapter['folder']}" if adapter else None
            await self._engine.publish(name, WeightsRef(base_model=self._model, uri=uri))

    def _row(self, frame: dict[str, Any], index: int, seed: int) -> None:
        given = frame["params"]
        full = len(frame["prompt"]) == self._engine.get_model(self._model).context_length
        job = SampleJob(
            job_id=f"{frame['job']}:{index}",
            weights_id=frame["adapter"]["name"] if frame["adapter"] else "",
            prompt=frame["prompt"],
            params=SamplingParams(
                **{name: given[name] for name in SHAPING | PENALTIES},
                logit_bias=dict(given["logit_bias"]),
                max_tokens=given["max_tokens"],
                stop_token_ids=given["stop_token_ids"],
                ignore_eos=given["ignore_eos"],
                seed=seed,
            ),
            num_samples=0 if full else 1,
            include_prompt_logprobs=given["prompt_logprobs"] is not None and not index,
        )

        def tell(progress: SampleProgress) -> None:
            if progress.error is not None:
                self._pipe.say("failed", job=frame["job"], error=str(progress.error))
            elif (result := progress.result) is not None:
                read = result.prompt_logprobs
                scores = None if read is None else list(read[1:])
                if not result.sequences:
                    self._pipe.row(frame["job"], index, [], [], [], "length", scores, 0)
                    return
                [one] = result.sequences
                for at, token in enumerate(one.tokens):
                    last = at + 1 == len(one.tokens)
                    columns = [token], [one.logprobs[at]], [one.sampling_logprobs[at]]
                    ended = one.stop_reason if last else None
                    self._pipe.row(frame["job"], index, *columns, ended, scores, 0)

        self._drops[frame["job"], index] = self._engine.sample(job, tell)


async def run(source: Any, sink: Any) -> None:
    pipe = await the_worker().open_pipe(source, sink)
    start = await pipe.read()
    if start is not None:
        writing = asyncio.create_task(pipe.write())
        how = start["engine"]
        await TorchStandIn(pipe, how).serve(how["max_num_seqs"])
        writing.cancel()


if __name__ == "__main__":
    the_worker().die_with_parent()
    torch.set_num_threads(1)
    asyncio.run(run(*the_worker().standard_streams()))
