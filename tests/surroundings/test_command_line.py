"""A command line that is not as the usage says is answered with the word that is wrong, and no other."""

from __future__ import annotations

import re

import pytest

from relay import cli
from relay.process.command_line import NotUnderstood, read_command_line
from relay.report import cli as report
from relay.status import cli as status


def refusal(usage: str, *arguments: str) -> str:
    """What is said to these arguments, which are not as the usage says."""
    with pytest.raises(NotUnderstood) as refused:
        read_command_line(usage, arguments)
    return str(refused.value)


def test_an_option_that_is_given_twice_is_told_of_and_not_one_that_is_right_and_has_a_letter() -> None:
    once = "--blur-usage is given more than once"
    assert refusal(cli.USAGE, "--websocket", "4002", "--blur-usage", "600", "--blur-usage", "60") == once
    assert refusal(cli.USAGE, "-w", "4002", "--blur-usage=600", "--blur", "60") == f"{once}, as --blur, too"
    assert refusal(cli.USAGE, "--websocket", "4002", "-w4003") == "--websocket is given more than once, as -w, too"
    assert refusal(cli.USAGE, "--check", "--check") == "--check is given more than once"
    assert refusal(status.USAGE, "--usage-db", "a", "--usage-db", "b", "--port", "1", "--port", "1") == (
        "--port is given more than once"
    )
    assert refusal(report.USAGE, "usage.sqlite", "--by", "day", "--by", "week") == "--by is given more than once"


def test_a_word_that_belongs_to_no_option_is_told_of() -> None:
    assert refusal(cli.USAGE, "--websocket", "4002", "extra") == "'extra' belongs to no option"
    assert refusal(cli.USAGE, "--trusted-proxies", "127.0.0.1,", "::1") == "'::1' belongs to no option"
    assert refusal(cli.USAGE, "--") == "'--' belongs to no option"
    assert refusal(status.USAGE, "--usage-db", "usage.sqlite", "extra") == "'extra' belongs to no option"


def test_an_option_that_is_none_is_told_of_and_not_a_value_that_looks_like_one() -> None:
    assert refusal(cli.USAGE, "--grace", "-1", "-w4002", "--blah=3", "--port", "0") == "--blah is not an option"
    assert refusal(cli.USAGE, "--grace", "--port", "-x") == "-x is not an option"
    assert refusal(report.USAGE, "--blah", "usage.sqlite") == "--blah is not an option"


def test_what_is_missing_is_for_each_program_to_say() -> None:
    assert refusal(report.USAGE, "--utc") == ""
    assert refusal(status.USAGE, "--port", "0") == ""


@pytest.mark.parametrize("usage", [cli.USAGE, report.USAGE, status.USAGE])
def test_every_option_of_the_help_is_known(usage: str) -> None:
    options = re.findall(r"^  (?:(-\w), )?(--[a-z-]+)( [A-Z]+)?", usage, re.MULTILINE)
    assert len(options) == usage.count("\n  -")
    for letter, name, value in options:
        if name in ("--help", "--version"):
            continue
        words = [name, "1"] if value else [name]
        assert refusal(usage, *words, "--no-such-thing") == "--no-such-thing is not an option"
        if letter:
            assert refusal(usage, f"{letter}1", "--no-such-thing") == "--no-such-thing is not an option"


@pytest.mark.parametrize("usage", [cli.USAGE, report.USAGE, status.USAGE])
def test_no_line_of_the_help_begins_with_an_option_but_its_description(usage: str) -> None:
    # docopt would take it for another option, of which the beginning of the right one is not the only name any more.
    assert re.findall(r"^(?:|   +)-.*", usage, re.MULTILINE) == []


def test_an_option_may_be_given_by_the_beginning_of_its_name() -> None:
    assert read_command_line(cli.USAGE, ["--max-con", "10"])["--max-connections"] == "10"
