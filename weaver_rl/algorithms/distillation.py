"""`distil`: learning what a teacher would say next, from its whole distribution. Recipes call it.

Each step: 1. a share λ of the batch's prompts is answered by the student as it is now, the others
have their reply, or the teacher's; 2. the teacher tells its K likeliest tokens at each token of the
replies; 3. one gradient of a divergence of `weaver_rl.divergences` by `forward_backward_custom`.
With `teacher_prompt` the teacher reads what the student does not: context distillation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from anyio.lowlevel import checkpoint

from weaver import AsyncSamplingClient, AsyncTrainingClient
from weaver.checks import check_length
from weaver.errors import ConfigError, InvalidRequestError
from weaver.fields import MOST_ALTERNATIVES
from weaver.tokenizers import encode_text, end_tokens
from weaver.types import Datum, ModelInput, SamplingParams
from weaver_rl.agent import derive_seed
from weaver_rl.algorithms.run import Result, Run, shows_progress
from weaver_rl.algorithms.supervised import batches
from weaver_rl.conversations import render, to_datum
from weaver_rl.credit.models import check_vocabulary
from weaver_rl.data import check_tasks
from weaver_rl.divergences import SoftLoss, SoftTargets, check_top_k, soft_loss, soft_targets
from weaver_rl.evaluation import Evaluate
from weaver_rl.examples import read_messages
from weaver_rl.guard import gather
from weaver_rl.metrics import train_metrics
from weaver_rl.plan import Steps, at_least
from weaver_rl.reference import logprobs_of
from weaver_rl.run_folder import Manifest

__all__ = ["DistilPlan", "check_distil", "distil"]

HELD_OUT = -1
"""In the place of a step, where the teacher answers held-out prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilPlan(Steps):
    """`DistilPlan(beta=1.0, lmbda=1.0, top_k=32, epochs=2, learning_rate=1e-3)`

    Raises:
        ConfigError: at construction; names the field.
    """

    beta: float = 0.5
    """Which divergence: 0 the forward KL, 1 the reverse KL, between them GKD's Jensen-Shannon."""
    lmbda: float = 0.5
    """GKD's λ, the share of each batch whose replies the student samples; it draws for each batch
    anew which kind all of it is."""
    top_k: int = 32
    """Tokens of each place that the teacher tells; what they leave over counts as one more."""
    temperature: float = 1.0
    """Of both distributions, among the K tokens."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How student and teacher sample replies; its seed is not used."""
    epochs: int = 1
    steps: int | None = None
    """The most steps, where that ends before the epochs do; None: all epochs."""
    batch_size: int = 32
    """Replies of a step."""
    max_length: int | None = None
    """Tokens of the longest prompt with its given reply; None: what the model's context holds. A
    longer one is refused by name."""

    def __post_init__(self) -> None:
        Steps.__post_init__(self)
        at_least(1, self, "epochs", "batch_size")
        for name in ("beta", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                hint = "A number from 0 to 1."
                raise ConfigError(f"is {getattr(self, name)!r}.", field=name, hint=hint)
        if type(self.top_k) is not int or not 1 <= self.top_k <= MOST_ALTERNATIVES:
            hint = f"1 to {MOST_ALTERNATIVES}."
            raise ConfigError(f"is {self.top_k!r}.", field="top_k", hint=hint)
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"is {self.temperature}.", field="temperature", hint="Above 0.")
        if self.max_length is not None:
            at_least(2, self, "max_length")
        if self.steps is not None:
            at_least(0, self, "steps")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """A reply with what student and teacher read before it."""

    tokens: tuple[int, ...]
    """The student's, T of them."""
    learned: npt.NDArray[np.bool_]
    """[T]; never the first."""
    read: tuple[int, ...]
    """The teacher's."""
    asked: npt.NDArray[np.bool_]
    """As many of them as are learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    prompt: tuple[int, ...] | None
    """What the student answers; None: it cannot be asked."""
    read: tuple[int, ...] | None
    """What the teacher reads in its place."""
    given: Text | None
    room: int
    """Tokens that both have left for a reply."""


@shows_progress
async def distil(
    trainer: AsyncTrainingClient,
    examples: Sequence[Mapping[str, Any]],
    plan: DistilPlan,
    *,
    teacher: AsyncSamplingClient,
    held_out: Sequence[Mapping[str, Any]] = (),
    run: Run | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains on all examples, as the plan says (Agarwal et al., GKD, arXiv:2306.13649).

    An example is `{"prompt": ...}`, a text or messages. A `completion` beside it is the reply where
    the student samples none; without one the teacher samples it. With a `teacher_prompt` the
    teacher reads that instead: the same model with instructions, examples or a hint, which the
    student learns to do without (Askell et al., arXiv:2112.00861; Snell et al., arXiv:2209.15189).
    Where `lmbda` is 0, other forms of `weaver_rl.conversations` are read, too.

    Args:
        teacher: of the student's vocabulary; for its own one `await
            trainer.save_weights_and_get_sampling_client()`, as it was then.
        held_out: examples of which `eval/loss` and `eval/agreement` are logged, on their replies,
            or the teacher's as sampled when the run begins.
        evaluate: as of `on_policy`.

    Raises:
        InvalidRequestError: no examples, or one that cannot be learned, named; or the teacher's
            answers are none.
        ConfigError: a teacher of another vocabulary, or that cannot tell `top_k` tokens.
    """
    rows, tests = await _checked(trainer, teacher, plan, examples, held_out)
    run = run or Run()
    planned = list(islice(_planned(len(rows), plan), plan.steps))
    done, version = await run.restore(trainer, steps=len(planned))
    ask = Asking(plan, teacher, trainer.model_info.vocab_size, await trainer.get_tokenizer())
    tested = await ask.texts(tests, range(len(tests)), HELD_OUT)

    async def measure() -> dict[str, float]:
        measured: dict[str, float] = {}
        if tested:
            data, loss = _batch(tested, plan)
            value, seen = loss(None, logprobs_of(await trainer.forward(data)))
            measured = {"eval/loss": float(value), "eval/agreement": seen["agreement"]}
        if evaluate is not None:
            measured |= await evaluate(await trainer.save_weights_and_get_sampling_client())
        return measured

    metrics = await run.evaluate_first(measure, plan, done=done.step, steps=len(planned))
    for step in range(done.step, len(planned)):
        begin = time.monotonic()
        run.waiting_for(f"replies of step {step + 1}")
        own = round(plan.lmbda * len(planned[step]))
        sampler = await trainer.save_weights_and_get_sampling_client() if own else teacher
        told = await ask.texts(rows, planned[step], step, student=sampler, own=own)
        collected = time.monotonic()
        run.waiting_for(f"training of step {step + 1}")
        gradient = trainer.forward_backward_custom(*_batch(told, plan))
        update = trainer.optim_step(plan.adam_params(step, trainer.model_info))
        version += 1
        metrics = train_metrics([(await gradient).metrics, (await update).metrics])
        metrics |= {
            "distil/on_policy_fraction": own / len(told),
            "distil/reply_tokens": float(np.mean([soft.weights.sum() for _, soft in told])),
            "time/rollout_s": collected - begin,
            "time/train_s": time.monotonic() - collected,
            "time/step_s": time.monotonic() - begin,
        }
        if plan.evaluates(step + 1, steps=len(planned)):
            metrics |= await measure()
        await run.log(metrics, step=step + 1)
        if run.is_due(step + 1, len(planned)):
            await run.checkpoint(trainer, Manifest(step=step + 1, extra={"version": version}))
    sampler = await trainer.save_weights_and_get_sampling_client()
    return Result(final=sampler, steps=len(planned), version=version, metrics=metrics)


async def check_distil(
    student: AsyncTrainingClient | AsyncSamplingClient,
    examples: Sequence[Mapping[str, Any]],
    plan: DistilPlan,
    *,
    teacher: AsyncSamplingClient,
) -> None:
    """What `distil` refuses is refused; dry runs call it."""
    await _checked(student, teacher, plan, examples, ())


async def _checked(
    student: AsyncTrainingClient | AsyncSamplingClient,
    teacher: AsyncSamplingClient,
    plan: DistilPlan,
    examples: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
) -> tuple[list[Row], list[Row]]:
    check_top_k(teacher, plan.top_k)
    check_tasks(examples, fields=(), source="examples")
    if held_out:
        check_tasks(held_out, fields=(), source="held_out")
    tokenizer = await student.get_tokenizer()
    await check_vocabulary([teacher], tokenizer, field="teacher")
    contexts = student.model_info.context_length, teacher.model_info.context_length
    read: list[list[Row]] = []
    for source, given in (("examples", examples), ("held_out", held_out)):
        read.append([])
        for i, example in enumerate(given):
            await checkpoint()  # a data set takes minutes, and the session has to be kept alive
            where = str(getattr(example, "where", f"{source}[{i}]"))
            read[-1].append(_read(tokenizer, example, plan, contexts, where=where))
    return read[0], read[1]


def _read(
    tokenizer: Any,
    example: Mapping[str, Any],
    plan: DistilPlan,
    contexts: tuple[int, int],
    *,
    where: str,
) -> Row:
    """Raises InvalidRequestError: it cannot be learned; ContextLengthError: no reply fits."""
    said = {name: example[name] for name in example.keys() if example[name] is not None}
    context, teachers = contexts
    asked = "prompt" in said
    encode = partial(_prompt, tokenizer, said)
    if not asked and (plan.lmbda or "teacher_prompt" in said):
        hint = "Give it: nothing can be sampled without one. Other forms need lmbda=0."
        raise InvalidRequestError("is missing.", field=f"{where}.prompt", hint=hint)
    prompt = encode("prompt", where) if asked else None
    read = encode("teacher_prompt", where) if "teacher_prompt" in said else prompt
    given = None
    if not asked or "completion" in said:
        datum = to_datum(
            tokenizer,
            {name: value for name, value in said.items() if name != "teacher_prompt"},
            max_length=plan.max_length,
            context_length=context,
            where=where,
        )
        given = given_text(datum, read if "teacher_prompt" in said else None, where=where)
        check_length(len(given.read), teachers, field=f"{where}, read by the teacher")
    for tokens, most, name in ((prompt, context, "prompt"), (read, teachers, "teacher_prompt")):
        if tokens is not None:
            check_length(len(tokens) + 1, most, field=f"{where}.{name}")
    room = min(context - len(prompt or ()), teachers - len(read or ()))
    return Row(prompt=prompt, read=read, given=given, room=room)


def _prompt(tokenizer: Any, said: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """The tokens of a text or of messages, up to where a reply begins."""
    if isinstance(said[name], str):
        tokens = encode_text(tokenizer, said[name])
    else:
        place = f"{where}.{name}"
        text = render(
            tokenizer,
            read_messages(said[name], place),
            tools=said.get("tools", ()),
            options=said.get("chat_template_kwargs", {}),
            where=place,
        )
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise InvalidRequestError("has no tokens.", field=f"{where}.{name}", hint="Give a text.")
    return tuple(tokens)


def given_text(datum: Datum, read: tuple[int, ...] | None, *, where: str) -> Text:
    """A reply that is there, as the teacher reads it too, or behind `read`."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    tokens = (*datum.model_input.to_ints(), targets[-1])
    learned = np.array([0.0, *datum.loss_fn_inputs["weights"].tolist()]) > 0
    if read is None:
        return Text(tokens=tokens, learned=learned, read=tokens, asked=learned)
    count = int(learned.sum())
    if not learned[-count:].all():
        hint = "Give one reply, the last message: the teacher reads its tokens behind that prompt."
        raise InvalidRequestError("has several replies.", field=f"{where}.completion", hint=hint)
    return _behind(tokens[:-count], read, tokens[-count:])


def _behind(prompt: Sequence[int], read: Sequence[int], reply: Sequence[int]) -> Text:
    learned, asked = (
        np.arange(len(one) + len(reply)) >= max(len(one), 1) for one in (prompt, read)
    )
    return Text(tokens=(*prompt, *reply), learned=learned, read=(*read, *reply), asked=asked)


Told = tuple[Text, SoftTargets]


class Asking:
    """Asks student and teacher for replies, and the teacher what it says of them.

    What it says of a reply that was given is asked once.
    """

    def __init__(
        self, plan: DistilPlan, teacher: AsyncSamplingClient, vocab: int, tokenizer: Any
    ) -> None:
        self._plan, self._teacher, self._vocab = plan, teacher, vocab
        ends = {token for token in end_tokens(tokenizer).values() if token < vocab}
        stops = tuple(ends.union(plan.sampling.stop_token_ids))
        self._sampling = plan.sampling.model_copy(update={"stop_token_ids": stops})
        self._known: dict[int, Told] = {}

    async def texts(
        self,
        rows: Sequence[Row],
        chosen: Sequence[int],
        step: int,
        *,
        student: AsyncSamplingClient | None = None,
        own: int = 0,
    ) -> list[Told]:
        """Of the rows `chosen`, the first `own` of which the student answers."""
        return await gather(
            [
                partial(self._told, rows[i], i, step, student if n < own else None)
                for n, i in enumerate(chosen)
            ]
        )

    async def _told(
        self, row: Row, index: int, step: int, student: AsyncSamplingClient | None
    ) -> Told:
        given = row.given if student is None else None
        keeps = given is not None and step != HELD_OUT and self._plan.epochs > 1
        if keeps and index in self._known:
            return self._known[index]
        text = given or await self._sampled(row, index, step, student)
        soft, _ = await soft_targets(self._teacher, text.read, text.asked, top_k=self._plan.top_k)
        told = text, soft.within(self._vocab).placed(text.learned[1:])
        if keeps:
            self._known[index] = told
        return told

    async def _sampled(
        self, row: Row, index: int, step: int, student: AsyncSamplingClient | None
    ) -> Text:
        assert row.prompt is not None and row.read is not None
        seed = derive_seed(self._plan.seed, step, index)
        most = min(self._sampling.max_tokens, row.room)
        sampling = self._sampling.model_copy(update={"seed": seed, "max_tokens": most})
        sampler, prompt = (self._teacher, row.read) if student is None else (student, row.prompt)
        answer = await sampler.sample(ModelInput.from_ints(prompt), sampling)
        return _behind(row.prompt, row.read, answer.sequences[0].tokens)


def _batch(told: Sequence[Told], plan: DistilPlan) -> tuple[list[Datum], SoftLoss]:
    loss = soft_loss([soft for _, soft in told], beta=plan.beta, temperature=plan.temperature)
    return [soft.datum(text.tokens) for text, soft in told], loss


def _planned(count: int, plan: DistilPlan) -> Iterator[list[int]]:
    """The rows of all steps."""
    for epoch in range(plan.epochs):
        yield from batches([1] * count, plan.batch_size, seed=plan.seed, epoch=epoch)
