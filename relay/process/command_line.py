"""A command line, read by the usage that the help prints; and what is wrong with one that is not as that says.

docopt says why it refuses only where one option is wrong by itself. Where it says nothing, this finds the word that is
wrong, so that nobody is told off for another one.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from relay.mistakes import Mistake
from relay.process.program import say

_OPTION = re.compile(r"^  (?:(-[a-z]), )?(--[a-z-]+)( [A-Z]+)?(?=  |$)", re.MULTILINE)
"""An option as a usage describes it: its letter, its name, and the name of its value, if it has these."""

_PATTERN = re.compile(r"^Usage:\n  \S+ (.*)$", re.MULTILINE)
"""What may be given, as a usage has it."""


class NotUnderstood(Mistake):
    """A command line that is not as the usage says; the text is why, and empty where something is missing."""


def read_command_line(usage: str, arguments: Sequence[str], version: str | None = None) -> dict[str, Any]:
    """What docopt makes of `arguments`. Prints and ends, with status 0, for --help and --version.

    Raises:
        NotUnderstood: it is not as `usage` says.
        Mistake: the help cannot be printed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 and later have something to say when they compile docopt 0.6.2
        import docopt
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return docopt.docopt(usage, list(arguments), version=version)
    except docopt.DocoptExit as refusal:
        complaint = str(refusal).partition("Usage:")[0].strip()
        raise NotUnderstood(complaint or _what_is_wrong(usage, arguments)) from None
    except SystemExit:
        say(printed.getvalue())
        raise
    finally:
        sys.modules.pop("docopt", None)  # it is needed once


def _what_is_wrong(usage: str, arguments: Sequence[str]) -> str:
    """The first word that is not as the usage says, or the first option that is there too often; empty for neither."""
    described = {name: (letter, bool(value)) for letter, name, value in _OPTION.findall(usage)}
    pattern = _PATTERN.findall(usage)[0]
    often = set(re.findall(r"\((--[a-z-]+) [A-Z]+\)\.\.\.", pattern))
    is_all_options = not re.sub(r"\[options\]|\([^)]*\)\.*", "", pattern).strip()
    first: dict[str, str] = {}
    rest = iter(arguments)
    for word in rest:
        if not re.match("-[^-]|--.", word):
            if is_all_options:
                return f"{word!r} belongs to no option"
            if word == "--":
                break  # what follows is no option, whatever it looks like
            continue
        written, name = _option_in(word, described)
        if name is None:
            return f"{written} is not an option"
        if name in first and name not in often:
            short = next((short for short in (first[name], written) if short != name), None)
            return f"{name} is given more than once{f', as {short}, too' if short else ''}"
        first[name] = written
        if described[name][1] and word == written:
            next(rest, None)  # its value
    return ""


def _option_in(word: str, described: dict[str, tuple[str, bool]]) -> tuple[str, str | None]:
    """An option as it is written in a word, and its name, if it is described."""
    if not word.startswith("--"):
        written = word[:2]  # what is behind it is its value: each option that has a letter takes one
        return written, next((name for name, (letter, _) in described.items() if letter == written), None)
    written = word.partition("=")[0]
    if written in described:
        return written, written
    # docopt takes the beginning of a name for it; where that is the beginning of several it says so itself.
    return written, next((name for name in described if name.startswith(written)), None)
