"""A pair: two clients glued, until their transfer is over.

In this order:

==========  ===========================================================================================
`pairs`     all transfers of this worker: how they begin, what they share, how they end
`pair`      two clients glued: two pumps, the ways in which a pair ends, how it moves house
`pump`      one direction of bytes, spliced by the kernel
`rest`      pairs that have little to move: one epoll for all, and no greenlet
`turns`     whose turn it is to move bytes, and how many
`pipes`     the kernel pipes that pumps borrow
`pace`      pure: how fast bytes may move where the operator has set a rate
`eviction`  who gives way when there is no place for newcomers
`state`     pure: what a pair packs of itself to move to another process
==========  ===========================================================================================

Only `pair` waits, in a greenlet for each pair that moves much. Nothing here knows of other workers: a pair lets go, is
packed and unpacked, and who carries it is somebody else's matter. Nothing here judges a client either.
"""
