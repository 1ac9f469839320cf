"""Stop strings across tokens, characters across tokens, and text that is never taken back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.optional import given, settings, st
from weaver.engine.torch.text import Draft, Stops, TextStream
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

EOS = 256
IM_END = 257
SPECIAL = {EOS: "</s>", IM_END: "<|im_end|>"}


class Bytes:
    """One token a byte; 256 and 257 are special."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokens: list[int] = []
        for part in re.split(r"(</s>|<\|im_end\|>)", text):
            special = [token for token, name in SPECIAL.items() if name == part]
            tokens += special or part.encode()
        return tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        names = {} if skip_special_tokens else SPECIAL
        said = (bytes([t]) if t < EOS else names.get(t, "").encode() for t in token_ids)
        return b"".join(said).decode(errors="replace")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece has them: spaces are part of words, rare characters are byte tokens."""
    words = ["▁Hello", "▁wor", "ld", "▁", "!", "▁\u00e9t\u00e9", "a"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def continuation(
    *, length: int = 100, stop: Sequence[str] = (), stream: bool = False, stop_ids: int = EOS
) -> Draft:
    stops = Stops.of(SamplingParams(stop=stop), Bytes(), ends=frozenset({stop_ids}))
    return Draft(Bytes(), stops, index=0, length=length, stream=stream)


def run(end: Draft, tokens: Sequence[int]) -> list[str]:
    deltas = []
    for token in tokens:
        deltas.append(end.push(token))
        if end.stop_reason:
            break
    return deltas


def test_a_stop_string_across_tokens_is_cut_from_text_but_not_from_tokens() -> None:
    end = continuation(stop=["END", "\n\n"], stream=True)
    deltas = run(end, [*b"So ENergy END, never read"])
    assert end.stop_reason == "stop"
    assert bytes(end.tokens) == b"So ENergy END"
    assert end.text == "".join(deltas) == "So ENergy "
    assert deltas[:6] == ["S", "o", " ", "", "", "ENe"]


def test_a_stop_token_ends_the_text_before_it() -> None:
    for stream in (False, True):
        for last in (EOS, ord("!")):
            end = continuation(stream=stream, stop_ids=last)
            deltas = run(end, [*b"hi", last, *b"more"])
            assert (end.stop_reason, end.text, end.tokens) == ("stop", "hi", [*b"hi", last])
            assert "".join(deltas) == "hi"


def test_what_was_held_back_comes_when_the_length_is_reached() -> None:
    end = continuation(length=4, stop=["END"], stream=True)
    assert run(end, [*b"ab", *b"EN"]) == ["a", "b", "", "EN"]
    assert (end.stop_reason, end.text) == ("length", "abEN")
    end = continuation(length=3, stream=True)
    assert run(end, [97, 0xE2, 0x82]) == ["a", "", "\ufffd"]


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    end = continuation(length=3, stop=["c"])
    run(end, [*b"abc"])
    assert (end.stop_reason, end.text) == ("stop", "ab")


def test_stop_strings_may_have_characters_of_several_tokens() -> None:
    end = continuation(stop=["€"], stream=True)
    deltas = run(end, [*"5 ∂€ x".encode()])
    assert (end.text, "".join(deltas)) == ("5 ∂", "5 ∂")
    assert bytes(end.tokens) == "5 ∂€".encode()


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(st.sampled_from([*"abé€😀".encode(), EOS]), st.integers(0, 255)), max_size=60
    ),
    stop=st.lists(st.text("ab€é", min_size=1, max_size=4), max_size=3),
    length=st.integers(1, 60),
)
def test_streaming_never_takes_text_back_and_ends_as_a_single_decode(
    tokens: list[int], stop: list[str], length: int
) -> None:
    """Against the definition: the shortest prefix of tokens whose text has a stop string."""
    end = continuation(length=length, stop=stop, stream=True)
    seen = ""
    for token in tokens:
        seen += end.push(token)
        if end.stop_reason:
            break
        assert end.tokens[-1] != EOS and not any(s in seen for s in stop)
    if end.stop_reason is None:
        return
    assert seen == end.text
    whole = Bytes().decode(end.tokens, skip_special_tokens=True)
    if end.stop_reason == "stop" and end.tokens[-1] != EOS:
        assert whole.startswith(seen) and any(whole[len(seen) :].startswith(s) for s in stop)
    else:
        assert seen == whole
        assert end.tokens[-1] == EOS or len(end.tokens) == length


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "said", "text"),
    [
        (["<|im_end|>"], [*b"bc", IM_END], "bc"),
        (["<|im_end|>\n"], [*b"bc", IM_END, *b"\n"], "bc"),
        (["c<|im_end|>"], [*b"bc", IM_END], "b"),
        (["c<|im_end|>d", "xyz"], [*b"bc", IM_END, *b"d"], "b"),
        (["<|im_end|><|im_end|>"], [*b"b", IM_END, *b"c", IM_END, IM_END], "bc"),
        (["<|im_end|>"], [*b"b", 0xE2, 0x82, IM_END], "b\ufffd"),
        (["€<|im_end|>"], [*"b€".encode(), IM_END], "b"),
        (["c</s>"], [*b"bc", EOS], "b"),
        (["|im_end|"], [*b"b", IM_END, *b"|im_end|"], "b"),  # no more than text
    ],
)
def test_a_stop_string_may_have_special_tokens(
    stop: list[str], said: list[int], text: str, stream: bool
) -> None:
    end = continuation(stop=stop, stream=stream)
    shown = "".join(run(end, [*said, *b"never read"]))
    assert (end.stop_reason, end.tokens, end.text) == ("stop", said, text)
    assert shown == text


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([*b"aab", IM_END, IM_END]), min_size=1, max_size=40),
    stop=st.lists(
        st.lists(st.sampled_from(["a", "b", "<|im_end|>"]), min_size=1, max_size=4).map("".join),
        max_size=3,
    ),
)
def test_text_ends_where_the_first_stop_string_begins(tokens: list[int], stop: list[str]) -> None:
    """Against the definition, on whole characters: what stands before the match, specials left."""
    end = continuation(length=len(tokens), stop=stop, stream=True)
    seen = "".join(run(end, tokens))
    whole, shown = (Bytes().decode(end.tokens, skip_special_tokens=skip) for skip in (False, True))
    cuts = [
        len(text[: text.find(string)].replace("<|im_end|>", ""))
        for string in stop
        if string in (text := whole if "<" in string else shown)
    ]
    assert end.text == seen == (shown[: min(cuts)] if cuts else shown)
    assert end.stop_reason == ("stop" if cuts else "length")
    before = Bytes().decode(end.tokens[:-1])
    assert not any(string in before for string in stop if "<" in string)


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["▁Hello", "▁wor", "ld", "▁", "!", "▁été", "a", "€", "😀"]), max_size=50
    )
)
def test_a_decoder_with_stripped_spaces_and_byte_tokens_streams_its_own_text(
    pieces: list[str],
) -> None:
    tokenizer = fallback_tokenizer()
    tokens: list[int] = []
    for piece in pieces:
        names = [piece] if len(piece) > 1 or piece in "▁!a" else []
        names = names or [f"<0x{b:02X}>" for b in piece.encode()]
        tokens += tokenizer.convert_tokens_to_ids(names)
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in tokens) + stream.flush()
    assert text == tokenizer.decode(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_context_end_is_a_length(stream: bool) -> None:
    end = continuation(length=2, stream=stream)
    run(end, [*b"abcdef"])
    assert (end.stop_reason, end.text, len(end.tokens)) == ("length", "ab", 2)
