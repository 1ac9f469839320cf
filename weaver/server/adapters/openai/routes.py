"""The routes of OpenAI's protocol: models, completions, chats, and tokens of a text.

A model's name is a base model, the path of a checkpoint, or a run's id or name, which is its newest
checkpoint.
A sample whose client goes away is cancelled.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from weaver import errors, protocol, types, wire
from weaver.server.adapters.openai import bodies
from weaver.server.adapters.openai.answers import Writer, failed, model_json
from weaver.server.adapters.openai.tools import grammar_of
from weaver.server.http.caller_session import CallerDep, CallerSession, Entry, Note
from weaver.server.http.gateway import ServiceDep
from weaver.server.http.streaming import EventStream, Turns, until_gone
from weaver.server.sampling import BASE
from weaver.types import JsonDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from weaver.server.adapters.openai.forms import Form
    from weaver.server.streams import SampleStream
    from weaver.server.view import View

PREFIX = "/v1"
SCHEME = "weaver://"

router = APIRouter(prefix=PREFIX, include_in_schema=False)


# --- models ---------------------------------------------------------------------------------------


@router.get("/models")
async def list_models(service: ServiceDep) -> JsonDict:
    """Base models, runs that have a checkpoint, and checkpoints for sampling."""
    found = [model_json(model.name, created=0) for model in await service.list_models()]
    checkpoints = await service.list_checkpoints()
    saved = {info.run_id for info in checkpoints}
    for name, run in (await _runs(service)).items():
        if run.run_id in saved:
            created = int(run.created_at.timestamp())
            found.append(model_json(name, created=created, root=run.base_model))
    for info in checkpoints:
        if info.kind == "sampler":
            created = int(info.created_at.timestamp())
            found.append(model_json(info.path, created=created, root=info.base_model))
    return {"object": "list", "data": found}


@router.get("/models/{name:path}")
async def get_model(name: str, service: ServiceDep) -> JsonDict:
    _, base_model = await _weights(service, name)
    return model_json(name, created=0, root=None if base_model == name else base_model)


async def _runs(service: View) -> dict[str, types.TrainingRun]:
    """The runs by their ids, and by names that are one run's alone and no base model's."""
    runs = await service.list_runs()
    others = Counter(run.name for run in runs)
    others.update(model.name for model in await service.list_models())
    names = {run.name: run for run in runs if run.name and others[run.name] == 1}
    return {run.run_id: run for run in runs} | names


async def _weights(service: View, name: str) -> tuple[str, str]:
    """The sampler that a name stands for, which is loaded at its first sample; its base model.

    Raises:
        UnknownModelError, CheckpointNotFoundError
    """
    if name.startswith(SCHEME):
        info = await service.get_checkpoint(name)
        return info.path, info.base_model
    if run := (await _runs(service)).get(name):
        checkpoints = await service.list_checkpoints(run.run_id)
        if not checkpoints:
            raise errors.CheckpointNotFoundError(
                f"the run {name} has no checkpoint.",
                field="model",
                hint="Save one, such as save_weights_and_get_sampling_client(name=...).",
            )
        newest = max(checkpoints, key=lambda info: (info.step, info.created_at))
        return newest.path, newest.base_model
    model = await service.get_model(name)
    return f"{BASE}{model.name}", model.name


@router.post("/tokenize")
async def tokenize(request: Request, service: ServiceDep) -> JsonDict:
    body = await bodies.TokenizeBody.read(request)
    _, base_model = await _weights(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.InvalidRequestError("needs either prompt or messages.", field="body")
    prompt: Any = body.prompt
    if body.messages is not None:
        prompt = tuple(message.native(at) for at, message in enumerate(body.messages))
    tokens = await service.encode(base_model, prompt)
    length = (await service.get_model(base_model)).context_length
    return {"count": len(tokens), "max_model_len": length, "tokens": tokens}


# --- samples --------------------------------------------------------------------------------------


@router.post("/completions")
async def complete(request: Request, caller: CallerDep) -> Response:
    body = await bodies.CompletionBody.read(request)
    if (body.best_of or body.count) != body.count:
        raise errors.UnsupportedError("is not n.", field="best_of", hint="Leave it out.")
    sampler_id, base_model = await _weights(caller.service, body.model)
    prompts = [
        await caller.service.encode(base_model, one) if isinstance(one, str) else list(one)
        for one in body.prompts
    ]
    if body.echo:
        _check_echo(body, sum(map(len, prompts)))
    return await _answer(
        request,
        caller,
        body,
        sampler_id,
        base_model,
        prompts=prompts,
        max_tokens=bodies.COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        top=body.logprobs,
        echo=body.prompts if body.echo else (),
    )


def _check_echo(body: bodies.CompletionBody, tokens: int) -> None:
    """Raises UnsupportedError, TooLargeError: so many tokens of prompts are not repeated."""
    if body.stream:
        raise errors.UnsupportedError("is not streamed.", field="echo", hint="Leave stream off.")
    if body.logprobs is not None and tokens * (1 + body.logprobs) > bodies.MOST_ECHOED:
        raise errors.TooLargeError(
            f"would tell more than {bodies.MOST_ECHOED} log-probabilities.",
            field="echo",
            hint="Send fewer prompts at a time.",
        )


@router.post("/chat/completions")
async def chat(request: Request, caller: CallerDep) -> Response:
    body = await bodies.ChatBody.read(request)
    top = body.top
    sampler_id, base_model = await _weights(caller.service, body.model)
    required = body.required
    prompt = await caller.service.encode(base_model, body.chat(), tools=body.functions)
    forms = []
    if required:
        template = getattr(await caller.service.tokenizer(base_model), "chat_template", None)
        forms = [{"grammar": grammar_of(required, str(template))}]
    return await _answer(
        request,
        caller,
        body,
        sampler_id,
        base_model,
        prompts=[prompt],
        forms=forms,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top=top,
    )


async def _answer(
    request: Request,
    caller: CallerSession,
    body: bodies.SampleBody,
    sampler_id: str,
    base_model: str,
    *,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    top: int | None,
    echo: Sequence[str | Sequence[int]] = (),
    forms: Sequence[Form] = (),
) -> Response:
    """`top`: so many of the likeliest tokens beside log-probabilities; None is without any."""
    service, chat = caller.service, isinstance(body, bodies.ChatBody)
    logprobs, top = top is not None, top or 0
    model = await service.get_model(base_model)
    if body.stream and len(prompts) != 1:
        raise errors.UnsupportedError(
            "has several prompts for one stream.", field="prompt", hint="Send one at a time."
        )
    scored_alone = bool(echo) and max_tokens == 0
    if max_tokens is None or scored_alone:
        max_tokens = max(model.context_length - max(map(len, prompts)), 1)
    operations = [
        protocol.Sample(
            sampler_id=sampler_id,
            prompt=types.ModelInput.from_ints(prompt),
            params=body.params(max_tokens, *forms),
            num_samples=0 if scored_alone else body.count,
            include_prompt_logprobs=scored_alone or (logprobs and bool(echo)),
            top_logprobs=0 if scored_alone else top,
            prompt_top_logprobs=top if echo else 0,
            stream=bool(body.stream),
        )
        for prompt in prompts
    ]
    writer = Writer(
        id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=body.model,
        chat=chat,
        logprobs=logprobs,
        top=top,
        echo=echo,
        token_ids=bool(body.return_token_ids),
        tools=body.names if isinstance(body, bodies.ChatBody) else (),
        tokenizer=await service.tokenizer(base_model) if logprobs or echo else None,
        prompts=prompts,
    )
    entries = [await caller.submit(operation, Note()) for operation in operations]
    if body.stream:
        stream = caller.stream(entries[0])
        turns = request.state.gateway.own(Turns)
        return SampleEvents(stream, turns, writer, caller, entries[0], usage=body.include_usage)
    results = await _results(request, caller, entries)
    if scored_alone:
        nothing = {"sequences": (bodies.NOTHING,) * body.count}
        results = [result.model_copy(update=nothing) for result in results]
    size = wire.about_bytes(results) * (8 if logprobs else 1)  # each token becomes text
    return await wire.beside(size, lambda: JSONResponse(writer.whole(results)))


async def _results(
    request: Request, caller: CallerSession, entries: Sequence[Entry]
) -> list[types.SampleResult]:
    """Raises WeaverError: why one of them failed."""
    await _wait(request, caller, entries)
    results = []
    for entry in entries:
        assert entry.outcome is not None
        if entry.outcome.error is not None:
            raise entry.outcome.error.to_error()
        assert isinstance(entry.outcome.result, protocol.Sampled)
        results.append(entry.outcome.result.output)
    return results


async def _wait(request: Request, caller: CallerSession, entries: Sequence[Entry]) -> None:
    """For all of them; who does not wait has them cancelled.

    Raises:
        ServiceConnectionError: the server stops, or the client has gone.
    """
    gateway, ended = request.state.gateway, False
    try:
        with gateway.until_it_stops():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until_gone, request.receive, tasks.cancel_scope)
                for entry in entries:
                    await entry.ended.wait()
                ended = True
                tasks.cancel_scope.cancel()
    finally:
        if not ended:
            with anyio.CancelScope(shield=True):
                for entry in entries:
                    await caller.cancel(entry)
    if not ended:
        raise errors.ServiceConnectionError("the sample was not waited for.", hint="Ask again.")


class SampleEvents(EventStream):
    """The pieces of one sample, then its usage where that is asked for, then `[DONE]`."""

    def __init__(
        self,
        stream: SampleStream,
        turns: Turns,
        writer: Writer,
        caller: CallerSession,
        entry: Entry,
        *,
        usage: bool,
    ) -> None:
        super().__init__(stream, turns)
        self._writer = writer
        self._caller = caller
        self._entry = entry
        self._usage = usage
        self._tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._caller.cancel(self._entry)

    def events(self, pieces: Sequence[types.SampleDelta], *, first: int) -> str:
        self._tokens += sum(len(piece.tokens) for piece in pieces)
        return self._writer.pieces(pieces)

    def ending(self, error: errors.WeaverError | None) -> str:
        if error is not None:
            return self._writer.event(failed(error))
        usage = self._writer.last_usage(self._tokens) if self._usage else ""
        return f"{usage}data: [DONE]\n\n"
