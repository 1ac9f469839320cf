"""The routes of Tinker's protocol, but for those of runs and checkpoints: `records.py` has them.

docs/tinker.md has their table. A request of a model or a sampler is submitted at once, under an id
that says which it is, and answered by that id; its future is waited for at `retrieve_future`.
"""

from __future__ import annotations

import hashlib

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from weaver import errors, protocol
from weaver.errors import WeaverError
from weaver.heads import check_asked
from weaver.server.adapters.tinker import answers, bodies, messages, passes
from weaver.server.adapters.tinker.session import (
    Future,
    Note,
    SamplerName,
    TinkerSession,
    creation_of,
    owner_of,
    run_of,
    session_of,
)
from weaver.server.http.gateway import Gateway, GatewayDep, ServiceDep
from weaver.server.sampling import BASE
from weaver.types import JsonDict

PREFIX = "/api/v1"
MOST_DATUMS, CHUNK_BYTES = 1024, 5_000_000
"""What a client sends at once, as it is told; one datum may be larger."""

router = APIRouter(prefix=PREFIX, include_in_schema=False)


# --- the server and its sessions ------------------------------------------------------------------


@router.post("/client/config")
async def client_config() -> JsonDict:
    """Every client asks first, and ends without an answer."""
    return {
        "fwdbwd_max_chunk_len": MOST_DATUMS,
        "fwdbwd_max_chunk_bytes_count": CHUNK_BYTES,
        "sample_cancel_enabled": True,
    }


@router.post("/client/dynamic_config")
async def dynamic_config() -> JsonDict:
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.post("/telemetry")
async def telemetry() -> JsonDict:
    """Nothing is read of it."""
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(service: ServiceDep) -> JsonDict:
    models = [
        {
            "model_name": model.name,
            "max_context_length": model.context_length,
            "trainable": True,
            "sampleable": True,
        }
        for model in await service.list_models()
    ]
    return {"supported_models": models}


@router.post("/create_session")
async def create_session(request: Request, service: ServiceDep) -> JsonDict:
    body = await bodies.SessionBody.read(request)
    shown = {"display_name": body.display_name} if body.display_name else {}
    metadata = {**(body.user_metadata or {}), "tinker": shown}
    given = request.headers.get("X-Idempotency-Key")
    place = f"{request.state.caller.project} create_session {given}"
    key = given and hashlib.sha256(place.encode()).hexdigest()
    info = await service.open_session(user_metadata=metadata, key=key)
    return {"session_id": info.session_id, "type": "create_session"}


@router.post("/session_heartbeat")
async def heartbeat(request: Request) -> JsonDict:
    session_of(request, (await bodies.OfSession.read(request)).session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/session-{rest}/finish")
async def finish(rest: str, service: ServiceDep) -> JsonDict:
    await service.close_session(f"session-{rest}")
    return {}


# --- models ---------------------------------------------------------------------------------------


@router.post("/create_model")
async def create_model(request: Request) -> JsonDict:
    body = await bodies.ModelBody.read(request)
    model_id = f"{body.session_id}:train:{body.model_seq_id}"
    session = session_of(request, body.session_id)
    note = Note(model_id=model_id)
    await session.submit(body.operation(model_id), creation_of(model_id), note)
    return {"request_id": creation_of(model_id), "model_id": model_id}


@router.post("/get_info")
async def get_info(request: Request, service: ServiceDep, gateway: GatewayDep) -> JsonDict:
    body = await bodies.OfModel.read(request)
    run = await service.get_run(run_of(body.model_id))
    model = await service.get_model(run.base_model)
    where = request.client.host if request.client else ""
    folder = await gateway.tokenizer_path(service, run.base_model, client=where)
    return {
        "type": "get_info",
        "model_id": body.model_id,
        "model_name": run.base_model,
        "model_data": {
            "arch": model.architecture,
            "model_name": run.base_model,
            "tokenizer_id": folder or run.base_model,
        },
        "is_lora": run.training_mode == "lora",
        "lora_rank": run.lora_config and run.lora_config.rank,
        "optimizer_config": {"type": "adamw"},
    }


# --- training -------------------------------------------------------------------------------------


@router.post("/forward_backward")
async def forward_backward(request: Request) -> JsonDict:
    return await _pass(request, forward_only=False)


@router.post("/forward")
async def forward(request: Request) -> JsonDict:
    return await _pass(request, forward_only=True)


async def _pass(request: Request, *, forward_only: bool) -> JsonDict:
    given = await passes.read_pass(request, forward_only=forward_only)
    note = Note(loss_fn=given.loss_fn)
    return await _in_turn(request, given.model_id, given.seq_id, given.operation, note)


@router.post("/optim_step")
async def optim_step(request: Request) -> JsonDict:
    body = await bodies.StepBody.read(request)
    return await _in_turn(request, body.model_id, body.seq_id, body.operation(), Note())


@router.post("/save_weights")
async def save_weights(request: Request) -> JsonDict:
    body = await bodies.SaveBody.read(request)
    note = Note(model_id=body.model_id)
    return await _in_turn(request, body.model_id, body.seq_id, body.operation(), note)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> JsonDict:
    body = await bodies.SamplerBody.read(request)
    called = ""
    if body.sampling_session_seq_id is not None:
        session_id = owner_of(body.model_id, field="model_id")
        called = f"{session_id}:sample:{body.sampling_session_seq_id}"
    inflight = body.kind == "inflight"
    note = Note(model_id=body.model_id, sampling_session=called, inflight=inflight)
    return await _in_turn(request, body.model_id, body.seq_id, body.operation(), note)


@router.post("/save_weights_external")
async def save_weights_external(request: Request) -> JsonDict:
    body = await bodies.ExternalBody.read(request)
    operation = body.operation(f"{answers.EXTERNAL}{body.path}")
    note = Note(model_id=body.model_id)
    return await _in_turn(request, body.model_id, body.seq_id, operation, note)


@router.post("/load_weights")
async def load_weights(request: Request) -> JsonDict:
    body = await bodies.LoadBody.read(request)
    operation = protocol.LoadCheckpoint(
        path=answers.native_path(body.path), include_optimizer=body.optimizer
    )
    if body.model_id is not None and body.seq_id is not None:
        note = Note(model_id=body.model_id)
        return await _in_turn(request, body.model_id, body.seq_id, operation, note)
    if body.session_id is None or body.model_seq_id is None:
        raise errors.InvalidRequestError(
            "needs session_id and model_seq_id, or model_id and seq_id.", field="body"
        )
    model_id = f"{body.session_id}:train:{body.model_seq_id}"
    await _create_like(request, model_id, operation.path, body)
    run_id = run_of(model_id)
    session, note = session_of(request, body.session_id), Note(model_id=model_id)
    request_id = f"{model_id}:load"
    await session.submit(operation, request_id, note, run_id=run_id, seq=1)
    return {"request_id": request_id, "model_id": model_id}


async def _create_like(request: Request, model_id: str, path: str, body: bodies.LoadBody) -> None:
    """Makes a run that the checkpoint fits, and waits for it.

    Raises:
        WeaverError: why it was not made.
        ServiceConnectionError: it goes on; a resend of the request waits for it again.
    """
    service, gateway = request.state.service, request.state.gateway
    info = await service.get_checkpoint(path)
    check_asked(False, info.lora_config.head if info.lora_config else None)
    marked = {"model_id": model_id, "loaded": True}
    operation = protocol.CreateModel(
        base_model=info.base_model,
        training_mode=info.training_mode,
        lora_config=info.lora_config,
        user_metadata={**(body.user_metadata or {}), "tinker": marked},
    )
    session = session_of(request, owner_of(model_id, field="session_id"))
    future = await session.submit(operation, creation_of(model_id), Note(model_id=model_id))
    await _success(gateway, future, "the model is still being made.")


async def _in_turn(
    request: Request, model_id: str, seq: int, operation: protocol.Operation, note: Note
) -> JsonDict:
    """Submits an operation of a model; what it waits for may come later."""
    session = session_of(request, owner_of(model_id, field="model_id"))
    run = await session.service.get_run(run_of(model_id))
    given = run.user_metadata.get("tinker")
    loaded = isinstance(given, dict) and given.get("loaded")
    request_id = f"{model_id}:{seq}"
    # the load that made a model has a place of its own in the native order
    await session.submit(operation, request_id, note, run_id=run.run_id, seq=seq + bool(loaded))
    return {"request_id": request_id, "model_id": model_id}


# --- sampling -------------------------------------------------------------------------------------


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> JsonDict:
    body = await bodies.SamplingSessionBody.read(request)
    called = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    await _open(request, called, base_model=body.base_model, model_path=body.model_path)
    return {"sampling_session_id": called, "type": "create_sampling_session"}


async def _open(
    request: Request, called: str, *, base_model: str | None, model_path: str | None
) -> None:
    """Makes weights ready that the session calls so from now on."""
    service, session_id = request.state.service, owner_of(called, field="session_id")
    session = session_of(request, session_id)
    if model_path is not None:
        info = await service.get_checkpoint(answers.native_path(model_path))
        if info.kind != "sampler":
            raise errors.InvalidRequestError(
                f"{model_path[:200]} is not for sampling.",
                field="model_path",
                hint="Give what save_weights_for_sampler answered.",
            )
        name = SamplerName(sampler_id=info.path, base_model=info.base_model, model_path=model_path)
        operation = protocol.OpenSampler(model_path=info.path)
    elif base_model is not None:
        model = await service.get_model(base_model)
        name = SamplerName(sampler_id=f"{BASE}{model.name}", base_model=model.name)
        operation = protocol.OpenSampler(base_model=model.name)
    else:
        raise errors.InvalidRequestError("needs base_model or model_path.", field="body")
    future = await session.submit(operation, f"{called}/open")
    await _success(request.state.gateway, future, "the weights are still being read.")
    await session.name_sampler(called, name)


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, request: Request) -> JsonDict:
    name = session_of(request, owner_of(sampler_id, field="sampler_id")).sampler(sampler_id)
    return {
        "sampler_id": sampler_id,
        "base_model": name.base_model,
        "model_path": name.model_path,
    }


@router.post("/asample")
async def asample(request: Request, service: ServiceDep) -> JsonDict:
    body = await bodies.SampleBody.read(request)
    called = body.sampling_session_id
    session = session_of(request, owner_of(called, field="sampling_session_id"))
    name = session.sampler(called)
    model = await service.get_model(name.base_model)
    operation = body.operation(sampler_id=name.sampler_id, context=model.context_length)
    temperature = operation.params.temperature or 1.0
    request_id = f"{called}:{body.seq_id}"
    note = Note(
        temperature=temperature,
        sparse_targets=body.sparse_targets,
        last_n=body.prompt_logprobs_last_n,
    )
    if not (name.inflight and request_id in session):  # whose resend may find newer weights
        await session.submit(operation, request_id, note)
    ids = [f"{request_id}:{i}" for i in range(body.num_samples)]
    return {"request_id": request_id, "sample_sequence_ids": ids}


# --- futures --------------------------------------------------------------------------------------


@router.post("/retrieve_future")
async def retrieve_future(request: Request, gateway: GatewayDep) -> Response:
    """Held until the outcome is there. No failure has a status of its own: see `failed`."""
    body = await bodies.FutureBody.read(request)
    session = session_of(request, owner_of(body.request_id, field="request_id"))
    future = session.find(body.request_id)
    await gateway.wait(future.ended, protocol.LONGEST_POLL_S)
    if future.outcome is None:
        return JSONResponse({"queue_state": "active"}, status_code=408)
    try:
        await _name_sampler(session, future)
        binary = messages.MEDIA_TYPE in request.headers.get("Accept", "")
        answer = await to_thread.run_sync(lambda: answers.future_answer(future, binary=binary))
    except WeaverError as error:
        return JSONResponse(answers.failed(error))
    session.answered(future)
    return answer


async def _name_sampler(session: TinkerSession, future: Future) -> None:
    """A sampler without a name is called by its session's client from its answer on."""
    outcome, called = future.outcome, future.note.sampling_session
    if called and outcome is not None and isinstance(outcome.result, protocol.CheckpointSaved):
        info = outcome.result.checkpoint
        name = SamplerName(
            sampler_id=info.path,
            base_model=info.base_model,
            inflight=future.note.model_id if future.note.inflight else "",
        )
        await session.name_sampler(called, name)


@router.post("/retrieve_futures")
async def retrieve_futures(request: Request, gateway: GatewayDep) -> JsonDict:
    """What has ended of a sampling session since a cursor; held until there is something."""
    body = await bodies.FuturesBody.read(request)
    called, after = body.target.sampling_session_id, body.prev_cursor or 0
    session = session_of(request, owner_of(called, field="target"))
    hold_s = min(body.timeout or protocol.LONGEST_POLL_S, protocol.LONGEST_POLL_S)
    ended: list[Future] = []
    with gateway.until_it_stops():
        ended = await session.completed(called, after=after, timeout_s=hold_s)
    completions, cursor = [], after
    for future in ended:
        assert future.outcome is not None
        state = "finished" if future.outcome.error is None else "failed"
        completions.append({"state": state, "request_id": future.id})
        cursor = max(cursor, future.outcome.cursor)
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future")
async def cancel_future(request: Request) -> JsonDict:
    body = await bodies.FutureBody.read(request)
    session = session_of(request, owner_of(body.request_id, field="request_id"))
    await session.cancel(body.request_id)
    return {}


async def _success(gateway: Gateway, future: Future, doing: str) -> None:
    """Waits for an operation that its route answers for itself.

    Raises:
        WeaverError: why it failed.
        ServiceConnectionError: it goes on; a resend of the request waits for it again.
    """
    await gateway.wait(future.ended, protocol.LONGEST_POLL_S)
    if future.outcome is None:
        raise errors.ServiceConnectionError(doing, hint="Ask again.")
    if future.outcome.error is not None:
        raise future.outcome.error.to_error()
