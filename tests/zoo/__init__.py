"""Tiny models and tokenizers of every kind that people bring, so that no test knows only one.

Tests take the `zoo` fixture, which makes from configurations and fixed seeds, once a session:

    folder = zoo.model("gemma3", "gemma")             # a folder: a random model and a tokenizer
    adapter = zoo.adapter(folder, "rslora")           # a folder, as PEFT saves one
"""

from tests.zoo.adapters import ADAPTERS
from tests.zoo.members import Zoo, covering
from tests.zoo.models import FAMILIES
from tests.zoo.tokenizers import TOKENIZERS

__all__ = ["ADAPTERS", "FAMILIES", "TOKENIZERS", "Zoo", "covering"]
