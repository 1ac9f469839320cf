"""Writes `docs/compatibility.md`; with names of architectures only shows their rows."""

import sys

from tests.compatibility.judge import judge
from tests.compatibility.page import PAGE, page, row
from tests.compatibility.tiny import NAMES

verdicts = []
for name in sys.argv[1:] or NAMES:
    verdicts.append(judge(name))
    sys.stdout.write(row(verdicts[-1]) + "\n")
    sys.stdout.flush()
if not sys.argv[1:]:
    PAGE.write_text(page(verdicts))
