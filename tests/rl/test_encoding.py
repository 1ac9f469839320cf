"""What is learned is what a sampler would have read and written, with every kind of tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zoo import TOKENIZERS, Zoo
from weaver.errors import InvalidRequestError
from weaver.tokenizers import encode_text, end_tokens
from weaver_rl.conversations import encode_behind, to_datum

if TYPE_CHECKING:
    from weaver.types import Datum

TEXTS = st.text(alphabet="Yes. at\n1=é😀<", min_size=1, max_size=12)
CHATTING = [name for name in TOKENIZERS if name != "plain"]
SETTINGS = settings(max_examples=40, deadline=None)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(zoo: Zoo, request: pytest.FixtureRequest) -> Any:
    return zoo.tokenizer(request.param)


def tokens_of(datum: Datum) -> list[int]:
    return [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]]


def learned_runs(datum: Datum) -> list[tuple[int, int]]:
    """From where to where tokens are learned, counted in the whole sequence."""
    weights = [0.0, *datum.loss_fn_inputs["weights"].tolist(), 0.0]
    starts = [i for i in range(1, len(weights)) if weights[i] and not weights[i - 1]]
    ends = [i for i in range(1, len(weights)) if weights[i - 1] and not weights[i]]
    return list(zip(starts, ends, strict=True))


@settings(SETTINGS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
@pytest.mark.parametrize("name", CHATTING)
def test_a_chat_is_learned_as_it_is_sampled(
    zoo: Zoo, name: str, pairs: list[tuple[str, str]]
) -> None:
    tokenizer = zoo.tokenizer(name)
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    datum = to_datum(tokenizer, {"messages": messages})
    tokens = tokens_of(datum)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.decode(tokens) == tokenizer.decode(whole)
    runs = learned_runs(datum)
    assert len(runs) == len(pairs)
    begin, _ = runs[0]
    assert tokens[:begin] == tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ends = end_tokens(tokenizer)
    for (_, text), (_, end) in zip(pairs, runs, strict=True):
        assert tokens[end - 1] in ends.values()
        assert tokenizer.decode(tokens[: end - 1]).rstrip().endswith(text.strip())


@settings(SETTINGS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS, completion=TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_completion_is_learned_behind_the_prompt_that_is_sampled(
    zoo: Zoo, name: str, prompt: str, completion: str
) -> None:
    tokenizer = zoo.tokenizer(name)
    datum = to_datum(tokenizer, {"prompt": prompt, "completion": completion})
    tokens = tokens_of(datum)
    ((begin, end),) = learned_runs(datum)
    assert tokens[:begin] == encode_text(tokenizer, prompt)
    assert end == len(tokens)
    assert tokens[-1] == tokenizer.eos_token_id
    whole = [*encode_text(tokenizer, prompt + completion), tokenizer.eos_token_id]
    assert tokenizer.decode(tokens) == tokenizer.decode(whole)


@settings(SETTINGS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=TEXTS, said=TEXTS, behind=TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_are_learned_to_the_character(
    zoo: Zoo, name: str, before: str, said: str, behind: str
) -> None:
    tokenizer = zoo.tokenizer(name)
    text, end = before + said + behind, len(before) + len(said)
    datum = to_datum(tokenizer, {"text": text, "spans": [[len(before), end]]})
    tokens = tokens_of(datum)
    ((begin, until),) = learned_runs(datum)
    assert tokenizer.decode(tokens) == tokenizer.decode(encode_text(tokenizer, text))
    assert tokens[:begin] == encode_text(tokenizer, before)
    shown = tokenizer.decode(encode_text(tokenizer, before + said))
    assert tokenizer.decode(tokens[:until]) == shown


def test_text_is_read_on_without_a_new_space(tokenizer: Any) -> None:
    for first, second in (("What is", " it?"), ("Yes.", "\nNo"), ("The c", "at"), ("it", "is")):
        before = tokenizer.encode(first, add_special_tokens=False)
        tokens = [*before, *next(encode_behind(tokenizer, before, second))]
        assert tokenizer.decode(tokens) == first + second


def test_a_border_that_no_token_can_have_is_named() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "</s>": 2}, unk_token="<unk>"))
    raw.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(InvalidRequestError, match=r"examples\[1\]: has no border .*'a'"):
        to_datum(tokenizer, {"prompt": "a", "completion": "b"}, where="examples[1]")
