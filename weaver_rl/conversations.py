"""Conversations and other texts: as the template writes them, as datums with masks.

Agents call `render`; `loops.supervised` calls `to_datum`, whose examples are one of

    {"prompt": "rev:abc=", "completion": "cba"}       the completion and an end token are learned
    {"messages": [{"role": "user", ...}, ...]}        messages of the roles asked for are learned
    {"text": "2+2=4", "spans": [[4, 5]]}              characters of the spans; all without `spans`

Each piece is encoded on its own, as when a model reads a prompt and writes behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError, InvalidRequestError
from weaver.loss_specs import check_length
from weaver.tokenizers import end_tokens
from weaver.types import Datum, ModelInput

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]
"""A text, and whether it is learned."""


def reply_content(
    tokenizer: PreTrainedTokenizerBase, sampled: Sequence[int], *, stopped: bool
) -> str:
    """What the reply says as a chat message: all but the token that ended it."""
    ends = {*tokenizer.all_special_ids, *end_tokens(tokenizer).values()}
    ended = stopped and sampled and sampled[-1] in ends
    said = list(sampled[:-1] if ended else sampled)
    return str(tokenizer.decode(said, skip_special_tokens=False))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
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


def to_datum(
    tokenizer: PreTrainedTokenizerBase,
    example: Mapping[str, Any],
    *,
    roles: Collection[str] = ("assistant",),
    max_length: int | None = None,
    context_length: int | None = None,
    where: str = "example",
) -> Datum:
    """A `cross_entropy` datum; weights are 1 where the target is learned.

    Raises:
        InvalidRequestError: not an example, nothing to learn, or longer than `max_length` tokens.
        ContextLengthError: longer than the model's context.
        ConfigError: a chat template is missing, or rewrites earlier messages.
    """
    parts = pieces(tokenizer, example, roles=roles, where=where)
    special = "messages" not in example  # templates write their own BOS
    datum = from_pieces(tokenizer, parts, special=special)
    if not datum.loss_fn_inputs["weights"].to_numpy().any():
        raise InvalidRequestError(
            "has nothing to learn.", field=where, hint=f"The learned roles are {tuple(roles)}."
        )
    length = datum.model_input.length + 1
    if max_length is not None and length > max_length:
        raise InvalidRequestError(
            f"has {length} tokens, more than {max_length}.",
            field=where,
            hint="Shorten it, leave it out, or raise max_length.",
        )
    if context_length is not None:
        check_length(datum.model_input.length, context_length, field=where)
    return datum


def from_pieces(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[Piece], *, special: bool = True
) -> Datum:
    """Texts as one sequence, each encoded on its own; weight 1 on the tokens of the learned ones.

    Args:
        special: whether the tokenizer's special tokens (BOS) come first.
    """
    tokens: list[int] = []
    learned: list[float] = []
    for text, wanted in parts:
        new = tokenizer.encode(text, add_special_tokens=special and not tokens)
        tokens += new
        learned += [float(wanted)] * len(new)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": learned[1:]},
    )


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    example: Mapping[str, Any],
    *,
    roles: Collection[str] = ("assistant",),
    where: str = "example",
) -> list[Piece]:
    """The example's text in order, split where learning begins and ends. Raises as `to_datum`."""
    if "messages" in example:
        return _chat(tokenizer, example["messages"], roles, where)
    if "prompt" in example and "completion" in example:
        end = str(tokenizer.eos_token or "")
        return [(example["prompt"], False), (example["completion"].removesuffix(end) + end, True)]
    if "text" in example:
        return _spans(example["text"], example.get("spans"), where)
    raise InvalidRequestError(
        f"has the fields {', '.join(map(repr, example)) or 'none'}.",
        field=where,
        hint="Give prompt and completion, messages, or text.",
    )


def _spans(text: str, spans: Sequence[Sequence[int]] | None, where: str) -> list[Piece]:
    if spans is None:
        return [(text, True)]
    made: list[Piece] = []
    at = 0
    for start, end in spans:
        if not at <= start < end <= len(text):
            raise InvalidRequestError(
                f"has the span [{start}, {end}] in {len(text)} characters.",
                field=where,
                hint="Spans ascend and do not overlap.",
            )
        made += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in (*made, (text[at:], False)) if piece[0]]


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    roles: Collection[str],
    where: str,
) -> list[Piece]:
    full = render(tokenizer, messages, generate=False)
    end = str(tokenizer.eos_token or "")
    made: list[Piece] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] not in roles:
            continue
        opening = render(tokenizer, messages[:i], generate=message["role"] == "assistant")
        closing = render(tokenizer, messages[: i + 1], generate=False)
        if not (full.startswith(closing) and closing.startswith(opening)):
            raise ConfigError(
                f"the chat template rewrites message {i} when others follow.",
                field=where,
                hint="Cut the conversation behind it, and give each as an example.",
            )
        said = closing[len(opening) :]
        if end and end in said:  # what the template writes behind it is never sampled
            said = said[: said.rfind(end) + len(end)]
        made += [(full[at : len(opening)], False), (said, True)]
        at = len(opening) + len(said)
    return [piece for piece in (*made, (full[at:], False)) if piece[0]]
