"""The manual pages, made from the help texts of the programs, so that nothing is written twice.

A program's help is the constant USAGE of a `cli.py`; what it is called is how that begins. The sources are read and not
imported: whoever builds a wheel need not have what the programs need.

Usage: misc/man_pages.py FOLDER     writes relay-gevent.1 and the others there
"""

from __future__ import annotations

import ast
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent

_OPTION = re.compile(r"  (?P<name>(?:-\w, )?--[\w-]+(?: [A-Z]\S*)?)(?:  +(?P<text>\S.*))?$")
_HEADING = re.compile(r"(?P<title>\S.*):$")

# What a help text has no room for, by the name of the program.
_FILES = {
    "relay-gevent": [
        ("etc/supervisord.conf", "starts the workers under supervisord; below share/relay-gevent of the environment"),
    ],
}


@dataclass(frozen=True)
class Help:
    """A program and what its --help prints."""

    program: str
    text: str

    def lines(self) -> list[str]:
        """Return the text's lines."""
        return self.text.rstrip("\n").split("\n")


def helps() -> list[Help]:
    """Return the help of each program of the distribution, by name."""
    found = [
        Help(usage.partition(",")[0], usage) for path in sorted(TOP.glob("relay/**/cli.py")) for usage in _usage(path)
    ]
    return sorted(found, key=lambda each: each.program)


def _usage(path: Path) -> Iterator[str]:
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["USAGE"]:
            yield ast.literal_eval(statement.value)


def version() -> str:
    """Return the version of the distribution."""
    match = re.search(
        r'^__version__ = "(.+)"$', (TOP / "relay" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert match is not None
    return match[1]


def page(of: Help, others: list[str], day: str) -> str:
    """Return the manual page, in man(7)'s macros.

    Args:
        of: the program and its help.
        others: the programs to name under "see also".
        day: the page's date, as 2026-11-27.
    """
    first, _, rest = of.text.partition("\n")
    purpose = first.partition(", ")[2].rstrip(".")
    out = [
        f'.TH {_escaped(of.program.upper())} 1 {day} "relay-gevent {version()}" "User Commands"',
        ".nh",
        ".SH NAME",
        f"{_escaped(of.program)} \\- {_escaped(purpose)}",
        ".SH SYNOPSIS",
    ]
    usage, _, body = rest.partition("Usage:\n")[2].partition("\n\n")
    for line in usage.split("\n"):
        name, _, arguments = line.strip().partition(" ")
        out += [f".B {_escaped(name)}", _escaped(arguments), ".br"]
    out += _body(body.rstrip("\n").split("\n"))
    out += [
        ".SH EXIT STATUS",
        "0 after an orderly end, 2 after a mistake, which is told in one line on standard error.",
    ]
    if of.program in _FILES:
        out += [".SH FILES"]
        for name, text in _FILES[of.program]:
            out += [".TP", f".I {_escaped(name)}", _escaped(text)]
    out += [".SH SEE ALSO", ",\n".join(f".BR {_escaped(other)} (1)" for other in others)]
    return "\n".join(out) + "\n"


def _body(lines: list[str]) -> list[str]:
    """Return what comes after the usage: options where the help has some, paragraphs where it has text."""
    out: list[str] = []
    section, begins = "", True
    for line in lines:
        option, heading = _OPTION.match(line), _HEADING.match(line)
        if not line:
            begins = True
            continue
        if line.startswith(" ") and option is None:  # the option before goes on
            out.append(_escaped(line.strip()))
            continue
        wanted = "OPTIONS" if option or heading else "NOTES" if "OPTIONS" in section else section or "DESCRIPTION"
        if wanted != section:
            out.append(f".SH {wanted}")
        elif begins and not option and not heading:
            out.append(".PP")
        section, begins = wanted, False
        if option is not None:
            out += [".TP", f".B {_escaped(option['name'])}", *([_escaped(option["text"])] if option["text"] else [])]
        else:
            out.append(f".SS {_escaped(heading['title'])}" if heading is not None else _escaped(line))
    return out


def _escaped(text: str) -> str:
    """Return text in which nothing is a request or an escape of troff's."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def write_pages(folder: Path) -> list[Path]:
    """Write the pages to a folder, made when missing, and return them. Their date is SOURCE_DATE_EPOCH's, or today."""
    folder.mkdir(parents=True, exist_ok=True)
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    written = []
    for each in helps():
        others = [other.program for other in helps() if other.program != each.program]
        path = folder / f"{each.program}.1"
        path.write_text(page(each, [*others, "supervisord"], day), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit((__doc__ or "").strip())
    for made in write_pages(Path(sys.argv[1])):
        print(made)
