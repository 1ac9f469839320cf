"""Does every job of docs/jobs.md from an empty folder, and writes its table: lines and minutes.

    python -m tests.journeys                     # all of them, embedded and on a server
    python -m tests.journeys --only evaluate     # these, whose rows alone are written

A job that begins with what another one left comes behind it; its minutes are its own.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import tyro

from tests.journeys.page import Job, fill, jobs
from tests.journeys.play import somewhere

BEHIND = {
    "continue-tomorrow": "fine-tune-on-my-chats",
    "evaluate": "fine-tune-on-my-chats",
    "export-to-vllm": "fine-tune-on-my-chats",
    "debug-a-run-that-does-not-learn": "reward-with-a-judge",
}
"""Jobs that begin with what another one left."""
SERVES = ("serve-to-a-team",)
"""Jobs that start a server themselves."""
PLACES = ("embedded", "on a server")


def journey(job: Job, where: str) -> tuple[float, dict[str, str]]:
    """The seconds of a job in an empty folder, and which of its lines were not run, with why."""
    by_anchor = {one.anchor: one for one in jobs()}
    with (
        tempfile.TemporaryDirectory() as place,
        somewhere(Path(place), "embedded" if job.anchor in SERVES else where) as player,
    ):
        if before := BEHIND.get(job.anchor):
            player.play(by_anchor[before])
        return player.play(job), player.skipped


def places(job: Job) -> tuple[str, ...]:
    return ("on a server",) if job.anchor in SERVES else PLACES


def main(*, only: tuple[str, ...] = ()) -> None:
    minutes: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    for job in jobs():
        if only and job.anchor not in only:
            continue
        took = {}
        for where in places(job):
            seconds, missing = journey(job, where)
            skipped |= {line: why for line, why in missing.items() if where == places(job)[-1]}
            took[where] = f"{max(0.1, seconds / 60):.1f} min"
            print(f"{job.name}, {where}: {seconds:.1f} s, {missing or 'all of it'}", flush=True)
        minutes[job.anchor] = (took.get("embedded", "–"), took.get("on a server", "–"))
    if only:
        return fill(minutes, None)
    named = "; ".join(f"`{line}` ({why})" for line, why in skipped.items())
    fill(
        minutes,
        "Lines are those that are typed, minutes those of `python -m tests.journeys` on "
        f"{os.cpu_count()} CPU cores\n({platform.machine()}, load {os.getloadavg()[0]:.0f}), "
        "with loading, and behind the job that one begins with.\n"
        f"Not run there: {named or 'nothing'}.",
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
