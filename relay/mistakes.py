"""What an operator can get wrong, said in one line."""

from __future__ import annotations


class Mistake(Exception):
    """Something that only the operator can put right; its text names the option or the file, and what to do.

    `relay-gevent` prints it behind ``relay-gevent: error:`` and ends with exit status 2.
    """
