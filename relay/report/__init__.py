"""`relay-usage`: what the usage database says, for people and for programs.

A program of its own. It needs no running relay and only reads; of the relay it knows nothing but the tables, and how a
-wal of another database is told (`relay.usage.belonging`).

    spread.py          pure: exact percentiles over more values than one wants to sort at once
    periods.py         pure: which day, week or month a moment belongs to
    tally.py           pure: connections by mood, bytes and spreads, for a period and for all of them together
    summing_up.py      pure: from the days that were counted to what is told
    units.py           pure: bytes and seconds as people write them
    layout.py          pure: the table with its bars
    export.py          pure: the same for programs, a JSON document or CSV rows
    database.py        opens the file without ever writing to it, reads the one-row tables
    scan.py            reads all rows of `usage`, on as many processors as there are
    forked.py          several processes at once, of which any may be killed
    by_other_hands.py  pure: numbers from columns in which anything may be
    counters.py        what workers count beside the tables
    paths.py           pure: what the counts of --measure-paths say
    cli.py             the command line; it is begun by `__main__`
"""
