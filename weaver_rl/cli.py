"""The command `weaver-rl`: `weaver-rl selftest ...` and `weaver-rl report FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.errors import WeaverError
from weaver_rl import selftest
from weaver_rl.report import write_report
from weaver_rl.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
weaver-rl selftest [--help]   run the learning proofs, and write a page of their results
weaver-rl report FOLDER       write a run's report.html anew
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: failed, and said why; 2: wrong arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["selftest"]:
        return selftest.main(words[1:])
    if words[:1] == ["report"] and len(words) == 2:
        try:
            sys.stdout.write(f"{write_report(RunFolder(Path(words[1])))}\n")
        except WeaverError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        return 0
    asked = words in (["--help"], ["-h"])
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2
