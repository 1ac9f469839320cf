"""A program for the published `openai` package, as its users write them; run by test_tinker.py.

Arguments: a base model, a run with a checkpoint, and a model whose chat template shows tools.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai
import pydantic

CHAT: Any = [{"role": "user", "content": "reverse: abc"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


class Verdict(pydantic.BaseModel):
    sure: bool
    digits: list[Literal[1, 2, 3]] = pydantic.Field(max_length=2)


def main(base_model: str, run: str, tools_model: str) -> None:
    client = openai.OpenAI()
    names = {model.id for model in client.models.list()}
    assert {base_model, run, tools_model} <= names, names
    for model in (base_model, run):
        samples(client, model)
    differ = [
        client.chat.completions.create(model=m, messages=CHAT, max_tokens=3, logprobs=True, seed=1)
        for m in (base_model, run)
    ]
    first, second = (one.choices[0].logprobs.content[0].logprob for one in differ)
    assert first != second
    shifted(client, base_model)
    formed(client, run)
    called(client, tools_model)
    refused(client, base_model)
    try:
        openai.OpenAI(api_key="wrong").models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was let in")


def samples(client: openai.OpenAI, model: str) -> None:
    """Chats, whole and as a stream, and completions."""
    given = {"model": model, "messages": CHAT, "max_tokens": 12, "seed": 3}
    extra = {"return_token_ids": True}
    whole = client.chat.completions.create(**given, n=2, logprobs=True, extra_body=extra)
    assert len(whole.choices) == 2
    for choice in whole.choices:
        assert len(choice.logprobs.content) == len(choice.token_ids)
    pieces = client.chat.completions.create(
        **given, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        usage = piece.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and usage.prompt_tokens == whole.usage.prompt_tokens
    completed = client.completions.create(
        model=model, prompt=["ab", "c"], max_tokens=4, temperature=0, logprobs=1
    )
    assert len(completed.choices) == 2
    assert len(completed.choices[0].logprobs.token_logprobs) <= 4
    scored = client.completions.create(
        model=model, prompt="abcd", max_tokens=0, temperature=0, logprobs=1, echo=True
    ).choices[0]
    assert scored.text == "abcd" and scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    shown = client.chat.completions.create(**given, logprobs=True, top_logprobs=3)
    assert all(len(t.top_logprobs) == 3 for t in shown.choices[0].logprobs.content)
    streamed = client.completions.create(
        model=model, prompt="ab", max_tokens=4, temperature=0, stream=True
    )
    text = "".join(piece.choices[0].text for piece in streamed)
    assert text == completed.choices[0].text


def shifted(client: openai.OpenAI, model: str) -> None:
    """A bias decides, and penalties for what was said keep it from being said again."""
    given = {"model": model, "prompt": "ab", "max_tokens": 6, "temperature": 0}
    ids = {
        letter: client.post("/tokenize", cast_to=object, body={"model": model, "prompt": letter})
        for letter in "xy"
    }
    x, y = (str(told["tokens"][-1]) for told in ids.values())
    forced = client.completions.create(**given, logit_bias={x: 100})
    assert forced.choices[0].text == "xxxxxx"
    varied = client.completions.create(**given, logit_bias={x: 100, y: 99}, frequency_penalty=2)
    assert "y" in varied.choices[0].text
    assert set(varied.choices[0].text) == {"x", "y"}


def formed(client: openai.OpenAI, model: str) -> None:
    """Texts of a schema, as the client's own helper asks for them and reads them."""
    given = {"model": model, "messages": CHAT, "max_tokens": 300, "seed": 5}
    read = client.chat.completions.parse(**given, response_format=Verdict)
    assert isinstance(read.choices[0].message.parsed, Verdict)
    text = client.chat.completions.create(**given, extra_body={"guided_choice": ["a b", "c"]})
    assert text.choices[0].message.content in ("a b", "c")


def called(client: openai.OpenAI, model: str) -> None:
    """A call that must be, whole and as a stream, and its answer in the next turn."""
    given = {"model": model, "messages": CHAT, "tools": [TOOL], "max_tokens": 100, "seed": 1}
    (choice,) = client.chat.completions.create(**given, tool_choice="required").choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "add")
    assert 0 <= json.loads(call.function.arguments)["a"] <= 99
    named = {"type": "function", "function": {"name": "add"}}
    stream = client.chat.completions.create(**given, tool_choice=named, stream=True)
    made = [c for piece in stream for one in piece.choices for c in one.delta.tool_calls or ()]
    assert [c.function.arguments for c in made] == [call.function.arguments]
    answer = {"role": "tool", "tool_call_id": call.id, "content": "7"}
    given["messages"] = [*CHAT, choice.message, answer]
    after = client.chat.completions.create(**given, tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def refused(client: openai.OpenAI, base_model: str) -> None:
    """Each error in the class that the client has for it."""
    wrong_schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}
    given = {"model": base_model, "messages": CHAT}
    for kind, wrong in (
        (openai.NotFoundError, {**given, "model": "none"}),
        (openai.BadRequestError, {**given, "messages": []}),
        (openai.UnprocessableEntityError, {**given, "tools": [TOOL]}),
        (openai.UnprocessableEntityError, {**given, "response_format": wrong_schema}),
        (openai.UnprocessableEntityError, {**given, "presence_penalty": 3}),
    ):
        try:
            client.chat.completions.create(**wrong)
        except kind as error:
            assert error.message and error.code
        else:
            raise AssertionError(f"{wrong} was answered")


if __name__ == "__main__":
    main(*sys.argv[1:])
