"""`encode_prompt`: a text or a chat as a model's own tokenizer and template make tokens of it.

`TorchEngine.encode` calls it. A chat template is a program of the model's author and may refuse
what it is given (a system message, say): the caller can mend that, so its words go to the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weaver.errors import InvalidRequestError, UnsupportedError
from weaver.tokenizers import encode_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.types import Message


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message], *, name: str) -> list[int]:
    """Tokens of a text (with special tokens) or of a chat (with the generation prompt).

    Args:
        name: of the model, for errors.

    Raises:
        UnsupportedError: messages, and the tokenizer has no chat template.
        InvalidRequestError: the template or the tokenizer refuses it, with its words.
    """
    text = isinstance(prompt, str)
    if not text and not tokenizer.chat_template:
        raise UnsupportedError(
            f"the tokenizer of {name} has no chat template.",
            field="prompt",
            hint="Pass text or tokens.",
        )
    try:
        if isinstance(prompt, str):
            return encode_text(tokenizer, prompt)
        return list(
            tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )
    except Exception as error:  # templates are programs, and tokenizers raise plain `Exception`
        who = "the tokenizer" if text else "the chat template"
        raise InvalidRequestError(
            f"{who} of {name} refuses it: {error}",
            field="prompt",
            hint="Mend it, or pass tokens." if text else "Mend the messages, or pass text.",
        ) from error
