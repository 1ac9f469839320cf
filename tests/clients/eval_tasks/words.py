"""Reversed words, as a task of inspect-ai; the words lie beside it."""

from __future__ import annotations

import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact
from inspect_ai.solver import generate


@task
def reversed_words() -> Task:
    lines = (Path(__file__).parent / "words.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    samples = [Sample(input=row["question"], target=row["answer"]) for row in rows]
    return Task(
        dataset=MemoryDataset(samples),
        solver=generate(),
        scorer=exact(),
        config=GenerateConfig(temperature=0.0, max_tokens=8),
    )
