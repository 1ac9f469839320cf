"""Tokens of a text that is learned in part: as the text is read whole, split where sampling begins.

`weaver_rl.conversations` encodes examples with it, agents what they read behind a reply. Texts are
not encoded piece by piece, since SentencePiece's tokenizers put a space before each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from weaver.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

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
