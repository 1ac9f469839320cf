"""A sampler's worker: vLLM behind frames of JSON on its standard streams. `WorkerProcess` runs it.

It runs in an environment of its own, in which there is no `weaver`: it imports nothing of it, and
all that goes through are plain values. A frame is its length in four bytes, the highest first, and
a JSON object. What it is to do, in `do`, and what it says, in `say`::

    start    engine: vLLM's arguments        ->  ready   what the engine is
             packages: whose versions
    load     adapter, ask                    ->  answer  ask, perhaps error
    forget   number
    ping     ask                             ->  answer  ask, once the engine itself has turned,
                                                         memory: bytes of its processes
    sample   job, adapter, prompt, params,   ->  rows    [[job, index, tokens, logprobs, drawn,
             seeds, pieces                                 ended, prompt_logprobs], ...]
                                             or  failed  job, error
    stop     job, index (none: all of them)
                                                 died    error, at which it ends

An adapter is a name, a number and a folder, none of which is ever used for other weights. Each seed
is a sample of its own. `logprobs` are those of the policy, `drawn` those of the distribution that
was drawn from, `cached` the prompt's tokens that were not read, as they were there.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

LARGEST = 2**28
"""Bytes of a frame."""
GREEDY = 1e-5
"""vLLM takes temperatures below it for 0."""


class Extension:
    """What vLLM's own workers can do beside their own methods, in their processes."""

    model_runner: Any

    def weaver_begin(self) -> dict[str, Any]:
        """Lets the sampler tell both log-probabilities; answers that, and what can be adapted."""
        die_with_parent()
        runner = self.model_runner
        manager = runner.lora_manager._adapter_manager
        packed = manager.packed_modules_mapping
        modules = [m for name in manager.supported_lora_modules for m in packed.get(name, [name])]
        score_by_adapter(runner)
        return {"modules": sorted(set(modules)), "both": tell_both(runner)}

    def weaver_beat(self) -> bool:
        return True


def tell_both(runner: Any) -> bool:
    """Has the sampler tell in place of the likeliest token how likely the drawn one was there.

    Jobs ask for one token beside the one that is drawn. False: the sampler is none that is known.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler

    if type(runner.sampler) is not Sampler:
        return False

    class Both(Sampler):  # type: ignore[misc]
        drawn: Any = None

        def sample(self, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            tokens, after = super().sample(logits, sampling_metadata, *args, **kwargs)
            self.drawn = logits.new_zeros(len(tokens))  # a greedy row has one outcome
            if after is not None:
                drawn = after.gather(-1, tokens.long()[:, None])[:, 0]
                self.drawn = drawn.masked_fill(sampling_metadata.temperature < GREEDY, 0.0)
            return tokens, None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            told = output.logprobs_tensors
            if told is not None and told.logprobs.shape[-1] > 1:
                told.logprobs[:, 1] = self.drawn
            return output

    runner.sampler.__class__ = Both
    runner.sampler.topk_topp_sampler = TopKTopPSampler("processed_logprobs")
    return True


def score_by_adapter(runner: Any) -> None:
    """Has each prompt scored with its own adapter of the output layer.

    vLLM 0.32 computes a prompt's logits, one for each of its tokens, with the adapters of the
    batch's rows: wrongly, or to the end of its engine.
    """
    score, logits = runner._get_prompt_logprobs_dict, runner.model.compute_logits
    scored: list[Any] = []
    """The adapter of the request whose prompt is scored."""

    def by_request(hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        wanted, told = runner.num_prompt_logprobs, {}
        for name in list(wanted):
            runner.num_prompt_logprobs = one = {name: wanted[name]}
            scored.append(runner.requests[name].lora_request)
            told.update(score(hidden_states, num_scheduled_tokens))
            scored.clear()
            if not one:
                del wanted[name]
        runner.num_prompt_logprobs = wanted
        return told

    def compute_logits(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        for adapter in scored:
            number = adapter.lora_int_id if adapter else 0
            rows = (number,) * len(hidden_states)
            runner._set_active_loras(rows, rows, {adapter} if adapter else set())
        return logits(hidden_states, *args, **kwargs)

    runner._get_prompt_logprobs_dict = by_request
    runner.model.compute_logits = compute_logits


def die_with_parent() -> None:
    """Linux ends this process when the thread that has started it ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def resident_bytes() -> int:
    """In main memory, of this process and those that it has started."""
    session, pages = os.getsid(0), 0
    for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError, IndexError):  # it has ended meanwhile
            if os.getsid(int(pid)) == session:
                with open(f"/proc/{pid}/statm") as file:
                    pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Pipe:
    """Frames in and out; the rows of one turn of the event loop go out in one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._rows: list[tuple[Any, ...]] = []
        self._frames: list[dict[str, Any]] = []
        self._some = asyncio.Event()

    async def read(self) -> dict[str, Any] | None:
        """The next frame; None is the end."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > LARGEST:
                raise ValueError(f"a frame of {size} bytes")
            frame: dict[str, Any] = json.loads(await self._reader.readexactly(size))
            return frame
        except asyncio.IncompleteReadError:
            return None

    def say(self, say: str, **values: Any) -> None:
        self._frames.append({"say": say, **values})
        self._some.set()

    def row(self, *values: Any) -> None:
        self._rows.append(values)
        self._some.set()

    async def write(self) -> NoReturn:
        while True:
            await self._some.wait()
            await self.flush()

    async def flush(self) -> None:
        self._some.clear()
        frames, self._frames = self._frames, []
        rows, self._rows = self._rows, []
        for frame in [{"say": "rows", "rows": rows}, *frames] if rows else frames:
            body = json.dumps(frame, separators=(",", ":")).encode()
            self._writer.write(len(body).to_bytes(4, "big") + body)
        await self._writer.drain()

    async def die(self, error: BaseException) -> NoReturn:
        """Says so and ends the process: an engine that has failed does not come back."""
        self.say("died", error=text_of(error))
        try:
            await asyncio.wait_for(self.flush(), 5)
        finally:
            os._exit(1)


class Worker:
    """Carries out frames until there are no more."""

    def __init__(self, engine: Any, pipe: Pipe) -> None:
        self._engine = engine
        self._pipe = pipe
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[int, asyncio.Task[None]] = {}
        self._rows: dict[tuple[int, int], asyncio.Task[None]] = {}

    async def serve(self) -> None:
        while (frame := await self._pipe.read()) is not None:
            do = frame.pop("do")
            if do == "stop":
                self._stop(**frame)
                continue
            task = asyncio.create_task(self._carry_out(do, frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if do == "sample":
                job = frame["job"]
                self._jobs[job] = task
                task.add_done_callback(partial(self._forget_job, job))

    def _forget_job(self, job: int, task: asyncio.Task[None]) -> None:
        del self._jobs[job]

    def _stop(self, job: int, index: int | None = None) -> None:
        task = self._jobs.get(job) if index is None else self._rows.get((job, index))
        if task is not None:
            task.cancel()

    async def _carry_out(self, do: str, frame: dict[str, Any]) -> None:
        does: dict[str, Callable[..., Awaitable[None]]] = {
            "load": self._load,
            "forget": self._forget,
            "ping": self._ping,
            "sample": self._sample,
        }
        try:
            await does[do](**frame)
        except Exception as error:
            from vllm.v1.engine.exceptions import EngineDeadError

            if isinstance(error, EngineDeadError) or self._engine.errored:
                await self._pipe.die(error)
            if do == "sample":
                self._pipe.say("failed", job=frame["job"], error=text_of(error))
            elif "ask" in frame:
                self._pipe.say("answer", ask=frame["ask"], error=text_of(error))

    async def _load(self, adapter: dict[str, Any], ask: int) -> None:
        await self._engine.add_lora(request_of(adapter))
        self._pipe.say("answer", ask=ask)

    async def _forget(self, number: int) -> None:
        await self._engine.remove_lora(number)

    async def _ping(self, ask: int) -> None:
        await self._engine.collective_rpc("weaver_beat")
        self._pipe.say("answer", ask=ask, memory=resident_bytes())

    async def _sample(
        self,
        job: int,
        adapter: dict[str, Any] | None,
        prompt: list[int],
        params: dict[str, Any],
        seeds: list[int],
        pieces: bool,
    ) -> None:
        """Loads the adapter first, each time: where that fails in a request, vLLM's engine dies."""
        if adapter is not None:
            await self._engine.add_lora(request_of(adapter))
        rows = []
        for index, seed in enumerate(seeds):
            how = {**params, "seed": seed} | ({"prompt_logprobs": None} if index else {})
            task = asyncio.create_task(self._row(job, index, adapter, prompt, how, pieces))
            self._rows[job, index] = task
            rows.append(task)
        try:
            await asyncio.wait(rows, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for index, task in enumerate(rows):
                task.cancel()
                del self._rows[job, index]
        for task in rows:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _row(
        self,
        job: int,
        index: int,
        adapter: dict[str, Any] | None,
        prompt: list[int],
        params: dict[str, Any],
        pieces: bool,
    ) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        outputs = self._engine.generate(
            TokensPrompt(prompt_token_ids=prompt),
            SamplingParams(
                **{**params, "logit_bias": dict(params["logit_bias"]) or None},
                logprobs=1,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if pieces else RequestOutputKind.FINAL_ONLY,
            ),
            f"{job}:{index}",
            lora_request=request_of(adapter),
        )
        async for output in outputs:
            [drawn] = output.outputs
            both, read = drawn.logprobs.logprobs, output.prompt_logprobs
            self._pipe.row(
                job,
                index,
                list(drawn.token_ids),
                both[::2],
                both[1::2],
                drawn.finish_reason if output.finished else None,
                list(read.logprobs) if read else None,
                output.num_cached_tokens or 0,
            )


def request_of(adapter: dict[str, Any] | None) -> Any:
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    return LoRARequest(adapter["name"], adapter["number"], adapter["folder"])


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def standard_streams() -> tuple[Any, Any]:
    """For frames alone: what is printed from now on goes to where errors go."""
    source, sink = (os.fdopen(os.dup(i), mode, buffering=0) for i, mode in ((0, "rb"), (1, "wb")))
    os.dup2(2, 1)
    return source, sink


async def open_pipe(source: Any, sink: Any) -> Pipe:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
    return Pipe(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


async def run(source: Any, sink: Any) -> None:
    pipe = await open_pipe(source, sink)
    frame = await pipe.read()
    if frame is None:
        return
    try:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**frame["engine"], worker_extension_cls="vllm_worker.Extension")
        engine = AsyncLLM.from_engine_args(arguments)
        [begun, *_] = await engine.collective_rpc("weaver_begin")
    except Exception as error:
        await pipe.die(error)
    cache = engine.vllm_config.cache_config
    pipe.say(
        "ready",
        **begun,
        versions={name: version(name) for name in frame["packages"]},
        rows=engine.vllm_config.scheduler_config.max_num_seqs,
        tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
    )
    writing = asyncio.create_task(pipe.write())
    await Worker(engine, pipe).serve()
    writing.cancel()
    engine.shutdown(timeout=2.0)


def main() -> None:
    die_with_parent()
    asyncio.run(run(*standard_streams()))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # what vLLM spawns reads this file first
    die_with_parent()
