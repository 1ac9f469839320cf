"""Runs that begin from a checkpoint, in which stands what kind of run it is; and those that exist.

For `create_model` and `attach`.
"""

from __future__ import annotations

from typing import Any

import anyio

from weaver import errors, protocol, types
from weaver.client.handle import OperationHandle
from weaver.client.session import Answer, Session
from weaver.client.training import LOADED, AsyncTrainingClient

GIVE_UP_S = 5.0


def begin_from(
    session: Session,
    path: str,
    *,
    base_model: str | None,
    include_optimizer: bool,
    head: types.Head | None,
    user_metadata: types.JsonDict,
    name: str | None,
) -> OperationHandle[AsyncTrainingClient]:
    """A new run like the checkpoint's, with its weights; one that cannot load them is deleted."""
    parts: list[OperationHandle[Any]] = []

    async def finish() -> AsyncTrainingClient:
        info = await session.service.get_checkpoint(path)
        if base_model not in (None, info.base_model):
            raise errors.CheckpointMismatchError(
                f"{path} was made from {info.base_model}, not from {base_model}.",
                field="base_model",
                hint="Leave base_model out.",
            )
        if head is not None and (info.lora_config is None or info.lora_config.head != head):
            raise errors.CheckpointMismatchError(
                f"{path} was saved without a {head} head.",
                field="head",
                hint="Leave head out, or begin the reward model from a base model.",
            )
        create = protocol.CreateModel(
            base_model=info.base_model,
            training_mode=info.training_mode,
            lora_config=info.lora_config,
            user_metadata=user_metadata,
            name=name,
        )
        created = session.submit(create, Answer(protocol.ModelCreated, lambda made: made))
        parts.append(created)
        made = await created
        load = protocol.LoadCheckpoint(path=path, include_optimizer=include_optimizer)
        loaded = session.submit(load, LOADED, run_id=made.run.run_id)
        parts.append(loaded)
        try:
            await loaded
        except errors.WeaverError:
            with anyio.move_on_after(GIVE_UP_S, shield=True):
                await session.service.delete_run(made.run.run_id)
            raise
        return AsyncTrainingClient(session, made.run, made.model)

    return session.compose(f"create_model from {path}", parts, finish)


async def find_run(service: protocol.Service, called: str) -> types.TrainingRun:
    """The run of this id, or of this name.

    Raises:
        RunNotFoundError: there is none, or several projects have one of that name.
    """
    try:
        return await service.get_run(called)
    except errors.RunNotFoundError:
        found = [run for run in await service.list_runs() if run.name == called]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(run.run_id for run in found)
            raise errors.RunNotFoundError(
                f"{called!r} is the name of {len(found)} runs: {ids}.",
                field="run_id",
                hint="Give the id of one.",
            ) from None
        raise
