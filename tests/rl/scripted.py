"""A sampler that says what it is told, and small real tokenizers with all kinds of templates."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weaver.tokenizers import end_tokens
from weaver.types import SampledSequence, SampleResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver.types import ModelInput, SamplingParams

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_AND_BRACKETS = (
    "<bos>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TOOLS = ("{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}") + CHATML
DROPS_THOUGHTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}",
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
KEEPING = {"chatml": CHATML, "brackets": BOS_AND_BRACKETS, "tools": TOOLS}
REWRITING = {"thoughts": DROPS_THOUGHTS, "trims": TRIMS}


@cache
def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """256 bytes, a few merges and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("h", "e"), ("l", "l"), ("Ġ", "t"), ("Ċ", "Ċ")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _wrapped(inner, template)


@cache
def metaspace_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: words begin with ▁, decoding drops a leading space."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz[]/ST0123456789IN.\n", "▁the", "▁a"]
    vocab: list[tuple[str, float]] = [
        ("<unk>", 0.0),
        *((w, -1.0 - i) for i, w in enumerate(letters)),
    ]
    inner = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return _wrapped(inner, template)


def _wrapped(inner: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        bos_token="<bos>",
        additional_special_tokens=["<|im_start|>", "<eos>", "<think>", "</think>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


class ScriptedSampler:
    """Has what agents use of an `AsyncSamplingClient`. `script(turn, prompt)` gives each reply.

    A reply that does not end with one of the tokenizer's ends counts as cut off.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        script: Callable[[int, list[int]], Sequence[int] | str],
        *,
        context_length: int = 100_000,
    ) -> None:
        self.tokenizer = tokenizer
        self.base_model = "scripted"
        self.script = script
        self.model_info = SimpleNamespace(context_length=context_length, vocab_size=len(tokenizer))
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    async def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    async def sample(
        self,
        prompt: ModelInput,
        sampling_params: SamplingParams,
        *,
        num_samples: int = 1,
        top_logprobs: int = 0,
    ) -> SampleResult:
        tokens = prompt.to_ints()
        sequences = []
        for _ in range(num_samples):
            reply = self.script(len(self.prompts), tokens)
            self.prompts.append(tokens)
            self.params.append(sampling_params)
            if isinstance(reply, str):
                reply = [
                    *self.tokenizer.encode(reply, add_special_tokens=False),
                    self.tokenizer.eos_token_id,
                ]
            sequences.append(self._sequence(list(reply)[: sampling_params.max_tokens]))
        return SampleResult(sequences=tuple(sequences), prompt_tokens=tuple(tokens))

    def _sequence(self, reply: list[int]) -> SampledSequence:
        stopped = bool(reply) and reply[-1] in end_tokens(self.tokenizer).values()
        return SampledSequence(
            tokens=tuple(reply),
            text=str(self.tokenizer.decode(reply, skip_special_tokens=True)),
            logprobs=tuple(-0.01 * token for token in reply),
            sampling_logprobs=tuple(-0.02 * token for token in reply),
            stop_reason="stop" if stopped else "length",
            weights_version=3,
        )
