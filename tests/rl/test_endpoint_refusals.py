"""What an endpoint refuses: by name, in OpenAI's envelope, at once, with nothing recorded of it."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

import weaver_rl as rl
from tests.rl.scripted import CHATML, TOOLS, ScriptedSampler, byte_tokenizer
from tests.rl.test_agent import agent_of
from tests.rl.test_endpoint import ADD, HELLO, Client, Json, client, user
from weaver.errors import EngineError
from weaver.types import SamplingParams
from weaver_rl.agent import Budget, BudgetExceeded
from weaver_rl.rollouts import sample_groups

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio
BODY: Json = {"model": "gpt", "messages": [HELLO]}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Slow(ScriptedSampler):
    """Says "one" once it may."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer(), lambda turn, prompt: "one")
        self.may = anyio.Event()
        self.asked, self.left = anyio.Event(), anyio.Event()

    async def sample(self, *given: Any, **more: Any) -> Any:
        self.asked.set()
        try:
            await self.may.wait()
        finally:
            self.left.set()
        return await super().sample(*given, **more)


def agent_with(template: str | None = CHATML, *, budget: Budget | None = None) -> rl.Agent:
    sampler = ScriptedSampler(byte_tokenizer(template), lambda turn, prompt: "one")
    return agent_of(sampler, budget=budget)


def refusal(answer: httpx.Response, code: str) -> Json:
    """What it says; clients are told not to try it again."""
    error: Json = answer.json()["error"]
    assert error["code"] == code, error
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.status_code >= 400
    assert answer.headers["x-should-retry"] == "false"
    return error


@asynccontextmanager
async def quick() -> AsyncIterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 1


async def test_an_agent_that_has_ended(anyio_backend: str) -> None:
    agent = agent_with()
    async with rl.endpoint(agent) as url, client(url) as http:
        await Client(http).ask(HELLO)
    before = agent.trajectory
    async with client(url) as http, quick():
        answer = await http.post("chat/completions", json=BODY)
    assert answer.status_code == 410
    assert "rollout of this agent has ended" in refusal(answer, "closed")["message"]
    assert agent.trajectory == before


async def test_an_agent_that_ends_meanwhile(anyio_backend: str) -> None:
    sampler, answers = Slow(), []
    agent, answered = agent_of(sampler), anyio.Event()

    async def ask(http: httpx.AsyncClient) -> None:
        answers.append(await http.post("chat/completions", json=BODY))
        answered.set()

    async with anyio.create_task_group() as tasks:
        async with rl.endpoint(agent) as url:
            http = await tasks.start(opened, url)
            tasks.start_soon(ask, http)
            await sampler.asked.wait()
        with anyio.fail_after(5):
            await answered.wait()
        tasks.cancel_scope.cancel()
    refusal(answers[0], "closed")
    assert agent.trajectory == agent_of(sampler).trajectory


async def opened(url: str, *, task_status: Any) -> None:
    async with client(url) as http:
        task_status.started(http)
        await anyio.sleep_forever()


async def test_two_at_once(anyio_backend: str) -> None:
    sampler = Slow()
    agent = agent_of(sampler)
    async with rl.endpoint(agent) as url, client(url) as http:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await http.post("chat/completions", json=BODY))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await sampler.asked.wait()
            async with quick():
                await ask()
            sampler.may.set()
    refused, answered = answers
    assert refused.status_code == 409
    assert "left to chance" in refusal(refused, "conflict")["message"]
    assert answered.json()["choices"][0]["message"]["content"] == "one"
    assert agent.trajectory.turns == 1


async def test_a_client_that_leaves(anyio_backend: str) -> None:
    """Its request is not recorded, and the next one is answered as if it had never been."""
    sampler = Slow()
    agent = agent_of(sampler)
    async with rl.endpoint(agent) as url:
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(base_url=url, timeout=0.3, trust_env=False) as http:
                await http.post("chat/completions", json=BODY)
        with anyio.fail_after(5):
            await sampler.left.wait()
        sampler.may.set()
        async with client(url) as http:
            answer = await http.post("chat/completions", json=BODY)
    assert answer.status_code == 200
    assert agent.trajectory.turns == 1
    assert len(sampler.params) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("template", "body", "code", "says"),
    [
        (CHATML, {**BODY, "tools": [ADD]}, "invalid_config", "does not show tools"),
        (None, BODY, "invalid_config", "no chat template"),
        (
            TOOLS + "{{ raise_exception('roles alternate') }}",
            BODY,
            "invalid_request",
            "roles alternate",
        ),
        (CHATML, {"model": "gpt"}, "invalid_request", "messages"),
        (CHATML, {**BODY, "max_tokens": 0}, "invalid_params", "max_tokens"),
        (CHATML, {**BODY, "top_logprobs": 2}, "invalid_request", "needs logprobs"),
        (CHATML, {**BODY, "functions": [ADD]}, "unsupported", "functions"),
        (CHATML, {**BODY, "tool_choice": "required"}, "invalid_request", "tool_choice"),
    ],
    ids=["tools", "template", "refuses", "body", "most", "top", "functions", "choice"],
)
async def test_what_is_asked(
    template: str | None, body: Json, code: str, says: str, anyio_backend: str
) -> None:
    agent = agent_with(template)
    before = agent.trajectory
    async with rl.endpoint(agent) as url, client(url) as http, quick():
        answer = await http.post("chat/completions", json=body)
        error = refusal(answer, code)
        assert says in f"{error['param']}: {error['message']}"
    assert 400 <= answer.status_code < 500
    assert agent.trajectory == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_no_request(anyio_backend: str) -> None:
    agent = agent_with()
    async with rl.endpoint(agent) as url, client(url) as http:
        refusal(await http.post("chat/completions", content=b"{"), "invalid_request")
        refusal(await http.post("embeddings", json={}), "not_found")
        for wrong in (url.replace("/v1", "x/v1"), url[: url.index("/", 10)]):
            async with client(wrong) as other:
                answer = await other.post("chat/completions", json=BODY)
                assert answer.status_code == 401
                refusal(answer, "unauthenticated")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b" " * 2**20

        large = await http.post("chat/completions", content=b" " * (2**25 + 1))
        assert large.status_code == 413
        refusal(large, "too_large")
        answer = await http.post("chat/completions", content=pieces())
        refusal(answer, "too_large")
    assert agent.trajectory.turns == 0


async def ask_twice(agent: rl.Agent, task: rl.Task) -> float:
    """A program that ends with an error where it is refused."""
    async with rl.endpoint(agent) as url, client(url) as http:
        talk = Client(http)
        for text in ("hello", "again"):
            await talk.ask(user(text))
    return 1.0


async def rollout(environment: rl.GroupEnvironment, sampler: ScriptedSampler) -> rl.Rollout:
    (group,) = await sample_groups(
        sampler,  # type: ignore[arg-type]
        [{}],
        environment,
        group_size=1,
        sampling=SamplingParams(max_tokens=10),
        seed=0,
    )
    return group.rollouts[0]


async def test_a_budget_ends_the_rollout_as_in_process(anyio_backend: str) -> None:
    sampler = ScriptedSampler(byte_tokenizer(), lambda turn, prompt: "one")
    played = await rollout(rl.each(ask_twice, budget=Budget(turns=1)), sampler)
    assert played.failure is None
    assert (played.reward, played.metrics["budget_exceeded"]) == (0.0, 1.0)
    assert played.trajectory.turns == 1
    agent = agent_with(budget=Budget(turns=1))
    async with rl.endpoint(agent) as url, client(url) as http:
        await Client(http).ask(HELLO)
        error = refusal(await http.post("chat/completions", json=BODY), "budget_exceeded")
    assert "all 1 turns are used" in error["message"]
    with pytest.raises(BudgetExceeded):
        async with rl.endpoint(agent) as url, client(url) as http:
            await Client(http).ask(HELLO)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_failure_says_what_was_refused(anyio_backend: str) -> None:
    sampler = ScriptedSampler(byte_tokenizer(None), lambda turn, prompt: "one")
    played = await rollout(rl.each(ask_twice), sampler)
    assert played.failure is not None
    assert "refused its last request" in played.failure.traceback
    assert "no chat template" in played.failure.traceback


async def test_a_service_that_fails_ends_the_run(anyio_backend: str) -> None:
    def script(turn: int, prompt: list[int]) -> str:
        raise EngineError("out of memory")

    sampler = ScriptedSampler(byte_tokenizer(), script)
    with pytest.raises(EngineError, match="out of memory"):
        await rollout(rl.each(ask_twice), sampler)
