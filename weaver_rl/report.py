"""`report.html`: a run in one page, made from what its folder holds. Loops write it at the end.

Curves of every metric, hints, the best and the worst groups of any step with tokens coloured by
log-probability gap, advantage, its parts, surprise or age, and the configuration. By hand:
`weaver-rl report`.

A page has its style, its script and its data in one file and needs no network; the self-test and
comparisons write one too. Data travels as JSON in a block that is never executed, and a content
security policy names the one script by its hash: what a model wrote cannot run.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from weaver.errors import NotFoundError
from weaver_rl.metrics import find_hints
from weaver_rl.run_folder import RunFolder, read_config, read_service
from weaver_rl.storage import encode, flattened, read_lines, write_atomically
from weaver_rl.transcripts import read_transcripts, steps_with_transcripts

__all__ = ["write_report"]

MAX_POINTS = 1000
"""A curve has at most so many; more are thinned out evenly."""
MAX_STEPS = 60
"""Whose samples are in the page; more are thinned out evenly."""
PLACES = (("Best group", 0), ("Worst group", -1), ("Second best", 1), ("Second worst", -2))
MAX_ROLLOUTS = 8
MAX_TOKENS = 600
Row = dict[str, Any]
T = TypeVar("T")


def write_report(folder: RunFolder) -> Path:
    """Writes `report.html` into the folder, atomically, and answers its path.

    Raises:
        NotFoundError: the folder holds no run.
        StorageError: disk full or not writable.
    """
    if not folder.config.exists():
        raise NotFoundError(
            f"{folder.path} holds no run.", field="folder", hint="It has no config.json."
        )
    title, data = folder.path.resolve().name, report_data(folder)
    page = make_page("report", title=title, data=data, scripts=("curves",))
    write_atomically(folder.report, page.encode())
    return folder.report


def report_data(folder: RunFolder) -> dict[str, Any]:
    """Everything that the page shows; see `templates/report.js`."""
    rows = read_lines(folder.metrics)
    shown = thinned(rows, MAX_POINTS)
    names = sorted({name for row in rows for name in row} - {"step", "time"})
    config = list(flattened(read_config(folder)))
    kept = steps_with_transcripts(folder.transcripts)
    steps = thinned(kept, MAX_STEPS)
    notes = [f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} from {folder.path}."]
    if len(shown) < len(rows):
        notes.append(f"Curves show {len(shown)} of {len(rows)} steps.")
    if len(steps) < len(kept):
        notes.append(f"Samples of {len(steps)} of {len(kept)} steps are shown.")
    run_id, name = read_service(folder)
    called = f"{name} ({run_id})" if name else run_id
    return {
        "subtitle": " · ".join(filter(None, [called, _subtitle(dict(config), rows)])),
        "last_step": rows[-1]["step"] if rows else 0,
        "seconds": rows[-1]["time"] - rows[0]["time"] if len(rows) > 1 else 0,
        "steps": [row["step"] for row in shown],
        "metrics": {name: [_figures(row.get(name)) for row in shown] for name in names},
        "hints": _hint_ranges(rows),
        "samples": {step: _groups(read_transcripts(folder.transcripts, step)) for step in steps},
        "config": config,
        "footer": " ".join(notes),
    }


def thinned(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (limit - 1))] for i in range(limit)]


def _subtitle(config: Mapping[str, str], rows: Sequence[Row]) -> str:
    begin = f"{datetime.fromtimestamp(rows[0]['time']):%Y-%m-%d %H:%M}" if rows else "no step yet"
    named = [config[name] for name in ("recipe", "model", "base_model") if name in config]
    return " · ".join([*named, begin])


HINTED = 240
"""Steps that a hint looks back in a report, besides the first two: long runs have many."""


def _hint_ranges(rows: Sequence[Row]) -> list[Row]:
    """Each kind of hint once, with the steps at which it was given and its last words."""
    given: dict[str, tuple[list[int], str]] = {}
    history = [_numbers(row) for row in rows]
    for i, row in enumerate(rows):
        past = max(0, i + 1 - HINTED)  # the first row may be of an evaluation alone
        seen = [*history[: min(past, 2)], *history[past : i + 1]]
        for name, text in find_hints(seen).items():
            steps, _ = given.get(name, ([], ""))
            given[name] = ([*steps, row["step"]], text)
    return [
        {"steps": _range_text(steps), "text": text, "good": name == "solved"}
        for name, (steps, text) in given.items()
    ]


def _range_text(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"Step {steps[0]}"
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def _groups(records: Sequence[Row]) -> list[Row]:
    """Best, worst, second best, second worst group by mean reward; one that failed is the worst."""
    groups: dict[int, list[Row]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    ranked = sorted(groups.values(), key=_mean, reverse=True)
    return [_group(label, ranked[i]) for label, i in PLACES[: len(ranked)]]


def _mean(group: Sequence[Row]) -> float:
    """The mean of the rewards; below all others where there is none, which the page gets as
    null."""
    rewards = [record["reward"] for record in group if record["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else float("-inf")


def _group(label: str, group: Sequence[Row]) -> Row:
    ranked = sorted(group, key=lambda one: _mean([one]), reverse=True)
    shown = thinned(ranked, MAX_ROLLOUTS)
    return {
        "label": label,
        "task": dict(flattened(group[0]["task"])),
        "mean": _mean(group),
        "left_out": len(group) - len(shown),
        "rollouts": [_rollout(record) for record in shown],
    }


def _rollout(record: Row) -> Row:
    failure = record["failure"]
    names = ("advantage", "trained", "reward", "stop_reason", "turns")
    return {name: record[name] for name in names} | {
        "failure": failure and f"{failure['where']} {failure['kind']}: {failure['message']}",
        "segments": [_segment(segment) for segment in record["segments"]],
    }


def _segment(segment: Row) -> Row:
    """As the transcript has it, cut to what the page shows; a list that repeats another goes."""
    credit = {name: values[:MAX_TOKENS] for name, values in segment.get("credit", {}).items()}
    cut = {k: values[:MAX_TOKENS] for k, values in segment.items() if k != "credit"}
    cut |= {"credit": credit} if credit else {}
    if cut["sampling_logprobs"] == cut["logprobs"]:
        del cut["sampling_logprobs"]
    return cut | {"left_out": max(0, len(segment["tokens"]) - MAX_TOKENS)}


def _figures(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def make_page(
    template: str, *, title: str, data: Mapping[str, object], scripts: Sequence[str] = ()
) -> str:
    """Fills `templates/<template>.html` with the common style and script, and its own scripts."""
    script = "".join(_read(f"{name}.js") for name in ("page", *scripts, template))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "HASH": f"sha256-{digest}",
        "TITLE": html.escape(title),
        "CSS": _read("page.css"),
        "DATA": json_block(data),
        "SCRIPT": script,
    }
    # Split once: what is filled in is never searched for names again.
    head, *rest = _read(f"{template}.html").split("@@")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return head + "".join(parts[name] + text for name, text in pairs)


def json_block(data: Mapping[str, object]) -> str:
    """JSON that may stand inside a script element: no character there has a meaning in HTML."""
    text = encode(data).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read(name: str) -> str:
    return (resources.files("weaver_rl") / "templates" / name).read_text(encoding="utf-8")
