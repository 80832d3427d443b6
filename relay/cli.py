"""The command line of `relay-gevent`: docopt text to `Options`; and `main()`."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from relay import __version__
from relay.clients.trusted_proxies import TrustedProxies
from relay.mistakes import Mistake
from relay.options import Options
from relay.preflight.check import check, check_log_fd
from relay.preflight.ports import check_ports
from relay.process import log
from relay.process.command_line import NotUnderstood, read_command_line
from relay.process.fd_limit import fd_limit, raise_fd_limit
from relay.process.memory import lack_behind, no_thread
from relay.process.program import fail, fail_for_lack_of_memory, get_ready
from relay.process.signals import be_ready_for_signals, end_by_signal
from relay.usage.own_log import OwnLog

USAGE = """relay-gevent, a transit relay for magic-wormhole.

Usage:
  relay-gevent [options]

Where it listens:
  --port PORT                  TCP port; 0 picks a free one, and the log says which. Also takes the Twisted relay's
                               forms tcp:4001 and tcp:4001:interface=ADDR [default: 4001]
  --interface ADDR             Address to listen on; :: is every address, IPv6 and IPv4 [default: ::]
  -w, --websocket ENDPOINT     Take WebSocket clients here, too: 4002, tcp:4002 or tcp:4002:interface=ADDR, where ADDR
                               is otherwise that of --interface. The endpoint of --port makes one port serve both.
  -u, --websocket-url URL      What clients are told elsewhere to connect to; it is checked, and changes nothing here.
  --health ENDPOINT            Answer health checks here, in the same forms: who connects, or sends a GET, is served by
                               each worker however full it is, takes no client's place, and is on no record.
  --ping-interval SECONDS      Ping a WebSocket client that was told nothing for so long; 0 is never [default: 30]
  --upstream TARGETS           Be a gateway: each WebSocket client becomes a TCP client of the relay or proxy there, at
                               HOST:PORT. There is no port for TCP then, and nothing is recorded. Several, separated by
                               commas, take turns, and one that cannot be reached is passed over.
  --send-proxy                 Tell the upstream who each client is, in a PROXY header of version 2.
  --congestion-control NAME    How TCP sends to the clients, such as bbr, which is faster on paths that are long and
                               lose packets. Without it, as this machine does by default.

What it records:
  --usage-db PATH              Keep usage in this SQLite file; it is made when missing.
  --log-fd FD                  Write a JSON line for each finished connection to this file descriptor.
  --log-stdout                 The same, to standard output.
  --log-path PATH              What file the descriptor was opened as. Lines go to a new file of that name once it is
                               renamed; without this option, only if that is after the start.
  --measure-paths              Count, at the end of each transfer of a megabyte or more, how good its paths were and
                               what limited it, in coarse buckets over all of them: for relay-usage --paths and
                               relay-status. Needs --usage-db.
  --blur-usage SECONDS         Round what is recorded: times down to a multiple of SECONDS, sizes up.

Several workers:
  --run-dir DIR                Where the workers of this relay find each other; made when missing. Workers that share
                               DIR are one relay. Without it, this worker is alone.

How it ends, and how long it waits:
  --grace SECONDS              How long transfers may go on after a signal to stop [default: 7]
  --handshake-timeout SECONDS  How long a client may take to say what it wants [default: 30]
  --wait-timeout SECONDS       How long a client may wait for its partner [default: 3600]
  --idle-timeout SECONDS       How long a transfer may go on without a byte [default: 86400]

What nobody gets more of (for each worker, unless it says otherwise):
  --max-connections N          Connections at a time; when there are more, what has been idle longest gives way, of
                               whoever has most, or new ones wait in the listen queue. Without it, as many as the limit
                               of file descriptors allows, or, with --run-dir, half of that: then a worker has room for
                               what another one hands it when that leaves.
  --max-handshakes N           Clients that have not said what they want; the oldest gives way, of whoever has most
                               [default: 1000]
  --max-waiting N              Clients that wait for a partner; the oldest gives way, of whoever has most. Without
                               it, three quarters of --max-connections.
  --max-waiting-per-token N    Clients that wait with the same token; the oldest gives way [default: 16]
  --max-per-source N           Connections from one address (IPv6: one /64). Without it, a sixteenth
                               of --max-connections; where that is less than 64, then 64, but at most a quarter.
  --max-new-per-source N       New connections a second from one address, and four times as many from all of one
                               IPv6 site (/48); without it, 200. Both of these spare this machine's own addresses,
                               unless they are given.
  --trusted-proxies NETS       Addresses and networks, separated by commas, of proxies whose word is taken for where a
                               client comes from: a PROXY header on either port, X-Forwarded-For on WebSocket. Only the
                               bounds above need to know; it is recorded nowhere.
  --proxy-protocol             Connections from these have to begin with a PROXY header (on WebSocket they may).
  --max-pair-bytes BYTES       What one transfer may move, both directions together; without it, anything.
  --pair-rate BYTES            Bytes a second that one transfer may move; without it, as fast as can be.
  --relay-rate BYTES           Bytes a second that the whole relay may move, all its workers together, shared
                               fairly between the transfers; without it, as fast as can be.

  --check                      Say what is wrong with these options on this machine, if anything is, and end. No port
                               is opened for it, and nothing is left behind.
  --help                       Show this.
  --version                    Show the version.

SIGTERM and SIGINT end it in good order; a second one ends it at once.
"""

RESERVED_FDS = 128
"""File descriptors that are not for clients: the database, the log, the listening socket, the siblings, the homes; and
those that `pipes` leaves free."""

LEAST_FDS = RESERVED_FDS + 6
"""Room for one transfer: two connections, and two pipes."""

MOST_PIPES = 1000
"""How many pipes a worker has at the most, however many file descriptors. Only transfers in which much moves hold one,
and one after the other does that; those who get none copy."""

USUAL_FDS = 65_536
"""As many file descriptors are made use of unasked. A limit of a thousand million, as some containers have it, says
nothing about how many connections there is memory for; who wants more says so with --max-connections."""

LEAST_PER_SOURCE = 4
"""Two sides that meet, and a spare of each."""

LOG_SECONDS = 1.0
"""How long the end waits for the reader of the log."""

RECORDS_SECONDS = 10.0
"""How long the last thing a worker does, writing the records that are still queued, may take."""

SIGN_OFF_SECONDS = 1.0
"""How long a worker that cannot start takes to leave a database that is locked."""

_ENDPOINT = re.compile(r"tcp:(\d+)(?::interface=((?:[^:\\]|\\.)+))?")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `relay-gevent` with the arguments `argv`; without them, as the program, with those of the process, which is
    made ready for it. Never returns normally for a mistake.

    Exit status: 0 after an orderly stop, 2 after a mistake of the operator's, told in one line on stderr.
    """
    try:
        closed: Collection[int] = ()
        if argv is None:
            be_ready_for_signals()  # `relay-gevent` is already; not so who calls this
            closed = get_ready()
        complaint = raise_fd_limit()
        options = read_options(sys.argv[1:] if argv is None else argv)
        if options.check:
            check(options, closed)
            return
        doubt = check_log_fd(options, closed)
        check_ports(options)
        own_log = _log_to_stderr()
        try:
            for line in filter(None, (complaint, doubt)):
                log.tell(line)
            _serve(options)
        finally:
            own_log.finish(LOG_SECONDS)
    except Mistake as mistake:
        fail("relay-gevent", mistake)
    except (MemoryError, ImportError) as error:
        fail_for_lack_of_memory("relay-gevent", error)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(options: Options) -> None:
    gc.collect()  # docopt, and what it made of the options, is 0.17 MB that what comes now can have
    # gevent and what builds on it is imported only now: --help and a mistake need not wait for it.
    import gevent

    from relay.server import Relay
    from relay.usage.recorder import UsageError, open_recorder

    gevent.config.format_context = "builtins.repr"  # its own choice, pprint, imports inspect and dataclasses: 1 MB
    hub = gevent.get_hub()
    if hub.loop.backend != "epoll":  # refused, and libev has taken something else, which not all of this can live with
        raise _cannot_do_without(OSError(0, "epoll_create1"))
    hub.print_exception = log.tell_uncaught
    try:
        relay = Relay(options)
    except OSError as error:
        raise _cannot_do_without(error) from None
    recorder = None
    try:
        relay.knock()
        # Before joining: a database may be locked for a while, and other newcomers wait for one that joins.
        try:
            recorder = open_recorder(
                usage_db=options.usage_db,
                log_fd=options.log_fd,
                log_path=options.log_path,
                blur_seconds=options.blur_usage,
                current=relay.current,
                warn=log.tell,
                describe=relay.describe,
            )
        except UsageError as error:
            raise Mistake(error) from None
        ports = relay.find_ports()
        ending = end_by_signal(relay.stop)
        relay.start(ports, recorder)
    except BaseException as error:
        relay.close()
        if recorder is not None:
            recorder.close(SIGN_OFF_SECONDS)
        if isinstance(error, OSError):
            raise _cannot_do_without(error) from None
        raise
    try:
        relay.wait_until_ended()
    finally:  # however it came to an end, what is on record is written
        try:
            ending.go_on_without_loop(recorder.hurry)
            relay.close()
        finally:
            recorder.close(RECORDS_SECONDS)
    ending.is_over()
    log.tell("stopped")


def _cannot_do_without(error: OSError) -> Mistake:
    lack = lack_behind(error)
    if lack is not None:
        return Mistake(lack)
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return Mistake(
        f"the system refuses something that the relay cannot do without ({what}); allow it, or see what the container "
        "or sandbox forbids with: strace -f relay-gevent …"
    )


def _log_to_stderr() -> OwnLog:
    """Send the log to stderr, a line each: what it holds is starting, stopping and what goes wrong."""
    try:
        own_log = OwnLog()
    except RuntimeError:
        raise Mistake(no_thread()) from None
    log.send_to(own_log.write)
    return own_log


def read_options(arguments: Sequence[str]) -> Options:
    """Understand the command line; exits with status 0 for --help and --version.

    Raises Mistake for anything that is not as the help says.
    """
    given = _read(arguments)
    port, interface = _endpoint(given["--port"], given["--interface"])
    websocket = _websocket(given, interface)
    health = _health(given, interface)
    upstream = _upstream(given)
    if upstream is not None and websocket is not None:
        (port, interface), websocket = websocket, None
    held, pipes = _shares_of_fds(given)
    most = _max_connections(given, held, pipes)
    return Options(
        port=port,
        interface=interface,
        websocket=websocket,
        health=health,
        upstream=upstream,
        send_proxy=given["--send-proxy"],
        ping_interval=_seconds(given, "--ping-interval", 0),
        congestion_control=given["--congestion-control"],
        blur_usage=None if given["--blur-usage"] is None else _whole(given, "--blur-usage", 1),
        log_fd=_log_fd(given),
        log_path=_log_path(given),
        usage_db=_path(given, "--usage-db"),
        run_dir=_path(given, "--run-dir"),
        grace=_seconds(given, "--grace", 0),
        handshake_timeout=_seconds(given, "--handshake-timeout", 0.1),
        wait_timeout=_seconds(given, "--wait-timeout", 0.1),
        idle_timeout=_seconds(given, "--idle-timeout", 1),
        max_connections=most,
        most_held=max(held, most),
        most_pipes=min(pipes, (held + 2 * pipes - most) // 2),
        max_handshakes=_whole(given, "--max-handshakes", 1),
        max_waiting=_whole_or(given, "--max-waiting", most * 3 // 4),
        max_waiting_per_token=_whole(given, "--max-waiting-per-token", 1),
        max_per_source=_whole_or(given, "--max-per-source", _max_per_source(most)),
        max_new_per_source=_whole_or(given, "--max-new-per-source", 200),
        bounds_loopback=given["--max-per-source"] is not None or given["--max-new-per-source"] is not None,
        trusted_proxies=_trusted_proxies(given),
        proxy_protocol=given["--proxy-protocol"],
        max_pair_bytes=_bytes(given, "--max-pair-bytes"),
        pair_rate=_bytes(given, "--pair-rate"),
        relay_rate=_bytes(given, "--relay-rate"),
        measure_paths=_measure_paths(given),
        check=given["--check"],
        own_interfaces=_own_interfaces(given),
    )


def read_health(arguments: Sequence[str]) -> tuple[int, str] | None:
    """The port and the interface where a relay with this command line answers health checks; None for nowhere.

    Of the other options no value is looked at. Exits and raises as `read_options`.
    """
    given = _read(arguments)
    return _health(given, _endpoint(given["--port"], given["--interface"])[1])


def _read(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return read_command_line(USAGE, arguments, f"relay-gevent {__version__}")
    except NotUnderstood as refusal:
        complaint = str(refusal) or f"cannot make sense of {' '.join(arguments)!r}"
        raise Mistake(f"{complaint}; see relay-gevent --help") from None


def _health(given: dict[str, Any], interface: str) -> tuple[int, str] | None:
    return None if given["--health"] is None else _endpoint(given["--health"], interface, "--health")


def _measure_paths(given: dict[str, Any]) -> bool:
    if given["--measure-paths"] and given["--usage-db"] is None:
        raise Mistake("--measure-paths: give --usage-db, too, where the counts go")
    return bool(given["--measure-paths"])


def _websocket(given: dict[str, Any], interface: str) -> tuple[int, str] | None:
    """The endpoint for WebSocket clients, checked with what belongs to it."""
    url = given["--websocket-url"]
    if url is not None and not re.match(r"wss?://[^/]", url):
        raise Mistake(f"--websocket-url {url}: give a URL that begins with ws:// or wss://")
    if given["--websocket"] is None:
        return None
    from importlib.util import find_spec  # for this only

    if find_spec("websockets") is None:
        raise Mistake("--websocket needs the package websockets: pip install 'relay-gevent[websocket]'")
    return _endpoint(given["--websocket"], interface, "--websocket")


def _upstream(given: dict[str, Any]) -> str | None:
    """Where a gateway carries its clients, checked with what does not go with it."""
    text: str | None = given["--upstream"]
    if text is None:
        if given["--send-proxy"]:
            raise Mistake("--send-proxy: it is for a gateway; give --upstream, too")
        return None
    from relay.clients.upstream import split_targets  # not before: few relays are gateways

    split_targets(text)
    if given["--websocket"] is None:
        raise Mistake(f"--upstream {text}: a gateway is for WebSocket clients; give --websocket, too")
    for option in ("--usage-db", "--log-fd", "--log-stdout", "--log-path", "--measure-paths"):
        if given[option]:
            raise Mistake(f"{option}: a gateway records nothing (--upstream); give it to the relay that it leads to")
    return ",".join(target.strip() for target in text.split(","))  # as its siblings write it


def _trusted_proxies(given: dict[str, Any]) -> str | None:
    """The trusted proxies in one spelling, checked."""
    text = given["--trusted-proxies"]
    if text is None and given["--proxy-protocol"]:
        raise Mistake("--proxy-protocol: give --trusted-proxies, too, and with it the addresses of the proxies")
    return None if text is None else str(TrustedProxies(text))


def _endpoint(port: str, interface: str, option: str = "--port") -> tuple[int, str]:
    """PORT as a number, or as the Twisted relay's endpoint, which may name the interface too."""
    endpoint = _ENDPOINT.fullmatch(port)
    if endpoint is not None:
        port = endpoint[1]
        if endpoint[2] is not None:
            interface = re.sub(r"\\(.)", r"\1", endpoint[2])
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise Mistake(f"{option} {port}: give a number from 0 to 65535, or tcp:PORT, or tcp:PORT:interface=ADDR")
    return int(port), interface


def _own_interfaces(given: dict[str, Any]) -> tuple[str, ...]:
    """The options whose value is a whole endpoint, with an interface."""
    options = ("--port", "--websocket", "--health")
    endpoints = {option: _ENDPOINT.fullmatch(given[option] or "") for option in options}
    return tuple(option for option, endpoint in endpoints.items() if endpoint is not None and endpoint[2] is not None)


def _path(given: dict[str, Any], option: str) -> str | None:
    path: str | None = given[option]
    if path == "":
        raise Mistake(f"{option}: its value is empty; give a path")
    if path is not None and not os.path.isabs(path):
        try:
            os.getcwd()
        except OSError:
            raise Mistake(f"{option} {path}: the folder in which this was started is gone; give a whole path") from None
    return path


def _log_fd(given: dict[str, Any]) -> int | None:
    if given["--log-fd"] is None:
        return 1 if given["--log-stdout"] else None
    log_fd = _whole(given, "--log-fd", 0)
    if given["--log-stdout"] and log_fd != 1:
        raise Mistake("--log-stdout and --log-fd name two places for the JSON lines; give one of them")
    return log_fd


def _log_path(given: dict[str, Any]) -> str | None:
    path = _path(given, "--log-path")
    if path is not None and given["--log-fd"] is None and not given["--log-stdout"]:
        raise Mistake(f"--log-path {path}: it only says what file a descriptor is; give --log-fd, too")
    return path


def _shares_of_fds(given: dict[str, Any]) -> tuple[int, int]:
    """For how many connections, and for how many pipes beside them, there are file descriptors."""
    fds = fd_limit()
    if fds < LEAST_FDS:
        raise Mistake(f"the limit of file descriptors is {fds}; raise it to {LEAST_FDS} or more (ulimit -n)")
    # As many as are asked for, and once more for those that siblings hand on.
    asked_for = 0 if given["--max-connections"] is None else 2 * _whole(given, "--max-connections", 2)
    free = min(fds, max(USUAL_FDS, RESERVED_FDS + asked_for + 2 * MOST_PIPES)) - RESERVED_FDS
    pipes = min(MOST_PIPES, free // 16)
    return free - 2 * pipes, pipes


def _max_connections(given: dict[str, Any], held: int, pipes: int) -> int:
    if given["--max-connections"] is None:
        return held if given["--run-dir"] is None else max(2, held // 2)
    most = _whole(given, "--max-connections", 2)
    possible = held + 2 * pipes
    if most > possible:
        raise Mistake(
            f"--max-connections {most}: the limit of file descriptors allows {possible}; raise it (ulimit -n)"
        )
    return most


def _max_per_source(most: int) -> int:
    """What a source may have of so many connections, where nobody says: a household's on the smallest relay."""
    return max(most // 16, min(most // 4, 64), min(most, LEAST_PER_SOURCE))


def _whole(given: dict[str, Any], option: str, least: int, most_digits: int = 12) -> int:
    text = given[option]
    if not re.fullmatch("[0-9]+", text) or (len(text) <= most_digits and int(text) < least):
        raise Mistake(f"{option} {text}: give a whole number, {least} or more")
    if len(text) > most_digits:
        raise Mistake(f"{option} {text}: give a whole number of at most {most_digits} digits")
    return int(text)


def _whole_or(given: dict[str, Any], option: str, otherwise: int) -> int:
    return otherwise if given[option] is None else _whole(given, option, 1)


def _bytes(given: dict[str, Any], option: str) -> int | None:
    return None if given[option] is None else _whole(given, option, 1, most_digits=18)


def _seconds(given: dict[str, Any], option: str, least: float) -> float:
    text = given[option]
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise Mistake(f"{option} {text}: give seconds, {least:g} or more")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise Mistake(f"{option} {text}: give seconds of at most 9 digits, and 9 behind the point")
    if float(text) < least:
        raise Mistake(f"{option} {text}: give seconds, {least:g} or more")
    return float(text)
