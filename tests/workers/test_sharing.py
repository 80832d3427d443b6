"""Large transfers that one worker has spread over those that have less to do."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

from tests.support.harness import CHECKOUT, Workers, wait_until
from tests.support.needs import needs_a_compiler

SECONDS = 12
PAIRS = 6


@needs_a_compiler
def test_bulk_transfers_of_a_busy_worker_move_to_an_idle_one_and_lose_no_byte(tmp_path: Path) -> None:
    load = tmp_path / "load"  # in C: clients in Python would be what is slow
    subprocess.run(["cc", "-O2", "-std=c11", str(CHECKOUT / "misc/bench/load.c"), "-o", str(load), "-lm"], check=True)
    with Workers(tmp_path, count=1) as workers:

        def shares() -> list[int]:
            return sorted(row["connected"] for row in workers.query("SELECT connected FROM worker_share"))

        command = [str(load), "traffic", "--port", str(workers.port), "--pairs", str(PAIRS), "--seconds", str(SECONDS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as traffic:
            try:
                wait_until(lambda: shares() == [PAIRS], 5, "the first worker has them all")
                workers.start_one()
                # How evenly depends on how much each moves just then.
                wait_until(lambda: len(shares()) == 2 and min(shares()) >= PAIRS // 3, SECONDS, "each has its part")
            finally:
                said = traffic.communicate(timeout=60)[0]
        assert traffic.returncode == 0  # each side has compared what came with what was sent
        moved = json.loads(said)["bytes"]
        rows = workers.wait_for_rows("usage", PAIRS)
        assert Counter(row["result"] for row in rows) == {"happy": PAIRS}
        assert sum(row["bytes"] for row in rows) >= moved
