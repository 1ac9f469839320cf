"""Settings: each is declared once, as a field of a class with its default and its help.

`Settings` are a client's, read here from the environment, which no other module reads.
`ServerSettings` (weaver/server/settings.py) are a server's: of their fields `weaver serve` makes
its flags, variables, the keys of its file, and its help.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from weaver.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

    from _typeshed import DataclassInstance

T = TypeVar("T")
Instance = TypeVar("Instance", bound="DataclassInstance")


def setting(
    default: T,
    help: str,
    *,
    name: str = "",
    least: float | None = None,
    most: float | None = None,
    variables: tuple[str, ...] = (),
    secret: bool = False,
) -> T:
    """A field that users set: `threads: int = setting(0, "Torch threads.", least=0)`.

    Args:
        name: by which users know it, where that is not the field's.
        least, most: of what users may give; a program may go beyond.
        variables: that are read where WEAVER_NAME is not set.
        secret: is left out of `repr`.
    """
    how = {"help": help, "name": name, "least": least, "most": most, "variables": variables}
    return field(default=default, repr=not secret, metadata=how)


LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A setting as users know it."""

    name: str
    """The name of a flag; with `_` for `-`, as in the file it may be, too."""
    type: Any
    default: Any
    help: str
    least: float | None
    most: float | None
    variables: tuple[str, ...]
    """The first of these in the environment counts."""


def options(defaults: DataclassInstance) -> Iterator[Option]:
    """What users can set in an instance of a settings class, and in those inside it."""
    types = get_type_hints(type(defaults))
    for item in fields(defaults):
        value = getattr(defaults, item.name)
        if is_dataclass(type(value)):
            yield from options(value)
        elif item.metadata:
            name = item.metadata["name"] or item.name
            names = (f"WEAVER_{name.upper()}", *item.metadata["variables"])
            how = {**item.metadata, "name": name, "variables": names}
            yield Option(type=types[item.name], default=value, **how)


def changed(defaults: Instance, given: Mapping[str, Any]) -> Instance:
    """Settings with the values that are given by their names; a path may begin with `~`."""
    values: dict[str, Any] = {}
    for item in fields(defaults):
        value = getattr(defaults, item.name)
        if is_dataclass(type(value)):
            value = changed(value, given)
        elif item.metadata:
            value = given.get(item.metadata["name"] or item.name, value)
        values[item.name] = value.expanduser() if isinstance(value, Path) else value
    return replace(defaults, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine in a user's own process and that of a server have in common."""

    home: Path = setting(Path("~/.weaver"), "Where runs, checkpoints and the database are kept.")
    device: str = setting(
        "auto",
        "auto (CUDA where torch has it, else the CPU), cpu, cuda, cuda:N, or mps (untested).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Of base weights; auto: bfloat16 on CUDA, else float32. What is trained is float32."
    )
    quantize: Literal["none", "int8", "nf4"] = setting(
        "none",
        "Keeps frozen layers of attention and MLP in int8, or in nf4 (extra `quant`).",
    )
    threads: int = setting(0, "Torch threads; 0 chooses by the model's size.", least=0)
    memory_gb: float = setting(
        0.0,
        "Gigabytes of the device that the engine may use; 0 takes what is free as it begins.",
        least=0,
    )
    model_memory_gb: float = setting(
        0.0,
        "Gigabytes of them for base models; 0: half, and more for one that is alone.",
        least=0,
    )
    kv_cache_gb: float = setting(
        0.0,
        "Gigabytes for keys and values of samples; 0: half of what the model leaves.",
        least=0,
    )
    sample_rows: int = setting(
        0, "Samples that are drawn at once; 0: 64 on a CPU, else 256.", least=0
    )
    tokens_per_pass: int = setting(
        0, "Tokens that go through the model at once in training; 0 chooses by memory.", least=0
    )
    head_rows: int = setting(
        0, "Tokens whose logits are made at once in training; 0 chooses by memory.", least=0
    )
    recompute: Literal["auto", "off", "all"] = setting(
        "auto",
        "Layers that compute their activations again in training, to save memory; auto: as few as "
        "need be.",
    )
    deterministic: bool = setting(False, "No result depends on what else runs.")
    sampler: Literal["torch", "vllm"] = setting(
        "torch",
        "What samples: torch, where it trains, or vllm, in processes with an environment of their "
        "own.",
    )
    sampler_env: str | None = setting(
        None,
        "The folder of that environment, if not sampler-env in the home; `weaver cluster "
        "install-sampler` makes it.",
    )
    sampler_workers: int = setting(
        1, "Processes of vLLM for each base model that is used.", least=1
    )
    sampler_devices: str = setting(
        "", "CUDA devices of vLLM, with commas between, and a process for each: 1,2,3."
    )
    sampler_max_rank: int = setting(
        64, "The largest rank of adapters that vLLM samples; it costs all the time of it.", least=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(EngineSettings):
    """A client's."""

    base_url: str | None = setting(None, "The server to use; without it, all runs in this process.")
    api_key: str | None = setting(None, "The key that is sent to that server.", secret=True)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """A client's settings from `environ`, which is the process's own by default.

    Raises:
        ConfigError: a variable has a value that cannot be used; names it.
    """
    env = os.environ if environ is None else environ
    given = {
        option.name: _value(option, text)
        for option in options(Settings())
        if (text := env.get(option.variables[0]))
    }
    return changed(Settings(), given)


def environment() -> MutableMapping[str, str]:
    """The process's own: for programs that it starts, and libraries that are set there."""
    return os.environ


def _value(option: Option, text: str) -> Any:
    """What the text of a variable stands for."""
    hint = None
    if option.type is int and not text.isdecimal():
        hint = f"Use a whole number. {option.help}"
    elif option.type is float and not re.fullmatch(r"\d+(\.\d+)?", text):
        hint = f"Use a number. {option.help}"
    elif option.type is bool and text not in ("0", "1"):
        hint = "Use 0 or 1."
    elif get_origin(option.type) is Literal and text not in (known := get_args(option.type)):
        hint = f"Use {', '.join(known[:-1])} or {known[-1]}."
    elif option.name == "base_url" and not text.startswith(("http://", "https://")):
        hint = "Start it with http:// or https://, or unset it to run embedded."
    if hint is not None:
        raise ConfigError(f"is {text!r}.", field=option.variables[0], hint=hint)
    if option.type in (int, bool):
        return option.type(int(text))
    if option.type is float:
        return float(text)
    return Path(text) if option.type is Path else text


def command(words: str, home: Path) -> str:
    """A command for somebody to run, which names the home where that is not the default."""
    default = EngineSettings().home
    same = home.expanduser().absolute() == default.expanduser()
    return words if same else f"{words} --home {shlex.quote(str(home))}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
