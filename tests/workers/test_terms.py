"""What the workers of one relay must have in common: a newcomer that differs ends with a line that says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from relay.cli import USAGE
from relay.options import Options
from relay.process.dataclass import replace
from relay.workers.terms import CLOCKS, DATABASE_FOLDER, MAY_DIFFER, NETWORK, PROCESSES, disagreement, terms_of
from tests.support.harness import CHECKOUT, Relay, Workers, free_port, wait_until
from tests.support.hostile import honest_transfer

TERMS = {
    "--blur-usage": (["--blur-usage", "600"], ["--blur-usage", "60"]),
    "--pair-rate": (["--pair-rate", "1000000"], []),
    "--relay-rate": ([], ["--relay-rate", "1000000"]),
    "--max-pair-bytes": (["--max-pair-bytes", "10"], ["--max-pair-bytes", "11"]),
    "--usage-db": (["--usage-db", "one.sqlite"], ["--usage-db", "two.sqlite"]),
    "--log-fd or --log-stdout": (["--log-stdout"], []),
    "--max-per-source or --max-new-per-source": (["--max-per-source", "10"], []),
    "--trusted-proxies": (["--trusted-proxies", "10.0.0.1"], ["--trusted-proxies", "10.0.0.2"]),
    "--proxy-protocol": (
        ["--trusted-proxies", "10.0.0.1"],
        ["--trusted-proxies", "10.0.0.1", "--proxy-protocol"],
    ),
}


def refusal(folder: Path, port: int, *options: str, inside: tuple[str, ...] = ()) -> str:
    """What a worker says that is not let into the relay in `folder`; AssertionError when it is."""
    newcomer = Relay(
        folder, "--run-dir", str(folder / "run"), *options, port=port, name="newcomer", inside=list(inside)
    )
    with pytest.raises(AssertionError, match="ended with 2"):
        newcomer.start()
    text = newcomer.log_text()
    (line,) = text.splitlines()
    assert line.startswith("relay-gevent: error: --run-dir "), line
    return line


@pytest.mark.parametrize("name", TERMS)
def test_a_worker_that_would_record_or_allow_something_else_is_refused(tmp_path: Path, name: str) -> None:
    theirs, ours = TERMS[name]
    with Workers(tmp_path, *theirs, count=1, recording=False) as workers:
        line = refusal(tmp_path, workers.port, *ours)
        assert f"its relay has {name} " in line
        assert "start this worker with the same" in line
        assert f"(its workers: {', '.join(map(str, workers.pids))})" in line
        honest_transfer(workers.port) if name != "--max-pair-bytes" else None
        same = workers.start_one()
        assert same.pids


def test_a_worker_of_a_gateway_that_would_tell_the_upstream_less_is_refused(tmp_path: Path) -> None:
    gateway = ("--websocket", f"tcp:{free_port()}:interface=127.0.0.1", "--upstream", f"127.0.0.1:{free_port()}")
    with Workers(tmp_path, *gateway, "--send-proxy", count=1, recording=False) as workers:
        assert "its relay has --send-proxy given, not none" in refusal(tmp_path, workers.port, *gateway)
        assert workers.start_one().pids


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--websocket", "{web}"], ["--websocket", "tcp:{web}:interface=127.0.0.1"]),
        (["--websocket", "tcp:{web}:interface=\\:\\:1"], ["--websocket", "tcp:{web}:interface=0\\:0\\:\\:1"]),
        (["--trusted-proxies", "10.0.0.0/8, ::ffff:1.2.3.4"], ["--trusted-proxies", "1.2.3.4,10.1.2.3/8"]),
        (
            ["--websocket", "{web}", "--upstream", "127.0.0.1:{up}, 127.0.0.2:{up}"],
            ["--websocket", "{web}", "--upstream", "127.0.0.1:{up},127.0.0.2:{up}"],
        ),
    ],
    ids=["websocket", "websocket IPv6", "trusted proxies", "upstream"],
)
def test_a_worker_that_spells_the_same_otherwise_is_let_in(tmp_path: Path, theirs: list[str], ours: list[str]) -> None:
    web, up = free_port(), free_port()
    first, second = ([option.format(web=web, up=up) for option in options] for options in (theirs, ours))
    with Workers(tmp_path, *first, count=1, recording=False) as workers:
        newcomer = Relay(tmp_path, "--run-dir", str(tmp_path / "run"), *second, port=workers.port, name="newcomer")
        with newcomer:
            wait_until(lambda: "siblings" in newcomer.log_text(), what="that it has joined")


@pytest.mark.parametrize(
    ("own", "name", "told"),
    [
        (Options(websocket=(4002, "::1")), "--websocket", "0:0::1 port 4002"),
        (Options(websocket=(4002, "FE80::1%lo")), "--websocket", "FE80::1%lo port 4002"),
        (Options(upstream="a:1,b:2"), "--upstream", "a:1, b:2"),
    ],
)
def test_a_worker_of_an_earlier_version_that_tells_a_spelling_as_it_was_given_is_of_the_same_relay(
    own: Options, name: str, told: str
) -> None:
    terms = terms_of(own)
    assert terms[name] != told
    assert disagreement(terms, {**terms, name: told}) is None
    for other in (told.replace("1", "3"), "none"):
        assert f"its relay has {name} " in (disagreement(terms, {**terms, name: other}) or "")


@pytest.mark.parametrize(("kind", "named"), [("--net", NETWORK), ("--pid", PROCESSES), ("--time", CLOCKS)])
def test_a_worker_of_another_container_on_the_same_volume_is_refused(tmp_path: Path, kind: str, named: str) -> None:
    separate = ("unshare", kind, *(["--fork", "--mount-proc", "--kill-child"] if kind == "--pid" else []))
    if shutil.which("unshare") is None:
        pytest.skip("apt-get install util-linux")
    if subprocess.run([*separate, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"unshare {kind} is not allowed here: run as root")
    with Workers(tmp_path, count=1) as workers:
        options = ("--usage-db", str(workers.usage_db), "--log-stdout")
        line = refusal(tmp_path, workers.port, *options, inside=separate)
        assert f"another {named}" in line
        assert "a run directory of its own" in line
        honest_transfer(workers.port)


def test_nor_is_one_whose_database_is_another_file_of_the_same_name(tmp_path: Path) -> None:
    separate = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path}/kept && exec "$@"', "sh")
    (tmp_path / "kept").mkdir()
    if subprocess.run([*separate, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount, and not in every container: run the tests as root")
    options = ("--usage-db", str(tmp_path / "kept" / "usage.sqlite"))
    with Workers(tmp_path, *options, count=1, recording=False) as workers:
        line = refusal(tmp_path, workers.port, *options, inside=separate)
        assert "another file of that name" in line
        honest_transfer(workers.port)


@pytest.mark.parametrize("disk", ["the same disk", "another disk"])
def test_a_database_that_has_moved_with_its_folder_is_still_that_of_the_relay(tmp_path: Path, disk: str) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    options = ("--usage-db", str(kept / "usage.sqlite"))
    there = Path("/dev/shm") if disk == "another disk" else tmp_path
    if disk == "another disk" and there.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is on the disk of the tests' folder: name another with --basetemp")
    with (
        tempfile.TemporaryDirectory(dir=there) as larger,
        Workers(tmp_path, *options, count=1, recording=False) as workers,
    ):
        shutil.move(kept, Path(larger) / "kept")
        kept.symlink_to(Path(larger) / "kept")
        newcomer = workers.start_one()
        joined = f"siblings {workers.workers[0].pid}"
        wait_until(lambda: joined in newcomer.log_text(), what="that it has joined")
        assert workers.stop() == 0


def test_one_file_by_two_ways_is_one_database() -> None:
    own = {"--usage-db": "/kept/usage.sqlite", DATABASE_FOLDER: "1:2"}
    assert disagreement(own, {**own, "--usage-db": "/bound/usage.sqlite"}) is None
    for other in ({"--usage-db": "/bound/other.sqlite"}, {"--usage-db": "/bound/usage.sqlite", DATABASE_FOLDER: "1:3"}):
        assert disagreement(own, {**own, **other}) is not None
    assert disagreement(own, {"--usage-db": "/bound/usage.sqlite"}) is not None, "where it is, is not known"


def test_bounds_of_another_size_are_a_disagreement() -> None:
    ten, twenty = (terms_of(Options(max_per_source=most, bounds_loopback=True)) for most in (10, 20))
    assert "--max-per-source or --max-new-per-source 20" in (disagreement(ten, twenty) or "")


OTHERWISE = {"bool": True, "int | None": 7, "str | None": "other", "tuple[int, str] | None": (7, "::1")}
"""By the type of an option, a value that is not its default."""

TERMS_OF_OPTIONS = {name: kind for name, kind in Options.__annotations__.items() if name not in MAY_DIFFER}

SHOWN_OR_CHECKED = {"--check", "--help", "--version", "--websocket-url"}
"""Options of the command line that no worker runs with."""


@pytest.mark.parametrize("name", TERMS_OF_OPTIONS)
def test_every_option_is_a_term_unless_it_is_named_as_one_that_may_differ(name: str) -> None:
    usual = terms_of(Options())
    other = terms_of(replace(Options(), **{name: OTHERWISE[TERMS_OF_OPTIONS[name]]}))  # type: ignore[arg-type]
    assert disagreement(usual, other) is not None


def test_what_may_differ_are_options() -> None:
    assert MAY_DIFFER.keys() <= Options.__annotations__.keys()


def test_no_option_of_the_command_line_is_anything_else() -> None:
    known = {"--" + name.replace("_", "-") for name in Options.__annotations__} | SHOWN_OR_CHECKED | {"--log-stdout"}
    written = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", USAGE, re.MULTILINE))
    assert len(written) > 30
    assert written <= known


def test_the_page_for_operators_names_every_term() -> None:
    page = (CHECKOUT / "docs" / "workers.md").read_text()
    (told,) = re.findall(r"record or allow something else than the relay it comes to: (.*?)\n\n", page, re.DOTALL)
    assert "JSON\nlines or none" in told
    missing = [
        option
        for term in terms_of(Options())
        for option in re.findall(r"--[a-z-]+", term)
        if option not in ("--log-fd", "--log-stdout") and f"`{option}`" not in told
    ]
    assert missing == []


def test_what_only_one_side_knows_is_no_disagreement() -> None:
    own = terms_of(Options())
    assert disagreement(own, {}) is None
    assert disagreement({}, own) is None
    assert disagreement(own, {**own, "--something-new": "1"}) is None
    assert "--blur-usage 7, not none" in (disagreement(own, {**own, "--blur-usage": "7"}) or "")
