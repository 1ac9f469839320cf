"""Tokens in, tokens out: what is recorded is exactly what was sampled, whatever the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rl.scripted import (
    CHATML,
    DROPS_THOUGHTS,
    KEEPING,
    REWRITING,
    ScriptedSampler,
    byte_tokenizer,
    metaspace_tokenizer,
)
from weaver.errors import ConfigError, InvalidRequestError
from weaver.tokenizers import end_tokens
from weaver.types import SamplingParams
from weaver_rl import datums
from weaver_rl.agent import Agent, Budget, BudgetExceeded, respond_all
from weaver_rl.credit.marks import level
from weaver_rl.objectives import Behaviour
from weaver_rl.types import Group, Rollout

if TYPE_CHECKING:
    from tests.zoo import Zoo
    from weaver_rl.types import Segment, Trajectory

TOKENIZERS = {"bytes": byte_tokenizer, "metaspace": metaspace_tokenizer}


def agent_of(sampler: ScriptedSampler, *, budget: Budget | None = None, seed: int = 1) -> Agent:
    return Agent(
        sampler,  # type: ignore[arg-type]
        sampler.tokenizer,
        sampling=SamplingParams(max_tokens=1000),
        seed=seed,
        budget=budget,
    )


def converse(sampler: ScriptedSampler, texts: list[str]) -> Trajectory:
    agent = agent_of(sampler)

    async def play() -> None:
        for text in texts:
            await agent.chat(text)

    anyio.run(play)
    return agent.trajectory


def check_exact(trajectory: Trajectory, sampler: ScriptedSampler, replies: list[list[int]]) -> None:
    """Each reply stands, unchanged, behind the very prompt that it was sampled from."""
    places = [
        (segment, start)
        for segment in trajectory.segments
        for start in range(len(segment.tokens))
        if segment.mask[start] and not (start and segment.mask[start - 1])
    ]
    assert len(places) == len(replies)
    for (segment, start), prompt, reply in zip(places, sampler.prompts, replies, strict=True):
        end = start + len(reply)
        assert list(segment.tokens[:start]) == prompt
        assert list(segment.tokens[start:end]) == reply
        assert end == len(segment.tokens) or not segment.mask[end]
        assert list(segment.logprobs[start:end]) == [-0.01 * token for token in reply]
        assert list(segment.sampling_logprobs[start:end]) == [-0.02 * token for token in reply]
        assert set(segment.versions[start:end]) == {3}
    assert trajectory.num_sampled == sum(map(len, replies))
    for segment in trajectory.segments:
        check_shape(segment)
    assert trained_tokens(trajectory) == [token for reply in replies for token in reply]


def trained_tokens(trajectory: Trajectory) -> list[int]:
    """The targets that have a weight in the datums that a step would send."""
    group = Group(task={}, rollouts=(Rollout(task={}, trajectory=trajectory, reward=1.0),))
    made = datums.examples(
        [group], [[level(group.rollouts[0])]], behaviour=Behaviour(True, 1.0), aggregate="token"
    )
    return [
        int(token)
        for inputs in (datums.to_datum(e, "importance_sampling").loss_fn_inputs for e in made)
        for token, weight in zip(
            inputs["target_tokens"].tolist(), inputs["weights"].tolist(), strict=True
        )
        if weight
    ]


def check_shape(segment: Segment) -> None:
    columns = (segment.mask, segment.logprobs, segment.sampling_logprobs, segment.versions)
    assert {len(column) for column in columns} == {len(segment.tokens)}
    assert segment.mask[-1] == 1
    assert all(
        (v, lp, slp) == (-1, 0.0, 0.0)
        for v, lp, slp, m in zip(
            segment.versions, segment.logprobs, segment.sampling_logprobs, segment.mask, strict=True
        )
        if not m
    )


@st.composite
def talks(draw: st.DrawFn) -> tuple[str, list[str], list[list[int]], bool]:
    """A tokenizer, what the user says, what is sampled, and whether replies end by EOS."""
    kind = draw(st.sampled_from(sorted(TOKENIZERS)))
    size = len(TOKENIZERS[kind]())
    turns = draw(st.integers(1, 4))
    token = st.integers(1, size - 1)
    texts = draw(st.lists(st.text(max_size=8), min_size=turns, max_size=turns))
    replies = draw(
        st.lists(st.lists(token, min_size=1, max_size=9), min_size=turns, max_size=turns)
    )
    return kind, texts, replies, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(talks(), st.sampled_from(sorted({**KEEPING, **REWRITING})))
def test_trained_tokens_are_the_sampled_ones(
    talk: tuple[str, list[str], list[list[int]], bool], name: str
) -> None:
    kind, texts, replies, stopped = talk
    tokenizer = TOKENIZERS[kind]({**KEEPING, **REWRITING}[name])
    if stopped:
        replies = [[*reply, tokenizer.eos_token_id] for reply in replies]
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: replies[turn])
    trajectory = converse(sampler, texts)
    check_exact(trajectory, sampler, replies)
    if name in KEEPING and kind == "bytes":
        assert len(trajectory.segments) == 1


def test_the_prompt_is_what_the_template_renders() -> None:
    tokenizer = byte_tokenizer(CHATML)
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: ["one", "two"][turn])
    trajectory = converse(sampler, ["hello", "again"])
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "again"},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer.decode(sampler.prompts[1]) == rendered
    assert [m["content"] for m in trajectory.messages] == ["hello", "one", "again", "two"]
    assert (trajectory.turns, trajectory.stop_reason) == (2, "stop")


def test_a_template_that_rewrites_history_splits_the_trajectory() -> None:
    tokenizer = byte_tokenizer(DROPS_THOUGHTS)
    texts = ["<think>hmm</think>one", "two", "three"]
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: texts[turn])
    trajectory = converse(sampler, ["hello", "again", "more"])
    assert len(trajectory.segments) == 2
    first, second = (tokenizer.decode(list(s.tokens)) for s in trajectory.segments)
    assert first.endswith("<think>hmm</think>one<|im_end|>")
    assert "hmm" not in second
    assert "one" in second
    assert trajectory.segments[1].mask[: len(sampler.prompts[1])] == (0,) * len(sampler.prompts[1])


@pytest.mark.parametrize("name", ["llama2", "mistral", "phi3", "unigram", "gemma", "qwen"])
def test_a_conversation_goes_on_behind_the_reply(zoo: Zoo, name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "What is it?"), ("assistant", "Yes."), ("user", "The cat?"))
    ]
    prompt, whole = (
        tokenizer.apply_chat_template(
            messages[:n], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        for n in (1, 3)
    )
    end = end_tokens(tokenizer)[list(end_tokens(tokenizer))[-1]]
    reply = whole[len(prompt) : whole.index(end, len(prompt)) + 1]
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: reply)
    trajectory = converse(sampler, ["What is it?", "The cat?"])
    assert sampler.prompts == [prompt, whole]
    assert len(trajectory.segments) == 1


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([{"role": "user", "text": "hi"}], "prompt[0].content"),
        ([{"content": "hi"}], "prompt[0].role"),
        ([], "prompt"),
        (3, "prompt"),
    ],
)
def test_messages_that_would_be_shown_as_nothing_are_refused(prompt: Any, field: str) -> None:
    agent = agent_of(ScriptedSampler(byte_tokenizer(), lambda turn, prompt: "x"))
    with pytest.raises(InvalidRequestError) as caught:
        anyio.run(agent.respond, prompt)
    assert caught.value.field == field
    said = {"from": "human", "value": "hi", "name": None}
    anyio.run(agent.respond, [said])
    assert agent.messages[0] == {"role": "user", "content": "hi"}


def test_a_reply_ends_at_what_this_side_s_template_ends_it_with() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "</think>"))
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: "x")
    agent = Agent(
        sampler,  # type: ignore[arg-type]
        tokenizer,
        sampling=SamplingParams(stop_token_ids=[7]),
        seed=1,
    )
    anyio.run(agent.chat, "hello")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</think>"])
    assert set(sampler.params[0].stop_token_ids) == {7, *ends}


def test_text_is_completed_as_it_is() -> None:
    tokenizer = byte_tokenizer(None)
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: [10 + turn, 20])
    agent = agent_of(sampler)

    async def play() -> None:
        await agent.complete("rev:abc=")
        await agent.complete(";")

    anyio.run(play)
    (segment,) = agent.trajectory.segments
    start, between = (tokenizer.encode(t, add_special_tokens=False) for t in ("rev:abc=", ";"))
    assert list(segment.tokens) == [*start, 10, 20, *between, 11, 20]
    assert agent.trajectory.stop_reason == "length"


def test_without_a_template_chat_says_what_to_do() -> None:
    agent = agent_of(ScriptedSampler(byte_tokenizer(None), lambda turn, prompt: "x"))
    with pytest.raises(ConfigError, match=r"agent\.complete"):
        anyio.run(agent.chat, "hello")


def test_a_group_is_asked_in_one_call() -> None:
    sampler = ScriptedSampler(byte_tokenizer(), lambda turn, prompt: [40 + turn])
    agents = [agent_of(sampler, seed=seed) for seed in range(3)]
    replies = anyio.run(respond_all, agents, "hello")
    assert [reply.tokens for reply in replies] == [(40,), (41,), (42,)]
    assert len({params.seed for params in sampler.params}) == 1
    for agent, reply in zip(agents, replies, strict=True):
        (segment,) = agent.trajectory.segments
        assert segment.tokens == (*reply.prompt_tokens, *reply.tokens)


def test_seeds_differ_by_turn_and_repeat_by_rollout() -> None:
    seeds = []
    for seed in (1, 1, 2):
        sampler = ScriptedSampler(byte_tokenizer(), lambda turn, prompt: "x")
        agent = agent_of(sampler, seed=seed)

        async def play(agent: Agent = agent) -> None:
            await agent.chat("a")
            await agent.chat("b")

        anyio.run(play)
        seeds.append([params.seed for params in sampler.params])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4


@pytest.mark.parametrize(
    ("budget", "context_length", "sampled"),
    [(Budget(turns=2), 1000, 6), (Budget(tokens=4), 1000, 4), (Budget(), 10, 5)],
)
def test_budgets_end_a_rollout(budget: Budget, context_length: int, sampled: int) -> None:
    """Turns read 1, 4 and 4 tokens and write 3 each, of which less may be left."""
    sampler = ScriptedSampler(
        byte_tokenizer(), lambda turn, prompt: [30] * 3, context_length=context_length
    )
    agent = agent_of(sampler, budget=budget)

    async def play() -> None:
        for text in ("a", "b---", "c---", "d---"):
            await agent.complete(text)

    with pytest.raises(BudgetExceeded):
        anyio.run(play)
    (segment,) = agent.trajectory.segments
    assert segment.tokens.count(30) == sampled
    assert len(segment.tokens) <= context_length
    check_shape(segment)
