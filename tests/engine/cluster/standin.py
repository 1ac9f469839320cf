"""A worker that stands in for vLLM's: a real process that speaks its frames and draws letters.

What it draws depends on the adapter's name, the seed and the position alone. It needs neither torch
nor weaver. Its start frame says how it goes wrong, if it is to::

    rows, modules, both,   what it says of itself
    has_version
    pace_s                 for each token
    pids                   a folder, in which each process leaves its number
    fault                  start, garbage, silent, load, draw (it ends when it draws the letter a)
    shift                  what a process draws later than the first to start is other letters
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[3] / "weaver" / "engine" / "cluster" / "vllm_worker.py"


def the_worker() -> Any:
    """The real one's module, of which this uses the pipe."""
    spec = importlib.util.spec_from_file_location("vllm_worker", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number(*of: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=6).digest(), "big")


def letter(adapter: str, seed: int, at: int) -> int:
    return 97 + number(adapter, seed, at) % 26


class StandIn:
    """Answers frames until there are no more."""

    def __init__(self, pipe: Any, how: dict[str, Any]) -> None:
        self._pipe = pipe
        self._how = how
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._shift = 0

    async def serve(self) -> None:
        how = self._how
        if how.get("pids"):
            self._shift = len(os.listdir(how["pids"])) if how.get("shift") else 0
            os.close(os.open(f"{how['pids']}/{os.getpid()}", os.O_CREAT))
        if how.get("fault") == "start":
            sys.exit("no such model")
        if how.get("fault") == "garbage":
            self._pipe._writer.write(b"\0\0\0\4{no}")
            await asyncio.sleep(60)
        self._pipe.say(
            "ready",
            rows=how.get("rows", 8),
            tokens=4096,
            modules=how.get("modules", ["q_proj", "lm_head"]),
            both=how.get("both", True),
            versions={"standin": how.get("has_version", "1")},
        )
        while (frame := await self._pipe.read()) is not None:
            self._do(frame)

    def _do(self, frame: dict[str, Any]) -> None:
        do = frame["do"]
        if do == "load":
            if self._how.get("fault") == "load":
                os._exit(4)
            error = {"error": "no such adapter"} if self._lacks(frame["adapter"]) else {}
            self._pipe.say("answer", ask=frame["ask"], **error)
        elif do == "ping" and self._how.get("fault") != "silent":
            self._pipe.say("answer", ask=frame["ask"], memory=the_worker().resident_bytes())
        elif do == "sample":
            for index, seed in enumerate(frame["seeds"]):
                task = asyncio.create_task(self._row(frame, index, seed))
                self._tasks[frame["job"], index] = task
        elif do == "stop":
            for (job, index), task in list(self._tasks.items()):
                if job == frame["job"] and frame.get("index") in (None, index):
                    task.cancel()

    def _lacks(self, adapter: dict[str, Any]) -> bool:
        return bool(adapter) and not os.path.isdir(adapter["folder"])

    async def _row(self, frame: dict[str, Any], index: int, seed: int) -> None:
        adapter, params, told = frame["adapter"] or {}, frame["params"], []
        if self._lacks(adapter):
            self._pipe.say("failed", job=frame["job"], error="no such adapter")
            return
        scores = None
        if params["prompt_logprobs"] is not None and not index:
            scores = [-number(a, b) / 2**48 for a, b in pairwise(frame["prompt"])]
        for at in range(params["max_tokens"]):
            await asyncio.sleep(self._how.get("pace_s", 0))
            token = letter(adapter.get("name", ""), seed, at + 100 * self._shift)
            if self._how.get("fault") == "draw" and token == 97:
                os._exit(5)
            ended = "stop" if token in params["stop_token_ids"] else None
            if at + 1 == params["max_tokens"]:
                ended = ended or "length"
            logprob = float("nan") if self._how.get("fault") == "nan" else -1 - at / 8
            told.append((token, logprob, logprob * params["temperature"]))
            if frame["pieces"] or ended:
                tokens, logprobs, drawn = (list(column) for column in zip(*told, strict=True))
                self._pipe.row(
                    frame["job"], index, tokens, logprobs, drawn, ended, scores, len(self._tasks)
                )
                told, scores = [], None
            if ended:
                return


async def run(source: Any, sink: Any) -> None:
    pipe = await the_worker().open_pipe(source, sink)
    start = await pipe.read()
    if start is not None:
        writing = asyncio.create_task(pipe.write())
        await StandIn(pipe, start["engine"]).serve()
        writing.cancel()


if __name__ == "__main__":
    the_worker().die_with_parent()
    asyncio.run(run(*the_worker().standard_streams()))
