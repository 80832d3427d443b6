"""A pair: two clients glued, until their transfer is over.

In this order:

==========  ===========================================================================================
`pairs`     all transfers of this worker: how they begin, what they share, how they end
`pair`      two clients glued: two pumps, who waits for both, how it moves house; `ending`, how it ends
`pump`      one direction of bytes, spliced by the kernel; `framed`, one with WebSocket frames at an end
`rest`      pairs that have little to move: one epoll for all, and no greenlet
`turns`     whose turn it is to move bytes, and how many
`pipes`     the kernel pipes that pumps borrow
`limits`    what the operator allows to a pair, and pumps that keep to it, `limited_framed` those with frames; `pace`,
            pure: how fast bytes may move at a rate
`path`      how good the paths of a transfer were, and what limited it, for --measure-paths
`slices`    long work in the event loop, a little at a time
`arrears`   what those that are over still owe; `lumps`, pure: who is idle that is owed something
`eviction`  who gives way when there is no place for newcomers
`state`     pure: what a pair packs of itself to move to another process
==========  ===========================================================================================

Only `pair` waits, in a greenlet for each pair that moves much. Nothing here knows of other workers: a pair lets go, is
packed and unpacked, and who carries it is somebody else's matter. Nothing here judges a client either.
"""
