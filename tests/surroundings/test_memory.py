"""Where memory is refused the operator is told of that, and of the limit that does it, and not of another one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from relay.process import memory
from relay.process.program import fail_for_lack_of_memory
from tests.support.command_line import checked, run

LIMITED = ["/bin/sh", "-c", 'ulimit -v 150000 && exec "$0" "$@"']
"""Enough for one worker, and too little for what several have in common."""


def test_a_limit_that_leaves_no_room_for_several_workers_is_named_by_the_start_and_by_check(tmp_path: Path) -> None:
    options = ("--port", "0", "--interface", "127.0.0.1", "--run-dir", str(tmp_path / "run"))
    told = checked(run(*options, inside=LIMITED))
    assert told == (
        f"--run-dir {tmp_path}/run: there is not enough memory: its limit is 146 MB; raise it (ulimit -v, LimitAS=)"
    )
    assert checked(run("--check", *options, inside=LIMITED)) == told


def test_a_thread_for_whose_stack_there_is_no_room_is_a_matter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ulimit -u" in memory.no_thread()
    monkeypatch.setattr(memory, "_limit", lambda: 64 << 20)
    monkeypatch.setattr(memory, "_in_use", lambda: 63 << 20)
    assert memory.no_thread() == ("there is not enough memory: its limit is 64 MB; raise it (ulimit -v, LimitAS=)")
    monkeypatch.setattr(memory, "_limit", lambda: 1 << 40)
    assert "ulimit -u" in memory.no_thread()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libsqlite3.so.0: failed to map segment from shared object"),
        ImportError("libssl.so.3: cannot allocate memory in static TLS block"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=repr,
)
def test_a_start_for_which_there_is_no_memory_ends_with_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fail_for_lack_of_memory("relay-gevent", error)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("relay-gevent: error: there is not enough memory")


def test_another_error_is_no_lack_of_memory() -> None:
    with pytest.raises(ImportError, match="No module"):
        fail_for_lack_of_memory("relay-gevent", ImportError("No module named 'gevent'"))
