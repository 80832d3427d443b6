"""A transit relay for magic-wormhole, in several equal processes.

Two clients that cannot reach each other directly both connect here, each says which transfer it belongs to, and
the relay glues the two connections together. The map, from the outside in:

=====================  ================================================================================
`cli`, `options`       the command line: docopt text to `Options`, and `main()`; `mistakes`, what it may complain of
`server`               the relay of one process: accept, shake hands, wait, pair, stop
`door`                 the TCP port, and whose turn it is to accept
`client`               one connection that is not yet in a pair, and what it is doing
`handshake`            pure: the bytes so far, and what they can still become
`waiting_room`         pure: who waits for which token, a newcomer's match, and the spares
`deadlines`            pure: who has to be done by when
`bounds`, `pace`       pure: what nobody may have more of, and how fast bytes may move
`pair`                 two clients glued: two pumps, how the pair ends, how it moves house
`pump`                 one direction of bytes, spliced by the kernel
`pipes`, `turns`       what the pumps share: kernel pipes, and whose turn it is
`siblings`, `link`     the other workers of this relay: who is there, what is handed on, and the connection to each
`run_dir`              where workers find each other
`sibling_language`     pure: what they say
`homes`                which worker a token lives with, and when it was last matched; all workers know the same
`balance`, `load`      pure: which transfers go to a worker with less to do; and how much this one has to do
`usage`                what is recorded: the JSON lines, the database, and the blur over both
`report`               `relay-usage`, which reads the database for a person
=====================  ================================================================================

Pure modules know no sockets and no gevent. Everything that waits is in `server`, `pair` and `siblings`. Nothing is
monkey-patched: the threads of `usage` are real ones.
"""

__version__ = "1.0.0"
