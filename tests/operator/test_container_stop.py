"""How a container's supervisord ends: what looks after its workers is no reason to wait once they are gone."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

from tests.support.harness import CHECKOUT, running, wait_until

CONTAINER = CHECKOUT / "misc" / "container"

CONF = """
[supervisord]
nodaemon=true
user=%(user)s
logfile=/dev/null
logfile_maxbytes=0
pidfile=%(folder)s/supervisord.pid
[program:relay]
command=/bin/sh -c 'trap "sleep 2; exit 0" TERM; while :; do sleep 0.1; done'
[eventlistener:end-when-fatal]
command=%(listener)s
events=%(events)s
environment=RELAY_WORKERS="1"
"""


def test_the_listener_is_gone_before_the_workers_are(tmp_path: Path) -> None:
    shipped = configparser.RawConfigParser(inline_comment_prefixes=(";",))
    shipped.read(CONTAINER / "as-in-a-container.conf")
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = tmp_path / "supervisord.conf"
    conf.write_text(
        CONF
        % {
            "user": user,
            "folder": tmp_path,
            "listener": CONTAINER / "end-when-fatal",
            "events": shipped["eventlistener:end-when-fatal"]["events"],
        }
    )
    log = tmp_path / "log"
    supervisord = str(Path(sys.executable).parent / "supervisord")
    with running([supervisord, "-c", str(conf)], log) as process:
        wait_until(lambda: log.read_text().count("entered RUNNING state") == 2, 30, "both run")
        process.terminate()
        assert process.wait(60) == 0
    told = log.read_text()
    assert 0 < told.find("exited: end-when-fatal (exit status 0; expected)") < told.find("stopped: relay"), told
