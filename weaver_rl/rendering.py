"""Prompts: from text and chat messages to the tokens that a model reads. Called by agents.

A conversation is rendered as text by the tokenizer's own chat template, and only what is new in it
is encoded. Tokens that were sampled stay as they were sampled: no reply is ever encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from weaver.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
    Schema: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Context:
    """What a model has read and written: `Context(tokens=(3, 1, 4), text="rev:")`."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    """What the tokens say, special tokens included."""


def read_text(tokenizer: Tokenizer, context: Context, text: str) -> Context:
    """Appends text as it is; the first one gets the tokenizer's special tokens (BOS)."""
    new = tokenizer.encode(text, add_special_tokens=not context.tokens)
    return Context((*context.tokens, *new), context.text + text)


def read_chat(
    tokenizer: Tokenizer,
    context: Context,
    messages: Sequence[Mapping[str, str]],
    *,
    tools: Sequence[Schema] = (),
) -> tuple[Context, bool]:
    """The context behind all messages and the generation prompt, and whether it continues this one.

    It continues `context` if the rendered conversation begins with exactly its text: then its
    tokens are kept and the rest is appended. Else the template rewrote history (it dropped the
    reasoning of earlier turns, say): the conversation is encoded anew.

    Raises:
        ConfigError: the tokenizer has no chat template, or it knows no tools.
    """
    full = render(tokenizer, messages, tools=tools)
    if context.tokens and full.startswith(context.text):
        new = tokenizer.encode(full[len(context.text) :], add_special_tokens=False)
        return Context((*context.tokens, *new), full), True
    return Context(tuple(tokenizer.encode(full, add_special_tokens=False)), full), False


def write(tokenizer: Tokenizer, context: Context, sampled: Sequence[int]) -> Context:
    """The context with a sampled reply behind it."""
    text = tokenizer.decode(list(sampled), skip_special_tokens=False)
    return Context((*context.tokens, *sampled), context.text + str(text))


def reply_content(tokenizer: Tokenizer, sampled: Sequence[int], *, stopped: bool) -> str:
    """What the reply says as a chat message: all but the special token that ended it."""
    ended = stopped and sampled and sampled[-1] in tokenizer.all_special_ids
    said = list(sampled[:-1] if ended else sampled)
    return str(tokenizer.decode(said, skip_special_tokens=False))


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    tools: Sequence[Schema] = (),
    generate: bool = True,
) -> str:
    """The conversation as text; with `generate` up to where the next reply begins. "" for none.

    Raises:
        ConfigError: the tokenizer has no chat template, or it knows no tools.
    """
    if not messages and not generate:
        return ""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            "the model's tokenizer has no chat template.",
            field="chat_template",
            hint="Use agent.complete(text), or give task['prompt'] as a text.",
        )
    if tools and "tools" not in str(template):
        raise ConfigError(
            "the model's chat template does not show tools.",
            field="chat_template",
            hint="Describe them in a system message: agent.system(weaver_rl.describe(tools)).",
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,
        add_generation_prompt=generate,
        tokenize=False,
    )
    return str(text)
