"""deploy/backup.sh beside a server that trains: what it copied goes on in another home."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from tests.server.test_kill import FAKE, running
from weaver import Datum, ServiceClient
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.postgres import Postgres

BACKUP = Path(__file__).parents[2] / "deploy" / "backup.sh"
DATUM = Datum(model_input=[5, 6, 7], loss_fn_inputs={"target_tokens": [6, 7, 8]})


def test_a_backup_of_a_running_server_goes_on_elsewhere(tmp_path: Path) -> None:
    home, losses, stop = tmp_path / "home", list[float](), threading.Event()
    """`losses[n]` is that of the weights after n steps."""

    def train() -> None:
        while not stop.is_set():
            loss = trainer.forward_backward([DATUM], loss_fn="cross_entropy")
            trainer.optim_step({"learning_rate": 0.01}, wait=True)
            losses.append(loss.result().metrics["loss"])

    with (
        running(home, FAKE) as server,
        ServiceClient(base_url=server.url, api_key=server.keys[0]) as service,
    ):
        trainer = service.create_model("fake", {"rank": 4})
        saved = trainer.save_state("early").path
        thread = threading.Thread(target=train)
        thread.start()
        try:
            for name in ("first", "second", "third"):
                time.sleep(0.7)  # snapshots are taken every 0.3 s
                subprocess.run([BACKUP, home, tmp_path / name], check=True, timeout=60)
        finally:
            stop.set()
            thread.join()
        assert not (home / "live" / "keep").exists()
    steps = [
        goes_on(tmp_path / name, trainer.model_id, saved, losses) for name in ("first", "third")
    ]
    assert 0 < steps[0] < steps[1] <= len(losses)


def goes_on(home: Path, model_id: str, saved: str, losses: list[float]) -> int:
    """The step at which the run of a backup stands."""
    with (
        running(home, FAKE) as server,
        ServiceClient(base_url=server.url, api_key=server.keys[0]) as service,
    ):
        trainer = service.attach(model_id)
        loss = trainer.forward([DATUM], loss_fn="cross_entropy", wait=True).metrics["loss"]
        key = {"X-WEAVER-API-KEY": server.keys[0]}
        reply = httpx.get(f"{server.url}/v1/runs/{model_id}", headers=key)
        step = int(reply.json()["step"])
        assert loss == losses[step]
        trainer.load_state(saved, wait=True)
        loss = trainer.forward([DATUM], loss_fn="cross_entropy", wait=True).metrics["loss"]
        assert loss == losses[0]
        trainer.forward_backward([DATUM], loss_fn="cross_entropy")
        assert trainer.optim_step({"learning_rate": 0.01}, wait=True).metrics["step"] == 1
    return step


@pytest.mark.parametrize("own", [True, False])
def test_a_home_without_snapshots_is_backed_up(tmp_path: Path, own: bool) -> None:
    home, target = tmp_path / "home", tmp_path / "backup"
    url = None if own else f"sqlite:///{tmp_path / 'elsewhere.db'}"
    database = open_database(home, url)
    secret = Keys(database).create("mine")[1]
    database.dispose()
    environment = {**os.environ, "WEAVER_DATABASE_URL": url or ""}
    home.mkdir(exist_ok=True)
    subprocess.run([BACKUP, home, target], check=True, env=environment)
    assert sorted(file.name for file in target.iterdir()) == ["server.db"]
    assert list(home.iterdir()) == ([home / "server.db"] if own else [])
    copy = open_database(target)
    assert Keys(copy).authenticate(secret).project == "mine"
    copy.dispose()


def test_a_backup_of_nothing_says_so(tmp_path: Path) -> None:
    command = [BACKUP, tmp_path / "none", tmp_path / "backup"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: there is no home")
    assert not (tmp_path / "backup").exists()


@pytest.mark.skipif(not shutil.which("pg_dump"), reason="needs pg_dump")
def test_a_dump_of_postgresql_goes_on_elsewhere(tmp_path: Path, postgres: Postgres) -> None:
    def settings(home: str) -> ServerSettings:
        return ServerSettings(home=tmp_path / home, port=0, auth=False, database_url=url)

    url = postgres.emptied()
    adam = {"learning_rate": 0.1}
    with (
        serving(FakeEngine(), settings("old")) as server,
        ServiceClient(base_url=server.address) as service,
    ):
        trainer = service.create_model("fake", {"rank": 2})
        trainer.forward_backward([DATUM], loss_fn="cross_entropy")
        trainer.optim_step(adam, wait=True)
        env = {**os.environ, "WEAVER_DATABASE_URL": url}
        subprocess.run([BACKUP, tmp_path / "old", tmp_path / "new"], env=env, check=True)
        before = trainer.forward([DATUM], loss_fn="cross_entropy", wait=True)
    postgres.emptied()
    dump = tmp_path / "new" / "server.dump"
    restore = ["pg_restore", "--clean", "--if-exists", "--no-owner", f"--dbname={url}", dump]
    subprocess.run(restore, check=True)
    with (
        serving(FakeEngine(), settings("new")) as server,
        ServiceClient(base_url=server.address) as service,
    ):
        again = service.attach(trainer.model_id)
        assert again.forward([DATUM], loss_fn="cross_entropy", wait=True) == before
        again.forward_backward([DATUM], loss_fn="cross_entropy")
        assert again.optim_step(adam, wait=True).metrics["step"] == 2
