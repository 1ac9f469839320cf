"""A cluster file: what it says, and what is refused by name before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from weaver.engine.cluster.config import read_cluster_file
from weaver.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GROUP = '[[trainer]]\nmodel = "weaver-nano"\n'


def read(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    return read_cluster_file(file)


def test_groups_have_names_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, f'{GROUP}ranks = 2\n{GROUP}[[trainer]]\nmodel = "b"\n')
    assert [*config.named()] == ["weaver-nano#0", "weaver-nano#1", "b#0"]
    assert [group.ranks for group in config.trainer] == [2, 1, 1]
    assert config.address == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "trainer"),
        ("trainer = []", "trainer"),
        (f"{GROUP}ranks = 0", "trainer.0.ranks"),
        (f"{GROUP}rank = 2", "trainer.0.rank"),
        (f'{GROUP}mode = "magic"', "trainer.0.mode"),
        (f'{GROUP}device = "tpu"', "trainer.0.device"),
        (f"{GROUP}call_s = 0", "trainer.0.call_s"),
        ("[[trainer]]\nranks = 2", "trainer.0.model"),
        (f"object_store_mb = 1\n{GROUP}", "object_store_mb"),
        (f"adress = 'auto'\n{GROUP}", "adress"),
        ("[[trainer", "TOML"),
        (f'{GROUP}[[pool]]\nmodel = "b"\nmax_rank = 513', "pool.0.max_rank"),
        (f"{GROUP}[[pool]]\nworkers = 2", "pool.0.model"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        read_cluster_file(tmp_path / "nowhere.toml")


def test_pools_are_one_for_each_model_or_none(tmp_path: Path) -> None:
    assert read(tmp_path, GROUP).pools() == {}
    text = '[[trainer]]\nmodel = "a"\n[[pool]]\nmodel = "{}"\n'
    assert [*read(tmp_path, text.format("a")).pools()] == ["a"]
    with pytest.raises(ConfigError, match=r"trainer\.0\.model: is a, which no pool samples"):
        read(tmp_path, text.format("b")).pools()
    twice = text.format("a") + '[[pool]]\nmodel = "a"\n'
    with pytest.raises(ConfigError, match=r"pool\.1\.model: is a, which has a pool already"):
        read(tmp_path, twice).pools()
