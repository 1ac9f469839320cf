"""A server with very many runs, for the tests of the console's list and for its benchmark."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tests.fake_engine import FakeEngine
from tests.server.console.site import Site
from tests.server.http.helpers import serving
from weaver import wire
from weaver.server import tables
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings
from weaver.types import LoraConfig, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.console.browser import Browser

RUNS, SHOWN, LOGGED = 1000, 100, 200


def fill(home: Path, count: int, url: str | None = None) -> tuple[str, str]:
    """A home with many runs of two projects; answers the keys of one and of an administrator."""
    database = open_database(home, url)
    keys = Keys(database)
    alice, admin = keys.create("alice")[1], keys.create("ops", admin=True)[1]
    model = wire.encode(FakeEngine().get_model("fake"))
    now, runs, owners, metrics = datetime.now(UTC), [], [], []
    for i in range(count):
        id, project = f"run-{i:012d}", "alice" if i % 2 else "bob"
        run = TrainingRun(
            run_id=id,
            name=f"sweep {i}",
            base_model="fake",
            training_mode="lora",
            lora_config=LoraConfig(rank=8),
            step=LOGGED,
            status="idle",
            created_at=now - timedelta(days=1),
            last_request_at=now - timedelta(minutes=i),
            project=project,
        )
        row = {"run_id": id, "description": wire.encode(run), "model": model, "seed": 0}
        runs.append({**row, "snapshot": 0, "project": project, "name": run.name})
        owners.append({"run_id": id, "project": project})
        point = {"run_id": id, "name": "reward/mean"}
        metrics += [{**point, "value": i / count, "step": step} for step in range(LOGGED)]
    with database.begin() as connection:
        for table, rows in ((tables.runs, runs), (tables.owners, owners)):
            connection.execute(table.insert(), rows)
        connection.execute(tables.metrics.insert(), metrics)
    database.dispose()
    return alice, admin


@dataclass(frozen=True)
class Many:
    address: str
    alice: str
    """A key, as is the next."""
    admin: str
    engine: FakeEngine

    def before(self, browser: Browser) -> Site:
        run = "run-000000000001"
        return Site(self.address, self.alice, self.admin, run, (), browser, self.engine)


@contextmanager
def many_at(folder: Path, count: int = RUNS, url: str | None = None) -> Iterator[Many]:
    alice, admin = fill(folder / "home", count, url)
    engine = FakeEngine()
    settings = ServerSettings(home=folder / "home", port=0, database_url=url)
    with serving(engine, settings) as server:
        yield Many(server.address, alice, admin, engine)
