"""Preferences: the losses against numpy in float64, rows, and the loop's mechanics."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.rl.fake import fake_service
from tests.rl.test_loops import Memory, weights, without_times
from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl.algorithms.preference import PreferencePlan, check_pairs, preference
from weaver_rl.algorithms.run import Run
from weaver_rl.loggers import Loggers
from weaver_rl.pairs import read_pair
from weaver_rl.preference_losses import LOSSES, Batch, Replies
from weaver_rl.run_folder import open_run_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


F = "npt.NDArray[np.float64]"
PAIRS = [
    {"prompt": f"{i}=", "chosen": "ab"[: 1 + i % 2], "rejected": "cde"[: 1 + i % 3]}
    for i in range(13)
]
PLAN = PreferencePlan(epochs=2, batch_size=4, learning_rate=0.1, seed=3)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def right_dpo(c: Any, r: Any, beta: float, gamma: float, wrong: float, kl: float) -> Any:
    margin = beta * ((c[0] - c[1]) - (r[0] - r[1]))
    losses = (1 - wrong) * np.log1p(np.exp(-margin)) + wrong * np.log1p(np.exp(margin))
    return losses.mean()


def right_ipo(c: Any, r: Any, beta: float, gamma: float, wrong: float, kl: float) -> Any:
    return (((c[0] - c[1]) - (r[0] - r[1]) - 0.5 / beta) ** 2).mean()


def right_simpo(c: Any, r: Any, beta: float, gamma: float, wrong: float, kl: float) -> Any:
    return -np.log(sigmoid(beta / c[2] * c[0] - beta / r[2] * r[0] - gamma)).mean()


def right_orpo(c: Any, r: Any, beta: float, gamma: float, wrong: float, kl: float) -> Any:
    p, q = np.exp(c[0] / c[2]), np.exp(r[0] / r[2])
    ratio = (p / (1 - p)) / (q / (1 - q))
    return (-np.log(p) - beta * np.log(ratio / (1 + ratio))).mean()


def right_kto(c: Any, r: Any, beta: float, gamma: float, wrong: float, kl: float) -> Any:
    zero = max(0.0, kl)
    good = [1 - sigmoid(beta * (x - y - zero)) for x, y, _ in zip(*c, strict=True)]
    bad = [1 - sigmoid(beta * (zero - (x - y))) for x, y, _ in zip(*r, strict=True)]
    return np.mean(good + bad)


RIGHT: dict[str, Callable[..., Any]] = {
    "dpo": right_dpo,
    "ipo": right_ipo,
    "simpo": right_simpo,
    "orpo": right_orpo,
    "kto": right_kto,
}


def batch_of(chosen: Any, rejected: Any, *, kl: float) -> Batch:
    sides = []
    for logprobs, reference, lengths in (chosen, rejected):
        sides.append(
            Replies(
                logprobs=torch.tensor(logprobs, requires_grad=True),
                reference=torch.tensor(reference),
                lengths=torch.tensor(lengths),
                given=torch.ones(len(lengths), dtype=torch.float64),
            )
        )
    return Batch(
        chosen=sides[0],
        rejected=sides[1],
        beta=0.3,
        gamma=0.7,
        label_smoothing=0.1,
        kl=torch.tensor(kl, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("kl", [0.4, -0.4])
def test_a_loss_and_its_gradient_are_those_of_numpy(name: str, kl: float) -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = (
        (-rng.uniform(1, 9, 6), -rng.uniform(1, 9, 6), rng.integers(2, 9, 6).astype(float))
        for _ in range(2)
    )
    batch = batch_of(chosen, rejected, kl=kl)
    loss = LOSSES[name].formula(batch)
    right = RIGHT[name](chosen, rejected, 0.3, 0.7, 0.1, kl)
    assert loss.item() == pytest.approx(right, abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    for side, (moved, other) in (("chosen", (chosen, rejected)), ("rejected", (rejected, chosen))):
        gradient = getattr(batch, side).logprobs.grad
        for i in range(6):
            values = []
            for step in (1e-6, -1e-6):
                one = (moved[0] + step * (np.arange(6) == i), *moved[1:])
                sides = (one, other) if side == "chosen" else (other, one)
                values.append(RIGHT[name](*sides, 0.3, 0.7, 0.1, kl))
            slope = (values[0] - values[1]) / 2e-6
            assert float(gradient[i]) == pytest.approx(slope, abs=1e-7)


def test_a_reply_that_is_certain_has_a_finite_loss() -> None:
    certain = (np.zeros(1), np.zeros(1), np.ones(1))
    assert torch.isfinite(LOSSES["orpo"].formula(batch_of(certain, certain, kl=0.0)))


SHARED = [{"role": "user", "content": "Hi"}]
SAID = [{"role": "assistant", "content": text} for text in ("Yes", "No")]


def test_messages_that_begin_alike_have_their_prompt() -> None:
    row = {"chosen": [*SHARED, SAID[0]], "rejected": [*SHARED, SAID[1]]}
    sides = read_pair(row, LOSSES["dpo"], where="pairs[0]").sides
    assert sides["chosen"] == {"prompt": SHARED, "completion": [SAID[0]]}
    assert sides["rejected"]["completion"] == [SAID[1]]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("text", r"pairs\[0\]"),
        ({"prompt": "a", "chosen": "b"}, r"pairs\[0\]\.rejected"),
        ({"prompt": "a", "rejected": "b", "chosen": None}, r"pairs\[0\]\.chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"pairs\[0\]\.rejected"),
        ({"chosen": "b", "rejected": "c"}, r"pairs\[0\]\.prompt"),
        ({"chosen": [*SHARED], "rejected": [*SHARED, SAID[0]]}, r"pairs\[0\]"),
        ({"chosen": [SAID[0]], "rejected": [SAID[1]]}, r"pairs\[0\]"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, r"pairs\[0\]\.chosen"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, r"pairs\[0\]"),
    ],
)
@pytest.mark.anyio
async def test_a_row_that_compares_nothing_is_named(tmp_path: Path, row: Any, field: str) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        with pytest.raises(InvalidRequestError, match=field):
            await preference(trainer, [row], PLAN)
        assert (await trainer.get_info()).step == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"loss": "ppo"}, "loss"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing"),
        ({"gamma": -1.0}, "gamma"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1, "loss": "kto"}, "batch_size"),
        ({"steps": -1}, "steps"),
    ],
)
def test_a_plan_that_cannot_be_is_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        replace(PLAN, **settings)


async def preferred(
    home: Path,
    plan: PreferencePlan,
    *,
    pairs: Any = PAIRS,
    folder: Path | None = None,
    resume: bool = False,
) -> tuple[list[float | None], dict[int, dict[str, float]], dict[str, float]]:
    memory = Memory()
    opened = (
        open_run_folder(folder, plan.as_config(), resume=resume, may_differ=["steps"])
        if folder
        else None
    )
    async with fake_service(home) as service:
        trainer = await service.create_model(base_model="fake")
        result = await preference(
            trainer,
            pairs,
            plan,
            held_out=PAIRS[:4],
            run=Run(folder=opened, loggers=Loggers(memory), checkpoint_every=2),
        )
        return await weights(trainer), memory.rows, dict(result.metrics)


@pytest.mark.parametrize("loss", [name for name, one in LOSSES.items() if not one.scores])
@pytest.mark.anyio
async def test_it_learns_and_evaluates(tmp_path: Path, loss: str) -> None:
    plan = replace(PLAN, epochs=6, loss=loss, learning_rate=0.3, evaluate_every=9)
    _, rows, last = await preferred(tmp_path, plan)
    assert sorted(rows) == list(range(len(rows)))
    assert last["eval/loss"] < rows[0]["eval/loss"]
    assert last["eval/accuracy"] > 0.5


@pytest.mark.anyio
async def test_kto_learns_from_rows_of_one_side(tmp_path: Path) -> None:
    lone = [
        {k: v for k, v in p.items() if k != ("chosen", "rejected")[i % 2]}
        for i, p in enumerate(PAIRS)
    ]
    plan = replace(PLAN, epochs=6, loss="kto", learning_rate=0.3)
    _, rows, last = await preferred(tmp_path, plan, pairs=lone)
    assert last["eval/accuracy"] > 0.5 and "train/kl" in rows[1]


@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo"])
@pytest.mark.anyio
async def test_what_goes_on_is_as_if_it_had_not_stopped(tmp_path: Path, loss: str) -> None:
    plan = replace(PLAN, epochs=3, loss=loss)
    whole, rows, _ = await preferred(tmp_path / "a", plan, folder=tmp_path / "run a")
    short = replace(plan, steps=4)
    await preferred(tmp_path / "b", short, folder=tmp_path / "run b")
    again, more, _ = await preferred(tmp_path / "b", short, folder=tmp_path / "run b", resume=True)
    assert 5 not in more and again
    if loss == "dpo":  # all pairs are in the first epoch, so nothing new is asked
        later = replace(plan, steps=None)
        ended, last, _ = await preferred(
            tmp_path / "b", later, folder=tmp_path / "run b", resume=True
        )
        assert ended == whole
        assert without_times(last).items() <= without_times(rows).items()
    if loss == "kto":  # replies to other prompts are others in the next epoch
        with pytest.raises(ConfigError, match="reference"):
            await preferred(tmp_path / "b", plan, folder=tmp_path / "run b", resume=True)


@pytest.mark.anyio
async def test_a_reference_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        sampler = await service.create_sampling_client(base_model="fake")
        with pytest.raises(ConfigError, match="reference"):
            await preference(trainer, PAIRS, replace(PLAN, loss="simpo"), reference=sampler)
        with pytest.raises(InvalidRequestError, match=r"pairs"):
            await preference(trainer, PAIRS[:1], replace(PLAN, loss="kto"))

        async def backwards() -> Any:
            known = (await trainer.get_tokenizer()).get_vocab()
            words = dict(zip(known, reversed(known.values()), strict=True))
            return SimpleNamespace(get_vocab=lambda: words)

        other: Any = SimpleNamespace(base_model="big", get_tokenizer=backwards)
        with pytest.raises(ConfigError, match=r"^reference: big has another vocabulary"):
            await preference(trainer, PAIRS, PLAN, reference=other)
        await check_pairs(sampler, PAIRS, PLAN)
        own = await preference(trainer, PAIRS, replace(PLAN, steps=0))
        given = await preference(trainer, PAIRS, replace(PLAN, steps=0), reference=sampler)
        assert own.steps == given.steps == 0
