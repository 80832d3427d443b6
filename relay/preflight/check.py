"""What a start with some options would end with, as far as that can be told without trying it."""

from __future__ import annotations

from collections.abc import Collection

from relay.clients.congestion import check_congestion_control
from relay.mistakes import Mistake
from relay.options import Options
from relay.preflight.ports import check_ports
from relay.process import log
from relay.process.addresses import check_interface


def check(options: Options, closed: Collection[int] = ()) -> None:
    """Raise Mistake for what a start with these options would end with, and tell what it would doubt.

    Args:
        options: understood, and right by themselves.
        closed: the standard descriptors that this process was started without.
    """
    doubt = check_log_fd(options, closed)
    if doubt is not None:
        log.tell(doubt)
    check_ports(options)
    if options.run_dir is not None:
        from relay.workers.estate import Estate  # not before: see `relay.server`
        from relay.workers.run_dir import check_run_dir

        check_run_dir(options.run_dir)
        Estate().make_homes(options.run_dir, first=True)  # in memory, and gone with this process
    if options.usage_db is not None:
        _check_database(options.usage_db)
    for option, _, interface in options.endpoints():
        check_interface(interface, options.interface_named_by(option))
    if options.congestion_control is not None:
        check_congestion_control(options.congestion_control)
    if options.upstream is not None:
        from relay.clients.upstream import Upstream  # not before: few relays are gateways

        Upstream(options.upstream)


def check_log_fd(options: Options, closed: Collection[int]) -> str | None:
    """Raise Mistake unless JSON lines can go to where they are to go. Returns a line for the log where that may be
    another place than the operator means.

    Best asked before anything is opened: soon a number that is not open may be something of the relay's own.
    """
    fd = options.log_fd
    if fd is None:
        return None
    # Not before: not every relay has such lines.
    from relay.usage.json_log import check_log_fd, not_open, renamed_or_mistaken
    from relay.usage.trouble import UsageError

    if fd in closed:
        raise Mistake(not_open(fd))
    try:
        check_log_fd(fd, options.usage_db, options.log_path)
    except UsageError as error:
        raise Mistake(error) from None
    return None if options.log_path is None else renamed_or_mistaken(fd, options.log_path)


def _check_database(path: str) -> None:
    from relay.usage.schema import check_file  # not before: SQLite takes 1.5 MB
    from relay.usage.trouble import UsageError

    try:
        check_file(path)
    except UsageError as error:
        raise Mistake(f"--usage-db {error}") from None
