"""What the relay records about itself, and how little about its clients.

==============  =======================================================================================
`record`        pure: one finished connection, the moods, and the blur over times and sizes
`recorder`      what the relay calls: `open_recorder`, `Recorder.record`, `Recorder.close`
`writer`        the thread behind each destination: takes what is queued, writes it, keeps it in trouble
`json_log`      destination: one JSON line for each record, to a file descriptor
`database`      destination: the SQLite tables, one transaction for all that is queued
`schema`        the database file: whose it is, its tables, opening and making it
`processes`     which of the workers named in the database still live
`reopen`        the JSON log's file after a rotation
`watched_file`  the database's file, watched from outside SQLite: still there, still whole
`own_log`       the relay's log to stderr, which nobody waits for either
`trouble`       what can keep a destination from being written, and what the operator is told
==============  =======================================================================================

The threads are real ones and nothing here knows gevent: a destination that stalls holds up its own thread, never the
relay, and never the other destination.
"""
