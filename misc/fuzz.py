#!/usr/bin/env python3
"""Drive a relay of two workers with clients at random, and compare all that they read, and all records, with a model.

    misc/fuzz.py --minutes 10

Ends with exit status 1, and the shortest run that Hypothesis found to show it, when the relay and
tests/support/relay_model.py disagree. Prints a summary otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.relay_model import RelayModel


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=40, help="in each run")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    books = RelayModel.books
    try:
        while time.monotonic() < until:
            run_state_machine_as_test(
                RelayModel,
                settings=settings(
                    max_examples=50,
                    stateful_step_count=arguments.steps,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                ),
            )
            came = f"{books.clients} clients, {books.web_clients} of them over WebSocket"
            print(f"{books.runs} runs, {came}, {books.restarts} workers replaced", flush=True)
    finally:
        books.close()


if __name__ == "__main__":
    main()
