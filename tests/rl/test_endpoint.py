"""An agent behind OpenAI's protocol: recorded is what was sampled, whatever its client is told."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weaver_rl as rl
from tests.rl.scripted import (
    CHATML,
    DROPS_THOUGHTS,
    KEEPING,
    REWRITING,
    TOOLS,
    ScriptedSampler,
    byte_tokenizer,
)
from tests.rl.test_agent import agent_of, check_exact, check_shape, trained_tokens
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.rollouts import sample_groups
from weaver_rl.tasks.guess_number import guess_number, guess_number_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weaver_rl.types import Trajectory

Json = dict[str, Any]
HELLO = {"role": "user", "content": "hello"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name":"add","arguments":{"a":1}}</tool_call>'


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Client:
    """A program that knows OpenAI's protocol alone; `said` is the history that it keeps."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.said: list[Json] = []

    async def whole(self, messages: Sequence[Json], **more: Any) -> Json:
        body = {"model": "gpt", "messages": list(messages), **more}
        answer = await self._http.post("chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def ask(self, *messages: Json, **more: Any) -> Json:
        """The reply as it is told; history goes on with it."""
        self.said += messages
        reply: Json = (await self.whole(self.said, **more))["choices"][0]["message"]
        self.said.append(reply)
        return reply


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=20, trust_env=False)


def scripted(
    replies: Sequence[str | list[int]], template: str | None = CHATML
) -> tuple[ScriptedSampler, rl.Agent]:
    sampler = ScriptedSampler(byte_tokenizer(template), lambda turn, prompt: replies[turn])
    return sampler, agent_of(sampler)


def tokens_of(sampler: ScriptedSampler, *replies: str) -> list[list[int]]:
    tokenizer = sampler.tokenizer
    return [
        [*tokenizer.encode(one, add_special_tokens=False), tokenizer.eos_token_id]
        for one in replies
    ]


def joined(sampler: ScriptedSampler, *replies: str) -> list[int]:
    return [token for one in tokens_of(sampler, *replies) for token in one]


def texts(sampler: ScriptedSampler, trajectory: Trajectory) -> list[str]:
    return [str(sampler.tokenizer.decode(list(s.tokens))) for s in trajectory.segments]


def user(text: str) -> Json:
    return {"role": "user", "content": text}


@pytest.mark.anyio
async def test_a_history_goes_on_behind_its_very_tokens(anyio_backend: str) -> None:
    sampler, agent = scripted(["one", "two", "three"])
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        for text in ("hello", "again", "more"):
            await talk.ask(user(text))
        assert [m["content"] for m in talk.said[1::2]] == ["one", "two", "three"]
    check_exact(agent.trajectory, sampler, tokens_of(sampler, "one", "two", "three"))
    assert len(agent.trajectory.segments) == 1
    assert [m["content"] for m in agent.messages] == [m["content"] for m in talk.said]
    assert agent.trajectory.turns == 3


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_as_in_process_with_the_same_seeds(home: Path, anyio_backend: str) -> None:
    """The whole of it, to the last bit: tokens, both log-probabilities, messages and rewards."""

    async def outside(agent: rl.Agent, task: rl.Task) -> rl.Score:
        async def chat(text: str) -> Any:
            return SimpleNamespace(text=(await talk.ask(user(text)))["content"])

        async with rl.endpoint(agent) as url, client(url) as http:
            talk = Client(http)
            return await guess_number(SimpleNamespace(chat=chat), task)  # type: ignore[arg-type]

    tasks, sampling = guess_number_tasks(2), SamplingParams(max_tokens=4)
    async with AsyncServiceClient(home=home, deterministic=True) as service:
        sampler = await service.create_sampling_client(base_model="weaver-nano")
        inside, through = [
            await sample_groups(
                sampler, tasks, rl.each(one), group_size=2, sampling=sampling, seed=7
            )
            for one in (guess_number, outside)
        ]
    assert inside == through
    assert all(rollout.failure is None for group in inside for rollout in group.rollouts)
    assert sum(group.rollouts[0].trajectory.turns for group in inside) > 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 267), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from(sorted({**KEEPING, **REWRITING})),
)
def test_trained_tokens_are_the_sampled_ones(replies: list[list[int]], name: str) -> None:
    """Also where the client is told less than was sampled: no special tokens, broken UTF-8."""
    sampler, agent = scripted(replies, {**KEEPING, **REWRITING}[name])

    async def play() -> None:
        async with rl.endpoint(agent) as url, client(url) as http:
            talk = Client(http)
            for turn in range(len(replies)):
                await talk.ask(user(str(turn)))

    anyio.run(play)
    check_exact(agent.trajectory, sampler, replies)
    if name in KEEPING:
        assert len(agent.trajectory.segments) == 1


async def play(
    replies: Sequence[str | list[int]],
    script: Callable[[Client], Any],
    template: str = CHATML,
) -> tuple[ScriptedSampler, Trajectory]:
    sampler, agent = scripted(replies, template)
    async with rl.endpoint(agent) as url, client(url) as http:
        await script(Client(http))
    for segment in agent.trajectory.segments:
        check_shape(segment)
    return sampler, agent.trajectory


@pytest.mark.anyio
async def test_conversations_are_segments_in_the_order_of_their_beginning(
    anyio_backend: str,
) -> None:
    """Rewards of turns, given in the order of time, stand with the tokens of their turns."""
    sampler, agent = scripted(["a0", "b000", "a1-"])
    async with rl.endpoint(agent) as url, client(url) as http:
        one, other = Client(http), Client(http)
        for turn, (who, text) in enumerate(((one, "A"), (other, "B"), (one, "A again"))):
            await who.ask(user(text))
            agent.reward(float(turn + 1))
    trajectory = agent.trajectory
    first, second = texts(sampler, trajectory)
    assert "a0" in first and "a1-" in first and "b000" not in first
    assert "b000" in second
    assert trajectory.reply_lengths == (3, 4, 5)
    assert trajectory.turn_rewards == (1.0, 3.0, 2.0)
    assert trained_tokens(trajectory) == joined(sampler, "a0", "a1-", "b000")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "edited",
    [
        lambda said: [user("summary"), *said[2:]],
        lambda said: [said[0], {"role": "assistant", "content": "other"}, *said[2:]],
        lambda said: [{"role": "system", "content": "be brief"}, *said],
    ],
    ids=["cut", "reply", "system"],
)
async def test_a_rewritten_history_is_another_segment(
    edited: Callable[[list[Json]], list[Json]], anyio_backend: str
) -> None:
    async def script(talk: Client) -> None:
        await talk.ask(user("hello"))
        await talk.ask(user("again"))
        talk.said = edited(talk.said)
        await talk.ask(user("more"))

    sampler, trajectory = await play(["one", "two", "three"], script)
    first, second = texts(sampler, trajectory)
    assert "three" not in first
    assert "three" in second
    assert trained_tokens(trajectory) == joined(sampler, "one", "two", "three")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_earlier_point_is_gone_on_from_without_training_twice(anyio_backend: str) -> None:
    async def script(talk: Client) -> None:
        await talk.ask(user("hello"))
        back = list(talk.said)
        await talk.ask(user("left"))
        talk.said = back
        await talk.ask(user("right"))

    sampler, trajectory = await play(["one", "two", "three"], script)
    first, second = trajectory.segments
    size = len(sampler.prompts[1]) - len("left")
    assert first.tokens[:10] == second.tokens[:10] and size > 10
    assert sum(second.mask) == len("three") + 1
    assert trained_tokens(trajectory) == joined(sampler, "one", "two", "three")
    assert [m["content"] for m in trajectory.messages] == [
        "hello", "one", "left", "two", "right", "three",
    ]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_n_choices_are_turns_and_each_can_be_gone_on_with(anyio_backend: str) -> None:
    async def script(talk: Client) -> None:
        answer = await talk.whole([HELLO], n=2)
        both = [choice["message"]["content"] for choice in answer["choices"]]
        assert both == ["one", "two"]
        talk.said = [HELLO, answer["choices"][1]["message"]]
        await talk.ask(user("more"))

    sampler, trajectory = await play(["one", "two", "three"], script)
    assert [sum(segment.mask) for segment in trajectory.segments] == [4, 10]
    assert texts(sampler, trajectory)[1].count("hello") == 1
    assert trajectory.turns == 3


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_of_tools_are_taken_apart_and_recorded_as_they_were(
    stream: bool, anyio_backend: str
) -> None:
    replies = [f"I see.{CALL}", "It is 2."]
    sampler, agent = scripted(replies, TOOLS)
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        talk.said = [HELLO]
        body = {"model": "gpt", "messages": talk.said, "tools": [ADD], "stream": stream}
        answer = await http.post("chat/completions", json=body)
        if stream:
            events = [line[6:] for line in answer.text.splitlines() if line]
            assert events.pop() == "[DONE]"
            choice = json.loads(events[0])["choices"][0]
            message = choice["delta"]
        else:
            choice = answer.json()["choices"][0]
            message = choice["message"]
        (call,) = message["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        talk.said.append({"role": "assistant", "content": "I see.", "tool_calls": [call]})
        result = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
        assert (await talk.ask(result, tools=[ADD]))["content"] == "It is 2."
    (segment,) = agent.trajectory.segments
    said = sampler.tokenizer.decode(list(segment.tokens))
    assert CALL in said and '"name": "add"' in said
    check_exact(agent.trajectory, sampler, tokens_of(sampler, *replies))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_says_what_a_whole_answer_says(anyio_backend: str) -> None:
    _, agent = scripted(["one", "one", "two"])
    more = {"logprobs": True, "stream_options": {"include_usage": True}}
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        whole = (await talk.whole([HELLO], **more))["choices"][0]
        body = {"model": "gpt", "messages": [HELLO], "stream": True, **more}
        async with http.stream("POST", "chat/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [line[6:] async for line in answer.aiter_lines() if line]
        *pieces, usage = map(json.loads, events[:-1])
        assert "".join(one["choices"][0]["delta"]["content"] for one in pieces) == "one"
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
        assert pieces[0]["choices"][0]["logprobs"] == whole["logprobs"]
        assert usage["usage"]["completion_tokens"] == 4
        talk.said = [HELLO, {"role": "assistant", "content": [{"type": "text", "text": " one"}]}]
        await talk.ask(user("more"))
    assert [sum(segment.mask) for segment in agent.trajectory.segments] == [4, 8]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_of_a_request_counts(anyio_backend: str) -> None:
    sampler, agent = scripted(["one"] * 4)
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        await talk.whole([HELLO], temperature=0.0, stop=["x", "y"], max_tokens=2, top_p=0.1)
        for seed in (5, 6):
            await talk.whole([HELLO], seed=seed, max_completion_tokens=200_000)
        models = (await http.get("models")).json()["data"]
    mine, five, six = sampler.params
    assert (mine.temperature, mine.top_p) == (1.0, 1.0)  # the run's
    assert (mine.stop, mine.max_tokens) == (("x", "y"), 2)
    assert len({mine.seed, five.seed, six.seed}) == 3
    assert five.max_tokens < 100_000
    assert [model["id"] for model in models] == ["scripted"]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_template_that_drops_thoughts_splits_the_rollout(anyio_backend: str) -> None:
    async def script(talk: Client) -> None:
        for text in ("hello", "again", "more"):
            await talk.ask(user(text))

    replies = ["<think>hmm</think>one", "two", "three"]
    sampler, trajectory = await play(replies, script, DROPS_THOUGHTS)
    first, second = texts(sampler, trajectory)
    assert first.endswith("hmm</think>one<|im_end|>")
    assert "hmm" not in second
    assert [m["content"] for m in trajectory.messages].count("hello") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_environment_goes_on_where_its_client_ended(anyio_backend: str) -> None:
    _, agent = scripted(["one", "two", "three"])
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        await talk.ask(HELLO)
        await agent.chat("again")
        assert (await talk.ask(user("more")))["content"] == "three"
    check = [sum(segment.mask) for segment in agent.trajectory.segments]
    assert check == [8, 6]
    assert agent.messages[-1]["content"] == "three"
