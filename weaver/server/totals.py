"""`tell_totals`: a line a minute in the log of what a server does, where it does something.

Started by `run_server`. Samples end by the thousand: each has a line at DEBUG alone.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from weaver.server.activity import Activity

EVERY_S = 60.0
logger = logging.getLogger(__name__)


async def tell_totals(activity: Activity, *, every_s: float = EVERY_S) -> None:
    """Until it is cancelled."""
    began, before = time.monotonic(), _counts(activity)
    while True:
        await anyio.sleep(every_s)
        now, counts = time.monotonic(), _counts(activity)
        took_s = now - began
        operations, failed, trained, sampled = (
            new - old for new, old in zip(counts, before, strict=True)
        )
        states = [ticket.began_at is not None for ticket in activity.pending()]
        running, waiting = sum(states), len(states) - sum(states)
        began, before = now, counts
        if not operations and not states:
            continue
        fields = {
            "seconds": round(took_s, 1),
            "operations": operations,
            "failed": failed,
            "trained_tokens_per_second": round(trained / took_s, 1),
            "sampled_tokens_per_second": round(sampled / took_s, 1),
            "running": running,
            "waiting": waiting,
        }
        logger.info(
            "in %.0f s: %d operations, %d of them failed; tokens/s: %.0f trained, %.0f sampled; "
            "%d running, %d waiting",
            *fields.values(),
            extra={"fields": fields},
        )


def _counts(activity: Activity) -> tuple[int, int, int, int]:
    return (activity.ended, activity.failed, activity.trained_tokens, activity.sampled_tokens)
