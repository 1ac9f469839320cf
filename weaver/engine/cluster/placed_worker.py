"""`PlacedWorker`: a sampler's worker on whichever machine of a cluster Ray finds room for it.

`pooled_cluster` makes them, and a `SamplerPool` opens them. An actor of Ray, the `Starter`, starts
there what `WorkerProcess` starts here; the standard streams of that process are two connections to
the pool, so that nothing of what is sampled goes through Ray.
"""

from __future__ import annotations

import hmac
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from weaver.engine.cluster.answers import gather
from weaver.engine.cluster.placement import find_room, in_time
from weaver.engine.cluster.sampler_env import faults_of
from weaver.engine.cluster.vllm_worker import die_with_parent
from weaver.engine.cluster.worker_process import LEAVE_S, Link, Pipe, WorkerLostError, last_words
from weaver.errors import EngineError, EngineLostError

if TYPE_CHECKING:
    from weaver.engine.cluster.placement import Cluster, Room

IN, OUT = b"i", b"o"
"""Which stream of the worker a connection becomes."""
CONNECT_S = 30.0
"""In which both connections are there."""
END_S = LEAVE_S + 4.0
"""In which a starter has ended its worker."""
START_S = 120.0
"""In which Ray has started the actor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where a worker is to be, as its starter has found it."""

    host: str
    pid: int
    """The starter's."""
    address: tuple[str, int]
    """Where the starter listens."""
    says: str
    """A file of the shared folder; nothing where it is not there."""
    faults: list[str]
    """Of vLLM's environment."""


class Starter:
    """In a process of Ray's, with which the worker ends."""

    def __init__(self) -> None:
        die_with_parent()
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, file: str, environment: str | None, wanted: Mapping[str, str]) -> Ground:
        import ray

        self._socket = socket.create_server((ray.util.get_node_ip_address(), 0))
        shared = Path(file)
        return Ground(
            host=socket.gethostname(),
            pid=os.getpid(),
            address=self._socket.getsockname(),
            says=shared.read_text() if shared.is_file() else "",
            faults=[] if environment is None else faults_of(Path(environment), wanted),
        )

    def start(self, command: Sequence[str], log: str, token: bytes) -> int:
        """Waits for the connections that know the token; answers the worker's process id.

        Raises:
            TimeoutError: they did not come.
            OSError: the command cannot be run.
        """
        ends: dict[bytes, socket.socket] = {}
        self._socket.settimeout(CONNECT_S)
        with self._socket:
            while len(ends) < 2:
                connection, _ = self._socket.accept()
                connection.settimeout(CONNECT_S)
                said = connection.makefile("rb").read(len(token) + 1)  # no more comes until then
                if hmac.compare_digest(said[:-1], token):
                    connection.settimeout(None)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    ends[said[-1:]] = connection
                else:
                    connection.close()
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with ends[IN], ends[OUT], Path(log).open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=ends[IN].fileno(),
                stdout=ends[OUT].fileno(),
                stderr=errors,
                start_new_session=True,
            )
        return self._process.pid

    def end(self) -> None:
        """The worker has nothing more to read, and ends, whatever it does."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_S)
            with suppress(ProcessLookupError):  # it, or what it has started
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class PlacedWorker:
    """
    Args:
        bundle: what Ray keeps for it.
        command: starts the worker, on any machine.
        log: what it prints, since its last start; in the shared folder.
        environment: vLLM's, which has to hold what is `wanted`; None is not looked at.
        proof: a file of the shared folder and what it says.
        place_s: how long room is waited for.
        changed: called in the pool's thread when its state has changed.
    """

    def __init__(
        self,
        name: str,
        *,
        cluster: Cluster,
        bundle: dict[str, float],
        command: Sequence[str],
        log: Path,
        environment: Path | None,
        wanted: Mapping[str, str],
        proof: tuple[Path, str],
        place_s: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.state = "stopped"
        """Or `waiting` for room, `starting`, `running`."""
        self.since = time.time()
        self.waits_for: str | None = None
        self.starts = 0
        self.last_loss: str | None = None
        self.ground: Ground | None = None
        """Where it is, or is being started."""
        self.pid = 0
        """Of the worker that runs, on that machine."""
        self._cluster = cluster
        self._bundle = bundle
        self._command = list(command)
        self._log = log
        self._environment = None if environment is None else str(environment)
        self._wanted = dict(wanted)
        self._proof = proof
        self._place_s = place_s
        self._changed = changed

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Link]:
        self.starts += 1
        try:
            async with AsyncExitStack() as stack:
                stack.push(self._note)
                room = await self._placed()
                actors: list[Any] = []
                stack.push_async_callback(_end, room, actors)
                self._turn("starting")
                with _needing(room):
                    actors += await to_thread.run_sync(room.actors, Starter, [()])
                    link = await self._started(actors[0], stack)
                self._turn("running")
                yield link
        finally:
            self.ground, self.pid = None, 0
            self._turn("stopped")

    def _note(self, kind: object, error: BaseException | None, trace: object) -> None:
        """What ends it, on the way out."""
        if error is not None:
            self.last_loss = _words(error)

    async def _placed(self) -> Room:
        try:
            return await find_room(
                self.name,
                self._cluster,
                lambda: self._bundle,
                1,
                within_s=self._place_s,
                waiting=lambda what: self._turn("waiting", what),
            )
        except EngineError as error:
            raise WorkerLostError(error.message) from None

    async def _started(self, actor: Any, stack: AsyncExitStack) -> Link:
        """Raises WorkerLostError: why it cannot be."""
        file, says = self._proof
        asked = actor.look.remote(str(file), self._environment, self._wanted)
        self.ground = ground = await _answer(asked, START_S)
        if ground.says != says:
            raise WorkerLostError(
                f"{ground.host} does not see {file.parent}, which has to be a shared folder"
            )
        if ground.faults:
            raise WorkerLostError(
                f"vLLM's environment on {ground.host}: {ground.faults[0]}; there, run `weaver "
                "cluster install-sampler`"
            )
        token = secrets.token_bytes(32)
        starting = actor.start.remote(self._command, str(self._log), token)
        streams = []
        try:
            with anyio.fail_after(CONNECT_S):
                for which in (IN, OUT):
                    stream = await anyio.connect_tcp(*ground.address)
                    streams.append(await stack.enter_async_context(stream))
                    await stream.send(token + which)
        except (OSError, anyio.BrokenResourceError) as error:
            raise WorkerLostError(f"{ground.host} cannot be reached: {error}") from None
        self.pid = await _answer(starting, CONNECT_S)
        sink, source = streams
        return Pipe(sink, BufferedByteReceiveStream(source), partial(last_words, self._log))

    def _turn(self, state: str, waits_for: str | None = None) -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.waits_for = state, waits_for
        self._changed()


@contextmanager
def _needing(room: Room) -> Iterator[None]:
    """Raises WorkerLostError: Ray is lost, and the room with it."""
    try:
        with room.session.needed():
            yield
    except EngineLostError as error:
        raise WorkerLostError(error.message) from None


async def _answer(reference: Any, within_s: float) -> Any:
    """Raises WorkerLostError: what kept the actor from answering."""
    import ray

    try:
        [answer] = await gather([reference], within_s, within_s)
    except TimeoutError:
        raise WorkerLostError(f"Ray has not started it in {within_s:.0f} s") from None
    except (ray.exceptions.RayError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise WorkerLostError(f"Ray cannot start it: {lines[-1] if lines else error!r}") from None
    return answer


async def _end(room: Room, actors: Sequence[Any]) -> None:
    """After the streams were closed."""
    await in_time(room, _bury, room, actors)


def _bury(room: Room, actors: Sequence[Any]) -> None:
    import ray

    for actor in actors:
        with suppress(ray.exceptions.RayError, EngineLostError, TimeoutError):
            room.session.result(actor.end.remote(), END_S)
    room.give_back(actors)


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
