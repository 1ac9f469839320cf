"""A program for the published `openai` package, as its users write them; run by test_tinker.py.

Arguments: a base model, and a run with a checkpoint.
"""

from __future__ import annotations

import sys

import openai

CHAT = [{"role": "user", "content": "reverse: abc"}]

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
"""The bundled model's chat template shows none."""


def main(base_model: str, run: str) -> None:
    client = openai.OpenAI()
    names = {model.id for model in client.models.list()}
    assert {base_model, run} <= names, names
    for model in (base_model, run):
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
        scored = client.completions.create(
            model=model, prompt="abcd", max_tokens=0, temperature=0, logprobs=1, echo=True
        ).choices[0]
        assert scored.text == "abcd" and scored.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
        shown = client.chat.completions.create(**given, logprobs=True, top_logprobs=3)
        assert all(len(t.top_logprobs) == 3 for t in shown.choices[0].logprobs.content)
        assert len(completed.choices[0].logprobs.token_logprobs) <= 4
    differ = [
        client.chat.completions.create(model=m, messages=CHAT, max_tokens=3, logprobs=True, seed=1)
        for m in (base_model, run)
    ]
    first, second = (one.choices[0].logprobs.content[0].logprob for one in differ)
    assert first != second
    for kind, wrong in (
        (openai.NotFoundError, {"model": "none", "messages": CHAT}),
        (openai.BadRequestError, {"model": base_model, "messages": []}),
        (openai.UnprocessableEntityError, {"model": base_model, "messages": CHAT, "tools": [TOOL]}),
    ):
        try:
            client.chat.completions.create(**wrong)
        except kind as error:
            assert error.message
        else:
            raise AssertionError(f"{wrong} was answered")
    try:
        openai.OpenAI(api_key="wrong").models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was let in")


if __name__ == "__main__":
    main(*sys.argv[1:])
