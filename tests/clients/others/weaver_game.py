"""A taskset as users of `verifiers` write one, which finds it by the name of this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import verifiers.v1 as vf

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Game"]


class Data(vf.TaskData):
    answer: str = ""


class GameTask(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float((trace.last_reply or "").strip() == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or ""))


class Game(vf.Taskset[GameTask, vf.TasksetConfig]):
    def load(self) -> Iterator[GameTask]:
        for answer in range(1, 8):
            data = Data(prompt="Guess a number from 1 to 7.", answer=str(answer))
            yield GameTask(data, self.config.task)
