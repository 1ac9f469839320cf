"""What tenants do in a day: when their jobs come, how large they are, and what each asks for.

Sizes have heavy tails: a few jobs are most of the work.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from tests.simulate.costs import UNIT
from tests.simulate.groups import MODEL
from weaver.protocol import (
    CheckpointSaved,
    CreateModel,
    ForwardBackward,
    ModelCreated,
    OptimStep,
    ReleaseSampler,
    Sample,
    Sampled,
    SaveCheckpoint,
)
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

if TYPE_CHECKING:
    from tests.simulate.client import Client

STEP = OptimStep(params=AdamParams(learning_rate=1e-5))
BASE = f"base:{MODEL.name}"
KINDS = {"sft": 0.40, "grpo": 0.25, "evaluation": 0.35}
PEAK_HOUR, SWING = 15.0, 0.7
SAMPLES = 16
"""Of a problem of GRPO."""
TASKS = 8
"""That tenants evaluate: their prompts are the same for all."""
TOKENS_A_DATUM = 31
"""Of the simulation, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    tenants: int = 1000
    hours: float = 24.0
    jobs_a_day: float = 1.0
    """Of a tenant, on average."""
    size: float = 0.5
    """Of all jobs, in steps and prompts."""
    begins_at: float = 0.0
    """The hour of the day."""

    def rate(self, at_s: float) -> float:
        """Jobs a second of one tenant."""
        hour = self.begins_at + at_s / 3600
        swing = 1 + SWING * math.cos(2 * math.pi * (hour - PEAK_HOUR) / 24)
        return self.jobs_a_day * swing / 86_400

    def arrivals(self, seed: int) -> list[tuple[float, str, int]]:
        """Of jobs: when, of which kind, and a number; a Poisson process of a changing rate."""
        rng = random.Random(f"arrivals {seed}")
        most = self.tenants * self.jobs_a_day * (1 + SWING) / 86_400
        at, found = 0.0, []
        while (at := at + rng.expovariate(most)) < 3600 * self.hours:
            if rng.random() < self.tenants * self.rate(at) / most:
                kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
                found.append((at, kind, rng.randrange(self.tenants)))
        return found


def pareto(rng: random.Random, least: float, most: float, alpha: float = 1.2) -> int:
    return int(min(most, least * rng.paretovariate(alpha)))


@dataclass(slots=True)
class Steps:
    """What jobs took, in seconds."""

    sft: list[float] = field(default_factory=list)
    grpo: list[float] = field(default_factory=list)
    evaluation: list[float] = field(default_factory=list)
    """A whole one."""


@dataclass(slots=True, eq=False)
class Job:
    """One run or evaluation of a tenant, until it is done or the day is over."""

    client: Client
    rng: random.Random
    steps: Steps
    size: float
    ends_at: float
    _number: int = 0

    async def run(self, kind: str) -> None:
        await getattr(self, kind)()

    def _over(self) -> bool:
        return anyio.current_time() >= self.ends_at

    def _gradient(self, units: int) -> ForwardBackward:
        """So many tokens of the simulation, and a number that the run has not had."""
        self._number += 1
        datums = []
        while units > 0:
            length = min(units, TOKENS_A_DATUM)
            units -= length
            tokens = [self._number, *range(1, length)]
            datums.append(Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tokens}))
        return ForwardBackward(datums=tuple(datums), loss_fn="cross_entropy")

    async def create(self) -> str:
        rank = self.rng.choice([8, 16, 32, 32, 64])
        lora = LoraConfig(rank=rank, train_unembed=False)
        outcome = await self.client.ask(CreateModel(base_model=MODEL.name, lora_config=lora))
        assert isinstance(outcome.result, ModelCreated)
        return outcome.result.run.run_id

    async def step(self, run_id: str, batches: list[int]) -> None:
        operations = [*(self._gradient(units) for units in batches), STEP]
        sent = await self.client.send(*operations, run_id=run_id, tokens=float(UNIT * sum(batches)))
        await self.client.outcomes(sent)

    async def sft(self) -> None:
        run_id, rng = await self.create(), self.rng
        units = max(8, min(1024, int(rng.lognormvariate(math.log(200), 0.8))))
        for _ in range(int(self.size * pareto(rng, 30, 1500)) or 1):
            if self._over():
                break
            begin = anyio.current_time()
            await self.step(run_id, [units])
            self.steps.sft.append(anyio.current_time() - begin)
        await self.client.ask(SaveCheckpoint(purpose="state", name="last"), run_id=run_id)

    async def grpo(self) -> None:
        run_id, rng = await self.create(), self.rng
        problems, most = rng.choice([4, 8, 8, 16]), rng.choice([8, 16, 16, 31])
        sampler = await self._publish(run_id)
        for _ in range(int(self.size * pareto(rng, 15, 400)) or 1):
            if self._over():
                break
            begin = anyio.current_time()
            prompts = [self._prompt() for _ in range(problems)]
            drawn = await self._sample(sampler, prompts, samples=SAMPLES, most=most)
            units = problems * SAMPLES + drawn
            await self.step(run_id, [units // 2, units - units // 2])
            before, sampler = sampler, await self._publish(run_id)
            await self.client.ask(ReleaseSampler(sampler_id=before))
            self.steps.grpo.append(anyio.current_time() - begin)
        await self.client.ask(ReleaseSampler(sampler_id=sampler))

    async def evaluation(self) -> None:
        rng = self.rng
        samples, most = rng.choice([1, 4, 4]), rng.choice([4, 8, 16, 31])
        left = int(self.size * pareto(rng, 40, 1500)) or 1
        task = 10_000 * rng.randrange(TASKS)
        begin = anyio.current_time()
        while left > 0 and not self._over():
            prompts = [ModelInput.from_ints([task + left - i]) for i in range(min(left, 64))]
            await self._sample(BASE, prompts, samples=samples, most=most)
            left -= len(prompts)
        self.steps.evaluation.append(anyio.current_time() - begin)

    def _prompt(self) -> ModelInput:
        return ModelInput.from_ints([self.rng.randrange(MODEL.vocab_size)])

    async def _publish(self, run_id: str) -> str:
        saved = (await self.client.ask(SaveCheckpoint(purpose="sampler"), run_id=run_id)).result
        assert isinstance(saved, CheckpointSaved)
        return saved.checkpoint.path

    async def _sample(
        self, sampler_id: str, prompts: list[ModelInput], *, samples: int, most: int
    ) -> int:
        """Tokens of the simulation that were drawn."""
        params = SamplingParams(max_tokens=most)
        asked = [
            Sample(sampler_id=sampler_id, prompt=one, params=params, num_samples=samples)
            for one in prompts
        ]
        told = await self.client.outcomes(await self.client.send(*asked))
        return sum(
            len(sequence.tokens)
            for outcome in told
            if isinstance(outcome.result, Sampled)
            for sequence in outcome.result.output.sequences
        )
