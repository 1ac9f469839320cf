"""Small tokenizers, made in the manner of those that models are published with.

Each has merges, characters that no token holds whole, and specials of its own; all but `plain` have
a chat template. What they differ in is said in `TOKENIZERS`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TEXTS = ("What is it? Yes. The cat sat.\n", "No. The answer is 12, user assistant.\n", "a b c\n")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PIPES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _byte_level(special: Sequence[str], *, extra: Sequence[str] = (), **settings: Any) -> Any:
    """Byte-level BPE; `extra` are added behind the vocabulary."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 5, trainer)
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in extra])
    return _wrapped(raw, **settings)


def _sentencepiece(
    special: Sequence[str], *, prefix: str = "", extra: Sequence[str] = (), **settings: Any
) -> Any:
    """BPE over text whose spaces are "▁", as converters write it; bytes are fallback.

    `prefix` says where a space is put before text: `always` between specials, or at the `first`.
    """
    learner = _with_spaces(Tokenizer(models.BPE()), prefix)
    first = [*special, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=first, show_progress=False)
    learner.train_from_iterator(TEXTS * 5, trainer)
    learned = json.loads(learner.to_str())["model"]  # put anew: no byte is a special token
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE(learned["vocab"], merges, byte_fallback=True, unk_token="<unk>")
    raw = _with_spaces(Tokenizer(model), prefix)
    raw.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in special])
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in extra])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _wrapped(raw, unk_token="<unk>", **settings)


def _with_spaces(raw: Tokenizer, prefix: str) -> Tokenizer:
    if prefix == "first":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        spaces = normalizers.Replace(" ", "▁")
        steps = [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
        raw.normalizer = normalizers.Sequence(steps)
    return raw


def _unigram(**settings: Any) -> Any:
    """SentencePiece's Unigram with `Metaspace`, which puts a space before every piece of text."""
    words = ["▁", "▁the", "▁is", "▁a", "at", "er", *sorted(set("".join(TEXTS)) - {" "})]
    special = [("<unk>", 0.0), ("</s>", 0.0)]
    scored = [(word, -2.0 - 0.1 * i) for i, word in enumerate(words)]
    raw = Tokenizer(
        models.Unigram([*special, *scored, *((b, -20.0) for b in BYTES)], 0, byte_fallback=True)
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    return _wrapped(raw, unk_token="<unk>", **settings)


def _wrapped(raw: Tokenizer, *, bos: str | None = None, template: Any = None, **names: Any) -> Any:
    """`bos` is added before every text, as the tokenizers of such models do."""
    if bos is not None:
        pair = (bos, raw.token_to_id(bos))
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[pair]
        )
        names["bos_token"] = bos
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = template
    return tokenizer


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    # byte-level, as Qwen's: no BOS, ChatML
    "qwen": lambda: _byte_level(
        IM,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=IM,
        template=CHATML,
    ),
    # byte-level, as Llama 3's: a BOS that the template writes too; the content is trimmed
    "llama3": lambda: _byte_level(
        LLAMA_3, extra=["<|eot_id|>"], bos=LLAMA_3[0], eos_token="<|eot_id|>", template=HEADERS
    ),
    # the same special token at the end of text, and no chat template
    "plain": lambda: _byte_level(
        ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ),
    # templates by name, one of them for tools
    "named": lambda: _byte_level(
        IM, eos_token="<|im_end|>", template={"default": CHATML, "tool_use": WITH_TOOLS}
    ),
    # a space before every piece, byte fallback, BOS, roles that must alternate
    "llama2": lambda: _sentencepiece(
        ["<unk>", "<s>", "</s>"], prefix="always", bos="<s>", eos_token="</s>", template=BRACKETS
    ),
    # the space before the first piece alone, as newer converters write it
    "mistral": lambda: _sentencepiece(
        ["<unk>", "<s>", "</s>"], prefix="first", bos="<s>", eos_token="</s>", template=BRACKETS
    ),
    # the same without BOS; markers of the template are tokens, but not special ones
    "phi3": lambda: _sentencepiece(
        ["<unk>", "<s>", "</s>"],
        prefix="always",
        extra=["<|user|>", "<|assistant|>", "<|system|>"],
        eos_token="</s>",
        template=PIPES,
    ),
    # no space before a piece, BOS, a template that refuses system messages
    "gemma": lambda: _sentencepiece(
        GEMMA,
        bos="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=GEMMA[4:],
        template=TURNS,
    ),
    # Unigram with Metaspace
    "unigram": lambda: _unigram(eos_token="</s>", template=PIPES),
    # tokens that were added behind the model's vocabulary, and never trained
    "beyond": lambda: _byte_level(
        IM,
        extra=["<|extra_0|>", "<|extra_1|>"],
        eos_token="<|im_end|>",
        additional_special_tokens=[*IM, "<|extra_0|>", "<|extra_1|>"],
        template=CHATML,
    ),
}
BEYOND = 2
"""Tokens of `beyond` that its models do not have."""
