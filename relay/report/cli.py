"""The command line of `relay-usage`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from relay import __version__
from relay.mistakes import Mistake
from relay.process.command_line import NotUnderstood, read_command_line
from relay.process.program import fail, fail_for_lack_of_memory, get_ready, say
from relay.process.shown import shown
from relay.report.counters import added, read_counters
from relay.report.database import ReportError, Summary, add_now, opened
from relay.report.export import as_csv, as_json
from relay.report.layout import Screen, table
from relay.report.paths import Paths, as_text, paths_of
from relay.report.periods import Span, day_of, parse_span
from relay.report.scan import Tallies, count
from relay.report.summing_up import Report, sum_up
from relay.report.tally import Tally, add_sums, spreads

USAGE = """relay-usage, what the usage database of relay-gevent says.

Usage:
  relay-usage [options] DATABASE...

DATABASE is the file that the relay's --usage-db names. It is only read; the relay may be running or not. Several, of a
relay on several machines, are added up.

  --by SPAN   Count by day, week or month [default: day]
  --last N    Show the last N of these, up to today; "all" shows each that has a connection. Without it, 14 days,
              12 weeks or 12 months.
  --utc       Begin days at midnight UTC instead of local time.
  --paths     Show instead how good the paths of transfers were, and what limited them, as a relay
              with --measure-paths counts it since it was started.
  --json      Print a JSON document.
  --csv       Print comma-separated values.
  --help      Show this.
  --version   Show the version.

"50 %" is the median, "95 %" the 95th percentile: of transfers (happy connections), as many are at most so large, or
took at most so long. In a terminal there are bars and colours; the environment variable NO_COLOR turns colours off.
"""

DEFAULT_LAST: dict[Span, int] = {"day": 14, "week": 12, "month": 12}
MOST_PERIODS = 100_000
READINGS = 5  # at most, of a database that a relay opens while it is being read without locks


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, understood."""

    databases: tuple[Path, ...]
    span: Span
    last: int | None
    utc: bool
    form: str
    paths: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run `relay-usage` with the arguments `argv`; without them, as the program, with those of the process.

    Exit status: 0, or 2 after a mistake, told in one line on stderr.
    """
    try:
        if argv is None:
            get_ready()
        options = read_options(sys.argv[1:] if argv is None else argv)
        if options.paths:
            say(as_text(read_paths(options)))
        else:
            say(_text(read_report(options), options.form, sys.stdout))
    except (ReportError, Mistake) as mistake:
        fail("relay-usage", mistake)
    except (MemoryError, ImportError) as error:
        fail_for_lack_of_memory("relay-usage", error)
    except KeyboardInterrupt:
        sys.exit(130)


def read_options(arguments: Sequence[str]) -> Options:
    """Understand the command line; prints and exits with status 0 for --help and --version.

    Raises:
        ReportError: something is not as the help says.
        Mistake: the help cannot be printed.
    """
    try:
        given = read_command_line(USAGE, arguments, f"relay-usage {__version__}")
    except NotUnderstood as refusal:
        complaint = str(refusal) or "give one DATABASE, and the options of the help"
        raise ReportError(f"{complaint}; see relay-usage --help") from None
    try:
        span = parse_span(given["--by"])
    except ValueError:
        raise ReportError(f"--by {given['--by']}: give day, week or month") from None
    if given["--json"] and given["--csv"]:
        raise ReportError("--json and --csv: give one of them")
    if given["--paths"] and (given["--json"] or given["--csv"]):
        raise ReportError("--paths: it is for people; relay-status has the same for programs")
    form = "json" if given["--json"] else "csv" if given["--csv"] else "table"
    return Options(
        _databases(given["DATABASE"]), span, _last(given["--last"], span), given["--utc"], form, given["--paths"]
    )


def _databases(given: Sequence[str]) -> tuple[Path, ...]:
    if "" in given:
        raise ReportError("DATABASE: it is empty; give the path that the relay's --usage-db names")
    databases = tuple(map(Path, given))
    files: dict[object, Path] = {}
    for database in databases:
        try:
            status = database.stat()
        except OSError:
            continue  # reading it will tell
        other = files.setdefault((status.st_dev, status.st_ino), database)
        if other is not database:
            raise ReportError(f"{database}: it is the same file as {other}; give each database once")
    return databases


def _last(text: str | None, span: Span) -> int | None:
    if text is None:
        return DEFAULT_LAST[span]
    if text == "all":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_PERIODS:
        raise ReportError(f"--last {text}: give a whole number from 1 to {MOST_PERIODS}, or all")
    return int(text)


def read_paths(options: Options) -> Paths | None:
    """Return what the relays have counted of their paths, None where none of them does. Raises ReportError."""
    lots = []
    for path in options.databases:
        with opened(path) as database, database.connection() as connection:
            lots.append(read_counters(connection))
    return paths_of(added(lots))


def read_report(options: Options) -> Report:
    """Return what is to be told.

    Raises:
        ReportError: a database cannot be read.
    """
    made = time.time()
    first, *others = options.databases
    summary, tallies = _read(first, options)
    summaries = [summary]
    for path in others:
        summary, of_one = _read(path, options)
        summaries.append(summary)
        for day, tally in of_one.items():
            tallies.setdefault(day, Tally()).extend(tally)
    for tally in tallies.values():
        tally.values.sort()
    return Report(
        paths=tuple(map(shown, options.databases)),
        made=made,
        zone="UTC" if options.utc else time.strftime("%Z", time.localtime(made)),
        now=add_now(summary.now for summary in summaries),
        since_start=add_sums(summary.since_start for summary in summaries),
        all_time=add_sums(summary.all_time for summary in summaries),
        spreads=spreads(tally.values for tally in tallies.values()),
        span=options.span,
        periods=sum_up(tallies, options.span, options.last, day_of(made, options.utc)),
    )


def _read(path: Path, options: Options) -> tuple[Summary, Tallies]:
    for _ in range(READINGS):
        with opened(path) as database:
            try:
                summary = database.summary()
                tallies = count(database, summary.first_row, summary.last_row, options.utc)
            except ReportError:
                if database.was_disturbed():
                    continue
                raise
            if not database.was_disturbed():
                return summary, tallies
    raise ReportError(f"{path}: it changes too often to be read; try again")


def _text(report: Report, form: str, output: TextIO | None) -> str:
    if form == "json":
        return as_json(report)
    if form == "csv":
        return as_csv(report)
    return table(report, _screen(output))


def _screen(output: TextIO | None) -> Screen:
    if output is None:  # closed, as `say` will find
        return Screen()
    blocks = (output.encoding or "").lower().startswith("utf")
    if not output.isatty():
        return Screen(blocks=blocks)
    colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return Screen(width=shutil.get_terminal_size().columns, colours=colours, blocks=blocks)


if __name__ == "__main__":
    main()
