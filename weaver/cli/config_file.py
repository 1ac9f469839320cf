"""`weaver serve --config FILE`: options from a TOML file, by the names of the flags.

An option is what its flag says, else its variable, else the file, else its default.
"""

from __future__ import annotations

import inspect
import tomllib
from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def parse_config(file: Path, command: Callable[..., object]) -> dict[str, Any]:
    """The arguments of `command` that the file sets, checked by their annotations.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of another type.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    try:
        given = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", field="config", hint="It has to be a TOML file."
        ) from None
    options = inspect.signature(inspect.unwrap(command), eval_str=True).parameters
    types: dict[str, Any] = {
        name: (option.annotation, option.default)
        for name, option in options.items()
        if name != "config"
    }
    known = {name.replace("_", "-"): name for name in types}
    for key in given:
        if key.replace("_", "-") not in known:
            raise ConfigError(
                f"{file} has the unknown key {key!r}.", field="config", hint=nearest(key, known)
            )
    model = create_model("Config", __config__=ConfigDict(extra="forbid"), **types)
    try:
        values = model(**{known[key.replace("_", "-")]: value for key, value in given.items()})
    except ValidationError as error:
        wrong = error.errors()[0]
        key = str(wrong["loc"][0]).replace("_", "-")
        raise ConfigError(
            f"{file}: {key} is {wrong['input']!r}.", field="config", hint=f"{wrong['msg']}."
        ) from None
    return values.model_dump(exclude_unset=True)
