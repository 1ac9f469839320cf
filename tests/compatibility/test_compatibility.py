"""No architecture is accepted and then fails, or differs from transformers; the page says so."""

from __future__ import annotations

import pytest
import transformers

from tests.compatibility.judge import judge
from tests.compatibility.page import PAGE, row
from tests.compatibility.tiny import NAMES

RIGHT = [
    "afmoe",  # keys that are views
    "beam",  # two layers of one name, one of them fused for PEFT
    "bert-generation",  # a tied bias
    "cohere2",
    "gemma2",  # scores that are capped
    "gemma3_text",
    "gpt2",  # no linear layers but the head
    "gpt_bigcode",  # one key head
    "gpt_oss",  # attention sinks
    "gpt_neox",  # files with names of their own
    "llama",
    "ministral3",  # queries that are scaled by position
    "mixtral",
    "opt",  # learned positions
]
REFUSED = {
    "bart": "attention cannot be replaced",
    "bert": "packed logits would differ",  # its head is more than a projection
    "deepseek_v3": "latent attention",
    "diffllama": "read piece by piece would differ",  # two attention calls a layer
    "doge": "packed logits would differ",  # what the mask holds is learned
    "gemma3": "more than a text decoder",
    "gemma4_text": "differ in their key heads",
    "mamba": "linear_attention",
    "mimo_v2_flash": "differ in their key heads",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.mark.parametrize("name", RIGHT)
def test_families_are_right(name: str) -> None:
    verdict = judge(name)
    assert verdict.verdict == "right", verdict


@pytest.mark.parametrize("name", REFUSED)
def test_families_are_refused_with_the_reason(name: str) -> None:
    verdict = judge(name)
    assert verdict.verdict == "refused", verdict
    assert REFUSED[name] in verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_as_the_page_says(name: str) -> None:
    verdict = judge(name)
    assert verdict.verdict != "WRONG", verdict
    page = PAGE.read_text()
    if f"transformers\n{transformers.__version__}," in page:
        cells = f"| {verdict.name} | {verdict.verdict} |"
        assert any(line.startswith(cells) for line in page.splitlines()), row(verdict)
