"""The display: plain lines off a terminal, a picture on one, and curves that stay in their box."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rl.helpers import group
from weaver.curves import draw_curve, number_text
from weaver_rl.display import Display, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {"reward/mean": 0.5, "train/loss": -0.0012, "tokens/per_second": 4210.0, "gap/max": 1e-6}


def test_plain_lines_off_a_terminal() -> None:
    stream = io.StringIO()
    display = Display(steps=60, stream=stream)
    display.log(METRICS, 1)
    display.waiting_for("12 of 256 rollouts")
    display.log({**METRICS, "gap/max": 0.1}, 2)
    display.log({**METRICS, "gap/max": 0.1}, 3)
    display.close()
    lines = stream.getvalue().splitlines()
    numbers = "reward 0.500  loss -0.001  tokens/s 4,210  gap 1.0e-06"
    assert re.fullmatch(rf"step 1/60  {numbers}  \d+\.\d s a step, .+ left", lines[0])
    assert [line.split(" ")[0] for line in lines] == ["step", "step", "hint:", "step"]
    assert "\x1b" not in stream.getvalue()


def test_a_picture_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = Display(steps=10, stream=stream)
    for step in range(1, 4):
        display.log({**METRICS, "reward/mean": 0.1 * step, "rollout/truncated_fraction": 1.0}, step)
    display.log_samples([group(1.0, 0.0)], 3)
    display.waiting_for("12 of 256 rollouts")
    display.close()
    display.close()
    text = stream.getvalue()
    for words in ("step 3/10", "0.300", "12 of 256", "cut off by max_tokens", "x → ", "│"):
        assert words in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_model_text_is_never_markup_or_control() -> None:
    stream = Terminal()
    display = Display(stream=stream)
    evil = replace(group(1.0).rollouts[0], task={"prompt": "[red]\x1b[2Jhello"})
    display.log_samples([replace(group(1.0), rollouts=(evil,))], 1)
    display.close()
    assert "\x1b[2J" not in stream.getvalue()
    assert "[red]" in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.53, "0.530"), (-2e-6, "-2.0e-06"), (4210.4, "4,210"), (3e9, "3.0e+09")],
)
def test_numbers(value: float, text: str) -> None:
    assert number_text(value) == text


def test_the_first_metric_that_is_there_is_shown() -> None:
    assert shown({"policy/surprise": 1.0}) == [("entropy", "1.000")]
    assert shown({"policy/surprise": 1.0, "train/entropy": 2.0}) == [("entropy", "2.000")]
    assert shown({}) == []


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a machine with other work
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(2, 10),
)
def test_a_curve_fills_its_box(values: list[float], width: int, height: int) -> None:
    rows = [row.partition("│")[2] for row in draw_curve(values, width=width, height=height)]
    assert len(rows) == height
    assert all(len(row) == width for row in rows)
    # Both dot columns of every character hold a dot in some row.
    for x in range(width):
        bits = 0
        for row in rows:
            bits |= ord(row[x]) - 0x2800
        assert bits & 0x47
        assert bits & 0xB8


def test_a_rising_line() -> None:
    assert draw_curve([0.0, 1.0], width=4, height=2) == ["1.000 │⠀⠀⡠⠊", "0.000 │⡠⠊⠀⠀"]
