"""The fake engine's language model and tokenizer: two weight rows and the bytes of UTF-8.

The token after t has the logits `W[0, v] + W[1, (v - t) mod V]`, W of shape [2, V]: a bias for
each token and one for each distance. Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from weaver.errors import CheckpointCorruptError, CheckpointMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Floats = npt.NDArray[np.float64]

EOS = 256
"""The end of a sequence; the tokens below it are the 256 bytes."""
VOCAB = 257
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _base_weights() -> Floats:
    weights = np.zeros((2, VOCAB))
    weights[0, 32:127] = 3.0  # printable characters, so that samples can be read
    return weights


BASE = _base_weights()


def logits(weights: Floats, tokens: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Logits [T, V] of what follows each of `tokens` [T], and the distances [T, V] they use.

    `weights` are [2, V], or [T, 2, V] for tokens with weights of their own.
    """
    distances = (np.arange(VOCAB)[None, :] - tokens[:, None]) % VOCAB
    by_distance = np.broadcast_to(weights[..., 1, :], distances.shape)
    return weights[..., 0, :] + np.take_along_axis(by_distance, distances, axis=1), distances


def log_softmax(logits: Floats) -> Floats:
    """Row-wise, float64 [T, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return cast("Floats", shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def read_weights(folder: Path, base_model: str) -> tuple[Floats, int]:
    """The weights and the step that a trainer saved.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        weights = np.load(folder / "weight.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointCorruptError(f"{folder.name} cannot be read.") from error
    if state["base_model"] != base_model:
        raise CheckpointMismatchError(
            f"{folder.name} was made from {state['base_model']}, not from {base_model}."
        )
    return weights, state["step"]


class ByteTokenizer:
    """Token b is the byte b."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token for token in token_ids if token < EOS).decode(errors="replace")


def tokenizer_files() -> dict[str, bytes]:
    """A byte tokenizer in the format of the `tokenizers` library: token b is the byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + i) for i, byte in enumerate(others)}  # GPT-2's names of bytes
    vocab = {name: byte for byte, name in names.items()} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
