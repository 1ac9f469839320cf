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
    dtype = env.get("WEAVER_DTYPE") or "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"is {dtype!r}.", field="WEAVER_DTYPE", hint="Use float32 or bfloat16.")
    threads = env.get("WEAVER_THREADS") or "0"
    if not threads.isdecimal():
        raise ConfigError(
            f"is {threads!r}.", field="WEAVER_THREADS", hint="Use a whole number; 0 chooses."
        )
    flag = env.get("WEAVER_DETERMINISTIC") or "0"
    if flag not in ("0", "1"):
        raise ConfigError(f"is {flag!r}.", field="WEAVER_DETERMINISTIC", hint="Use 0 or 1.")
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
        dtype=dtype,
        threads=int(threads),
        deterministic=flag == "1",
    )
