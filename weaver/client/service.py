"""`AsyncServiceClient`: the way in; makes training and sampling clients and manages what is saved.

On an embedded service, over a server or on an injected `Service` alike. The sync `ServiceClient`
wraps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Self

from weaver import errors, protocol, types
from weaver.checks import CheckpointPath, as_path, as_value, check_model_name, check_ttl
from weaver.client.beginning import begin_from, find_run
from weaver.client.exports import export_to
from weaver.client.handle import OperationHandle
from weaver.client.imports import import_from
from weaver.client.kept import Kept
from weaver.client.opening import open_service
from weaver.client.rewards import AsyncRewardClient, open_rewards
from weaver.client.sampling import AsyncSamplingClient, open_sampler
from weaver.client.session import Answer, Session, open_session
from weaver.client.training import AsyncTrainingClient
from weaver.config import load_settings
from weaver.exchange import Selection
from weaver.keywords import suggesting
from weaver.names import check_run_name


@suggesting
class AsyncServiceClient(Kept):
    """Opens a session with a service; use it as `async with AsyncServiceClient() as service:`.
    In a notebook `service = await AsyncServiceClient()` keeps it open over cells, until `close`.

    Without `base_url` and WEAVER_BASE_URL everything runs in this process, below `home`
    (WEAVER_HOME, ~/.weaver). Enter and leave it in one task. Leaving it fails what is still pending
    with `ClosedError` and never touches what was saved. A run stays as it is after its last step,
    for `attach` in this process or a later one on the same home.

    Args:
        base_url: of a server; WEAVER_BASE_URL by default.
        api_key: the key sent to it; WEAVER_API_KEY by default.
        deterministic: in this process, no number depends on what else is computed, or on when;
            WEAVER_DETERMINISTIC=1 does the same. A server is started so.
        user_metadata: kept with the session, which the service lists with it.
        service: an open service of this event loop to use instead; it is not closed.

    Raises:
        InvalidParamsError, ConfigError: `base_url` or a WEAVER_* variable cannot be used.
        ServiceConnectionError, AuthenticationError: on entering, with a server.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | PathLike[str] | None = None,
        deterministic: bool = False,
        user_metadata: types.JsonDict | None = None,
        service: protocol.Service | None = None,
    ) -> None:
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise errors.InvalidParamsError(
                f"is {base_url!r}.",
                field="base_url",
                hint="Start it with http:// or https://, or leave it out to run embedded.",
            )
        settings = load_settings()
        self._settings = replace(
            settings,
            base_url=base_url or settings.base_url,
            api_key=api_key or settings.api_key,
            home=Path(home).expanduser() if home is not None else settings.home,
            deterministic=deterministic or settings.deterministic,
        )
        self._user_metadata = user_metadata
        self._given = service
        self._stack = AsyncExitStack()
        self._open: Session | None = None

    def __repr__(self) -> str:
        where = self._settings.base_url or f"embedded, below {self._settings.home}"
        return f"<AsyncServiceClient: {where}>"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            service = self._given
            if service is None:
                service = await stack.enter_async_context(open_service(self._settings))
            self._open = await stack.enter_async_context(
                open_session(service, self._settings.home, user_metadata=self._user_metadata)
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        # The task groups inside are not told of the block's own error, which they would wrap.
        if self._open is None or self._open.origin.is_here:  # what a fork inherits is not its own
            await self._stack.aclose()

    async def close(self) -> None:
        """Fails what is pending with `ClosedError` and ends the session; saved state stays."""
        if self._open is not None:
            await self._open.close()
        await self._let_go()

    # --- models in training ---

    def create_model(
        self,
        base_model: str | None = None,
        lora_config: types.LoraConfig | Mapping[str, object] | None = None,
        *,
        training_mode: types.TrainingMode = "lora",
        head: types.Head | None = None,
        seed: int = 0,
        name: str | None = None,
        user_metadata: types.JsonDict | None = None,
        from_checkpoint: CheckpointPath | None = None,
        include_optimizer: bool = False,
    ) -> OperationHandle[AsyncTrainingClient]:
        """Starts a run: a new adapter on a base model, or all of its weights with "full_ft".

        Or one like a checkpoint's run, with its weights and at its step: what it is trained on and
        how is in the checkpoint.

        Args:
            base_model: a name of `list_supported_models`, a Hugging Face id, or a local folder.
            lora_config: rank, alpha, seed, and train_attn, train_mlp, train_unembed.
            head: "scalar" makes a reward model, whose output is one number a sequence; LoRA alone.
            seed: of the adapter's initial values, where `lora_config` has none.
            name: for people; `words-2` where the project has a run called `words`.
            user_metadata: kept with the run, for `list_training_runs`.
            from_checkpoint: a weaver:// path, a `CheckpointInfo`, or a folder that `save_state`
                wrote; `import_checkpoint` takes adapters and models from elsewhere.
            include_optimizer: go on with the checkpoint's optimizer, too.

        Raises:
            InvalidRequestError, InvalidParamsError, InvalidNameError: at the call.
            UnknownModelError, UnsupportedError, CheckpointNotFoundError: from the handle; there is
                no run then.
            CheckpointCorruptError, CheckpointMismatchError: the same.
        """
        session = self._session
        check_run_name(name)
        if base_model is not None:
            check_model_name(base_model)
        if from_checkpoint is not None:
            if lora_config is not None:
                raise errors.InvalidParamsError(
                    "is that of the checkpoint.", field="lora_config", hint="Leave it out."
                )
            return begin_from(
                session,
                as_path(from_checkpoint, field="from_checkpoint"),
                base_model=base_model,
                include_optimizer=include_optimizer,
                head=head,
                user_metadata=user_metadata or {},
                name=name,
            )
        if base_model is None or include_optimizer:
            raise errors.InvalidRequestError(
                "needs base_model." if base_model is None else "has no optimizer to include.",
                field="create_model",
                hint='Pass base_model="weaver-nano", or from_checkpoint= a saved state.',
            )
        if training_mode == "full_ft" and lora_config is not None:
            raise errors.InvalidParamsError(
                "full fine-tuning has no adapter.",
                field="lora_config",
                hint='Leave it out, or use training_mode="lora".',
            )
        if training_mode == "full_ft" and head is not None:
            raise errors.InvalidParamsError(
                "is trained beside a LoRA adapter, the model's own weights stay.",
                field="head",
                hint='Use training_mode="lora".',
            )
        lora = None
        if training_mode == "lora":
            lora = as_value(types.LoraConfig, lora_config or {}, field="lora_config")
            lora = types.LoraConfig(**{**lora, "head": head or lora.head})
        operation = protocol.CreateModel(
            base_model=base_model,
            training_mode=training_mode,
            lora_config=lora,
            seed=seed,
            user_metadata=user_metadata or {},
            name=name,
        )
        reply = Answer(
            protocol.ModelCreated, lambda made: AsyncTrainingClient(session, made.run, made.model)
        )
        return session.submit(operation, reply)

    create_training_client = create_model

    def create_training_client_from_state(
        self, path: CheckpointPath, user_metadata: types.JsonDict | None = None
    ) -> OperationHandle[AsyncTrainingClient]:
        """`create_model(from_checkpoint=path)`: the weights, and an optimizer that starts anew."""
        return self.create_model(from_checkpoint=path, user_metadata=user_metadata)

    def create_training_client_from_state_with_optimizer(
        self, path: CheckpointPath, user_metadata: types.JsonDict | None = None
    ) -> OperationHandle[AsyncTrainingClient]:
        """The same with the optimizer's state, to continue exactly where the save was made."""
        return self.create_model(
            from_checkpoint=path, include_optimizer=True, user_metadata=user_metadata
        )

    async def attach(self, model_id: str) -> AsyncTrainingClient:
        """Another client of a run, by id or name; within one service client they share its order.

        Raises:
            RunNotFoundError: the service has no such run.
        """
        session = self._session
        run = await find_run(session.service, model_id)
        model = await session.service.get_model(run.base_model)
        return AsyncTrainingClient(session, run, model)

    def create_sampling_client(
        self, model_path: CheckpointPath | None = None, base_model: str | None = None
    ) -> OperationHandle[AsyncSamplingClient]:
        """A client that samples from saved weights, or from a base model as it is.

        Args:
            model_path: a weaver:// path, a `CheckpointInfo`, or a folder: an adapter in PEFT's
                layout, for which `base_model` names the model below it, or a whole model.

        Raises:
            InvalidRequestError: neither is given.
            UnknownModelError, CheckpointNotFoundError: from the handle.
            CheckpointMismatchError, CheckpointCorruptError: from the handle.
        """
        if model_path is None and base_model is None:
            raise errors.InvalidRequestError(
                "needs model_path or base_model.",
                field="create_sampling_client",
                hint='Pass base_model="weaver-nano", or the path of saved weights.',
            )
        if base_model is not None:
            check_model_name(base_model)
        return open_sampler(
            self._session,
            model_path=None if model_path is None else as_path(model_path, field="model_path"),
            base_model=base_model,
        )

    def create_reward_client(
        self, model_path: CheckpointPath, base_model: str | None = None
    ) -> OperationHandle[AsyncRewardClient]:
        """A client that scores sequences with a saved reward model.

        Args:
            model_path: a weaver:// path, a `CheckpointInfo`, or a folder with an adapter in PEFT's
                layout that has a head called `score`, for which `base_model` names the model below.

        Raises:
            InvalidNameError: at the call.
            UnsupportedError: from the handle: these weights give tokens.
            UnknownModelError, CheckpointNotFoundError: from the handle.
            CheckpointMismatchError, CheckpointCorruptError: from the handle.
        """
        if base_model is not None:
            check_model_name(base_model)
        path = as_path(model_path, field="model_path")
        return open_rewards(self._session, model_path=path, base_model=base_model)

    # --- what there is ---

    async def list_supported_models(self) -> list[types.ModelInfo]:
        """The base models that the service names; an embedded engine takes any other id too."""
        return list(await self._session.service.list_models())

    async def list_training_runs(self) -> list[types.TrainingRun]:
        """The runs that the service has, oldest first."""
        return list(await self._session.service.list_runs())

    async def get_training_run(self, model_id: str) -> types.TrainingRun:
        """By its id or name; raises RunNotFoundError."""
        return await find_run(self._session.service, model_id)

    async def rename_training_run(self, model_id: str, name: str) -> types.TrainingRun:
        """Gives a run another name, as `create_model` does; raises InvalidNameError, too."""
        service, name = self._session.service, check_run_name(name)
        return await service.rename_run((await find_run(service, model_id)).run_id, name)

    async def delete_training_run(self, model_id: str, *, checkpoints: bool = False) -> None:
        """Forgets a run and its metrics for good; its checkpoints only if that is asked.

        Raises:
            RunNotFoundError, ConflictError: another process has it.
        """
        service = self._session.service
        run = await find_run(service, model_id)
        await service.delete_run(run.run_id, checkpoints=checkpoints)

    async def list_checkpoints(self, model_id: str | None = None) -> list[types.CheckpointInfo]:
        """All checkpoints, or those of one run, oldest first."""
        return list(await self._session.service.list_checkpoints(model_id))

    async def delete_checkpoint(self, path: str | types.CheckpointInfo) -> None:
        """Raises CheckpointNotFoundError."""
        await self._session.service.delete_checkpoint(as_path(path))

    async def set_checkpoint_ttl(
        self, path: str | types.CheckpointInfo, ttl_seconds: int | None
    ) -> types.CheckpointInfo:
        """Lets a checkpoint expire so many seconds from now; None keeps it for good."""
        check_ttl(ttl_seconds)
        return await self._session.service.set_checkpoint_ttl(as_path(path), ttl_seconds)

    async def delete_checkpoints(
        self,
        model_id: str | None = None,
        *,
        pattern: str | None = None,
        older_than_s: float | None = None,
        dry_run: bool = False,
    ) -> list[types.CheckpointInfo]:
        """Deletes all checkpoints for which everything given holds, and answers them.

        Args:
            model_id: of this run.
            pattern: as of a shell: `step-*` of their names, `weaver://*/sampler/*` of their paths.
            older_than_s: written at least so many seconds ago.
            dry_run: only answers what would be deleted.

        Raises:
            InvalidParamsError: nothing is given; `pattern="*"` means all.
            RunNotFoundError: the run is another project's.
        """
        given = {"run_id": model_id, "pattern": pattern, "older_than_s": older_than_s}
        which = as_value(Selection, given, field="delete_checkpoints")
        which.check()
        return list(await self._session.service.delete_checkpoints(which, dry_run=dry_run))

    async def import_checkpoint(
        self,
        folder: str | PathLike[str],
        base_model: str | None = None,
        *,
        name: str = "imported",
        ttl_seconds: int | None = None,
    ) -> types.CheckpointInfo:
        """Makes a checkpoint of an adapter in PEFT's layout, or of a whole model, in a folder here.

        `create_model(from_checkpoint=...)` begins a run with it; it can be sampled from as well. A
        whole model is for full fine-tuning. Its step is 0.

        Args:
            base_model: what the weights were trained on, by its name here; an adapter may name it
                itself.

        Raises:
            InvalidRequestError: the folder holds neither, or not in safetensors.
            InvalidNameError, InvalidParamsError: a name, or the base model is not said.
            UnsupportedError: a variant of LoRA, or a setting or tensor that is not known.
            CheckpointMismatchError, UnknownModelError: the weights are of another base model.
            CheckpointCorruptError: a file is broken or not finite.
            TooLargeError, QuotaExceededError, StorageError: the server has no room for it.
        """
        check_ttl(ttl_seconds)
        if base_model is not None:
            check_model_name(base_model)
        return await import_from(
            self._session.service, folder, base_model=base_model, name=name, ttl_seconds=ttl_seconds
        )

    async def export_checkpoint(
        self, path: str | types.CheckpointInfo, folder: str | PathLike[str], *, merge: bool = False
    ) -> Path:
        """Writes what other programs read of a checkpoint into a new folder, and answers it.

        That is an adapter in PEFT's layout; or with `merge`, and after full fine-tuning, a whole
        model for `AutoModelForCausalLM.from_pretrained`, with its tokenizer. A merged weight is
        W + scale·B·A, computed in float32 and kept in the base model's dtype.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            StorageError: the folder exists or cannot be written; nothing is left behind.
            CheckpointCorruptError: a file is not what was saved.
            UnsupportedError: this base model's files cannot be merged.
        """
        return await export_to(self._session.service, as_path(path), folder, merge=merge)

    @property
    def _session(self) -> Session:
        if self._open is None:
            hint = "Use `async with AsyncServiceClient() as service`, or `await` it first."
            raise errors.ClosedError("the client is not open.", hint=hint)
        return self._open
