"""A model as a judge: asked through its own client, read as a number, failing by name."""

from __future__ import annotations

import anyio
import pytest

from tests.rl.scripted import ScriptedSampler, byte_tokenizer
from weaver_rl.rewards import judge, last_number, scorer
from weaver_rl.types import Failure, Reply, Score

REPLY = Reply(text="hello", tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")


def judged(says: str, **kwargs: object) -> Score | Failure:
    sampler = ScriptedSampler(byte_tokenizer(), lambda turn, prompt: says)
    reward = judge(
        sampler,  # type: ignore[arg-type]
        lambda task, reply: [
            {"role": "user", "content": f"Rate {reply.text} for {task['prompt']}"}
        ],
        **kwargs,  # type: ignore[arg-type]
    )
    (score,) = anyio.run(scorer(reward), {"prompt": "greet"}, [REPLY])
    asked = str(sampler.tokenizer.decode(sampler.prompts[0]))
    assert "Rate hello for greet" in asked
    assert sampler.params[0].temperature == 0.0
    return score


def test_it_reads_a_number() -> None:
    assert judged("It is fine: 7.5") == Score(7.5)
    assert judged("good", read=lambda text: float(text == "good")) == Score(1.0)


def test_no_number_is_a_failure() -> None:
    failure = judged("splendid")
    assert isinstance(failure, Failure)
    assert "no number: 'splendid'" in failure.message


@pytest.mark.parametrize(("text", "number"), [("-3", -3), ("1 of 10: 0.25.", 0.25), ("7/9", 9)])
def test_the_last_number(text: str, number: float) -> None:
    assert last_number(text) == number


def test_a_name_needs_a_service_around_it() -> None:
    (failure,) = anyio.run(scorer(judge("weaver-nano", lambda task, reply: "")), {}, [REPLY])
    assert isinstance(failure, Failure)
    assert "no service is known here" in failure.message
    assert "create_sampling_client" in failure.message
