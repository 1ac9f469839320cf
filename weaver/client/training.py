"""`AsyncTrainingClient`: one model in training. Made by `AsyncServiceClient.create_model`.

Every ordered verb is a plain function: the call fixes its place in the run's order, awaiting the
returned handle gives its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from weaver import errors, protocol, types
from weaver.checks import CheckpointPath, LossConfig, as_path, as_value, check_datums
from weaver.client import custom_loss
from weaver.client.custom_loss import CustomLoss
from weaver.client.handle import OperationHandle
from weaver.client.rewards import AsyncRewardClient, TokenPrompts, open_rewards, token_prompts
from weaver.client.sampling import AsyncSamplingClient, open_sampler
from weaver.client.session import Answer, Session
from weaver.heads import check_asked
from weaver.keywords import suggesting
from weaver.names import check_name
from weaver.threads import in_daemon_thread
from weaver.tokenizers import PreTrainedTokenizer

GRADIENTS = Answer(protocol.GradientsDone, lambda result: result.output)
SCORES = Answer(
    protocol.GradientsDone,
    lambda done: [one["scores"].to_numpy().item() for one in done.output.loss_fn_outputs],
)
STEP = Answer(protocol.StepDone, lambda result: result.output)
SAVED = Answer(protocol.CheckpointSaved, lambda result: result.checkpoint)
LOADED = Answer(protocol.CheckpointLoaded, lambda result: result.checkpoint)


@suggesting
class AsyncTrainingClient:
    """Trains one run; several clients of one service client may share a run and its order."""

    def __init__(self, session: Session, run: types.TrainingRun, model: types.ModelInfo) -> None:
        self._session = session
        self.model_id = run.run_id
        self.name = run.name
        """The run's when this client was made; `get_info` tells that of now."""
        self.model_info = model
        self.base_model = model.name
        self.head = run.lora_config.head if run.lora_config else None
        """Of a reward model "scalar"; None where it gives tokens."""
        self.deterministic = session.deterministic
        """No number depends on what else the service computes, or on when."""

    def __repr__(self) -> str:
        called = f"{self.name} ({self.model_id})" if self.name else self.model_id
        return f"<AsyncTrainingClient: {called} of {self.base_model}>"

    async def get_tokenizer(self) -> PreTrainedTokenizer:
        """The model's tokenizer, a transformers one; loaded once per client."""
        return await self._session.get_tokenizer(self.base_model)

    async def get_info(self) -> types.TrainingRun:
        """The run as the service knows it: its step, status and metadata."""
        return await self._session.service.get_run(self.model_id)

    # --- gradients and steps ---

    def forward(
        self,
        datums: Sequence[types.Datum],
        loss_fn: str = "cross_entropy",
        *,
        loss_fn_config: LossConfig | None = None,
    ) -> OperationHandle[types.ForwardBackwardResult]:
        """`forward_backward` without a gradient: the loss and the log-probabilities only."""
        return self._gradients(datums, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self,
        datums: Sequence[types.Datum],
        loss_fn: str = "cross_entropy",
        *,
        loss_fn_config: LossConfig | None = None,
    ) -> OperationHandle[types.ForwardBackwardResult]:
        """Computes a loss and adds its gradient to what the next `optim_step` applies.

        Several calls before one step accumulate. The losses, their inputs and options are those of
        `weaver.losses`, explained on the docs page on losses.

        Returns:
            `metrics["loss"]` and more; `loss_fn_outputs[i]["logprobs"]`, float32 in the shape of
            the targets of datum i, [T] or [T, K]; of a reward model `scores`, [1].

        Raises:
            InvalidDatumError, TokenOutOfRangeError, ContextLengthError: at the call, before
                anything is queued.
            UnknownLossError, InvalidLossConfigError, UnsupportedError: the same.
            NonFiniteError: from the handle; the next `optim_step` then fails too, so that no part
                of a batch is applied.
        """
        return self._gradients(datums, loss_fn, loss_fn_config, backward=True)

    def forward_backward_custom(
        self, datums: Sequence[types.Datum], loss_fn: CustomLoss
    ) -> OperationHandle[types.ForwardBackwardResult]:
        """`forward_backward` with a loss of your own.

        `loss_fn(datums, logprobs)` is called in a worker thread with the datums and, for each, a
        float32 tensor of the log-probabilities of its `target_tokens`, in their shape: [T], or
        [T, K] for several at each position. It returns a scalar
        tensor made from them and a dict of metrics. Of a reward model it is called with the scores
        of the datums, [1] each. Beside `target_tokens` the datums may carry
        whatever inputs the function reads. It costs one more forward pass than a built-in loss.

        Returns:
            The function's metrics and `loss`; `loss_fn_outputs` as in `forward_backward`.

        Raises:
            MissingDependencyError: torch is not installed.
            Exception: whatever `loss_fn` raises comes out of the handle; the next `optim_step` then
                fails, as after any gradient pass that failed.
        """
        custom_loss.require_torch()
        if not callable(loss_fn):
            raise errors.InvalidRequestError(
                f"is a {type(loss_fn).__name__}.",
                field="loss_fn",
                hint="Pass a function of (datums, logprobs).",
            )
        if self.head is None:
            forward = self.forward(custom_loss.targets_only(datums))
        else:
            forward = self.forward(custom_loss.tokens_only(datums), "surrogate")
        place = self._session.reserve(
            "forward_backward_custom", GRADIENTS, run_id=self.model_id, adds_gradient=True
        )

        async def finish() -> types.ForwardBackwardResult:
            surrogate, result = await in_daemon_thread(
                partial(custom_loss.differentiate, datums, await forward, loss_fn)
            )
            self._session.fill(
                place, protocol.ForwardBackward(datums=surrogate, loss_fn="surrogate")
            )
            done = await place.handle
            return result.model_copy(update={"metrics": {**done.metrics, **result.metrics}})

        return self._session.compose(place.handle.label, [forward, place.handle], finish)

    def score(self, prompts: TokenPrompts) -> OperationHandle[list[float]]:
        """What the reward model says of sequences of tokens, at this place in the run's order.

        Raises:
            UnsupportedError: this is no reward model.
            InvalidDatumError, TokenOutOfRangeError, ContextLengthError: at the call.
        """
        check_asked(True, self.head)
        given = [types.Datum(model_input=one) for one in token_prompts(prompts, self.model_info)]
        datums = tuple(custom_loss.tokens_only(given))
        operation = protocol.ForwardBackward(datums=datums, loss_fn="surrogate", backward=False)
        return self._session.submit(operation, SCORES, run_id=self.model_id)

    def optim_step(
        self, adam_params: types.AdamParams | Mapping[str, object]
    ) -> OperationHandle[types.OptimStepResult]:
        """Applies the accumulated gradient with AdamW and clears it.

        Returns:
            `metrics` with `grad_norm` (before clipping), `learning_rate` and `step`, from 1.

        Raises:
            InvalidParamsError: at the call.
            NoGradientsError, GradientsDiscardedError, NonFiniteError: from the handle; the weights
                are as they were.
        """
        params = as_value(types.AdamParams, adam_params, field="adam_params")
        return self._session.submit(protocol.OptimStep(params=params), STEP, run_id=self.model_id)

    # --- checkpoints ---

    def save_state(
        self,
        name: str | None = None,
        *,
        include_optimizer: bool = True,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
    ) -> OperationHandle[types.CheckpointInfo]:
        """Saves the weights, and the optimizer's state, to continue from; None makes up a name.

        Raises:
            InvalidNameError, InvalidParamsError: at the call.
            NameTakenError, StorageError: from the handle.
        """
        operation = protocol.SaveCheckpoint(
            purpose="state",
            name=check_name(name),
            include_optimizer=include_optimizer,
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
        )
        return self._session.submit(operation, SAVED, run_id=self.model_id)

    def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False
    ) -> OperationHandle[types.CheckpointInfo]:
        """Saves the weights to sample from, in PEFT's layout; raises as `save_state` does."""
        operation = protocol.SaveCheckpoint(
            purpose="sampler",
            name=check_name(name),
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
        )
        return self._session.submit(operation, SAVED, run_id=self.model_id)

    def save_weights_and_get_sampling_client(
        self, name: str | None = None
    ) -> OperationHandle[AsyncSamplingClient]:
        """A client that samples from the weights as they are at this place in the order.

        Without a name the weights live as long as the client that is answered, and at most 64 of
        them; with one they are saved.

        Raises:
            UnsupportedError: at the call, of a reward model, which has
                `save_weights_and_get_reward_client`.
        """
        check_asked(False, self.head)
        operation = protocol.SaveCheckpoint(purpose="sampler", name=check_name(name))
        saved = self._session.submit(operation, SAVED, run_id=self.model_id)
        parts: list[OperationHandle[Any]] = [saved]

        async def finish() -> AsyncSamplingClient:
            path = (await saved).path
            opened = open_sampler(
                self._session, model_path=path, base_model=None, owned=name is None
            )
            parts.append(opened)
            return await opened

        return self._session.compose(saved.label, parts, finish)

    def save_weights_and_get_reward_client(
        self, name: str | None = None
    ) -> OperationHandle[AsyncRewardClient]:
        """`save_weights_and_get_sampling_client` of a reward model: a client that scores.

        Raises:
            UnsupportedError: at the call: this is no reward model.
        """
        check_asked(True, self.head)
        operation = protocol.SaveCheckpoint(purpose="sampler", name=check_name(name))
        saved = self._session.submit(operation, SAVED, run_id=self.model_id)
        parts: list[OperationHandle[Any]] = [saved]

        async def finish() -> AsyncRewardClient:
            path = (await saved).path
            opened = open_rewards(self._session, model_path=path, owned=name is None)
            parts.append(opened)
            return await opened

        return self._session.compose(saved.label, parts, finish)

    def load_state(self, path: CheckpointPath) -> OperationHandle[types.CheckpointInfo]:
        """Replaces the weights by saved ones; the optimizer starts anew.

        Raises:
            InvalidNameError: at the call.
            CheckpointNotFoundError, CheckpointMismatchError, CheckpointCorruptError: from the
                handle; the run is as it was.
        """
        return self._load(path, include_optimizer=False)

    def load_state_with_optimizer(
        self, path: CheckpointPath
    ) -> OperationHandle[types.CheckpointInfo]:
        """`load_state` with the optimizer's state, to continue exactly where the save was made."""
        return self._load(path, include_optimizer=True)

    async def list_checkpoints(self) -> list[types.CheckpointInfo]:
        """This run's checkpoints, oldest first."""
        return list(await self._session.service.list_checkpoints(self.model_id))

    # --- metrics ---

    async def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Keeps numbers with the run: `await trainer.log_metrics({"reward": 0.5}, step=3)`.

        Raises:
            InvalidParamsError: a value is not a finite number.
        """
        if not isinstance(metrics, Mapping):
            raise errors.InvalidRequestError(
                f"is a {type(metrics).__name__}.", field="metrics", hint='Pass {"reward": 0.5}.'
            )
        points = [
            types.MetricPoint(name=name, value=value, step=step) for name, value in metrics.items()
        ]
        await self._session.service.log_metrics(self.model_id, points)

    async def read_metrics(self, name: str | None = None) -> list[types.MetricPoint]:
        """The numbers logged so far, oldest first; of one name where it is given."""
        return list(await self._session.service.read_metrics(self.model_id, name=name))

    async def rewind_metrics(self, step: int) -> None:
        """Forgets the numbers of later steps, after the run was loaded as it was at `step`.

        Its curves go on from there, in place of a second time from an earlier step.
        """
        await self._session.service.rewind_metrics(self.model_id, step)

    # --- shared ---

    def _gradients(
        self,
        datums: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: LossConfig | None,
        *,
        backward: bool,
    ) -> OperationHandle[types.ForwardBackwardResult]:
        check_datums(datums, loss_fn, config=loss_fn_config, model=self.model_info, head=self.head)
        given = {k: v for k, v in (loss_fn_config or {}).items() if v is not None}
        operation = protocol.ForwardBackward(
            datums=tuple(datums), loss_fn=loss_fn, loss_fn_config=given, backward=backward
        )
        return self._session.submit(operation, GRADIENTS, run_id=self.model_id)

    def _load(
        self, path: CheckpointPath, *, include_optimizer: bool
    ) -> OperationHandle[types.CheckpointInfo]:
        operation = protocol.LoadCheckpoint(path=as_path(path), include_optimizer=include_optimizer)
        return self._session.submit(operation, LOADED, run_id=self.model_id)
