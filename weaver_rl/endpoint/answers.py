"""One request of OpenAI's protocol, answered and recorded as a turn of an agent; for `Desk`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from weaver.server.adapters.openai.answers import Writer
from weaver.server.adapters.openai.bodies import ChatBody
from weaver.server.adapters.openai.tools import grammar_of
from weaver.types import Message, SampleDelta, SampledSequence, SampleResult
from weaver_rl.agent import Agent
from weaver_rl.endpoint.lines import Line, opening


async def answer(agent: Agent, lines: list[Line], body: ChatBody, gone: Callable[[], bool]) -> str:
    """The JSON, or the events of a stream, which begin once the reply is whole: none is recorded
    in part. Where the client has `gone` before, nothing is.

    Raises:
        BudgetExceeded, ConfigError, InvalidRequestError: nothing was sampled, nothing changed.
        WeaverError: the service failed.
    """
    functions, top = body.functions, body.top
    found = opening(agent, lines, [_plain(one) for one in body.chat()], functions)
    forms = []
    if body.required:
        template = str(agent.tokenizer.get_chat_template(tools=functions))
        forms = [{"grammar": grammar_of(body.required, template)}]
    most = body.max_completion_tokens or body.max_tokens
    prompt = found.prompt
    result = await agent.draw(
        prompt,
        max_tokens=most,
        num_samples=body.count,
        top_logprobs=top or 0,
        wanted=body.params(1 if most is None else most, *forms),
    )
    writer = partial(
        Writer,
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=body.model,
        chat=True,
        logprobs=top is not None,
        top=top or 0,
        token_ids=bool(body.return_token_ids),
        tools=body.names,
        tokenizer=agent.tokenizer,
        prompts=[prompt],
    )
    whole = writer().whole([result])
    if not gone():
        told = [choice["message"] for choice in whole["choices"]]
        _record(agent, lines, found.read(), result, told)
    return _events(writer(), result, usage=body.include_usage) if body.stream else json.dumps(whole)


def _record(
    agent: Agent, lines: list[Line], line: Line, result: SampleResult, told: list[dict[str, Any]]
) -> None:
    """Each choice as a turn; those behind the first begin conversations of their own."""
    talk = line.talk
    size = {"rows": len(talk.rows), "text": len(talk.text), "messages": len(talk.messages)}
    others = [Line(talk.reread(**size), list(line.said), []) for _ in told[1:]]
    for one, sequence, reply in zip([line, *others], result.sequences, told, strict=True):
        agent.record(one.talk, sequence)
        one.replied(reply)
        if all(one is not known for known in lines):
            lines.append(one)


def _events(writer: Writer, result: SampleResult, *, usage: bool) -> str:
    said = [_delta(i, sequence) for i, sequence in enumerate(result.sequences)]
    last = writer.last_usage(sum(len(one.tokens) for one in said)) if usage else ""
    return f"{writer.pieces(said)}{last}data: [DONE]\n\n"


def _delta(index: int, sequence: SampledSequence) -> SampleDelta:
    return SampleDelta(
        index=index,
        tokens=sequence.tokens,
        text=sequence.text,
        logprobs=sequence.logprobs,
        stop_reason=sequence.stop_reason,
        top_logprobs=sequence.top_logprobs,
    )


def _plain(message: Message) -> dict[str, Any]:
    """As agents keep messages and templates take them."""
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls}
