"""`docs/compatibility.md`, from verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
import transformers

from tests.compatibility.judge import BOUND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.compatibility.judge import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEAD = """# Which models work

Every architecture for which transformers has a causal language model, by its `model_type`, made
tiny from its configuration with random weights in float32, and compared with transformers' own
eager attention and with PEFT. `python -m tests.compatibility` wrote this page, with transformers
{transformers}, PEFT {peft} and torch {torch}.

- **right**: the largest difference to transformers of log-probabilities, in nats, of prompts that
  are read in pieces (prefill) and of samples that are drawn in one batch (decode); of
  log-probabilities and gradients, relative to the largest, of an adapter and of full fine-tuning
  (training); and of the merged adapter and the fully trained model as transformers reads them
  (export). All are within {bound}.
- **refused**: an `UnsupportedError` of the field `base_model` says why when a run or a sampler is
  made, before anything is computed.
- **untried**: transformers makes no tiny model of it from these sizes. What it computes is compared
  when it is opened, as with every model.

{counts}. None is accepted and wrong.

| model_type | | prefill | decode | training | export | why, or what it cannot do |
|---|---|---|---|---|---|---|
"""


def page(verdicts: Sequence[Verdict]) -> str:
    kinds = ("right", "refused", "untried", "WRONG")
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in kinds}
    head = HEAD.format(
        transformers=transformers.__version__,
        peft=peft.__version__,
        torch=torch.__version__,
        bound=BOUND,
        counts=", ".join(f"{n} are {kind}" for kind, n in counts.items() if n),
    )
    return head + "\n".join(row(v) for v in verdicts) + "\n"


def row(verdict: Verdict) -> str:
    gaps = (verdict.prefill, verdict.decode, verdict.training, verdict.export)
    cells = ("" if gap is None else f"{gap:.0e}" for gap in gaps)
    why = verdict.reason.replace("|", "/")
    return f"| {verdict.name} | {verdict.verdict} | {' | '.join(cells)} | {why} |"
