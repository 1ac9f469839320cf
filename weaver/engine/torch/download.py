"""`download`: fetches a model into the cache of the hub, where every process finds it.

`weaver models download` calls it, `ReadAhead` fetches by the same rules: only weights in
safetensors and plain files, no pickles, no code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from weaver import errors
from weaver.engine.torch.catalog import HUB_ID, Catalog, first_line, only_here
from weaver.types import ModelInfo

HTTP_ERRORS: Any = HfHubHTTPError.__bases__[:1]
"""What the hub's client raises: the package that it is made with has changed its name."""
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
LEFT = ["*/*", "consolidated*"]
"""Other forms of the same weights."""


def download(hub_id: str) -> tuple[ModelInfo, Path]:
    """What the model is, and the folder of its files; refuses what cannot run before its weights.

    Raises:
        InvalidNameError: not of the form `owner/name`.
        ServiceConnectionError: the hub is out of reach, or stopped answering.
        UnknownModelError: the hub has no such model, or not for this user.
        UnsupportedError: the architecture cannot run here, and why.
        StorageError: the cache cannot be written.
    """
    if not re.fullmatch(HUB_ID, hub_id):
        raise errors.InvalidNameError(
            f"is {hub_id[:200]!r}.", field="id", hint="Give a Hugging Face id: owner/name."
        )
    if only_here(hub_id):
        raise _out_of_reach("it cannot be reached")
    info = Catalog({hub_id: hub_id}, allow_paths=False).facts(hub_id).info
    try:
        return info, Path(snapshot_download(hub_id, allow_patterns=FETCHED, ignore_patterns=LEFT))
    except HTTP_ERRORS as error:
        raise _out_of_reach(first_line(error)) from error
    except OSError as error:
        raise errors.StorageError(
            f"{hub_id} cannot be kept in {constants.HF_HUB_CACHE}: {error}",
            hint="Free some space, or choose another place with HF_HOME; then go on as before.",
        ) from error


def _out_of_reach(reason: str) -> errors.ServiceConnectionError:
    return errors.ServiceConnectionError(
        f"the Hugging Face hub at {constants.ENDPOINT}: {reason}.",
        hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; or copy the model's folder here "
        "and name that.",
    )
