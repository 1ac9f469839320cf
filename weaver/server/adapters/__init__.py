"""The wire formats of a server, each an adapter over the same service; `run_server` mounts them."""

from __future__ import annotations

from weaver.server.adapters.native import NATIVE
from weaver.server.adapters.openai import OPENAI
from weaver.server.adapters.tinker import TINKER
from weaver.server.adapters.weaver_rest import WEAVER_REST
from weaver.server.console import CONSOLE

ADAPTERS = (NATIVE, WEAVER_REST, *TINKER, OPENAI, CONSOLE)
