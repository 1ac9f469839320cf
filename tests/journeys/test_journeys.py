"""The quick jobs of docs/jobs.md from an empty folder; its table is of the page as it is."""

from __future__ import annotations

import re

import pytest

from tests.journeys.__main__ import BEHIND, PLACES, journey, places
from tests.journeys.page import Block, Job, jobs, table


def test_the_table_has_every_job_with_its_lines_and_minutes() -> None:
    rows = table()
    assert list(rows) == [job.anchor for job in jobs()]
    for job in jobs():
        lines, *minutes = rows[job.anchor]
        assert int(lines) == job.lines, "python -m tests.journeys"
        for place, one in zip(PLACES, minutes, strict=True):
            assert one == "–" or (place in places(job) and re.fullmatch(r"\d+\.\d min", one))


def test_what_a_job_begins_with_is_another_job() -> None:
    anchors = [job.anchor for job in jobs()]
    assert {*BEHIND, *BEHIND.values()} <= {*anchors}


def test_remarks_empty_lines_and_data_are_not_typed() -> None:
    python, shell = "import a\n\n# why\na.b()  # how\n", "weaver doctor\n"
    blocks = (Block("python", None, python), Block("bash", None, shell), Block("json", "c", "{}"))
    assert Job("A job, or two", blocks).lines == 3
    assert Job("A job, or two", ()).anchor == "a-job-or-two"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("continue-tomorrow", "embedded"),  # and what it begins with
        ("serve-to-a-team", "on a server"),
    ],
)
def test_a_job_is_done_as_its_page_says(name: str, where: str) -> None:
    [job] = [one for one in jobs() if one.anchor == name]
    _, skipped = journey(job, where)
    assert [line for line in skipped if not line.startswith("pip install")] == []
