"""`weaver checkpoints eval` in the environment of the tools, where `weaver` is no command."""

from __future__ import annotations

import sys

from weaver.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoints", "eval"]
    main()
