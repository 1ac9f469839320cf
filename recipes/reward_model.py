"""A reward model, on weaver-nano: it learns what people prefer, and a policy learns it from it.

    python -m recipes.reward_model                             # offline, about a minute
    python -m recipes.reward_model --policy-steps 0            # the reward model alone
    python -m recipes.reward_model --dry-run                   # validate all pairs, and leave
    python -m recipes.reward_model --tasks pairs.jsonl --model Qwen/Qwen3-0.6B

A row of `--tasks` is `{"prompt": ..., "chosen": ..., "rejected": ...}`, texts or lists of messages,
and may have a `margin`. The recipe's own pairs are two random replies each, of which the one that
begins with a vowel is preferred; the base model knows nothing of it, and neither does the policy,
which is given no pair and no rule.

The algorithm (arXiv:2203.02155, its second and third step):

1. A LoRA adapter and a linear layer on the last token's hidden state give a score s.
2. A step takes a batch of pairs and minimises −log σ(s⁺ − s⁻) + c·(s⁺ + s⁻)², whose second part
   keeps scores near 0 (arXiv:2312.09244); held-out pairs say how often the order is right.
3. A second adapter is the policy. Its samples are scored by the first, and a step of
   `importance_sampling` with advantages centred in each group follows (arXiv:2503.20783).

Left out: a KL to the base, which a policy needs that goes on for long. Here twenty steps are enough
for it to say what is preferred, and too few to find what the reward model wrongly likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.pairs import read_pair
from weaver_rl.preference_losses import LOSSES
from weaver_rl.tasks.words import preference_pairs, vowel_first

from . import _run

PAIRS = preference_pairs(1100, seed=1)
"""`{"prompt": "rev:abcd=", "chosen": "ozvq", "rejected": "kwib"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder of pairs; none: the recipe's own."""
    epochs: int = 1
    steps: int = 60
    """Of the reward model, at most; fewer where the epochs end before."""
    batch_size: int = 32
    """Pairs of a step."""
    centre: float = 0.01
    """How much scores are held near 0."""
    max_length: int | None = None
    """Tokens of the longest prompt with its reply; none: what the model's context holds."""
    max_tokens: int = 8
    """Tokens of a reply of the policy, at most."""
    policy_steps: int = 20
    groups_per_step: int = 8
    group_size: int = 8


def main(flags: Flags) -> Mapping[str, float]:
    """Trains both, evaluates and reports; answers the metrics of the end, `pairs/...` and
    `eval/...`."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    pairs, held_out = _run.split_tasks(flags, PAIRS, asked=())
    plan = _run.plan_of(rl.PreferencePlan, flags, loss="bradley_terry", evaluate_every=20)
    policy = _run.plan_of(rl.Plan, flags, steps=flags.policy_steps, evaluate_every=10)
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            sampler = await service.create_sampling_client(base_model=flags.model)
            await rl.check_pairs(sampler, [*pairs, *held_out], plan)
            print(f"{len(pairs)} pairs for {flags.model} are sound; nothing was trained.")
            return {}
        with _run.opened(service, flags, "reward-model", tasks=pairs, plan=plan.as_config()) as run:
            trainer = await _run.trainer(service, flags, run, head="scalar")
            learned = await rl.preference(trainer, pairs, plan, held_out=held_out, run=run)
        saved = await trainer.save_weights_for_sampler("rewards", overwrite=True)
        metrics = {f"pairs{name[4:]}": n for name, n in learned.metrics.items() if "eval/" in name}
        print(f"Held-out pairs: {metrics.get('pairs/accuracy', 0.5):.3f} right; {saved.path}")
        assert run.folder is not None
        print(f"Report: {rl.write_report(run.folder)}")
        if not flags.policy_steps:
            return metrics
        reward = rl.reward_model(await service.create_reward_client(saved))
        prompts, unseen = ([_prompt(row) for row in rows] for rows in (pairs, held_out))
        evaluate = rl.evaluator(
            unseen,
            reward=vowel_first if flags.tasks is None else reward,  # of its own the truth is known
            sampling=flags.sampling,
        )
        below = replace(flags, out=run.folder.path / "policy", steps=flags.policy_steps)
        with _run.opened(service, below, "policy", tasks=prompts, plan=policy.as_config()) as run:
            reinforced = await rl.on_policy(
                await _run.trainer(service, flags, run),
                prompts,
                rl.single_turn(reward),
                policy,
                run=run,
                evaluate=evaluate if unseen else None,
            )
        return _run.finished(run, {**metrics, **reinforced.metrics})


def _prompt(row: rl.Task) -> rl.Task:
    """What the policy is asked: a row's prompt, or the messages with which both replies begin."""
    read = read_pair(row, LOSSES["bradley_terry"], where="pairs")
    return {"prompt": read.sides["chosen"]["prompt"]}


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
