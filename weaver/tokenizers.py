"""Tokenizers from the files that a service hands out, so that they are the same near and far.

The clients' `get_tokenizer` uses it. transformers is imported when a tokenizer is asked for. What a
text begins with and where a reply ends is decided here, for sampling and for training alike.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from anyio import Lock, to_thread

from weaver.errors import InvalidNameError, InvalidRequestError, requiring
from weaver.threads import out_at_exit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from weaver.protocol import Service

PreTrainedTokenizer: TypeAlias = "PreTrainedTokenizerBase"
FILE_NAME = re.compile(r"\w[\w.-]*")
LARGE = 10_000
"""Entries of a table that makes a tokenizer's copy slow."""
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What a chat template raises, beside jinja2's own errors, on messages that it was not made for."""


class TokenizerCache:
    """The tokenizers of one client, each loaded once: by the engine, if it is in this process."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        self._folder = folder
        self._loaded: dict[str, PreTrainedTokenizer] = {}
        self._lock = Lock()

    async def get(self, base_model: str) -> PreTrainedTokenizer:
        """Raises UnknownModelError, or MissingDependencyError without transformers."""
        async with self._lock:
            if base_model not in self._loaded:
                shared = await self._service.tokenizer(base_model)
                if shared is None:
                    files = await self._service.tokenizer_files(base_model)
                    load = partial(load_tokenizer, files, self._folder)
                else:
                    load = partial(copy_tokenizer, shared)
                self._loaded[base_model] = await to_thread.run_sync(out_at_exit, load)
            return self._loaded[base_model]


def copy_tokenizer(tokenizer: PreTrainedTokenizer) -> PreTrainedTokenizer:
    """One with settings of its own, such as padding and added tokens, and the same vocabulary.

    Whoever changes one of them leaves the other as it was; the tables, which nobody changes, are in
    memory once.
    """
    kept = {
        id(value): value
        for value in vars(tokenizer).values()
        if isinstance(value, (dict, list)) and len(value) >= LARGE
    }
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        own = type(fast)(fast.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (value := getattr(fast, part)) is not None:
                setattr(own, part, copy.deepcopy(value))
        own.encode_special_tokens = fast.encode_special_tokens
        added = fast.get_added_tokens_decoder()
        own.add_tokens([token for _, token in sorted(added.items())])
        if own.get_added_tokens_decoder() == added:  # else it has gaps, which a whole copy keeps
            kept[id(fast)] = own
    return copy.deepcopy(tokenizer, kept)


def load_tokenizer(files: Mapping[str, bytes], folder: Path) -> PreTrainedTokenizer:
    """A transformers tokenizer from file contents, kept below `folder` under their hash.

    Raises:
        MissingDependencyError: transformers is not installed.
        InvalidNameError: a file name that leads elsewhere.
    """
    with requiring("a tokenizer", "engine"):
        from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(
        store_tokenizer(files, folder), local_files_only=True, trust_remote_code=False
    )


def encode_text(tokenizer: PreTrainedTokenizer, text: str) -> list[int]:
    """The tokens of a text that is no chat, behind those that the tokenizer puts before every text.

    A text that begins with them, such as one that a chat template wrote, gets no second ones.
    Tokens that the tokenizer puts behind a text are left out: a prompt goes on.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False)
    whole: list[int] = tokenizer.encode("a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tokens if tokens[:at] == whole[:at] else whole[:at] + tokens


def render_chat(
    tokenizer: PreTrainedTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generate: bool = True,
    options: Mapping[str, Any] | None = None,
    field: str = "prompt",
) -> str:
    """What the chat template makes of messages; with `generate` up to where a reply begins.

    Args:
        options: other variables of the template, `{"enable_thinking": False}`.
        field: what the error names.

    Raises:
        InvalidRequestError: the template refuses them; with its words.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=generate,
            tokenize=False,
            **(options or {}),
        )
    except (TemplateError, *_FAULTS) as error:
        raise InvalidRequestError(
            f"the chat template refuses it: {error or type(error).__name__}.",
            field=field,
            hint="Give the roles and contents that the template knows.",
        ) from error
    return str(text)


def end_tokens(tokenizer: PreTrainedTokenizer) -> dict[str, int]:
    """What ends a reply, token ids by their text: `{"<|im_end|>": 2}`.

    The tokenizer's end of sequence, and the added token that the chat template writes behind an
    assistant's message: with some models the former is only the end of a document.
    """
    texts = [tokenizer.eos_token]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        with suppress(InvalidRequestError, ValueError):  # it wants another chat, or shows no reply
            text = render_chat(tokenizer, chat, generate=False)
            behind = text[text.rindex("Hello") + len("Hello") :].lstrip()
            texts.append(max(filter(behind.startswith, tokenizer.get_added_vocab()), key=len))
    return {str(text): int(tokenizer.convert_tokens_to_ids(text)) for text in texts if text}


def store_tokenizer(files: Mapping[str, bytes], folder: Path) -> Path:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        if not FILE_NAME.fullmatch(name):
            raise InvalidNameError(f"the service sent a tokenizer file called {name!r}.")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    target = folder / digest.hexdigest()[:32]
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder))
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        try:
            unfinished.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return target
