"""Weights that move while rollouts are under way: whose each token is, how old, what it saves."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import anyio
import numpy as np
import pytest

from tests.fake_engine.two_devices import TwoDevices
from tests.rl.fake import vowels
from tests.rl.scripted import byte_tokenizer
from tests.rl.test_loops import PLAN, RATIO, TASKS, Memory
from weaver import AsyncServiceClient
from weaver.errors import ConfigError, EngineError
from weaver.server.service import LocalService
from weaver.types import (
    AdamParams,
    Datum,
    ModelInput,
    SampleDelta,
    SampledSequence,
    SampleResult,
    SamplingParams,
)
from weaver_rl.advantages import group_centred
from weaver_rl.algorithms.policy import off_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.in_flight import InFlight, MovedSequence, unfollowed, versions_of
from weaver_rl.loggers import Loggers
from weaver_rl.objectives import Objective
from weaver_rl.plan import Plan
from weaver_rl.rollouts import each, single_turn
from weaver_rl.run_folder import manifests, open_run_folder
from weaver_rl.transcripts import read_transcripts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.advantages import AdvantageFn
    from weaver_rl.agent import Agent
    from weaver_rl.algorithms.step import Stepped
    from weaver_rl.plan import Move
    from weaver_rl.types import BoolPG, Filtered, FloatPG, Group, Reply, Task

AHEAD = replace(PLAN, max_staleness=2, objective=RATIO, max_logprob_gap=1e-4)


@asynccontextmanager
async def two_devices(
    home: Path, *, deterministic: bool = False, **times: float
) -> AsyncIterator[tuple[AsyncServiceClient, TwoDevices]]:
    engine = TwoDevices(**times)
    with anyio.fail_after(60):
        async with (
            LocalService(engine, home=home, deterministic=deterministic) as service,
            AsyncServiceClient(service=service, home=home) as client,
        ):
            yield client, engine


class Kept(Run):
    """Keeps the groups of each step."""

    def __init__(self, memory: Memory | None = None, **given: Any) -> None:
        super().__init__(loggers=Loggers(memory or Memory()), **given)
        self.groups: dict[int, tuple[Group, ...]] = {}

    def log_rollouts(self, chosen: Filtered, stepped: Stepped, *, step: int) -> None:
        self.groups[step] = chosen.kept
        super().log_rollouts(chosen, stepped, step=step)


def keeping(
    trainer: AsyncTrainingClient, moved_on: Sequence[anyio.Event] = ()
) -> dict[int, AsyncSamplingClient]:
    """By version, the samplers that a loop makes of this trainer from now on.

    `moved_on`: by version, set once there are newer weights.
    """
    made: dict[int, AsyncSamplingClient] = {}
    make = trainer.save_weights_and_get_sampling_client

    async def kept() -> AsyncSamplingClient:
        sampler = await make()
        for event in moved_on[: sampler.weights_version]:
            event.set()
        return made.setdefault(sampler.weights_version, sampler)

    trainer.save_weights_and_get_sampling_client = kept  # type: ignore[method-assign,assignment]
    return made


async def gaps(
    sampler: AsyncSamplingClient, tokens: Sequence[int], logprobs: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Differences from what a sampler says of these tokens at their places, nats."""
    told = await sampler.compute_logprobs(list(tokens))
    return np.abs(np.array([0.0, *told[1:]], dtype=float) - np.array(logprobs))


# --- overlap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1])
def test_training_and_sampling_overlap(staleness: int, tmp_path: Path) -> None:
    """Wall over the sum of both, on devices that take as long for each: half is the ideal."""
    memory = Memory()
    sampling = SamplingParams(max_tokens=4)
    small = replace(AHEAD, groups_per_step=2, group_size=2, sampling=sampling)
    plan = replace(small, max_staleness=staleness, steps=9 if staleness else 3)

    async def run() -> float:
        async with two_devices(tmp_path, pass_s=0.4, token_s=0.1) as (service, engine):
            trainer = await service.create_model(base_model="fake")
            await trainer.get_tokenizer()
            begin, logged = time.monotonic(), Run(loggers=Loggers(memory))
            await off_policy(trainer, TASKS, single_turn(vowels), plan, run=logged)
            return (time.monotonic() - begin) / sum(engine.seconds.values())

    ratio = anyio.run(run)
    overlaps = [memory.rows[step]["time/overlap_s"] for step in range(2, plan.steps)]
    if staleness:
        assert ratio <= 0.7
        assert min(overlaps) > 0.2
    else:
        assert ratio >= 0.95
        assert max(overlaps) == 0


# --- whose tokens they are ----------------------------------------------------------------------


async def until_newer(reply: Reply, moved_on: Sequence[anyio.Event]) -> None:
    """Waits for newer weights than those of a reply; of the first ones not for long, since the
    first step has to end before there are any."""
    with anyio.move_on_after(20 if reply.weights_version else 0.2):
        await moved_on[reply.weights_version].wait()


async def check_versions(
    run: Kept, made: Mapping[int, AsyncSamplingClient], plan: Plan
) -> Counter[int]:
    """Each token is of the weights that it names, none too old; how many weights rollouts have."""
    mixed: Counter[int] = Counter()
    for step, groups in run.groups.items():
        assert len(groups) == plan.groups_per_step
        for rollout in (one for group in groups for one in group.rollouts):
            drawn_by: set[int] = set()
            for segment in rollout.trajectory.segments:
                versions = np.array(segment.versions)
                for version in {*segment.versions} - {-1}:
                    differ = await gaps(made[version], segment.tokens, segment.logprobs)
                    assert differ[versions == version].max() < 1e-4
                    drawn_by.add(version)
            assert max(drawn_by) <= step - 1 <= min(drawn_by) + plan.max_staleness
            mixed[len(drawn_by)] += 1
    return mixed


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("moves", [None, "never"])
async def test_a_turn_begins_with_the_newest_weights(moves: Move | None, tmp_path: Path) -> None:
    run, moved_on = Kept(), [anyio.Event() for _ in range(PLAN.steps + 1)]

    async def two_turns(agent: Agent, task: Task) -> float:
        first = await agent.chat(task["prompt"])
        await until_newer(first, moved_on)
        return vowels(task, await agent.chat("again"))

    plan = replace(AHEAD, in_flight=moves)
    async with two_devices(tmp_path) as (service, _):
        trainer = await service.create_model(base_model="fake")
        made = keeping(trainer, moved_on)
        await off_policy(trainer, TASKS, each(two_turns), plan, run=run)
        mixed = await check_versions(run, made, plan)
    if moves is None:
        assert mixed[2] >= 48, mixed  # all that did not begin with the first weights
    else:
        assert set(mixed) == {1}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_replies_go_on_with_newer_weights(tmp_path: Path) -> None:
    """With slow and fast ones, of which the slow outlive several weights."""
    run, memory = Kept(memory := Memory()), memory
    sampling = SamplingParams(max_tokens=30, temperature=0.8)
    plan = replace(AHEAD, sampling=sampling, in_flight="reply")

    async def uneven(agent: Agent, task: Task) -> float:
        return vowels(
            task, await agent.complete(task["prompt"], max_tokens=3 * len(task["prompt"]))
        )

    tasks = [{"prompt": f"{i}=" * (1 + 4 * (i % 2))} for i in range(10)]
    async with two_devices(tmp_path, token_s=0.03) as (service, _):
        trainer = await service.create_model(base_model="fake")
        made = keeping(trainer)
        await off_policy(trainer, tasks, each(uneven), plan, run=run)
        mixed = await check_versions(run, made, plan)
    assert mixed[2] + mixed[3] >= 4, mixed
    for row in memory.rows.values():
        assert row["staleness/max"] <= plan.max_staleness
        shares = {k: v for k, v in row.items() if k.startswith("staleness/share_")}
        assert sum(shares.values()) == pytest.approx(1)
        ages = sum(int(k.rpartition("_")[2]) * v for k, v in shares.items())
        assert ages == pytest.approx(row["staleness/mean"])
    assert max(row["staleness/mixed_fraction"] for row in memory.rows.values()) > 0


def dealt(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """Advantages of rewards that are dealt to any rollouts of their groups."""
    dice = np.random.default_rng(int(rewards_P_G.sum() * 1e6))
    return group_centred(dice.permuted(rewards_P_G, axis=1), valid_P_G)


@pytest.mark.parametrize("advantage", [group_centred, dealt])
def test_it_learns_from_tokens_of_several_weights(advantage: AdvantageFn, tmp_path: Path) -> None:
    memory = Memory()
    plan = replace(
        AHEAD,
        steps=20,
        advantage=advantage,
        objective=Objective(correction="token"),
        sampling=SamplingParams(max_tokens=12),
        in_flight="reply",
    )

    async def run() -> None:
        async with two_devices(tmp_path, token_s=0.01) as (service, _):
            trainer = await service.create_model(base_model="fake")
            logged = Run(loggers=Loggers(memory))
            await off_policy(trainer, TASKS, single_turn(vowels), plan, run=logged)

    anyio.run(run)
    before, after = (
        sum(memory.rows[step]["reward/mean"] for step in steps) / 4
        for steps in (range(1, 5), range(13, 17))
    )
    mixed = [row["staleness/mixed_fraction"] for row in memory.rows.values()]
    assert max(mixed) > 0
    assert (after > before + 0.15) == (advantage is group_centred)


async def learn(trainer: AsyncTrainingClient, text: str) -> AsyncSamplingClient:
    """Weights that are far from the former."""
    tokens = (await trainer.get_tokenizer()).encode(text)
    datum = Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )
    for _ in range(2):
        trainer.forward_backward([datum])
        await trainer.optim_step(AdamParams(learning_rate=1e-2))
    return await trainer.save_weights_and_get_sampling_client()


def watched(sampler: AsyncSamplingClient) -> anyio.Event:
    """Set once a stream of this sampler has told of a token."""
    begun, stream = anyio.Event(), sampler.stream

    async def told(*args: Any, **given: Any) -> AsyncGenerator[SampleDelta, None]:
        async with aclosing(cast("AsyncGenerator[SampleDelta, None]", stream(*args, **given))) as s:
            async for delta in s:
                begun.set()
                yield delta

    sampler.stream = told  # type: ignore[method-assign]
    return begun


async def moved_twice(service: AsyncServiceClient, model: str) -> None:
    """Draws while weights move, and asks each of them for the numbers of its tokens."""
    trainer = await service.create_model(model, {"rank": 8})
    samplers = {0: await trainer.save_weights_and_get_sampling_client()}
    begun = watched(samplers[0])
    in_flight = InFlight(samplers[0], within=True)
    prompt = ModelInput.from_ints((await trainer.get_tokenizer()).encode("rev:abc="))
    params = SamplingParams(max_tokens=400, temperature=0.7, ignore_eos=True, seed=3)
    replies: list[SampledSequence] = []

    async def draw() -> None:
        replies.extend((await in_flight.sample(prompt, params, num_samples=3)).sequences)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(draw)
        for _ in range(2):
            sampler = await learn(trainer, "rev:abcd=dcba, the quick brown fox")
            samplers[sampler.weights_version] = sampler
            await begun.wait()
            begun = watched(sampler)
            in_flight.move(sampler)
    assert len({reply.tokens for reply in replies}) == 3
    for sequence in replies:
        begin, versions = prompt.length, np.array(versions_of(sequence))
        assert sequence.stop_reason == "length"
        assert len(sequence.tokens) == len(versions) == 400
        assert versions.tolist() == sorted(versions)
        assert set(versions) == {0, 2, 4} and sequence.weights_version == 4
        tokens = [*prompt.to_ints(), *sequence.tokens]
        logprobs = [0.0] * begin + list(sequence.logprobs)
        for other, sampler in samplers.items():
            differ = (await gaps(sampler, tokens, logprobs))[begin:]
            for version in (0, 2, 4):
                assert (differ[versions == version].max() < 1e-4) == (version == other)


@pytest.mark.anyio
async def test_numbers_are_of_the_weights_that_drew_each_token(tmp_path: Path) -> None:
    async with two_devices(tmp_path, token_s=0.002) as (service, _):
        await moved_twice(service, "fake")


def test_so_they_are_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")

    async def run() -> None:
        with anyio.fail_after(100):
            async with AsyncServiceClient(home=tmp_path) as service:
                await moved_twice(service, "weaver-nano")

    anyio.run(run)


# --- a run that goes on -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    plan = replace(AHEAD, in_flight="reply", steps=6)
    folder = open_run_folder(tmp_path / "run", plan.as_config())

    class Killed(Exception):
        pass

    class Bomb(Kept):
        async def log(self, metrics: Mapping[str, float], *, step: int) -> None:
            if step > 3:
                raise Killed
            await super().log(metrics, step=step)

    async def go(run: Kept) -> None:
        async with two_devices(tmp_path, token_s=0.005) as (service, _):
            trainer = await service.create_model(base_model="fake")
            await off_policy(trainer, TASKS, single_turn(vowels), plan, run=run)

    with pytest.raises(Killed):
        await go(Bomb(folder=folder, exact=False, checkpoint_every=2))
    memory = Memory()
    resumed = Kept(memory, folder=folder, exact=False, checkpoint_every=2)
    await go(resumed)
    assert sorted(memory.rows) == [3, 4, 5, 6]
    assert [one.step for one in manifests(folder)] == [6, 4, 2]
    assert all(len(read_transcripts(folder.transcripts, step)) == 16 for step in range(1, 7))
    assert all(row["staleness/max"] <= 2 for row in memory.rows.values())


# --- a reply of several requests ----------------------------------------------------------------


class Requests:
    """Has what `InFlight` uses of a sampling client: streams of what is scripted, text or tokens.

    A number ends the reply, None hangs for ever, an error is raised; what is asked is kept.
    """

    def __init__(self, version: int, *scripts: Sequence[str | int | Exception | None]) -> None:
        self.weights_version = version
        self.asked: list[tuple[str, SamplingParams]] = []
        self._scripts = list(scripts)

    async def get_tokenizer(self) -> Any:
        return byte_tokenizer()

    async def sample(self, *args: object, **given: object) -> SampleResult:
        raise NotImplementedError("one request")

    async def stream(
        self, prompt: ModelInput, params: SamplingParams, *, num_samples: int
    ) -> AsyncGenerator[SampleDelta, None]:
        tokenizer = byte_tokenizer()
        self.asked.append((str(tokenizer.decode(prompt.to_ints())), params))
        count = 0
        for said in self._scripts.pop(0):
            if isinstance(said, Exception):
                raise said
            if said is None:
                await anyio.sleep_forever()
            tokens = said if isinstance(said, list) else tokenizer.encode(str(said))
            tokens = [said] if isinstance(said, int) else tokens
            for token in tokens:
                count += 1
                last = isinstance(said, int) or count == params.max_tokens
                yield SampleDelta(
                    index=0,
                    tokens=(token,),
                    text="",
                    logprobs=(-1.0,),
                    sampling_logprobs=(-2.0,),
                    stop_reason=("stop" if isinstance(said, int) else "length") if last else None,
                )


async def moved(first: Requests, second: Requests, params: SamplingParams) -> MovedSequence:
    """A reply that `first` begins, and `second` goes on with once nothing more comes."""
    in_flight = InFlight(cast("Any", first), within=True)
    found: list[SampleResult] = []

    async def draw() -> None:
        found.append(await in_flight.sample(prompt(), params))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(draw)
        await anyio.wait_all_tasks_blocked()
        in_flight.move(cast("Any", second))
    [sequence] = found[0].sequences
    assert isinstance(sequence, MovedSequence)
    return sequence


def prompt() -> ModelInput:
    return ModelInput.from_ints(byte_tokenizer().encode("Q:"))


@pytest.mark.anyio
async def test_the_next_request_begins_where_the_last_was() -> None:
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(max_tokens=9, seed=5, stop_token_ids=(end, 3))
    first, second = Requests(4, ["He y\u00e9", None]), Requests(6, ["o", end])
    drawn = await moved(first, second, params)
    assert [asked[0] for asked in first.asked + second.asked] == ["Q:", "Q:He y\u00e9"]
    given = second.asked[0][1]
    kept = len(byte_tokenizer().encode("He y\u00e9"))
    assert given.max_tokens == 9 - kept and given.seed not in (5, None)
    assert given.model_copy(update={"max_tokens": 9, "seed": 5}) == params
    assert drawn.versions == (4,) * kept + (6, 6) and drawn.weights_version == 6
    assert drawn.text == "He y\u00e9o" and drawn.stop_reason == "stop"
    assert drawn.sampling_logprobs == (-2.0,) * (kept + 2)


@pytest.mark.anyio
async def test_a_character_and_a_stop_string_may_lie_across() -> None:
    euro = byte_tokenizer().encode("\u20ac")
    params = SamplingParams(max_tokens=40, seed=5, stop=("</a>",))
    first = Requests(0, ["x", euro[:1], None])
    drawn = await moved(first, Requests(1, [euro[1:], "y</", "a", "> and on", None]), params)
    assert drawn.text == "x\u20acy"
    first = Requests(0, ["\u20acx</", None])
    drawn = await moved(first, Requests(1, ["a", "> and on", None]), params)
    assert drawn.text == "\u20acx" and drawn.stop_reason == "stop"
    assert str(byte_tokenizer().decode(list(drawn.tokens))) == "\u20acx</a>"
    drawn = await moved(Requests(0, ["x</", None]), Requests(1, ["z" * 50]), params)
    assert drawn.text == "x</" + "z" * 37 and drawn.stop_reason == "length"


@pytest.mark.anyio
async def test_what_fails_is_asked_again_from_where_it_was_if_anything_came() -> None:
    lost = EngineError("a worker ended")
    params = SamplingParams(max_tokens=4, seed=5)
    sampler = Requests(2, ["ab", lost], ["cdef"])
    [drawn] = (await InFlight(cast("Any", sampler), within=True).sample(prompt(), params)).sequences
    assert [asked[0] for asked in sampler.asked] == ["Q:", "Q:ab"]
    assert versions_of(drawn) == (2,) * len(drawn.tokens) and drawn.stop_reason == "length"
    nothing = Requests(2, ["ab", lost], [lost])
    with pytest.raises(EngineError, match="ended"):
        await InFlight(cast("Any", nothing), within=True).sample(prompt(), params)


# --- bad input ----------------------------------------------------------------------------------


def test_a_bad_plan() -> None:
    with pytest.raises(ConfigError, match="in_flight: is 'token'"):
        replace(AHEAD, in_flight="token")
    assert AHEAD.as_config()["in_flight"] is None  # as in runs that were begun without it


UNFOLLOWED: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": 1,
    "grammar": "start: /a/",
    "json_schema": {"type": "object"},
    "stop": ("</a><|im_end|>",),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", UNFOLLOWED)
async def test_what_several_requests_cannot_draw(name: str, tmp_path: Path) -> None:
    """Asked of a run it is refused by name; asked of an endpoint, it is one request."""
    params = SamplingParams(seed=1, **{name: UNFOLLOWED[name]})
    sampler = Requests(3, ["no stream"])
    assert unfollowed(params, byte_tokenizer()) == name
    with pytest.raises(NotImplementedError, match="one request"):
        await InFlight(cast("Any", sampler), within=True).sample(prompt(), params)
    assert unfollowed(SamplingParams(stop=("</a>", "<|im_end|>")), byte_tokenizer()) is None
    if name != "stop":  # the fake tokenizer's special token is in the tests' own
        plan = replace(AHEAD, in_flight="reply", sampling=params)
        async with two_devices(tmp_path) as (service, _):
            trainer = await service.create_model(base_model="fake")
            with pytest.raises(ConfigError, match=rf"sampling\.{name}"):
                await off_policy(trainer, TASKS, single_turn(vowels), plan)


@pytest.mark.anyio
async def test_what_would_not_go_on_exactly_is_refused(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "run", {})
    plan, played = replace(AHEAD, in_flight="turn", steps=1), single_turn(vowels)
    async with two_devices(tmp_path, deterministic=True) as (service, _):
        trainer = await service.create_model(base_model="fake")
        with pytest.raises(ConfigError, match=r"in_flight.*exact=False"):
            await off_policy(trainer, TASKS, played, plan, run=Run(folder=folder))
        assert not folder.metrics.exists()
        await off_policy(trainer, TASKS, played, plan, run=Run(folder=folder, exact=False))
