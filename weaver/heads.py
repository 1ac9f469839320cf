"""What a batch must be for the head of its model, and for a loss of pairs. Called by `checks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weaver import errors
from weaver.losses import LOSSES
from weaver.types import Datum, Head


def check_head(loss_fn: str, filled: Mapping[str, object], head: Head | None) -> None:
    """Raises UnsupportedError, InvalidLossConfigError: loss or option is not one of this head's."""
    loss = LOSSES[loss_fn]
    if head not in loss.heads:
        others = ", ".join(name for name, one in LOSSES.items() if head in one.heads)
        ours, its = (
            ("tokens", 'create_model(head="scalar")') if head is None else ("scores", "no head=")
        )
        raise errors.UnsupportedError(
            f"{loss_fn} is no loss of a model that gives {ours}.",
            field="loss_fn",
            hint=f"Use {others}; or a model with {its}.",
        )
    if head is not None and filled["temperature"] != 1:
        raise errors.InvalidLossConfigError(
            f"is {filled['temperature']}, and scores have none.",
            field="loss_fn_config.temperature",
            hint="Leave it out.",
        )


def check_asked(score: bool, head: Head | None) -> None:
    """Raises UnsupportedError: the weights have not the head that is asked for."""
    if score and head is None:
        raise errors.UnsupportedError(
            "these weights give tokens; they have no scalar head to score with.",
            field="head",
            hint='Sample from them, or give a model that was made with head="scalar".',
        )
    if head is not None and not score:
        raise errors.UnsupportedError(
            "these weights are a reward model's: they give one score, no tokens.",
            field="head",
            hint="Use create_reward_client and score(prompts), or other weights.",
        )


def check_pairs(datums: Sequence[Datum]) -> None:
    """Raises InvalidDatumError: a side is missing, both are the same, or a rejected one has inputs.

    Datums 2i and 2i + 1 are a pair, the preferred first.
    """
    if len(datums) % 2:
        raise errors.InvalidDatumError(
            "has no other side: datums come in pairs, the preferred first.",
            field=f"datums[{len(datums) - 1}]",
            hint="Give [preferred, other, preferred, other, ...].",
        )
    for i in range(0, len(datums), 2):
        chosen, rejected = datums[i : i + 2]
        if rejected.loss_fn_inputs:
            raise errors.InvalidDatumError(
                f"has {next(iter(rejected.loss_fn_inputs))!r}, which is the pair's.",
                field=f"datums[{i + 1}].loss_fn_inputs",
                hint="Give it with the preferred side, the first of the pair.",
            )
        if chosen.model_input.to_ints() == rejected.model_input.to_ints():
            raise errors.InvalidDatumError(
                f"is the same as datums[{i}], which is to be preferred to it.",
                field=f"datums[{i + 1}]",
                hint="Leave the pair out.",
            )


def lengths_together(datums: Sequence[Datum], loss_fn: str) -> list[int]:
    """For each datum, tokens of what has to be in one pass: its own, or those of its whole pair."""
    lengths = [datum.model_input.length for datum in datums]
    if not LOSSES[loss_fn].paired:
        return lengths
    return [lengths[i] + lengths[i ^ 1] for i in range(len(lengths))]
