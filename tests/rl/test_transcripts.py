"""Transcripts: every rollout of a step, aligned token by token, in bounded space."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.rl.helpers import group, rollout, segment
from weaver_rl.credit.marks import spread
from weaver_rl.datums import examples
from weaver_rl.objectives import Behaviour
from weaver_rl.transcripts import (
    read_transcripts,
    steps_with_transcripts,
    token_texts,
    write_transcripts,
)
from weaver_rl.types import Group

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def decode(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


def test_every_rollout_with_what_training_knew(tmp_path: Path) -> None:
    two = Group(
        task={"prompt": "x"},
        rollouts=(rollout(1.0, segment([1, 2], [3, 4]), segment([1, 2], [5])), rollout(0.0)),
    )
    groups = [group(1.0, None, 0.0), two]
    advantages_P_G = np.array([[0.5, 0.0, -0.5], [0.25, -0.25, 0.0]])
    marks = spread(groups, advantages_P_G)
    parts = {"outcome": np.array([0.5, 0.5]), "turns": np.array([0.25, -0.25])}
    measured = {"kl/reference": np.array([0.0, 0.125])}
    marks[0][0] = replace(marks[0][0], parts=parts, measured=measured)
    made = examples(groups, marks, behaviour=Behaviour(False, 1.0), aggregate="token")
    trained = [(one, one.q + 0.001 * (i + 1)) for i, one in enumerate(made)]
    write_transcripts(
        tmp_path,
        7,
        groups=groups,
        marks=marks,
        trained=trained,
        dropped=[group(0.0, 0.0)],
        decode=decode,
    )
    rows = read_transcripts(tmp_path, 7)
    assert [(row["group"], row["rollout"]) for row in rows] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [row["advantage"] for row in rows] == [0.5, None, -0.5, 0.25, -0.25, None, None]
    assert [row["reward"] for row in rows] == [1.0, None, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert rows[1]["failure"]["message"] == "ValueError: no"
    assert [row["trained"] for row in rows] == [True, False, True, True, True, False, False]
    gaps = [s.get("gaps") for row in rows for s in row["segments"]]
    assert gaps == [
        [0, 0, 0.001, 0.001], None, [0, 0, 0.002, 0.002], [0, 0, 0.003, 0.003], [0, 0, 0.004],
        [0, 0, 0.005, 0.005], None, None,
    ]  # fmt: skip
    first = rows[0]["segments"][0]
    assert first["advantages"] == [0, 0, 0.5, 0.5]
    assert first["credit"] == {
        "outcome": [0, 0, 0.5, 0.5], "turns": [0, 0, 0.25, -0.25], "kl/reference": [0, 0, 0, 0.125]
    }  # fmt: skip
    assert "credit" not in rows[2]["segments"][0]
    assert first["pieces"] == ["b", "c", "d", "e"]
    assert (first["mask"], first["versions"]) == ([0, 0, 1, 1], [-1, -1, 0, 0])
    assert read_transcripts(tmp_path, 8) == []


def test_old_steps_are_thinned_out(tmp_path: Path) -> None:
    def write(step: int, max_bytes: int) -> int:
        path = write_transcripts(
            tmp_path,
            step,
            groups=[group(1.0)],
            marks=spread([group(1.0)], np.zeros((1, 1))),
            trained=(),
            decode=decode,
            max_bytes=max_bytes,
        )
        return path.stat().st_size

    size = write(1, 10**6)
    for step in range(2, 31):
        write(step, int(6.5 * size))
    left = steps_with_transcripts(tmp_path)
    assert (left[0], left[-1], len(left)) == (1, 30, 6)
    assert max(b - a for a, b in itertools.pairwise(left)) <= 16


@pytest.mark.parametrize("text", ["plain", " leading", "aé漢🙂b", "🙂", "a\ufffdb"])
def test_pieces_join_to_the_text(text: str) -> None:
    tokens = list(text.encode())
    pieces = token_texts(tokens, lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


def test_a_leading_space_survives() -> None:
    words = ["▁hello", "▁world"]

    def drops_the_first_space(tokens: Sequence[int]) -> str:
        return "".join(words[t] for t in tokens).replace("▁", " ")[1:]

    assert token_texts([0, 1], drops_the_first_space) == ["hello", " world"]
