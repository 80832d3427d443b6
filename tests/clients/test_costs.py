"""What somebody sends costs in proportion to what it is, however it is made up and in whatever pieces it comes.

Else a few kilobytes keep the event loop from everybody else for as long as their sender likes. Nothing is timed here:
regular expressions are looked at for what makes them try in many ways, and what is looked at of a head that comes byte
by byte is counted.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import relay
from relay.clients import proxy_header, websocket
from relay.clients.proxy_header import LONGEST, HeaderReader, ProxyHeader
from relay.clients.websocket import LONGEST_HEAD, RequestHead
from tests.clients.test_proxy_header import IPV4_ADDRESSES, NOOP, PROXY, TCP4, binary, field

try:
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse

Item: TypeAlias = tuple[Any, Any]
"""What `re` makes of a part of an expression: its kind, and what belongs to it."""

ALL = frozenset(range(256))
ANY_NUMBER = 256
"""A repeat of so many or more is one of any number."""


@dataclass(frozen=True)
class Part:
    """A place of a regular expression: which characters it takes, and whether any number of them, or perhaps none."""

    takes: frozenset[int]
    any_number: bool = False
    may_be_none: bool = False


def patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    """All regular expressions of the relay, and where each is."""
    for module in pkgutil.walk_packages(relay.__path__, "relay."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        for name, value in vars(loaded).items():
            if isinstance(value, re.Pattern):
                yield f"{module.name}.{name}", value
        tree = ast.parse(Path(str(loaded.__file__)).read_text())
        at_the_top = {
            id(statement.value) for statement in ast.walk(tree) if isinstance(statement, ast.Assign | ast.AnnAssign)
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or id(call) in at_the_top:
                continue
            if re.fullmatch(r"re\.\w+", ast.unparse(call.func)):
                yield f"{module.name}:{call.lineno}", re.compile(ast.literal_eval(call.args[0]))


def readings(parsed: Iterable[Item]) -> list[list[Part]]:
    """All rows of parts that a regular expression can stand for: one for each choice that there is in it."""
    rows: list[list[Part]] = [[]]
    for item in parsed:
        rows = [row + more for row in rows for more in readings_of(item)]
    return rows


def readings_of(item: Item) -> list[list[Part]]:
    """The same for one item of it."""
    kind, value = item
    if kind is sre.SUBPATTERN:
        return readings(value[-1])
    if kind is sre.BRANCH:
        return [row for branch in value[1] for row in readings(branch)]
    if kind in (sre.AT, sre.ASSERT, sre.ASSERT_NOT):
        return [[]]
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, body = value
        rows = readings(body)
        if most < ANY_NUMBER:
            return rows if least else [*rows, []]
        assert not any(part.any_number for row in rows for part in row), "any number of any number"
        takes = frozenset[int]().union(*(part.takes for row in rows for part in row))
        return [[Part(takes, any_number=True, may_be_none=not least)]]
    return [[Part(characters(item))]]


def characters(item: Item) -> frozenset[int]:
    """Which of the first 256 characters an item for a single one takes."""
    kind, value = item
    if kind is sre.IN and value[0][0] is sre.NEGATE:
        return ALL - characters((sre.IN, value[1:]))
    if kind is sre.IN:
        return frozenset[int]().union(*map(characters, value))
    if kind is sre.RANGE:
        return frozenset(range(value[0], min(value[1], 255) + 1))
    if kind is sre.CATEGORY:
        named = {sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_SPACE: r"\s", sre.CATEGORY_WORD: r"\w"}
        negated = {sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_NOT_WORD: r"\W"}
        text = (named | negated)[value]
        return frozenset(number for number in ALL if re.match(text, chr(number)))
    return {sre.LITERAL: frozenset({value}), sre.NOT_LITERAL: ALL - {value}, sre.ANY: ALL}[kind]


def is_tried_in_many_ways(pattern: re.Pattern[Any]) -> bool:
    """Whether one character can belong to either of two repeats, so that what fails behind them is tried with each
    character as the border."""
    for row in readings(sre_parse.parse(pattern.pattern, pattern.flags)):
        for first, part in enumerate(row):
            for second in range(first + 1, len(row)):
                both = part.takes & row[second].takes
                between = row[first + 1 : second]
                if (
                    part.any_number
                    and row[second].any_number
                    and both
                    and all(each.may_be_none or each.takes & both for each in between)
                ):
                    return True
    return False


@pytest.mark.parametrize("text", [r"a:[ \t]*([ -~]*)\n", r"[ab]+b[ab]+c", r"(\w*)(?:-|)([a-z]+)!", r"x*y?z?x*;"])
def test_repeats_that_can_take_each_others_characters_are_found(text: str) -> None:
    assert is_tried_in_many_ways(re.compile(text))


@pytest.mark.parametrize(
    "text", [r"a:([ -~]*)\n", r"\w+ \w+ \w+", r"(?:\[([^]]*)\]|([0-9.]+)):[0-9]{1,5}", r"a{1,5}a*"]
)
def test_and_others_are_not(text: str) -> None:
    assert not is_tried_in_many_ways(re.compile(text))


def test_no_regular_expression_tries_a_text_in_many_ways() -> None:
    found = dict(patterns())
    assert "relay.clients.websocket._FIELD" in found
    assert "relay.status.routes.HOST" in found
    assert [where for where, pattern in found.items() if is_tried_in_many_ways(pattern)] == []


# What comes byte by byte


class Counting:
    """A regular expression that counts the bytes that it is given to look at."""

    def __init__(self, pattern: re.Pattern[bytes], most: int) -> None:
        self.looked_at = 0
        self._pattern = pattern
        self._most = most

    def match(self, text: bytes, at: int = 0, end: int = LONGEST_HEAD) -> re.Match[bytes] | None:
        self.looked_at += min(len(text) - at, end - at, self._most)
        return self._pattern.match(text, at, end)

    def search(self, text: bytes, at: int = 0, end: int = LONGEST_HEAD) -> re.Match[bytes] | None:
        self.looked_at += min(len(text), end) - at
        return self._pattern.search(text, at, end)


HEADS = {
    "a long request line": b"GET /" + b"x" * 8100 + b" HTTP/1.1\r\n\r\n",
    "a long field": b"GET / HTTP/1.1\r\nA:" + b" " * 8100 + b"\r\n\r\n",
    "many fields": b"GET / HTTP/1.1\r\n" + b"A:\r\n" * 2000 + b"\r\n",
    "one that never ends": (b"GET / HTTP/1.1\r\n" + b"A:\r\n" * 3000)[:LONGEST_HEAD],
}


@pytest.mark.parametrize("name", HEADS)
def test_a_request_that_comes_byte_by_byte_is_looked_at_a_few_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The beginning of a request line is looked at again, up to the 21 bytes that it can have.
    most = {"_REQUEST_BEGUN": 21, "_REQUEST_LINE": LONGEST_HEAD, "_HEAD_END": LONGEST_HEAD}
    counting = {name: Counting(getattr(websocket, name), most) for name, most in most.items()}
    for regular_expression, counted in counting.items():
        monkeypatch.setattr(websocket, regular_expression, counted)
    head = RequestHead()
    heard = [head.hear(HEADS[name][at : at + 1]) for at in range(len(HEADS[name]))]
    assert heard[-1] is not None
    assert heard[:-1] == [None] * (len(heard) - 1)
    looked_at = {name: counted.looked_at for name, counted in counting.items()}
    assert looked_at["_REQUEST_BEGUN"] <= 21 * len(heard)
    assert looked_at["_REQUEST_LINE"] <= 2 * len(heard)
    assert looked_at["_HEAD_END"] <= 4 * len(heard), looked_at


def test_a_proxy_header_that_comes_byte_by_byte_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0

    class Number(int):
        @classmethod
        def from_bytes(cls, *arguments: Any, **named: Any) -> int:  # type: ignore[override]  # noqa: ANN401
            nonlocal looked_at
            looked_at += 1
            return int.from_bytes(*arguments, **named)

    monkeypatch.setattr(proxy_header, "int", Number, raising=False)
    fields = field(NOOP, b"") * ((LONGEST - 16 - 12) // 3)
    header = binary(PROXY, TCP4, IPV4_ADDRESSES + fields)
    reader = HeaderReader()
    heard = [reader.hear(header[at : at + 1]) for at in range(len(header))]
    assert heard[-1] == ProxyHeader(len(header), "192.168.0.1")
    assert heard[:-1] == [None] * (len(heard) - 1)
    assert looked_at <= 5 * len(header)
