"""A transit relay for magic-wormhole, in several equal processes.

Two clients that cannot reach each other directly both connect here, each says which transfer it belongs to, and
the relay glues the two connections together. The map, from the outside in:

=================  ====================================================================================
`cli`              the command line: docopt text to `Options`, and `main()`
`server`           the relay of one process: accept, shake hands, wait, pair, stop
`client`           one connection that is not yet in a pair, and what it is doing
`handshake`        pure: the bytes so far, and what they can still become
`waiting_room`     pure: who waits for which token, a newcomer's match, and the spares
`deadlines`        pure: who has to be done by when
`pair`             two clients glued: two pumps, how the pair ends, how it moves house
`pump`             one direction of bytes, spliced by the kernel
`pipes`, `turns`   what the pumps share: kernel pipes, and whose turn it is
`siblings`         the other workers of this relay: links, homes, handing on
`usage`            what is recorded: the JSON lines, the database, and the blur over both
`report`           `relay-usage`, which reads the database for a person
=================  ====================================================================================

Pure modules know no sockets and no gevent. Everything that waits is in `server`, `pair` and `siblings`. Nothing is
monkey-patched: the threads of `usage` are real ones.
"""

__version__ = "1.0.0"
