"""Reward models: trained by `preference`, loaded as rewards. On torch, which has heads."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import weaver_rl as rl
from tests.rl.test_loops import Memory, without_times
from weaver import AsyncRewardClient, AsyncServiceClient
from weaver.errors import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    UnsupportedError,
)
from weaver.types import SamplingParams
from weaver_rl.algorithms.run import Run
from weaver_rl.loggers import Loggers
from weaver_rl.run_folder import open_run_folder, release_run_folder
from weaver_rl.tasks.words import preference_pairs
from weaver_rl.types import Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from weaver import AsyncTrainingClient

pytestmark = pytest.mark.anyio
PAIRS = preference_pairs(24, seed=1)
PLAN = rl.PreferencePlan(
    loss="bradley_terry", epochs=2, batch_size=8, learning_rate=1e-3, seed=3, centre=0.01
)
LORA = {"rank": 4}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[AsyncServiceClient, AsyncTrainingClient]]:
    async with AsyncServiceClient(deterministic=True) as service:
        yield service, await service.create_model("weaver-nano", LORA, head="scalar")


def reply(text: str) -> Reply:
    return Reply(text=text, tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")


async def test_preference_trains_it_and_the_reward_says_what_it_was_trained_on() -> None:
    memory = Memory()
    async with opened() as (_, trainer):
        run = Run(loggers=Loggers(memory))
        done = await rl.preference(trainer, PAIRS, PLAN, held_out=PAIRS[:5], run=run)
        assert (done.steps, done.version) == (6, 6)
        rows = list(memory.rows.values())
        assert {"eval/accuracy", "eval/margin", "eval/loss"} <= rows[-1].keys()
        assert {"train/accuracy", "train/margin", "train/chosen_score"} <= rows[0].keys()
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]
        reward: Any = rl.reward_model(done.rewards)
        tokenizer, pair = await trainer.get_tokenizer(), PAIRS[0]
        said = [pair["chosen"], pair["rejected"]]
        texts = [tokenizer.encode(f"{pair['prompt']}{one}<|end|>") for one in said]
        scores = await trainer.score(texts)
        assert [await reward(pair, reply(one)) for one in said] == pytest.approx(scores, abs=1e-5)
        chat = {"prompt": [{"role": "user", "content": "rev:ab="}]}
        whole = [*chat["prompt"], {"role": "assistant", "content": "ba"}]
        tokens = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert await reward(chat, reply("ba")) == pytest.approx(
            (await trainer.score([tokens]))[0], abs=1e-5
        )
        with pytest.raises(UnsupportedError, match="reward model"):
            _ = done.sampler


async def test_a_run_that_stops_goes_on_exactly(tmp_path: Path) -> None:
    whole = Memory()
    async with opened() as (_, trainer):
        run = Run(loggers=Loggers(whole))
        await rl.preference(trainer, PAIRS, PLAN, held_out=PAIRS[:5], run=run)
    parts = Memory()
    for steps in (3, None):
        async with opened() as (_, trainer):
            folder = open_run_folder(tmp_path / "run", {}, resume=steps is None)
            run = Run(folder=folder, loggers=Loggers(parts), checkpoint_every=3)
            plan = rl.PreferencePlan(**{**_fields(PLAN), "steps": steps})
            done = await rl.preference(trainer, PAIRS, plan, held_out=PAIRS[:5], run=run)
            release_run_folder(folder)
    assert done.steps == 6
    assert without_times(parts.rows)[6] == without_times(whole.rows)[6]


def _fields(plan: rl.PreferencePlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


async def test_the_same_text_is_asked_about_once_and_few_at_the_same_time() -> None:
    asked: list[int] = []
    running = most = 0

    class Client(AsyncRewardClient):
        async def score(self, prompts: Any) -> list[float]:  # type: ignore[override]
            nonlocal running, most
            running += 1
            most = max(most, running)
            asked.append(prompts[0].length)
            await anyio.sleep(0.01)
            running -= 1
            return [float(len(asked))]

    async with opened() as (_, trainer):
        client = await trainer.save_weights_and_get_reward_client()
        client.__class__ = Client
        reward: Any = rl.reward_model(client, concurrency=2)
        found: dict[int, float] = {}

        async def one(i: int) -> None:
            found[i] = await reward({"prompt": "rev:ab="}, reply("ab" * (i % 5)))

        async with anyio.create_task_group() as tasks:
            for i in range(20):
                tasks.start_soon(one, i)
        assert len(asked) == 5 and most == 2
        assert all(found[i] == found[i % 5] for i in range(20))


def test_a_path_opens_a_client_of_its_own_in_any_event_loop() -> None:
    async def trained() -> tuple[str, list[float]]:
        async with opened() as (_, trainer):
            done = await rl.preference(trainer, PAIRS, PLAN)
            texts = [[1, 2], [3, 4, 5]]
            path = (await trainer.save_weights_for_sampler("rewards")).path
            return path, await done.rewards.score(texts)

    path, _ = anyio.run(trained)
    reward = rl.reward_model(path)
    assert path in reward.__name__
    done = rl.train(
        "weaver-nano",
        PAIRS,
        reward,
        steps=2,
        groups_per_step=2,
        group_size=4,
        lora_config=LORA,
        sampling=SamplingParams(max_tokens=4),
        display=False,
    )
    assert done.metrics["reward/std"] > 0
    with pytest.raises(UnsupportedError, match="scalar"):
        rl.reward_model(done.weights)


@pytest.mark.parametrize(
    ("given", "error", "field"),
    [
        ({"concurrency": 0}, ConfigError, "concurrency"),
        ({"base_url": "http://localhost"}, ConfigError, "base_url"),
    ],
)
async def test_bad_arguments(given: dict[str, Any], error: type[Exception], field: str) -> None:
    async with opened() as (_, trainer):
        client = await trainer.save_weights_and_get_reward_client()
        with pytest.raises(error, match=field):
            rl.reward_model(client, **given)


async def test_what_the_model_cannot_read_is_named() -> None:
    async with opened() as (_, trainer):
        reward: Any = rl.reward_model(await trainer.save_weights_and_get_reward_client())
        with pytest.raises(ContextLengthError, match="the prompt with its reply"):
            await reward({"prompt": "x" * 2000}, reply("y"))
        with pytest.raises(InvalidRequestError):
            await reward({"prompt": 3}, reply("y"))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "rejected": "b"}, "chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b<|end|>"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "margin"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "margin"),
    ],
)
async def test_a_bad_pair_is_named_before_anything_is_trained(
    row: dict[str, Any], field: str
) -> None:
    async with opened() as (_, trainer):
        before = await trainer.score([[1, 2, 3]])
        with pytest.raises(InvalidRequestError, match=rf"pairs\[1\]\.{field}"):
            await rl.preference(trainer, [PAIRS[0], row], PLAN)
        assert await trainer.score([[1, 2, 3]]) == before


async def test_a_margin_of_a_pair_asks_for_more() -> None:
    async with opened() as (_, trainer):
        found = []
        for margin in (0.0, 2.0):
            rows = [{**row, "margin": margin} for row in PAIRS]
            plan = rl.PreferencePlan(loss="bradley_terry", learning_rate=0.0, steps=0)
            found.append((await rl.preference(trainer, PAIRS, plan, held_out=rows)).metrics)
        assert found[1]["eval/loss"] > found[0]["eval/loss"] + 0.5
        assert found[1]["eval/margin"] == found[0]["eval/margin"]


async def test_head_and_loss_have_to_fit() -> None:
    async with opened() as (service, trainer):
        with pytest.raises(ConfigError, match="loss"):
            await rl.preference(trainer, PAIRS, rl.PreferencePlan(loss="dpo"))
        with pytest.raises(ConfigError, match="evaluate"):
            await rl.preference(trainer, PAIRS, PLAN, evaluate=rl.evaluator([], reward=len))  # type: ignore[arg-type]
        sampler = await service.create_sampling_client(base_model="weaver-nano")
        with pytest.raises(ConfigError, match="reference"):
            await rl.preference(trainer, PAIRS, PLAN, reference=sampler)
        with pytest.raises(ConfigError, match="bradley_terry"):
            await rl.preference(await service.create_model("weaver-nano", LORA), PAIRS, PLAN)
        with pytest.raises(UnsupportedError, match="reward model"):
            await rl.on_policy(trainer, PAIRS, rl.single_turn(len), rl.Plan(steps=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"centre": -1.0}, {"beta": 0.5}, {"loss": "dpo", "centre": 0.1}])
def test_a_plan_with_what_its_loss_has_not_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"centre|beta"):
        rl.PreferencePlan(**{"loss": "bradley_terry", **wrong})
