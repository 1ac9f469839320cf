"""`preference`: learning from pairs of replies, one of them preferred. Recipes call it.

Each step is one gradient of a loss of `preference_losses` over a batch of rows, by
`forward_backward_custom`. What the reference says is asked for once, before the first step, and
kept in the run's folder: it is the policy as the run began, unless another model is given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from anyio.lowlevel import checkpoint

from weaver import AsyncSamplingClient, AsyncTrainingClient
from weaver.errors import ConfigError, InvalidRequestError
from weaver.types import Datum, ModelInfo
from weaver_rl.algorithms.run import Result, Run, shows_progress
from weaver_rl.conversations import to_datum
from weaver_rl.credit.models import check_vocabulary
from weaver_rl.data import check_tasks
from weaver_rl.evaluation import Evaluate
from weaver_rl.metrics import train_metrics
from weaver_rl.pairs import SIDES, Row, read_pair
from weaver_rl.plan import Steps, at_least
from weaver_rl.preference_losses import LOSSES, Batch, Replies
from weaver_rl.reference import Reference, logprobs_of
from weaver_rl.reward_models import sequence_of, sides_of
from weaver_rl.run_folder import Manifest

if TYPE_CHECKING:
    import torch

__all__ = ["PreferencePlan", "check_pairs", "preference"]

EQUAL = 1e-5
"""Rewards no further apart are equal: passes of other batches round otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePlan(Steps):
    """`PreferencePlan(loss="dpo", epochs=2, batch_size=16, learning_rate=1e-3)`"""

    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo", "bradley_terry"] = "dpo"
    """The last trains a reward model."""
    beta: float | None = None
    """How much the loss weighs its margin; None: the paper's, 0.1, of SimPO 2."""
    gamma: float = 1.0
    """SimPO's margin, in units of its reward."""
    label_smoothing: float = 0.0
    """DPO's chance that a pair is the wrong way round, below 0.5."""
    centre: float = 0.0
    """How much bradley_terry holds scores near 0."""
    epochs: int = 1
    steps: int | None = None
    """The most steps, where that ends before the epochs do; None: all epochs."""
    batch_size: int = 16
    """Rows of a step."""
    max_length: int | None = None
    """Tokens of the longest prompt with its reply; None: what the model's context holds. A longer
    one is refused by name."""

    def __post_init__(self) -> None:
        Steps.__post_init__(self)
        at_least(1, self, "epochs", "batch_size")
        at_least(0, self, "gamma", "label_smoothing", "centre")
        if self.loss not in LOSSES:
            raise ConfigError(f"is {self.loss!r}.", field="loss", hint=f"One of {list(LOSSES)}.")
        scores = LOSSES[self.loss].scores
        for name, wrong in (("centre", self.centre and not scores), ("beta", self.beta and scores)):
            if wrong:
                value, hint = getattr(self, name), "Leave it out."
                raise ConfigError(f"is {value}; {self.loss} has none.", field=name, hint=hint)
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ConfigError(f"is {self.beta}.", field="beta", hint="A number above 0.")
        if self.label_smoothing and not (self.loss == "dpo" and self.label_smoothing < 0.5):
            raise ConfigError(
                f"is {self.label_smoothing} with {self.loss}.",
                field="label_smoothing",
                hint='Below 0.5, and with loss="dpo" alone.',
            )
        if self.loss == "kto":
            at_least(2, self, "batch_size")  # z₀ is of replies to other prompts
        if self.max_length is not None:
            at_least(2, self, "max_length")
        if self.steps is not None:
            at_least(0, self, "steps")

    @property
    def strength(self) -> float:
        """`beta`, or the paper's."""
        return LOSSES[self.loss].beta if self.beta is None else self.beta

    @property
    def loss_options(self) -> dict[str, float]:
        """Those of the engine's loss."""
        return {"centre": self.centre}


@shows_progress
async def preference(
    trainer: AsyncTrainingClient,
    pairs: Sequence[Mapping[str, Any]],
    plan: PreferencePlan,
    *,
    held_out: Sequence[Mapping[str, Any]] = (),
    reference: AsyncSamplingClient | None = None,
    run: Run | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains on all pairs, as the plan says.

    A row is `{"prompt": ..., "chosen": ..., "rejected": ...}`, all texts or all lists of messages;
    without a prompt the messages with which both begin are it. With `loss="kto"` a row may have one
    reply alone. With `loss="bradley_terry"`, of a trainer with `head="scalar"`, a row may have a
    `margin`, a number.

    Args:
        held_out: rows of which `eval/accuracy`, the share whose chosen reply has the larger reward
            (equal ones count half), `eval/margin` and `eval/loss` are logged.
        reference: the model that DPO, IPO and KTO hold the policy to; None: the policy as it was
            when the run began.
        evaluate: as of `on_policy`; of a reward model there is nothing to sample.

    Raises:
        InvalidRequestError: no pairs, or one that cannot be learned; names it.
        ConfigError: a reference that the loss does not ask, or of another vocabulary; a trainer
            without the loss's head.
    """
    loss = LOSSES[plan.loss]
    if loss.scores != (trainer.head is not None):
        what, hint = ("scores", "no head") if loss.scores else ("tokens", 'head="scalar"')
        said = f"is {plan.loss}, which is of {what}; the model was made with {hint}."
        raise ConfigError(
            said, field="loss", hint='create_model(head="scalar") is for bradley_terry.'
        )
    if loss.scores and evaluate is not None:
        raise ConfigError("samples.", field="evaluate", hint="Leave it out; give held_out pairs.")
    if reference is not None and not loss.needs_reference:
        raise ConfigError(f"{plan.loss} asks none.", field="reference", hint="Leave it out.")
    rows = _read(pairs, plan, source="pairs")
    tests = _read(held_out, plan, source="held_out") if held_out else []
    tokenizer = await trainer.get_tokenizer()
    await check_vocabulary([reference] if reference else [], tokenizer, field="reference")
    encode = partial(_encode, tokenizer, trainer.model_info, plan)
    planned = [await encode([rows[i] for i in batch]) for batch in _planned(len(rows), plan)]
    tested = await encode(tests) if tests else None
    run = run or Run()
    done, version = await run.restore(trainer, steps=len(planned))
    known = None
    if loss.needs_reference:
        known = Reference(run.folder.path / "reference.json" if run.folder else None)
        wanted = [datum for one in (*planned, tested) if one for datum in one.datums]
        await known.ask(wanted, reference or trainer, moved=reference is None and done.step > 0)

    async def measure() -> dict[str, float]:
        measured: dict[str, float] = {}
        if tested and loss.scores:
            measured = await tested.measured(trainer, plan)
        elif tested:
            found = logprobs_of(await trainer.forward(tested.datums))
            value, seen = tested.loss(plan, known, found)
            measured = {f"eval/{name}": n for name, n in {**seen, "loss": float(value)}.items()}
        if evaluate is not None:
            measured |= await evaluate(await trainer.save_weights_and_get_sampling_client())
        return measured

    metrics = await run.evaluate_first(measure, plan, done=done.step, steps=len(planned))
    for step in range(done.step, len(planned)):
        begin = time.monotonic()
        batch = planned[step]

        def compute(
            _: Sequence[Datum], found: Sequence[torch.Tensor], batch: Encoded = batch
        ) -> tuple[torch.Tensor, dict[str, float]]:
            return batch.loss(plan, known, found)

        gradient = (
            trainer.forward_backward(batch.datums, plan.loss, loss_fn_config=plan.loss_options)
            if loss.scores
            else trainer.forward_backward_custom(batch.datums, compute)
        )
        update = trainer.optim_step(plan.adam_params(step, trainer.model_info))
        version += 1
        metrics = train_metrics([(await gradient).metrics, (await update).metrics])
        metrics["time/step_s"] = time.monotonic() - begin
        if plan.evaluates(step + 1, steps=len(planned)):
            metrics |= await measure()
        await run.log(metrics, step=step + 1)
        if run.is_due(step + 1, len(planned)):
            await run.checkpoint(trainer, Manifest(step=step + 1, extra={"version": version}))
    final = (
        await trainer.save_weights_and_get_reward_client()
        if loss.scores
        else await trainer.save_weights_and_get_sampling_client()
    )
    return Result(final=final, steps=len(planned), version=version, metrics=metrics)


async def check_pairs(
    client: AsyncTrainingClient | AsyncSamplingClient,
    pairs: Sequence[Mapping[str, Any]],
    plan: PreferencePlan,
) -> None:
    """What `preference` refuses of the pairs is refused; dry runs call it."""
    rows = _read(pairs, plan, source="pairs")
    await _encode(await client.get_tokenizer(), client.model_info, plan, rows)


def _read(pairs: Sequence[Any], plan: PreferencePlan, *, source: str) -> list[Row]:
    check_tasks(pairs, fields=(), source=source)
    if LOSSES[plan.loss].unpaired and len(pairs) < 2:
        hint = "Give two: a reply is compared with those to other prompts."
        raise InvalidRequestError("is one row.", field=source, hint=hint)
    return [
        read_pair(row, LOSSES[plan.loss], where=str(getattr(row, "where", f"{source}[{i}]")))
        for i, row in enumerate(pairs)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The rows of a step: their datums, and whose they are."""

    datums: list[Datum]
    places: list[tuple[str, int]]
    """Of each datum: its side, or `other` for a reply to another prompt, and its row."""
    rows: int

    async def measured(
        self, trainer: AsyncTrainingClient, plan: PreferencePlan
    ) -> dict[str, float]:
        """What the engine says of a reward model's scores."""
        options = plan.loss_options
        found = await trainer.forward(self.datums, plan.loss, loss_fn_config=options)
        return {f"eval/{name}": found.metrics[name] for name in ("accuracy", "margin", "loss")}

    def loss(
        self, plan: PreferencePlan, known: Reference | None, logprobs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The plan's loss of these log-probabilities of the datums' targets, and its metrics."""
        import torch

        sums, spans = [], []
        for datum, found in zip(self.datums, logprobs, strict=True):
            weights = torch.as_tensor(datum.loss_fn_inputs["weights"].tolist(), dtype=found.dtype)
            sums.append((found * weights).sum())
            spans.append(float(weights.sum()))
        constant = [known.of(datum) if known else 0.0 for datum in self.datums]
        sides = {side: self._side(side, sums, constant, spans) for side in SIDES}
        strayed = [
            float(sums[i].detach()) - constant[i]
            for i, (side, _) in enumerate(self.places)
            if side == "other"
        ]
        loss = LOSSES[plan.loss]
        batch = Batch(
            **sides,
            beta=plan.strength,
            gamma=plan.gamma,
            label_smoothing=plan.label_smoothing,
            kl=torch.tensor(np.mean(strayed) if strayed else 0.0, dtype=torch.float32),
        )
        metrics = {"kl": float(batch.kl)} if strayed else {}
        rewards = {side: loss.rewards(sides[side], plan.strength).detach() for side in SIDES}
        both = (sides["chosen"].given * sides["rejected"].given).bool()
        if bool(both.any()):
            margins = (rewards["chosen"] - rewards["rejected"])[both]
            won = (margins > EQUAL).float() + 0.5 * (margins.abs() <= EQUAL).float()
            metrics |= {"accuracy": float(won.mean()), "margin": float(margins.mean())}
        for side, of in sides.items():
            if bool(of.given.any()):
                mean = (of.logprobs.detach() * of.given).sum() / of.given.sum()
                metrics[f"{side}_logprob"] = float(mean)
        assert loss.formula is not None
        return loss.formula(batch), metrics

    def _side(
        self,
        side: str,
        sums: Sequence[torch.Tensor],
        constant: Sequence[float],
        spans: Sequence[float],
    ) -> Replies:
        import torch

        at = {row: i for i, (one, row) in enumerate(self.places) if one == side}

        def column(of: Sequence[float]) -> torch.Tensor:
            return torch.tensor([of[at[n]] if n in at else 0.0 for n in range(self.rows)])

        nothing = torch.zeros(())
        return Replies(
            logprobs=torch.stack([sums[at[n]] if n in at else nothing for n in range(self.rows)]),
            reference=column(constant),
            lengths=column(spans),
            given=column([1.0] * len(self.datums)),
        )


def _scored(tokenizer: Any, model: ModelInfo, plan: PreferencePlan, row: Row) -> list[Datum]:
    """Both sides whole, for a reward model; by an epoch before they are encoded."""
    if not row.encoded:
        chosen, rejected = (
            sequence_of(
                tokenizer, example, model, where=f"{row.where}.{side}", max_length=plan.max_length
            )
            for side, example in row.sides.items()
        )
        if chosen == rejected:
            hint = "Leave the row out: it prefers nothing."
            said = "has the same tokens as chosen."
            raise InvalidRequestError(said, field=f"{row.where}.rejected", hint=hint)
        row.encoded.update(zip(SIDES, sides_of(chosen, rejected, row.margin), strict=True))
    return [row.encoded[side] for side in SIDES]


async def _encode(
    tokenizer: Any, model: ModelInfo, plan: PreferencePlan, rows: Sequence[Row]
) -> Encoded:
    """Raises InvalidRequestError: a reply cannot be learned, or is too long; names it."""
    encode = partial(
        to_datum,
        tokenizer,
        max_length=plan.max_length,
        context_length=model.context_length,
    )
    datums: list[Datum] = []
    places: list[tuple[str, int]] = []
    for number, row in enumerate(rows):
        await checkpoint()  # a data set takes minutes, and the session has to be kept alive
        if LOSSES[plan.loss].scores:
            datums += _scored(tokenizer, model, plan, row)
            continue
        for side, example in row.sides.items():
            if side not in row.encoded:  # by an epoch before
                row.encoded[side] = encode(example, where=f"{row.where}.{side}")
            datums.append(row.encoded[side])
            places.append((side, number))
        if LOSSES[plan.loss].unpaired:
            said = next(iter(rows[(number + 1) % len(rows)].sides.values()))
            other = {**next(iter(row.sides.values())), "completion": said["completion"]}
            datums.append(encode(other, where=f"{row.where}, with another's reply"))
            places.append(("other", number))
    return Encoded(datums=datums, places=places, rows=len(rows))


def _planned(count: int, plan: PreferencePlan) -> list[list[int]]:
    """The rows of all steps; what is left at an epoch's end rides with the batch before it."""
    batches = []
    for epoch in range(plan.epochs):
        order = np.random.default_rng([plan.seed, epoch]).permutation(count)
        parts = max(1, count // plan.batch_size)
        batches += [part.tolist() for part in np.array_split(order, parts)]
    return list(islice(batches, plan.steps))
