"""Conversations and other texts: as the template writes them, as datums with masks.

Agents call `render`; `algorithms.supervised` calls `to_datum`, whose examples are one of

    {"prompt": "rev:abc=", "completion": "cba"}       the completion and an end token are learned
    {"messages": [{"role": "user", ...}, ...]}        messages of the roles asked for are learned
    {"text": "2+2=4", "spans": [[4, 5]]}              characters of the spans; all without `spans`

Tokens are those of the whole text, split where a sampler would have begun to write: texts are not
encoded piece by piece, since SentencePiece's tokenizers put a space before each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from weaver.checks import check_length
from weaver.errors import ConfigError, InvalidRequestError
from weaver.tokenizers import encode_text, end_tokens, render_chat
from weaver.types import Datum, ModelInput
from weaver_rl.examples import Chat, Completion, read_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]
"""A text, and whether it is learned."""
Span = tuple[int, int]
"""Characters of a text, from the first to the one behind the last."""


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
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generate: bool = True,
    options: Mapping[str, Any] | None = None,
    where: str | None = None,
) -> str:
    """The conversation as text; with `generate` up to where the next reply begins. "" for none.

    Args:
        options: other variables of the template.
        where: what errors name; None: the chat template, or the messages.

    Raises:
        ConfigError: the tokenizer has no chat template, or it knows no tools.
        InvalidRequestError: the template refuses a message, or cannot write its content.
    """
    if not messages and not generate:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the model's tokenizer has no chat template.",
            field=where or "chat_template",
            hint="Use agent.complete(text), or give task['prompt'] as a text.",
        )
    place = where or "messages"
    show = partial(
        render_chat, tokenizer, tools=tools, generate=generate, options=options, field=place
    )
    text = show(messages)
    if tools and "tools" not in tokenizer.get_chat_template(tools=list(tools)):
        raise ConfigError(
            "the model's chat template does not show tools.",
            field=where or "chat_template",
            hint="Describe them in a system message: agent.system(weaver_rl.describe(tools)).",
        )
    for i in range(len(messages)):
        _check_shown(messages, i, text, show=show, where=f"{place}[{i}]")
    return text


def _check_shown(
    messages: Sequence[Mapping[str, Any]],
    number: int,
    text: str,
    *,
    show: Callable[[Sequence[Mapping[str, Any]]], str],
    where: str,
) -> None:
    """Refuses calls, and a content that is no text, that the template left out of `text`, or wrote
    as Python would; by what it shows with less in the message of that number."""
    message = messages[number]
    content = message.get("content")

    def show_with(less: Mapping[str, Any]) -> str:
        return show([*messages[:number], less, *messages[number + 1 :]])

    if message.get("tool_calls"):
        bare = {name: value for name, value in message.items() if name != "tool_calls"}
        if show_with({**bare, "content": content or ""}) == text:
            raise InvalidRequestError(
                "is not shown by the chat template.",
                field=f"{where}.tool_calls",
                hint="Write the calls into the content.",
            )
        _check_calls(message["tool_calls"], text, where=f"{where}.tool_calls")
    if isinstance(content, str):
        return
    without = show_with({**message, "content": ""})
    parts = list(content) if isinstance(content, list | tuple) else []
    raw = any(text.count(str(one)) > without.count(str(one)) for one in (content, *parts))
    said = [str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part]
    if raw or not all(one.strip() in text for one in said):
        raise InvalidRequestError(
            f"is {content!r:.80}, which the chat template cannot write.",
            field=f"{where}.content",
            hint="Give a text.",
        )


def _check_calls(calls: Sequence[Any], text: str, *, where: str) -> None:
    """Refuses arguments that the template wrote as a text in a text, or as Python would."""
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(arguments, str | dict | list):
            continue
        is_text = isinstance(arguments, str)
        written = json.dumps(arguments, ensure_ascii=False)
        wrong = written if is_text else str(arguments)
        if wrong in text and (is_text or wrong != written):
            raise InvalidRequestError(
                f"is written as {wrong:.80} by the chat template.",
                field=f"{where}[{i}].function.arguments",
                hint=f"Give {'an object' if is_text else 'the JSON as a text'} there.",
            )


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
        InvalidRequestError: not an example, nothing to learn, or longer than `max_length` tokens;
            or the chat template refuses it.
        ContextLengthError: longer than the model's context.
        ConfigError: a chat template or an end token is missing, or it rewrites earlier messages.
    """
    read = read_example(example, where=where)
    if isinstance(read, Chat):
        text, spans = _chat(tokenizer, read, roles)
    elif isinstance(read, Completion):
        text, spans = _completion(tokenizer, read, where)
    else:
        text, spans = read.text, list(read.spans)
    # templates write their own BOS
    datum = _datum(tokenizer, text, spans, where=where, special=not isinstance(read, Chat))
    length = datum.model_input.length + 1
    if max_length is not None and length > max_length:
        raise InvalidRequestError(
            f"has {length} tokens, more than {max_length}.",
            field=where,
            hint='Shorten it, raise max_length, or choose too_long="cut" or "drop".',
        )
    if context_length is not None:
        check_length(datum.model_input.length, context_length, field=where)
    return datum


def cut_datum(datum: Datum, length: int) -> Datum | None:
    """The first `length` tokens of one that `to_datum` made; None: nothing in them is learned."""
    kept = {name: data.tolist()[: length - 1] for name, data in datum.loss_fn_inputs.items()}
    if not any(kept["weights"]):
        return None
    tokens = ModelInput.from_ints(datum.model_input.to_ints()[: length - 1])
    return Datum(model_input=tokens, loss_fn_inputs=kept)


def from_pieces(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Piece]) -> Datum:
    """Texts as one, encoded as a whole; weight 1 on the tokens of the learned ones.

    Raises:
        InvalidRequestError: nothing is learned, or no token can end where a learned text ends.
    """
    spans: list[Span] = []
    text = ""
    for part, learned in parts:
        if learned and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return _datum(tokenizer, text, spans, where="parts")


def _datum(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
    *,
    where: str,
    special: bool = True,
) -> Datum:
    """`special`: whether the tokenizer's special tokens (BOS) come first."""
    bare = partial(tokenizer.encode, add_special_tokens=False)
    encode = partial(encode_text, tokenizer) if special else bare
    borders = [border for span in spans for border in span]
    tokens, counts = encode_split(tokenizer, text, borders, encode=encode, where=where)
    learned = [0.0] * len(tokens)
    for start, end in zip(counts[::2], counts[1::2], strict=True):
        learned[start:end] = [1.0] * (end - start)
    if not any(learned[1:]):
        raise InvalidRequestError(
            "has nothing to learn.",
            field=where,
            hint="Give a text of two tokens, or a message of the learned roles.",
        )
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": learned[1:]},
    )


def _completion(
    tokenizer: PreTrainedTokenizerBase, read: Completion, where: str
) -> tuple[str, list[Span]]:
    ends = tuple(end_tokens(tokenizer))
    if not ends:
        raise ConfigError(
            "the model's tokenizer has no token to end a completion with.",
            field=where,
            hint='Give {"text": ..., "spans": ...}, and sample with a stop string.',
        )
    end = "" if read.completion.endswith(ends) else ends[0]
    text = read.prompt + read.completion + end
    return text, [(len(read.prompt), len(text))]


def _chat(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, roles: Collection[str]
) -> tuple[str, list[Span]]:
    show = partial(render, tokenizer, tools=chat.tools, options=chat.options, where=chat.where)
    full = show(chat.messages, generate=False)
    ends = end_tokens(tokenizer)
    spans: list[Span] = []
    for i, message in enumerate(chat.messages):
        if i < chat.learned_from or message["role"] not in roles or message.get("weight") == 0:
            continue
        replies = message["role"] == "assistant"
        opening = show(chat.messages[:i], generate=replies)
        closing = show(chat.messages[: i + 1], generate=False)
        said = closing[len(opening) :]
        # what the template writes behind an end is never sampled
        find = said.find if replies else said.rfind
        behind = [at + len(end) for end in ends if (at := find(end)) >= 0]
        said = said[: min(behind, default=len(said))]
        if not closing.startswith(opening) or not full.startswith(opening + said):
            raise ConfigError(
                f"the chat template rewrites message {i} when others follow, or opens it otherwise "
                "when it is sampled.",
                field=chat.where,
                hint="Cut the conversation behind it, and give each as an example.",
            )
        if replies and not behind:
            raise ConfigError(
                f"the chat template ends message {i} with no token at which sampling ends.",
                field=chat.where,
                hint="Let it write the tokenizer's eos_token there, or give prompt and completion.",
            )
        spans.append((len(opening), len(opening) + len(said)))
    return full, spans


ANCHORS = ("\n", ".", "a", "0")


def encode_split(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    borders: Sequence[int],
    *,
    encode: Callable[[str], list[int]],
    where: str,
) -> tuple[list[int], list[int]]:
    """The text's tokens, and how many of them stand before each border, a character of it.

    They are `encode(text)`, and before a border `encode(text[:border])`, which is what a sampler
    would have read there. Where both cannot be, since a token would reach over the border, the
    second holds, and what follows is encoded on its own.

    Args:
        borders: ascending.
        where: what the error names.

    Raises:
        InvalidRequestError: no tokens with such a border say the text.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    tokens = encode(text)
    base: list[int] = []
    start = 0
    counts: list[int] = []
    for border in borders:
        heads = (
            [base + more for more in encode_behind(tokenizer, base, text[start:border])]
            if start
            else [encode(text[:border])]
        )
        head = next((one for one in heads if tokens[: len(one)] == one), None)
        if head is None:
            said = decode(tokens)
            split = (
                (one, one + more)
                for one in heads
                for more in encode_behind(tokenizer, one, text[border:])
            )
            head, tokens = next((both for both in split if decode(both[1]) == said), (None, tokens))
            if head is None:
                raise InvalidRequestError(
                    f"has no border between tokens behind {text[max(0, border - 20) : border]!r}.",
                    field=where,
                    hint="Begin or end what is learned a character earlier or later.",
                )
            base, start = head, border
        counts.append(len(head))
    return tokens, counts


def encode_behind(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str
) -> Iterator[list[int]]:
    """Tokens of `text` where it goes on behind `tokens`, likeliest first; there is at least one.

    What goes before a text decides about a space before it and stands in the way of merges, so the
    last token's text is encoded with it, or another, and taken away again.
    """
    last = str(tokenizer.decode(list(tokens[-1:])))
    for anchor in (last, *ANCHORS) if tokens else ():
        before = tokenizer.encode(anchor, add_special_tokens=False)
        both = tokenizer.encode(anchor + text, add_special_tokens=False)
        if anchor and both[: len(before)] == before:
            yield both[len(before) :]
    yield tokenizer.encode(text, add_special_tokens=False)


def decode_behind(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]
) -> str:
    """What `tokens` say behind `before`: alone, decoders leave out the space that begins a text."""
    head, whole = (
        str(tokenizer.decode([*before[-1:], *more], skip_special_tokens=False))
        for more in ((), tokens)
    )
    alone = str(tokenizer.decode(list(tokens), skip_special_tokens=False))
    return whole[len(head) :] if whole.startswith(head) else alone
