"""Distillation: the loop's mechanics, what it minimises, and what it refuses."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.rl.fake import fake_service, vowels
from tests.rl.test_loops import PLAN as POLICY
from tests.rl.test_loops import TASKS, Memory, weights, without_times
from weaver.errors import ConfigError, ContextLengthError, InvalidRequestError
from weaver.types import Datum, ModelInput, SamplingParams
from weaver_rl import credit
from weaver_rl.algorithms.distillation import DistilPlan, check_distil, distil, given_text
from weaver_rl.algorithms.policy import on_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.credit.marks import Marks
from weaver_rl.divergences import SoftTargets
from weaver_rl.evaluation import evaluator
from weaver_rl.loggers import Loggers
from weaver_rl.rollouts import single_turn
from weaver_rl.run_folder import open_run_folder
from weaver_rl.types import Group

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weaver import AsyncSamplingClient, AsyncServiceClient

PLAN = DistilPlan(
    top_k=8,
    epochs=2,
    batch_size=4,
    learning_rate=0.2,
    sampling=SamplingParams(max_tokens=6),
    seed=3,
)
GIVEN = [{"prompt": f"{i}=", "completion": "aeiou"[: 1 + i % 5]} for i in range(10)]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def taught(service: AsyncServiceClient) -> AsyncSamplingClient:
    """A model that likes vowels."""
    trainer = await service.create_model(base_model="fake")
    plan = replace(POLICY, learning_rate=0.4)
    return (await on_policy(trainer, TASKS, single_turn(vowels), plan)).sampler


async def whole(model: AsyncSamplingClient, tokens: Sequence[int]) -> Any:
    """Log-probabilities [T, 256] of the fake model's bytes at each place but the first."""
    targets = np.tile(np.arange(256), (len(tokens), 1))
    found = await model.compute_logprobs(ModelInput.from_ints(tokens), targets=targets)
    assert found.prompt_target_logprobs is not None
    return np.asarray(found.prompt_target_logprobs, dtype=np.float64)[1:]


def reverse_kl(student: Any, teacher: Any, *, top_k: int) -> Any:
    """[N], over the teacher's likeliest and the rest, from log-probabilities [N, 256]."""
    apart = []
    for q, p in zip(np.exp(student), np.exp(teacher), strict=True):
        best = np.argsort(-p)[:top_k]
        both = [(*x[best], 1 - x[best].sum()) for x in (q, p)]
        apart.append(sum(a * np.log(a / b) for a, b in zip(*both, strict=True)))
    return np.array(apart)


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0, "beta": 0.0},
        {"lmbda": 1.0, "beta": 1.0},
        {"lmbda": 0.5, "beta": 0.5, "temperature": 2.0},
    ],
)
@pytest.mark.anyio
async def test_it_comes_near_its_teacher(tmp_path: Path, settings: dict[str, Any]) -> None:
    plan = replace(PLAN, epochs=4, learning_rate=0.4, evaluate_every=99, **settings)
    memory = Memory()
    async with fake_service(tmp_path) as service:
        teacher = await taught(service)
        trainer = await service.create_model(base_model="fake")
        watch = evaluator(TASKS, reward=vowels, sampling=PLAN.sampling)
        done = await distil(
            trainer,
            TASKS,
            plan,
            teacher=teacher,
            held_out=TASKS[:3],
            run=Run(loggers=Loggers(memory)),
            evaluate=watch,
        )
    first, last = memory.rows[0], done.metrics
    assert done.steps == done.version == 12 == max(memory.rows)
    assert 0 < last["eval/loss"] < 0.3 * first["eval/loss"]
    assert {"eval/mean", "eval/agreement"} <= last.keys()
    assert memory.rows[1]["distil/on_policy_fraction"] == settings["lmbda"]
    assert 0 < last["train/teacher_rest"] < 1 and last["distil/reply_tokens"] > 1


@pytest.mark.anyio
async def test_the_first_loss_is_that_of_numpy(tmp_path: Path) -> None:
    """Of given replies with a prompt that only the teacher reads; so is that of the credit."""
    rows = [{**row, "teacher_prompt": "hint: aaa " + row["prompt"]} for row in GIVEN[:4]]
    memory = Memory()
    async with fake_service(tmp_path) as service:
        teacher = await taught(service)
        trainer = await service.create_model(base_model="fake")
        base = await service.create_sampling_client(base_model="fake")
        tokenizer = await trainer.get_tokenizer()
        want = []
        for row in rows:
            reply = [*tokenizer.encode(row["completion"]), 256]
            both = []
            for model, prompt in ((base, row["prompt"]), (teacher, row["teacher_prompt"])):
                found = await whole(model, [*tokenizer.encode(prompt), *reply])
                both.append(found[-len(reply) :])
            want.append(reverse_kl(*both, top_k=8))
        plan = replace(PLAN, beta=1.0, lmbda=0.0, steps=1)
        run = Run(loggers=Loggers(memory))
        await distil(trainer, rows, plan, teacher=teacher, run=run)
        assert memory.rows[1]["train/loss"] == pytest.approx(np.concatenate(want).mean(), abs=1e-5)

        groups: list[Group] = []
        full = credit.distil(teacher, top_k=8)

        async def kept(given: Sequence[Group]) -> list[list[Marks]]:
            groups.extend(given)
            return await full(given)

        student = await service.create_model(base_model="fake")
        policy = replace(POLICY, steps=1, credit=kept)
        done = await on_policy(student, TASKS, single_turn(vowels), policy)
        segments = [r.trajectory.segments[0] for g in groups for r in g.rollouts]
        each = []
        for one in segments:
            at = np.array(one.mask[1:]) > 0
            both = [(await whole(model, one.tokens))[at] for model in (base, teacher)]
            each.append(reverse_kl(*both, top_k=8))
        told = done.metrics["train/distil_loss"]
        assert told == pytest.approx(np.concatenate(each).mean(), abs=1e-5)
        assert done.metrics["train/loss"] == pytest.approx(told)
        assert done.metrics["train/grad_norm"] > 0 < done.metrics["kl/teacher"]


@pytest.mark.anyio
async def test_the_whole_distribution_is_a_credit_like_others(tmp_path: Path) -> None:
    """Alone it finds the teacher; rewards go with it; what `unless` leaves out teaches nothing."""
    async with fake_service(tmp_path) as service:
        teacher = await taught(service)

        async def after(one: Any, **more: Any) -> tuple[Any, Any]:
            student = await service.create_model(base_model="fake")
            plan = replace(POLICY, **{"steps": 2, "group_size": 2, "credit": one, **more})
            done = await on_policy(student, TASKS, single_turn(vowels), plan)
            return await weights(student), done.metrics

        full = credit.distil(teacher, top_k=8)
        _, first = await after(full, steps=1)
        alone, last = await after(full, steps=4, passes=2, minibatches=2)
        assert last["train/distil_loss"] < 0.3 * first["train/distil_loss"]
        both, metrics = await after(credit.total(credit.outcome(), full))
        assert metrics["credit/outcome/mean_abs"] > 0 < metrics["train/distil_loss"]
        nothing, _ = await after(credit.unless(lambda rollout: True, full))
        rewards, _ = await after(credit.outcome())
        quiet, _ = await after(
            credit.total(credit.outcome(), credit.unless(lambda rollout: True, full))
        )
        base = await weights(await service.create_model(base_model="fake"))
        assert nothing == base != alone
        np.testing.assert_allclose(rewards[1:], quiet[1:], atol=1e-9)  # type: ignore[arg-type]
        assert np.abs(np.subtract(rewards[1:], both[1:])).max() > 1e-3


@pytest.mark.anyio
async def test_marks_with_rows_of_another_number(tmp_path: Path) -> None:
    async def mine(groups: Sequence[Group]) -> list[list[Marks]]:
        soft = SoftTargets(np.zeros((1, 1), np.int64), np.full((1, 1), -1.0), np.ones(1))
        made = await credit.outcome()(groups)
        return [[replace(one, soft=(soft,)) for one in row] for row in made]

    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        with pytest.raises(InvalidRequestError, match=r"^mine\[0\]\[0\]\.soft\[0\]: has 1 rows"):
            await on_policy(trainer, TASKS, single_turn(vowels), replace(POLICY, credit=mine))
        assert (await trainer.get_info()).step == 0


async def distilled(
    home: Path, plan: DistilPlan, *, folder: Path | None = None, resume: bool = False
) -> tuple[list[float | None], dict[int, dict[str, float]]]:
    memory = Memory()
    opened = (
        open_run_folder(folder, plan.as_config(), resume=resume, may_differ=["steps"])
        if folder
        else None
    )
    async with fake_service(home) as service:
        teacher = await taught(service)
        trainer = await service.create_model(base_model="fake")
        run = Run(folder=opened, loggers=Loggers(memory), checkpoint_every=2)
        await distil(trainer, [*GIVEN, *TASKS], plan, teacher=teacher, run=run)
        return await weights(trainer), memory.rows


@pytest.mark.anyio
async def test_what_goes_on_is_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    ended, rows = await distilled(tmp_path / "a", PLAN, folder=tmp_path / "run a")
    short = replace(PLAN, steps=4)
    await distilled(tmp_path / "b", short, folder=tmp_path / "run b")
    again, more = await distilled(tmp_path / "b", PLAN, folder=tmp_path / "run b", resume=True)
    assert sorted(more) == [5, 6, 7, 8, 9, 10] and len(rows) == 10
    assert again == ended
    assert without_times(more).items() <= without_times(rows).items()


@pytest.mark.anyio
async def test_a_teacher_is_asked_once_about_what_is_given(tmp_path: Path) -> None:
    counts: list[Sequence[int]] = []
    async with fake_service(tmp_path) as service:
        teacher = await service.create_sampling_client(base_model="fake")
        trainer = await service.create_model(base_model="fake")

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(teacher, name)

            def compute_logprobs(self, prompt: Any, **more: Any) -> Any:
                counts.append(prompt.to_ints())
                return teacher.compute_logprobs(prompt, **more)

        plan = replace(PLAN, lmbda=0.0, epochs=3)
        await distil(trainer, GIVEN, plan, teacher=Counting())  # type: ignore[arg-type]
    assert len(counts) == len(GIVEN)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"lmbda": 2.0}, "lmbda"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 257}, "top_k"),
        ({"top_k": 3.5}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_a_plan_that_cannot_be_is_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        replace(PLAN, **settings)


def test_several_replies_have_no_other_prompt() -> None:
    inputs = {"target_tokens": [2, 3, 4, 5], "weights": [0.0, 1.0, 0.0, 1.0]}
    datum = Datum(model_input=[1, 2, 3, 4], loss_fn_inputs=inputs)
    text = given_text(datum, None, where="examples[0]")
    assert text.read == text.tokens == (1, 2, 3, 4, 5)
    assert text.learned.tolist() == text.asked.tolist() == [False, False, True, False, True]
    with pytest.raises(InvalidRequestError, match=r"^examples\[0\]\.completion: has several"):
        given_text(datum, (9,), where="examples[0]")


@pytest.mark.parametrize(
    ("row", "settings", "field"),
    [
        ("text", {}, r"examples\[1\]"),
        ({"completion": "a"}, {}, r"examples\[1\]\.prompt"),
        ({"text": "abc"}, {}, r"examples\[1\]\.prompt"),
        ({"text": "abc", "teacher_prompt": "a"}, {"lmbda": 0.0}, r"examples\[1\]\.prompt"),
        ({"prompt": ""}, {}, r"examples\[1\]\.prompt"),
        ({"prompt": 3}, {}, r"examples\[1\]\.prompt"),
        ({"prompt": "a", "completion": 3}, {}, r"examples\[1\]\.completion"),
        ({"prompt": "a", "teacher_prompt": [{"role": "user"}]}, {}, r"examples\[1\]\.teacher_pro"),
        ({"prompt": "a", "completion": "abc"}, {"max_length": 4}, r"examples\[1\].* 5 tokens"),
        ({"prompt": "\ud800"}, {}, r"examples\[1\]"),
    ],
)
@pytest.mark.anyio
async def test_a_row_that_teaches_nothing_is_named(
    tmp_path: Path, row: Any, settings: dict[str, Any], field: str
) -> None:
    plan = replace(PLAN, **settings)
    async with fake_service(tmp_path) as service:
        teacher = await service.create_sampling_client(base_model="fake")
        trainer = await service.create_model(base_model="fake")
        begin = time.monotonic()
        with pytest.raises(InvalidRequestError, match=field):
            await distil(trainer, [GIVEN[0], row], plan, teacher=teacher)
        with pytest.raises(InvalidRequestError, match=field):
            await check_distil(teacher, [GIVEN[0], row], plan, teacher=teacher)
        assert time.monotonic() - begin < 2
        assert (await trainer.get_info()).step == 0


@pytest.mark.anyio
async def test_a_teacher_that_cannot_teach_is_named(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        base = await service.create_sampling_client(base_model="fake")
        trainer = await service.create_model(base_model="fake")
        tokenizer = await trainer.get_tokenizer()

        def like(**other: Any) -> Any:
            names = ("base_model", "compute_logprobs", "get_tokenizer", "model_info", "sample")
            return SimpleNamespace(**{name: getattr(base, name) for name in names} | other)

        async def backwards() -> Any:
            words = tokenizer.get_vocab()
            turned = dict(zip(words, reversed(words.values()), strict=True))
            return SimpleNamespace(get_vocab=lambda: turned)

        async def nothing(prompt: Any, *, top_k: int) -> Any:
            found = await base.compute_logprobs(prompt, top_k=top_k)
            assert found.prompt_top_logprobs is not None
            wrong = np.full(found.prompt_top_logprobs.logprobs.shape, np.nan)
            top = SimpleNamespace(tokens=found.prompt_top_logprobs.tokens, logprobs=wrong)
            return SimpleNamespace(prompt_logprobs=found.prompt_logprobs, prompt_top_logprobs=top)

        small = base.model_info.model_copy(update={"vocab_size": 7})
        short = base.model_info.model_copy(update={"context_length": 6})
        for teacher, rows, error, said in (
            (object(), GIVEN, ConfigError, "^teacher.* gives no log-probabilities"),
            (like(get_tokenizer=backwards), GIVEN, ConfigError, "^teacher.* another vocabulary"),
            (like(model_info=small), GIVEN, ConfigError, "^top_k: is 8"),
            (like(model_info=short), GIVEN, ContextLengthError, r"\[3\], read by the teacher"),
            (
                like(model_info=short),
                [{"prompt": "a", "teacher_prompt": "abcdefg"}],
                ContextLengthError,
                r"\[0\]\.teacher_prompt",
            ),
            (like(compute_logprobs=nothing), GIVEN, InvalidRequestError, "^teacher: gave no 8"),
            (base, [], InvalidRequestError, "^examples"),
        ):
            with pytest.raises(error, match=said):
                await distil(trainer, rows, PLAN, teacher=teacher)
        for settings, field in (
            ({"top_k": 300}, "top_k"),
            ({"top_k": 2, "discount": 1.0}, "discount"),
        ):
            with pytest.raises(ConfigError, match=f"^{field}"):
                credit.distil(base, **settings)  # type: ignore[arg-type]
        assert (await trainer.get_info()).step == 0
