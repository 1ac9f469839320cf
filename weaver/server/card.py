"""The model card of a whole model: `README.md`, as the Hugging Face hub reads it.

`Operations` puts one beside what full fine-tuning saves, `Exports` beside a merged model.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.types import CheckpointInfo, JsonDict

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
METHODS = {"lora": "a LoRA adapter, merged into the base", "full_ft": "full fine-tuning"}
TEXT = """\
---
{front}
---

# {name}

`{base}` after {step} optimizer steps of {method}, trained with Weaver.

```json
{data}
```

The folder is read as it is by transformers (`{auto}.from_pretrained`) and by vLLM
(`vllm serve FOLDER`). The licence is that of the base model.
"""


def write_card(
    folder: Path,
    info: CheckpointInfo,
    *,
    origin: str,
    metadata: JsonDict,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes what is known of the run that a checkpoint is of.

    `origin` is where the base comes from: the front matter names it if it may be an id of the hub.
    `metrics` are the last ones that were logged, by name.
    """
    scores = info.lora_config is not None and info.lora_config.head is not None
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["weaver", info.training_mode],
    }
    if HUB_ID.fullmatch(origin):
        front |= {"base_model": origin, "base_model_relation": "finetune"}
    kept = {"run_id", "name", "base_model", "training_mode", "lora_config", "step", "created_at"}
    data = info.model_dump(mode="json", include=kept)
    data |= {"user_metadata": metadata, "metrics": dict(metrics or {})}
    text = TEXT.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        name=f"{info.run_id}/{info.name}",
        base=info.base_model,
        auto="AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM",
        step=info.step,
        method=METHODS[info.training_mode],
        data=json.dumps(data, indent=2),
    )
    (folder / CARD).write_text(text)
