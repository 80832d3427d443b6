"""Whatever clients do in whichever order, each reads what it must, and each is on record once.

misc/fuzz.py does the same for as long as wanted.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.relay_model import Books, RelayModel


def test_clients_at_random_read_and_leave_behind_what_the_model_says() -> None:
    class Briefly(RelayModel):
        books = Books()

    brief = settings(
        max_examples=10,
        stateful_step_count=25,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        for _ in range(10):
            run_state_machine_as_test(Briefly, settings=brief)
            if (
                Briefly.books.clients > 20 and Briefly.books.web_clients > 5
            ):  # what it chooses may be to do next to nothing
                break
    finally:
        Briefly.books.close()
    assert Briefly.books.clients > 20
    assert Briefly.books.web_clients > 5
