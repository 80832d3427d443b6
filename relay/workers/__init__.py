"""The other workers of this relay: who is there, what is handed on, and what is taken in.

In this order:

============  ==========================================================================================
`household`   what siblings ask of this worker, and what it asks of them: who lives where
`handing_on`  clients and transfers that go to a sibling
`siblings`    who is there, and what they say
`gathering`   how they find each other; `run_dir`, the directory in which they do
`link`        the connection to each
`language`    pure: what they say
`parcels`     clients and transfers under way, that none gets lost or doubled; `claim`, whose each is
`tokens`      which worker a token lives with
`homes`       the memory in which all workers keep that: `buckets`, its hash table; `lives`, by which the kernel tells
              who is dead; `matches`, when tokens were last matched
`terms`       what all must agree on
`estate`      what all have in common, and a newcomer gets
`surplus`     what a worker has too much of, and siblings that have places for it
`balance`     pure: which transfers go to a worker with less to do; `load`, how much this one has to do
`departure`   how a worker ends: everything into other hands, or its grace
`telling`     what it tells the database of itself, and when
============  ==========================================================================================

Nothing here decides who matches whom, or moves a byte. It knows the rooms of `relay.clients` and `relay.transfer`, and
they do not know it.
"""
