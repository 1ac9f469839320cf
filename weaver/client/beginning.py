"""Runs that begin from a checkpoint, in which stands what kind of run it is. For `create_model`."""

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
