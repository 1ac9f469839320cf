"""vLLM on an exported checkpoint: `vllm_flow.py FOLDER`, in an environment of its own.

FOLDER has `tokens.json`, `adapter` and `model`; the log-probabilities of the tokens behind the
first, by the base with the adapter and by the merged model, are written to `vllm.json` in it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

FOLDER = Path(sys.argv[1])
TOKENS = json.loads((FOLDER / "tokens.json").read_text())


def logprobs(model: str, *, adapter: Path | None = None) -> list[float]:
    more: dict[str, Any] = {}
    if adapter is not None:
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        more = {"enable_lora": True, "max_lora_rank": rank}
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=128, seed=0, **more
    )
    [answer] = engine.generate(
        [TokensPrompt(prompt_token_ids=TOKENS)],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        lora_request=None if adapter is None else LoRARequest("mine", 1, str(adapter)),
        use_tqdm=False,
    )
    assert answer.prompt_logprobs is not None
    pairs = zip(answer.prompt_logprobs[1:], TOKENS[1:], strict=True)
    found = [float(at[token].logprob) for at, token in pairs if at is not None]
    del engine
    gc.collect()
    return found


if __name__ == "__main__":
    adapter = FOLDER / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    told = {
        "adapter": logprobs(base, adapter=adapter),
        "merged": logprobs(str(FOLDER / "model")),
    }
    (FOLDER / "vllm.json").write_text(json.dumps(told))
