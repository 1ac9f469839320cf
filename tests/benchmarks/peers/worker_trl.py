"""TRL's GRPOTrainer, one optimizer step a round: `worker_trl.py FOLDER`."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import worker
from tests.benchmarks.peers.worker_peft import TARGETS

if TYPE_CHECKING:
    from tests.benchmarks.peers.cases import Load


def make() -> Any:
    import datasets
    import peft
    import transformers
    import trl

    device, dtype = worker.device()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)

    def grpo(load: Load) -> float:
        """Seconds of the second of two steps, since a trainer is made for each round."""
        (prompt,) = worker.prompts(load)
        text = " ".join(f"w{token}" for token in prompt)
        ends: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())

        trainer = trl.GRPOTrainer(
            model=sys.argv[1],
            reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
            args=trl.GRPOConfig(
                output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
                per_device_train_batch_size=load.samples,
                num_generations=load.samples,
                max_completion_length=load.lengths[0],
                max_steps=2,
                learning_rate=1e-5,
                use_cpu=device == "cpu",
                gradient_checkpointing=False,
                bf16=dtype == "bfloat16",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": text}] * 4),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=load.rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
        return ends[1] - ends[0]

    return grpo


if __name__ == "__main__":
    worker.serve(make)
