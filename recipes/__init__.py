"""Programs that fine-tune, a file each: `python -m recipes.sft --help`.

What they all take from the extra `rl` is looked for here, before any of them imports it.
"""

from __future__ import annotations

import sys
from importlib import import_module

from weaver.errors import MissingDependencyError, requiring

try:
    with requiring("a recipe", "all"):
        import_module("tyro")
except MissingDependencyError as error:
    if sys.argv[0] != "-m":  # while Python looks for the program to run
        raise
    sys.exit(f"error: {error}")
