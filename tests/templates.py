"""The bundled model with another chat template: such as show tools, which its own does not."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from weaver.engine.torch.catalog import NANO

if TYPE_CHECKING:
    from pathlib import Path

SHOWING = "{% if tools %}{{ (tools | tojson)[:200] }}{% endif %}"
HERMES = SHOWING + "<tool_call>"
LLAMA = SHOWING + '{"name": , "parameters": }'


def nano_with(template: str, folder: Path) -> Path:
    """Before its own template."""
    shutil.copytree(NANO, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = template + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
