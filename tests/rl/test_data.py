"""Tasks: every format reads the same, bad rows are named, the order resumes, splits never leak."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver.errors import InvalidRequestError, NotFoundError
from weaver_rl.data import TaskStream, check_tasks, digest, read_tasks, split_tasks

if TYPE_CHECKING:
    from pathlib import Path

TASKS = [{"prompt": f"rev:{i}=", "answer": str(i)[::-1]} for i in range(10)]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    jsonl = write(tmp_path / "a.jsonl", *(json.dumps(task) for task in TASKS), "")
    parquet.write_table(pa.Table.from_pylist(TASKS), tmp_path / "a.parquet")
    Dataset.from_list(TASKS).save_to_disk(str(tmp_path / "a"))
    for path in (jsonl, tmp_path / "a.parquet", tmp_path / "a"):
        assert read_tasks(path, fields=("prompt", "answer")) == TASKS


@pytest.mark.parametrize(
    ("lines", "field", "words"),
    [
        ([], "a.jsonl", "no tasks"),
        (['{"prompt": "a"}', "{oops"], "a.jsonl", "line 2"),
        (['{"prompt": "a"}', '{"text": "b"}'], "a.jsonl[1]", "'prompt'"),
        (['{"prompt": "a"}', '{"prompt": null}'], "a.jsonl[1]", "'prompt'"),
        (["[1, 2]"], "a.jsonl[0]", "list"),
        (["[" * 100_000], "a.jsonl", "line 1 is not JSON"),
        (['{"prompt": "a", "info": [{"x": "\\ud83d"}]}'], "a.jsonl[0].info[0].x", "surrogate"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, lines: list[str], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        read_tasks(write(tmp_path / "a.jsonl", *lines))
    assert caught.value.field is not None
    assert caught.value.field.endswith(field)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r\n\r\n')
    assert read_tasks(lines) == [{"prompt": "é"}]
    lines.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(InvalidRequestError, match=r"a\.jsonl: line 2 is not UTF-8: .*0xe9"):
        read_tasks(lines)
    bad = pa.array([b"a", b"\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["a", "b"], "answer": bad})
    parquet.write_table(table, tmp_path / "a.parquet")
    Dataset(table).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "a.parquet", tmp_path / "d"):
        with pytest.raises(InvalidRequestError, match="not UTF-8") as caught:
            read_tasks(path)
        assert caught.value.field == f"{path}[1].answer"


def test_a_row_knows_its_place_wherever_it_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(json.dumps(task) for task in TASKS))
    train, test = split_tasks(read_tasks(path), held_out=3)
    for task in pickle.loads(pickle.dumps([*train, *test])):
        assert task.where == f"{path}[{TASKS.index(task)}]"


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequestError, match="no known format"):
        read_tasks(write(tmp_path / "a.csv", "x"))
    with pytest.raises(InvalidRequestError, match="not a Parquet file"):
        read_tasks(write(tmp_path / "a.parquet", "x"))
    with pytest.raises(InvalidRequestError, match="not a dataset"):
        read_tasks(tmp_path)


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = DatasetDict({"train": Dataset.from_list(TASKS), "test": Dataset.from_list(TASKS)})
    parts.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InvalidRequestError, match="train, test"):
        read_tasks(tmp_path / "d")
    assert read_tasks(tmp_path / "d" / "test") == TASKS


def test_tasks_given_by_hand_are_checked() -> None:
    with pytest.raises(InvalidRequestError, match="no field 'answer'"):
        check_tasks([{"prompt": "a"}], fields=("prompt", "answer"))
    with pytest.raises(InvalidRequestError, match="no tasks"):
        TaskStream([])
    with pytest.raises(InvalidRequestError, match="is -1"):
        TaskStream(TASKS, position=-1)


@given(st.lists(st.integers(0, 25), max_size=6), st.integers(0, 5))
def test_a_stream_goes_on_from_its_position(takes: list[int], seed: int) -> None:
    whole = TaskStream(TASKS, seed=seed).take(sum(takes) + 7)
    stream, taken = TaskStream(TASKS, seed=seed), []
    for count in takes:
        taken += stream.take(count)
        stream = TaskStream(TASKS, seed=seed, position=stream.position)
    assert taken + stream.take(7) == whole


def test_every_epoch_has_every_task_in_another_order() -> None:
    stream = TaskStream(TASKS, seed=1)
    epochs = [stream.take(10) for _ in range(3)]
    for epoch in epochs:
        assert sorted(task["prompt"] for task in epoch) == [task["prompt"] for task in TASKS]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != TaskStream(TASKS, seed=2).take(10)


@given(st.permutations(TASKS), st.integers(1, 9))
def test_a_split_depends_on_content_alone(tasks: list[dict[str, str]], held_out: int) -> None:
    train, test = split_tasks(tasks, held_out=held_out)
    assert len(test) == held_out
    assert len(train) == 10 - held_out
    expected = {task["prompt"] for task in split_tasks(TASKS, held_out=held_out)[1]}
    assert {task["prompt"] for task in test} == expected


def test_equal_tasks_stay_on_one_side() -> None:
    for held_out in range(1, 12):
        train, test = split_tasks(TASKS + TASKS[:5], held_out=held_out)
        assert len(train) + len(test) == 15
        assert not {t["prompt"] for t in train} & {t["prompt"] for t in test}


@pytest.mark.parametrize("held_out", [-1, 10, 11])
def test_a_split_that_leaves_nothing_is_refused(held_out: int) -> None:
    with pytest.raises(InvalidRequestError, match="of 10 tasks"):
        split_tasks(TASKS, held_out=held_out)
    assert split_tasks(TASKS, held_out=0) == (TASKS, [])


def test_a_digest_is_of_content_and_order_alone() -> None:
    assert [*{8, 0}] != [*{0, 8}]  # equal sets, in the order of their making
    tasks = [{"prompt": "a", "n": 1}, {"prompt": "b", "of": {8, 0}, "by": object()}]
    again = [{"n": 1, "prompt": "a"}, {"by": object(), "of": {0, 8}, "prompt": "b"}]
    assert digest(tasks) == digest(again)
    assert digest(tasks)["count"] == 2
    assert digest(tasks) != digest(tasks[::-1])
    assert digest(tasks) != digest([tasks[0], {**tasks[1], "prompt": "c"}])
