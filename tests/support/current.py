"""Who has how much just now: the `current` table, and what each worker has of it."""

from __future__ import annotations

from tests.support.harness import Relay, Service, wait_until


def current(service: Service) -> tuple[int, int]:
    """Pairs and waiting clients, as the `current` table says."""
    (row,) = service.rows("current")
    return row["connected"], row["waiting"]


def wait_for_current(service: Service, connected: int, waiting: int, seconds: float = 10) -> None:
    """Return when the `current` table says that so many pairs and waiting clients are there."""
    wait_until(lambda: current(service) == (connected, waiting), seconds, f"{connected} pairs and {waiting} who wait")


def share(service: Service, worker: Relay) -> tuple[int, int]:
    """Pairs and waiting clients of one worker."""
    rows = service.query("SELECT connected, waiting FROM worker_share WHERE pid = ?", worker.pid)
    return (rows[0]["connected"], rows[0]["waiting"]) if rows else (0, 0)


def shares(service: Service) -> dict[int, int]:
    """How many pairs each worker has, by its process id."""
    return {row["pid"]: row["connected"] for row in service.rows("worker_share")}
