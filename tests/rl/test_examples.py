"""Rows of every usual form are read, and what cannot be is refused by its place, with the fix."""

from __future__ import annotations

import json
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoo import TOKENIZERS, Zoo
from weaver.errors import ConfigError, InvalidRequestError, WeaverError
from weaver_rl.conversations import to_datum
from weaver_rl.data import read_tasks

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.types import Datum

USER: dict[str, Any] = {"role": "user", "content": "hi"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "yes"}
AGAIN: dict[str, Any] = {"role": "user", "content": "why?"}
NO: dict[str, Any] = {"role": "assistant", "content": "no"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "s"}
PARTS = [{"type": "text", "text": "hi", "image_url": None}]
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {}}}],
}
SHOWS_ALL = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% if big %}BIG{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


BYTES = TOKENIZERS["qwen"]()


def tokenizer_of(template: Any) -> Any:
    tokenizer = copy(BYTES)
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer: Any, datum: Datum) -> str:
    last = datum.loss_fn_inputs["target_tokens"].tolist()[-1]
    return str(tokenizer.decode([*datum.model_input.to_ints(), last]))


def learned(tokenizer: Any, datum: Datum) -> str:
    targets, weights = (datum.loss_fn_inputs[n].tolist() for n in ("target_tokens", "weights"))
    return str(tokenizer.decode([t for t, w in zip(targets, weights, strict=True) if w]))


CHAT = {"messages": [SYSTEM, USER, REPLY]}
TALK = {"messages": [USER, REPLY, AGAIN, NO]}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yes"},
                ]
            },
            CHAT,
        ),
        ({"conversations": [USER, REPLY], "system": "s"}, CHAT),
        ({"messages": [{"from": "user", "value": "hi"}, REPLY], "system": "s"}, CHAT),
        ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, CHAT),
        ({"messages": [SYSTEM, {"role": "user", "content": PARTS}, REPLY]}, CHAT),
        (
            {"messages": [{**m, "tool_calls": None, "name": None} for m in CHAT["messages"]]},
            CHAT,
        ),
        ({**CHAT, "prompt": None, "text": None, "tools": None, "conversations": None}, CHAT),
        ({"messages": None, "prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"text": "abc", "spans": None, "messages": None}, {"text": "abc"}),
        ({"tools": '[{"name": "rain"}]', **CHAT}, {"tools": [{"name": "rain"}], **CHAT}),
    ],
)
def test_usual_forms_are_read(row: dict[str, Any], same: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(SHOWS_ALL)
    one, two = to_datum(tokenizer, row), to_datum(tokenizer, same)
    assert text_of(tokenizer, one) == text_of(tokenizer, two)
    assert learned(tokenizer, one) == learned(tokenizer, two)


def test_rows_of_arrays_are_read() -> None:
    """As pandas gives them."""
    tokenizer = tokenizer_of(SHOWS_ALL)
    calls = {**CALL, "tool_calls": np.array(CALL["tool_calls"], dtype=object)}
    row = {"messages": np.array([USER, calls], dtype=object), "tools": np.array(TOOLS, object)}
    same = {"messages": [USER, CALL], "tools": TOOLS}
    assert text_of(tokenizer, to_datum(tokenizer, row)) == text_of(
        tokenizer, to_datum(tokenizer, same)
    )


def test_only_the_completion_of_a_chat_is_learned() -> None:
    tokenizer = tokenizer_of(SHOWS_ALL)
    datum = to_datum(tokenizer, {"prompt": [USER, REPLY, AGAIN], "completion": [NO]})
    assert text_of(tokenizer, datum) == text_of(tokenizer, to_datum(tokenizer, TALK))
    assert learned(tokenizer, datum) == "no<|im_end|>"


def test_a_message_of_weight_0_is_not_learned() -> None:
    tokenizer = tokenizer_of(SHOWS_ALL)
    row = {"messages": [USER, {**REPLY, "weight": 0}, AGAIN, {**NO, "weight": 1}]}
    assert learned(tokenizer, to_datum(tokenizer, row)) == "no<|im_end|>"


def test_tools_and_options_reach_the_template(zoo: Zoo) -> None:
    row = {"messages": [USER, CALL], "tools": TOOLS, "chat_template_kwargs": {"big": True}}
    tokenizer = tokenizer_of(SHOWS_ALL)
    datum = to_datum(tokenizer, row)
    assert text_of(tokenizer, datum) == tokenizer.apply_chat_template(
        row["messages"], tools=TOOLS, big=True, tokenize=False
    )
    assert learned(tokenizer, datum).startswith('[{"type": "function"')
    named = zoo.tokenizer("named")
    row = {"messages": [USER, REPLY], "tools": TOOLS}
    assert '"rain"' in text_of(named, to_datum(named, row))
    with pytest.raises(ConfigError, match=r"examples\[3\].messages: .*does not show tools"):
        to_datum(zoo.tokenizer("qwen"), row, where="examples[3]")


@pytest.mark.parametrize(
    ("row", "place", "words"),
    [
        (None, "", "NoneType"),
        ({}, "", "none"),
        ({"instruction": "a", "output": "b"}, "", "Give prompt and completion"),
        ({"prompt": "a", "response": "b"}, "", "'response'"),
        ({"prompt": "a", "completion": None}, "", r"'completion' \(null\)"),
        ({"text": None}, "", r"'text' \(null\)"),
        ({"prompt": 1, "completion": "a"}, ".prompt", "int"),
        ({"prompt": "a", "completion": [REPLY]}, ".completion", "list"),
        ({"prompt": {"a": 1}, "completion": [REPLY]}, ".prompt", "dict"),
        ({"text": ["a"]}, ".text", "list"),
        ({"text": "abc", "spans": [[0, 2], [1, 3]]}, ".spans", "ascend"),
        ({"text": "abc", "spans": [1, 2]}, ".spans", "pairs"),
        ({"text": "abc", "spans": []}, "", "nothing to learn"),
        ({"text": ""}, "", "nothing to learn"),
        ({"text": "a\ud800"}, ".text", "surrogate"),
        ({"messages": []}, ".messages", "no messages"),
        ({"messages": "hi"}, ".messages", "str"),
        ({"messages": ["hi"]}, ".messages[0]", "str"),
        ({"messages": [{"content": "hi"}]}, ".messages[0].role", "role"),
        ({"messages": [USER, {"role": "assistant"}]}, ".messages[1].content", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, ".messages[0].content", "int"),
        ({"messages": [USER, {**REPLY, "content": "\udc00"}]}, ".messages[1].content", "surrog"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, ".messages[1].weight", "0.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]},
            ".messages[0].content[0]",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, ".messages[0].content[0]", "str"),
        ({"conversations": [{"from": "who", "value": "x"}]}, ".conversations[0].from", "Known"),
        ({"conversations": [{"from": ["gpt"]}]}, ".conversations[0].from", "Known"),
        ({"conversations": [{"from": "gpt"}]}, ".conversations[0].content", "missing"),
        ({"messages": [USER, {**CALL, "tool_calls": []}]}, ".messages[1].content", "null"),
        ({"messages": [USER, {**CALL, "tool_calls": "x"}]}, ".messages[1].tool_calls", "list"),
        ({"messages": [USER, REPLY], "tools": [{"\ud800": 1}]}, ".tools[0]", "surrogate"),
        ({"messages": [USER, REPLY], "tools": 3}, ".tools", "schemas"),
        ({"messages": [USER, REPLY], "tools": "{"}, ".tools", "not JSON"),
        ({"messages": [USER, REPLY], "tools": [3]}, ".tools", "schemas"),
        ({"messages": [USER, REPLY], "functions": [{}]}, ".functions", "tools"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": 3}, ".chat_template_kwargs", "object"),
    ],
)
def test_a_broken_row_is_named(row: Any, place: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        to_datum(tokenizer_of(SHOWS_ALL), row, where="chat.jsonl[3]")
    assert caught.value.field == f"chat.jsonl[3]{place}"
    assert caught.value.hint


def call_of(arguments: Any) -> dict[str, Any]:
    return {**CALL, "tool_calls": [{"function": {"name": "rain", "arguments": arguments}}]}


PYTHONIC = SHOWS_ALL.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments")
NAIVE = SHOWS_ALL.replace("{% if m.content is string %}{{ m.content }}", "{{ m.get('content') }}")
NAIVE = NAIVE.replace("{% else %}", "{% if m.never %}")
MUTE = SHOWS_ALL.replace("{% if 'tool_calls' in m %}", "{% if m.never %}")
DEAF = SHOWS_ALL.replace("{% for part in m.content or [] %}{{ part.text }}{% endfor %}", "")


@pytest.mark.parametrize(
    ("template", "messages", "place"),
    [
        (NAIVE, [{"role": "user", "content": PARTS}, REPLY], ".messages[0].content"),
        (NAIVE, [USER, CALL], ".messages[1].content"),  # writes "None"
        (DEAF, [{"role": "user", "content": PARTS}, REPLY], ".messages[0].content"),
        (MUTE, [USER, CALL], ".messages[1].tool_calls"),
        (MUTE, [USER, {**CALL, "content": "a"}, USER, REPLY], ".messages[1].tool_calls"),
        (SHOWS_ALL, [USER, call_of('{"a": "b"}')], ".messages[1].tool_calls[0].function.arguments"),
        (PYTHONIC, [USER, call_of({"a": "b"})], ".messages[1].tool_calls[0].function.arguments"),
        ("{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}", [USER, REPLY], ".messages"),
        (SHOWS_ALL + "{{ raise_exception('no') }}", [USER, REPLY], ".messages"),
        ("{{ messages[0].content + 1 }}", [USER, REPLY], ".messages"),
        ("{% if %}", [USER, REPLY], ".messages"),
        ({"other": SHOWS_ALL}, [USER, REPLY], ".messages"),
    ],
)
def test_what_a_template_cannot_write_is_refused(
    template: Any, messages: list[dict[str, Any]], place: str
) -> None:
    with pytest.raises(InvalidRequestError, match="template") as caught:
        to_datum(tokenizer_of(template), {"messages": messages}, where="chat.jsonl[3]")
    assert caught.value.field == f"chat.jsonl[3]{place}"


def test_arguments_are_learned_as_json_however_they_are_given() -> None:
    as_text = tokenizer_of(PYTHONIC)
    datum = to_datum(as_text, {"messages": [USER, call_of('{"a": "b"}')]})
    assert learned(as_text, datum) == '{"a": "b"}<|im_end|>'


@pytest.mark.parametrize("call", [3, "rain", {"function": "rain"}, {"function": {"name": "rain"}}])
def test_calls_of_any_shape_are_shown_or_refused(call: Any) -> None:
    tokenizer = tokenizer_of(SHOWS_ALL)
    row = {"messages": [USER, {"role": "assistant", "content": "None", "tool_calls": [call]}]}
    assert json.dumps(call) in learned(tokenizer, to_datum(tokenizer, row))
    with pytest.raises(InvalidRequestError, match="template refuses it"):
        to_datum(tokenizer_of("{{ messages[1].tool_calls[0].function.name + 1 }}"), row)


def test_fields_that_only_arrow_has_filled_in_are_not_shown(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def row(name: str) -> dict[str, Any]:
        return {
            "tools": [{"name": name, "parameters": {"properties": {name: {"type": "string"}}}}],
            "messages": [USER, call_of({name: "x"})],
        }

    rows = [row("city"), row("day")]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenizer = tokenizer_of(SHOWS_ALL)
    for read, own in zip(read_tasks(tmp_path / "a.parquet", fields=()), rows, strict=True):
        assert read != own
        one, two = (text_of(tokenizer, to_datum(tokenizer, each)) for each in (read, own))
        assert "null" not in one
        assert one == two


def test_a_system_message_that_a_template_refuses_is_named(zoo: Zoo) -> None:
    with pytest.raises(InvalidRequestError, match=r"a\[3\]\.messages: .*System role not"):
        to_datum(zoo.tokenizer("gemma"), {"messages": [SYSTEM, USER, REPLY]}, where="a[3]")


def test_an_end_that_sampling_does_not_know_is_not_taught() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ConfigError, match=r"a\[3\]\.messages: .*at which sampling ends"):
        to_datum(tokenizer_of(plain), {"messages": [USER, REPLY]}, where="a[3]")
    endless = TOKENIZERS["plain"]()
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"a\[3\]: .*no token to end a completion"):
        to_datum(endless, {"prompt": "a", "completion": "b"}, where="a[3]")


def test_a_turn_ends_at_its_first_end(zoo: Zoo) -> None:
    """As with Phi-3's template, which writes another end behind the whole conversation."""
    tokenizer = tokenizer_of(
        SHOWS_ALL + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    )
    tokenizer.eos_token = "<|endoftext|>"
    assert learned(tokenizer, to_datum(tokenizer, TALK)) == "yes<|im_end|>no<|im_end|>"
    gemma = zoo.tokenizer("gemma")
    assert learned(gemma, to_datum(gemma, {"messages": [USER, REPLY]})) == "yes<end_of_turn>"
    row = {"prompt": "a", "completion": "b<end_of_turn>"}
    assert learned(gemma, to_datum(gemma, row)) == "b<end_of_turn>"


NAMES = st.sampled_from(
    "messages conversations prompt completion text spans tools functions system role content from "
    "value weight tool_calls function name arguments type chat_template_kwargs tokenize".split()
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(["", "user", "assistant", "human", "text", "hi", "{", "[]", "\ud800", "\x00é"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4)
)
MESSAGES = st.lists(
    st.dictionaries(NAMES, VALUES, max_size=3).map(lambda more: {**more, **USER})
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": VALUES},
        optional={"tool_calls": VALUES, "weight": VALUES},
    ),
    max_size=3,
).map(lambda some: [*some, REPLY])


@settings(max_examples=400, deadline=None)
@given(
    row=VALUES
    | st.dictionaries(NAMES, VALUES, max_size=4)
    | st.fixed_dictionaries(
        {"messages": MESSAGES}, optional={"tools": VALUES, "chat_template_kwargs": VALUES}
    )
    | st.fixed_dictionaries({"prompt": VALUES | MESSAGES, "completion": VALUES | MESSAGES})
    | st.fixed_dictionaries({"text": VALUES, "spans": VALUES}),
    template=st.sampled_from([SHOWS_ALL, NAIVE, PYTHONIC, DEAF]),
)
def test_no_row_raises_anything_bare(row: Any, template: str) -> None:
    try:
        to_datum(tokenizer_of(template), row, where="a[3]")
    except WeaverError as error:
        assert str(error).startswith("a[3]")
        assert error.hint
