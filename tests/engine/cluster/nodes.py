"""`Nodes`: a Ray of several nodes on this machine, of which any can end and to which others come.

They are children of a process of their own, which is told a line for each change. Its head places
nothing. Tests open one; `python -m tests.engine.cluster.nodes` is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

HEAD = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}


class Nodes:
    """Methods block, in any thread. A node is a number, the head 0."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._tell("start", 0)

    def join(self, cpus: int, env: Mapping[str, str] | None = None) -> int:
        """A node that has joined, whose processes have those variables."""
        return int(self._tell("join", cpus, dict(env or {})))

    def remove(self, node: int) -> None:
        """At once, as a machine does that loses its power."""
        self._tell("remove", node)

    def start(self) -> None:
        """The head anew, where it was: of what was there it knows nothing."""
        self._tell("start", int(self.address.rpartition(":")[2]))

    def _tell(self, *what: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nodes have ended"
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@contextmanager
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        yield made
    finally:
        made.close()


def serve() -> None:
    from ray.cluster_utils import Cluster

    out = sys.stdout
    with redirect_stdout(sys.stderr):
        cluster, there = Cluster(), dict[int, Any]()
        for line in sys.stdin:
            answer: Any = None
            match json.loads(line):
                case ["start", port]:
                    if there:
                        cluster.shutdown()
                        cluster, there = Cluster(), {}
                    there[0] = cluster.add_node(
                        **HEAD, **({"gcs_server_port": port} if port else {})
                    )
                    answer = cluster.address
                case ["join", cpus, env]:
                    answer = max(there) + 1
                    there[answer] = cluster.add_node(num_cpus=cpus, env_vars=env)
                case ["remove", node]:
                    cluster.remove_node(there.pop(node), allow_graceful=False)
            out.write(json.dumps(answer) + "\n")
            out.flush()
        cluster.shutdown()


if __name__ == "__main__":
    serve()
