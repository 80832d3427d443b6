"""misc/rolling-restart of a relay one of whose workers stands still, and two of it at a time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support import hanging_relay
from tests.support.harness import met, read_exactly, wait_until
from tests.support.supervised import Supervised, supervised

pytestmark = pytest.mark.long


def pid_of(service: Supervised, worker: str) -> int:
    return int(service.control("pid", f"relay:{worker}"))


def kill_soon(service: Supervised) -> None:
    """Have supervisord wait three seconds for a worker to stop, and not thirty."""
    configured = service.conf.read_text()
    assert "\nstopwaitsecs=30\n" in configured
    service.conf.write_text(configured.replace("\nstopwaitsecs=30\n", "\nstopwaitsecs=3\n"))


@pytest.mark.parametrize("sleeper", ["relay-1", "relay-0"])
@pytest.mark.parametrize("how", ["stopped", "hangs"])
def test_a_worker_that_stands_still_is_renewed_before_those_that_answer_and_costs_them_no_transfer(
    how: str, sleeper: str, tmp_path: Path
) -> None:
    with supervised(started=False, options="--grace 1") as service:
        kill_soon(service)
        service.env[hanging_relay.VARIABLE] = str(tmp_path)
        configured = service.conf.read_text()
        assert "exec relay-gevent " in configured
        program = f"exec {sys.executable} -m tests.support.hanging_relay "
        service.conf.write_text(configured.replace("exec relay-gevent ", program))
        service.start()
        before = service.pids()
        asleep = pid_of(service, sleeper)
        if how == "stopped":
            os.kill(asleep, signal.SIGSTOP)
        else:
            (tmp_path / str(asleep)).touch()
        wait_until(
            lambda: [line for line in service.log_lines() if f"worker {asleep} does not answer" in line],
            20,
            f"the other one says so: {service.logs()}",
        )
        transfers = [met(service.port) for _ in range(4)]
        done = service.try_rolling_restart()
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{service.logs()}"
        (line,) = done.stderr.splitlines()
        assert f"relay:{sleeper} does not answer, and is renewed before the others" in line
        assert not set(before) & set(service.pids())
        for sender, receiver in [*transfers, met(service.port)]:
            sender.sendall(b"goes on")
            assert read_exactly(receiver, 7) == b"goes on"


def test_a_worker_that_nobody_who_answers_could_take_over_from_is_left_alone() -> None:
    with supervised(options="--grace 1") as service:
        kill_soon(service)
        left = pid_of(service, "relay-1")
        before = pid_of(service, "relay-0")
        control = f"{sys.executable} -m supervisor.supervisorctl"
        log = service.var / "relay-0.log"
        folder = service.home / "first"
        folder.mkdir()
        stops_the_first = folder / "supervisorctl"
        stops_the_first.write_text(
            f'#!/bin/sh\n{control} "$@" || exit\n'
            f'case "$*" in *" restart relay:relay-0")\n'
            f"    pid=$({control} -c {service.conf} pid relay:relay-0)\n"
            f'    until grep -qF "[$pid] joined the relay in" {log}; do sleep 0.1; done\n'
            f"    kill -STOP $pid;;\n"
            "esac\n"
        )
        stops_the_first.chmod(0o755)
        service.env["PATH"] = f"{folder}:{service.env['PATH']}"
        try:
            refused = service.try_rolling_restart()
        finally:
            os.kill(pid_of(service, "relay-0"), signal.SIGCONT)
        assert refused.returncode == 1, refused.stdout + refused.stderr
        assert "relay:relay-1 is left as it is, since no other worker answers" in refused.stderr
        assert pid_of(service, "relay-1") == left
        assert pid_of(service, "relay-0") != before


def test_of_two_rolling_restarts_the_second_waits_for_the_first() -> None:
    with supervised() as service:
        before = service.pids()
        first = service.begin_rolling_restart()
        try:
            assert first.stdout is not None
            assert "stopped" in first.stdout.readline()
            second = service.try_rolling_restart()
            _, errors = first.communicate(timeout=60)
        finally:
            first.kill()
        assert (first.returncode, errors) == (0, ""), service.logs()
        assert second.returncode == 0, second.stderr
        assert second.stderr == "rolling-restart: another one is under way; this one begins when it has ended\n"
        assert not set(before) & set(service.pids())
