"""Settings from the environment. The only module that reads it; called by the clients and the CLI.

| variable           | meaning                                            | default        |
|--------------------|----------------------------------------------------|----------------|
| WEAVER_BASE_URL    | the server to use; unset: the embedded engine      | unset          |
| WEAVER_API_KEY     | the key sent to that server                        | unset          |
| WEAVER_HOME        | where the embedded engine keeps runs               | ~/.weaver      |
| WEAVER_DEVICE      | torch device of the embedded engine                | cpu            |
| WEAVER_DTYPE       | float32 or bfloat16 base weights                   | float32        |
| WEAVER_THREADS     | torch threads of the embedded engine; 0: by size   | 0              |
| WEAVER_DETERMINISTIC | 1: no result depends on what runs beside it      | 0              |
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    home: Path = Path("~/.weaver")
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    deterministic: bool = False


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Reads WEAVER_* from `environ` (the process's own by default).

    Raises:
        ConfigError: a variable has a value that cannot be used; names it.
    """
    env = os.environ if environ is None else environ
    threads = env.get("WEAVER_THREADS") or "0"
    if not threads.isdecimal():
        raise ConfigError(
            f"is {threads!r}.", field="WEAVER_THREADS", hint="Use a whole number; 0 chooses."
        )
    base_url = env.get("WEAVER_BASE_URL") or None
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"is {base_url!r}.",
            field="WEAVER_BASE_URL",
            hint="Start it with http:// or https://, or unset it to run embedded.",
        )
    return Settings(
        base_url=base_url,
        api_key=env.get("WEAVER_API_KEY") or None,
        home=Path(env.get("WEAVER_HOME") or "~/.weaver").expanduser(),
        device=env.get("WEAVER_DEVICE") or "cpu",
        dtype=_choice(env, "WEAVER_DTYPE", ("float32", "bfloat16")),
        threads=int(threads),
        deterministic=_choice(env, "WEAVER_DETERMINISTIC", ("0", "1")) == "1",
    )


def _choice(env: Mapping[str, str], name: str, values: tuple[str, ...]) -> str:
    """One of the values; the first by default."""
    value = env.get(name) or values[0]
    if value not in values:
        raise ConfigError(f"is {value!r}.", field=name, hint=f"Use {' or '.join(values)}.")
    return value


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
