"""Supervised examples: exactly the asked-for tokens are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.rl.scripted import CHATML, DROPS_THOUGHTS, byte_tokenizer
from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl.conversations import to_datum

if TYPE_CHECKING:
    from weaver.types import Datum

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]


def learned(datum: Datum) -> str:
    """The text of the targets with weight 1, gaps as |."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    text, last = "", 1.0
    for token, weight in zip(targets, weights, strict=True):
        if weight:
            text += ("" if last else "|") + str(byte_tokenizer().decode([token]))
        last = weight
    return text.lstrip("|")


def made(example: dict[str, Any], **kwargs: Any) -> Datum:
    return to_datum(byte_tokenizer(CHATML), example, **kwargs)


@pytest.mark.parametrize(
    ("example", "kwargs", "want"),
    [
        ({"prompt": "rev:ab=", "completion": "ba"}, {}, "ba<|im_end|>"),
        ({"prompt": "x=", "completion": "1<|im_end|>"}, {}, "1<|im_end|>"),
        ({"text": "2+2=4"}, {}, "+2=4"),
        ({"text": "2+2=4, 3+3=6", "spans": [[4, 5], [11, 12]]}, {}, "4|6"),
        ({"messages": MESSAGES}, {}, "yes<|im_end|>|no<|im_end|>"),
        ({"messages": MESSAGES}, {"roles": ("system",)}, "system\nBe brief.<|im_end|>"),
    ],
)
def test_what_is_learned(example: dict[str, Any], kwargs: dict[str, Any], want: str) -> None:
    assert learned(made(example, **kwargs)) == want


def test_a_chat_is_the_text_of_its_template() -> None:
    tokenizer = byte_tokenizer(CHATML)
    datum = made({"messages": MESSAGES})
    last = datum.loss_fn_inputs["target_tokens"].tolist()[-1]
    text = tokenizer.decode([*datum.model_input.to_ints(), last])
    assert text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize(
    ("example", "match"),
    [
        ({"question": "x"}, "Give prompt and completion"),
        ({"messages": MESSAGES[:2]}, "nothing to learn"),
        ({"text": "abc", "spans": [[2, 9]]}, "span"),
        ({"text": "abc", "spans": [[1, 2], [0, 1]]}, "span"),
        ({"text": "a" * 99}, "more than 50"),
    ],
)
def test_refused(example: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        made(example, max_length=50, where="examples[3]")
    assert str(caught.value).startswith("examples[3]")


def test_a_template_that_rewrites_history_is_refused() -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>hm</think>yes"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "no"},
    ]
    template = DROPS_THOUGHTS.replace(
        "'</think>' in m.content", "'</think>' in m.content and not loop.last"
    )
    with pytest.raises(ConfigError, match="rewrites message 1"):
        to_datum(byte_tokenizer(template), {"messages": messages})
    assert "hm" in learned(to_datum(byte_tokenizer(template), {"messages": messages[:2]}))
