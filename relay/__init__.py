"""A transit relay for magic-wormhole, in several equal processes.

Two clients that cannot reach each other directly both connect here, each says which transfer it belongs to, and
the relay glues the two connections together. The folders are the stations of a connection, and each says at its head
in which order to read it:

====================  =================================================================================
`cli`, `options`      the command line: docopt text to `Options`, and `main()`; `mistakes`, what it may complain of
`preflight/`          what a start would refuse, told before it, for ``--check``
`server`              one worker: puts the parts together, starts, ticks and stops
`clients/`            before a pair: accept, shake hands, wait, match; or be turned away
`transfer/`           a pair: bytes in both directions, and how it ends
`workers/`            the other workers: who is there, what is handed on and taken in
`usage/`              what is recorded: the JSON lines, the database, and the blur over both
`report/`             `relay-usage`, which reads the database for a person
`status/`             `relay-status`, the relay seen live
`process/`            what a process is before it is either: standard streams, limits, signals
====================  =================================================================================

Imports run downwards only: `server`, `workers`, `transfer`, `clients`, the records of `usage`; `options`,
`process/` and `mistakes` are below all. (``make lint`` checks it.) A part that needs something above it is given it.
Pure modules know no sockets and no gevent. Nothing is monkey-patched: the threads of `usage` are real ones.
"""

__version__ = "1.0.0"
