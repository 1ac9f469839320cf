"""`ModelSource`: where a base model comes from, and how a server is told so.

`weaver serve` reads them from its options, `TorchEngine` is given them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from weaver.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Load = Literal["first_use", "start"]
OPTION = re.compile(r",(\w+)=([^,=]*)$")
OPTIONS = ("context", "load")
FORM = "[NAME=]SOURCE[,context=TOKENS][,load=start]"


@dataclass(frozen=True, slots=True)
class ModelSource:
    place: str | Path
    """A folder, or a Hugging Face id."""
    context: int | None = None
    """Tokens of the longest sequence, where that is to be less than the model's own."""
    load: Load = "first_use"
    """When it is loaded: with the first thing that needs it, or as the server starts."""

    @classmethod
    def of(cls, source: str | Path | ModelSource) -> ModelSource:
        """One that may be only its place."""
        return source if isinstance(source, cls) else cls(source)  # type: ignore[arg-type]


def parse_models(given: Sequence[str]) -> Mapping[str, ModelSource]:
    """By names: each of `FORM` is served under its name and its source as given.

    Raises:
        ConfigError: an option is unknown or has no value that can be used; a name has two sources.
    """
    models: dict[str, ModelSource] = {}
    for item in given:
        rest, options = item, dict[str, str]()
        while found := OPTION.search(rest):
            options[found[1]], rest = found[2], rest[: found.start()]
        name, _, place = rest.rpartition("=")
        if not place:
            raise ConfigError(f"is {item!r}.", field="model", hint=f"Write it as {FORM}.")
        folder = Path(place).expanduser()
        source = ModelSource(
            folder.absolute() if folder.is_dir() else place, **_read(item, options)
        )
        for alias in (name, place):
            if alias and models.setdefault(alias, source) != source:
                raise ConfigError(
                    f"{alias!r} has two sources.", field="model", hint="Give each model one name."
                )
    return models


def _read(item: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The fields that options set."""
    for name in options:
        if name not in OPTIONS:
            said = f"{item!r} has the unknown option {name!r}."
            raise ConfigError(said, field="model", hint=nearest(name, OPTIONS))
    context, load = options.get("context", "1"), options.get("load", "first_use")
    if not context.isdecimal() or not int(context):
        said = f"{item!r} has the context {context!r}."
        raise ConfigError(said, field="model", hint="Give it in tokens: context=8192.")
    if load not in get_args(Load):
        said = f"{item!r} is to be loaded at {load!r}."
        raise ConfigError(said, field="model", hint=f"Use {' or '.join(get_args(Load))}.")
    return {"context": int(context) if "context" in options else None, "load": load}


def table_text(table: Mapping[str, Any]) -> str:
    """A table of a server's file, with `source` and what else is set, in the form of an option.

    Raises:
        ConfigError: it has no source, or an unknown key.
    """
    for key in table:
        if key not in ("name", "source", *OPTIONS):
            known = ("name", "source", *OPTIONS)
            raise ConfigError(
                f"has the unknown key {key!r}.", field="model", hint=nearest(key, known)
            )
    if not table.get("source"):
        raise ConfigError("has no source.", field="model", hint="A folder, or a Hugging Face id.")
    name = f"{table['name']}=" if table.get("name") else ""
    return f"{name}{table['source']}" + "".join(
        f",{key}={table[key]}" for key in OPTIONS if key in table
    )
