"""Rows of preferences: a prompt and two replies, one of them preferred. `preference` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weaver.errors import InvalidRequestError
from weaver.types import Datum
from weaver_rl.preference_losses import PreferenceLoss

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt with its replies, as examples that `to_datum` reads."""

    sides: Mapping[str, Mapping[str, Any]]
    """By `chosen` and `rejected`; one may be missing."""
    where: str
    margin: float | None = None
    """By how much bradley_terry wants the scores apart."""
    encoded: dict[str, Datum] = field(default_factory=dict)


def read_pair(row: Any, loss: PreferenceLoss, *, where: str) -> Row:
    """What a row compares.

    Raises:
        InvalidRequestError: a side is missing, or both are the same; names the field.
    """
    if not hasattr(row, "keys"):
        hint = 'Give {"prompt": ..., "chosen": ..., "rejected": ...}.'
        raise InvalidRequestError(f"is a {type(row).__name__}.", field=where, hint=hint)
    given = {side: row[side] for side in SIDES if row.get(side) is not None}
    missing = [side for side in SIDES if side not in given]
    unpaired = loss.unpaired
    if missing and (len(missing) == 2 or not unpaired):
        hint = "One of both is enough." if unpaired else 'Only loss="kto" learns from one side.'
        raise InvalidRequestError("is missing.", field=f"{where}.{missing[0]}", hint=hint)
    if not missing and given["chosen"] == given["rejected"]:
        hint = "Leave the row out: it prefers nothing."
        raise InvalidRequestError("is the same as chosen.", field=f"{where}.rejected", hint=hint)
    prompt = row.get("prompt")
    if prompt is None:
        prompt, given = _shared(given, where)
    more = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    sides = {side: {"prompt": prompt, "completion": said, **more} for side, said in given.items()}
    margin = row.get("margin") if loss.scores else None
    if margin is not None and not (isinstance(margin, int | float) and np.isfinite(margin)):
        raise InvalidRequestError(
            f"is {margin!r:.80}.", field=f"{where}.margin", hint="Give a finite number."
        )
    return Row(sides=sides, where=where, margin=margin)


def _shared(given: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """The messages with which both sides begin, and what each has behind them."""
    texts = any(isinstance(side, str) or not isinstance(side, Sequence) for side in given.values())
    if texts or len(given) < 2:
        hint = "Give it, or two lists of messages that begin alike."
        raise InvalidRequestError("is missing.", field=f"{where}.prompt", hint=hint)
    one, two = given["chosen"], given["rejected"]
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    same = min(len(one), len(two)) if same is None else same
    if not 0 < same < min(len(one), len(two)):
        hint = "Both begin with the same messages, and each ends with others."
        raise InvalidRequestError("compares no replies.", field=where, hint=hint)
    return one[:same], {side: said[same:] for side, said in given.items()}
