"""`relay-status`: the relay seen live, by a person, by Prometheus, by other programs.

A program of its own beside the workers. It only reads the usage database, so nothing that happens to it, or that its
visitors do, reaches the relay; and it has something to say whatever has become of the relay or of the database.

===========  ==========================================================================================
`reading`    pure: what a database said at one moment, and several of them together
`source`     reads a database, a few rows at a time, and never a whole table
`rates`      pure: what is remembered of the readings, and the rates that follow
`history`    connections by day: the one thing that needs all rows, counted in the background, in slices
`recount`    pure: when they are counted again, so that the days are right and cost little
`observer`   the thread that does so for one database
`health`     pure: is all well, in words
`view`       pure: all that is shown, of one moment
`metrics`    that for Prometheus; `document`, as JSON; `page`, for a person, with `plots` and `dress`
`routes`     what each URL answers; `server`, the bounds on whoever asks
`cli`        the command line; it is begun by `__main__`
===========  ==========================================================================================
"""
