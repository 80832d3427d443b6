"""What the relay records about itself, and how little about its clients.

=================  ====================================================================================
`record`           pure: one finished connection, the moods, and the blur over times and sizes
`recorder`         what the relay calls: `open_recorder`, `Recorder.record`, `Recorder.close`
`writer`           the thread behind each destination: takes what is queued, writes it, keeps it in trouble
`json_log`         destination: one JSON line for each record, to a file descriptor
`reopen`           the JSON log's file after a rotation
`database`         destination: the SQLite tables, one transaction for all that is queued
`rows`             the rows of `usage`, in order or in none
`one_row`          the tables of one row: what is added to them, and how they are put right
`shares`           what each worker holds, and which of them live, by `lifeline` or by `processes`
`told`             what each tells of itself for those who look at the relay live
`schema`           the database file: whose it is, its tables, opening and making it
`folder`           the folder that it is in, and whether that will do
`watched_file`     the database's file, watched from outside SQLite: still there, still whole
`whereabouts`      which file its path names, looked at from the event loop
`belonging`        which file a -wal belongs to, where an operator has put another in its place
`write_ahead_log`  the same of what is beside it, the -wal and the -shm
`looks`            when all of the -wal is looked at
`sqlite`           SQLite, without what it takes to turn dates into values
`trouble`          what can keep a destination from being written; `sqlite_trouble`, what SQLite has against it
`unhurried`        what the operator is told of that, at times that say nothing
`sign`             what others see of it at once: the process's name
`own_log`          the relay's log to stderr, which nobody waits for either
=================  ====================================================================================

The threads are real ones and nothing here knows gevent: a destination that stalls holds up its own thread, never the
relay, and never the other destination.
"""
