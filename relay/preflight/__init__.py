"""What a start would refuse, as far as that can be told without a port, without the siblings, and without leaving
anything behind: for ``--check``, and before a start opens anything.

=========  ==================================================================
`check`    all of it; and what is best asked first of all, where lines go
`ports`    that the ports of a relay are different ones
=========  ==================================================================

Each part is asked where it is known, by what the start itself asks: so the two cannot say different things. What only
trying can tell stays with the start: whether a port is free and may be had, what the siblings' terms are, whether a
database is whole. Nothing in here lives longer than the question.
"""
