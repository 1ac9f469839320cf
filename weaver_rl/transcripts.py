"""What was asked, said and rewarded at each step, as JSONL; loops write it, the report reads it.

One file a step, one line a rollout::

    {"step": 3, "group": 0, "rollout": 2, "task": {"prompt": "rev:abc=", "answer": "cba"},
     "messages": [...], "text": "cba", "reward": 1.0, "metrics": {}, "advantage": 0.5,
     "trained": true, "failure": null, "stop_reason": "stop", "turns": 1, "seconds": 0.2,
     "segments": [{"tokens": [...], "pieces": ["r", ...], "mask": [...], "logprobs": [...],
                   "sampling_logprobs": [...], "versions": [...], "advantages": [...],
                   "gaps": [...], "credit": {"outcome": [...], "kl/reference": [...]}}]}

Lists of a segment have T entries; the last three are there where it was trained on. `gaps` is
trainer − sampler in nats, `credit` the parts of the advantages and what was measured for them. The
rollout's `advantage` is the mean of those of its tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from weaver_rl.credit.marks import Marks
from weaver_rl.datums import Example, FloatN, by_segment
from weaver_rl.storage import naming_storage, read_lines, write_lines
from weaver_rl.types import Group, Rollout, Segment

MAX_BYTES = 512 * 2**20
DIGITS = 5


def write_transcripts(
    folder: Path,
    step: int,
    *,
    groups: Sequence[Group],
    marks: Sequence[Sequence[Marks]],
    trained: Sequence[tuple[Example, FloatN]],
    dropped: Sequence[Group] = (),
    decode: Callable[[tuple[int, ...]], str],
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Writes the step's file, atomically, then thins out old steps to stay below `max_bytes`.

    Args:
        groups: those that were trained on; `marks` are theirs.
        trained: what `datums.examples(groups, marks, ...)` made, each with the trainer's
            log-probabilities [N] before the step.
        dropped: groups that were sampled and left out.
        decode: the tokenizer's, special tokens included.

    Raises:
        StorageError: disk full or not writable.
    """
    learned = {one[0].place: one for one in trained}
    # Samples of a step share most of their tokens and pieces.
    cached = lru_cache(maxsize=100_000)(decode)
    records = []
    for p, group in enumerate([*groups, *dropped]):
        for g, rollout in enumerate(group.rollouts):
            own = marks[p][g] if p < len(groups) and rollout.failure is None else None
            segments = [
                _segment(one, learned.get((p, g, s)), cached)
                for s, one in enumerate(rollout.trajectory.segments)
            ]
            if own is not None:
                _add_credit(segments, rollout, own)
            records.append(
                {
                    "step": step,
                    "group": p,
                    "rollout": g,
                    **_rollout(rollout),
                    "advantage": None if own is None else _mean_advantage(own),
                    "trained": own is not None and bool(own.weights.any() or not own.weights.size),
                    "segments": segments,
                }
            )
    path = folder / f"{step:06d}.jsonl"
    write_lines(path, records)
    _thin_out(folder, max_bytes)
    return path


def read_transcripts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step, as written; [] where it has none."""
    return read_lines(folder / f"{step:06d}.jsonl")


def steps_with_transcripts(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in folder.glob("[0-9]*.jsonl"))


def token_texts(tokens: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """The text that each token adds; of a character made by several, the last has it all.

    Each piece is decoded behind the one before, since many tokenizers drop a leading space.
    """
    texts: list[str] = []
    before: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    for i, token in enumerate(tokens):
        pending = (*pending, token)
        text = decode((*before, *pending))[len(decode(before)) if before else 0 :]
        if text.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(tokens):
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, ()
    return texts


def _rollout(rollout: Rollout) -> dict[str, Any]:
    trajectory = rollout.trajectory
    return {
        "task": rollout.task,
        "messages": trajectory.messages,
        "text": rollout.text,
        "reward": rollout.reward if rollout.failure is None else None,
        "metrics": rollout.metrics,
        "failure": asdict(rollout.failure) if rollout.failure is not None else None,
        "stop_reason": trajectory.stop_reason,
        "turns": trajectory.turns,
        "seconds": round(rollout.seconds, DIGITS),
    }


def _segment(
    segment: Segment,
    trained: tuple[Example, FloatN] | None,
    decode: Callable[[tuple[int, ...]], str],
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tokens": segment.tokens,
        "pieces": token_texts(segment.tokens, decode),
        "mask": segment.mask,
        "logprobs": [round(x, DIGITS) for x in segment.logprobs],
        "sampling_logprobs": [round(x, DIGITS) for x in segment.sampling_logprobs],
        "versions": segment.versions,
    }
    if trained is not None:
        example, logprobs_N = trained
        gaps_N = (logprobs_N - example.q) * example.mask
        record["advantages"] = [0.0, *(round(float(a), DIGITS) for a in example.advantages)]
        record["gaps"] = [0.0, *(float(f"{gap:.3g}") for gap in gaps_N)]
    return record


def _add_credit(segments: Sequence[dict[str, Any]], rollout: Rollout, marks: Marks) -> None:
    for name, values in {**marks.parts, **marks.measured}.items():
        for record, placed in zip(segments, by_segment(rollout, values), strict=True):
            if "advantages" in record:
                rounded = [round(x, DIGITS) for x in placed.tolist()]
                record.setdefault("credit", {})[name] = rounded


def _mean_advantage(marks: Marks) -> float | None:
    counted = marks.advantages[marks.weights > 0]
    return round(float(counted.mean()), DIGITS) if counted.size else None


def _thin_out(folder: Path, max_bytes: int) -> None:
    """Deletes the step whose neighbours are nearest, again and again; first and last stay."""
    kept = steps_with_transcripts(folder)
    sizes = {step: (folder / f"{step:06d}.jsonl").stat().st_size for step in kept}
    while sum(sizes.values()) > max_bytes and len(sizes) > 2:
        steps = list(sizes)
        spans = {b: c - a for a, b, c in zip(steps, steps[1:], steps[2:], strict=False)}
        victim = min(spans, key=lambda step: spans[step])
        del sizes[victim]
        with naming_storage(folder):
            (folder / f"{victim:06d}.jsonl").unlink()
