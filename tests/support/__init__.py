"""What the tests share; nothing here is a test, and no test module imports another one.

===============  ===================================================================================
`harness`        relays as real processes, clients as plain blocking sockets, and waiting for conditions
`crowd`          many clients at once, and whether every byte of theirs arrives
`client_frames`  WebSocket frames as a client sends them, good or not
`hostile`        clients that mean no good, and honest ones beside them; `intentions`: those of a soak
`load`           transfers beside what happens to the relay, and whether each was recorded once
`web`            WebSocket clients
`twisted`        the Twisted relay
`ledger`         everything that was recorded, against what was done
`current`        who has how much just now, by the `current` table and the workers' shares of it
`relay_model`    what a relay has to answer and to record, as a model for Hypothesis
                 (`model_clients`: those it drives)
`kernel_view`    the relay's own sockets, pipes and locks, as the kernel knows them
`command_line`   relay-gevent run to its end, and what it complained of
`namespaces`     hosts of the test's own; `wan`: long paths between them
`wormholes`      the real clients, and a mailbox server for them
`home_table`     what the homes' table in shared memory holds
`watched_relay`  relay-gevent that tells when its event loop was away from its sockets, and what is inside
`work_counter`   how often a worker did something for its clients, and for how many in one go
`told_process`   processes that do what a test says: `homes_worker`, `usage_worker`
`usage_records`  records for the recorder, and what of them has come to be written
`usage_disk`     a small disk that can be full
`debian`         a Debian of the test's own; `container`: the image built on it, in namespaces of its own
`status`         relay-status, and what its visitors read; `chromium`, a browser for its page
`needs`          what not every machine has
`kept_records`   what a relay in the test's own process records
`bare_pair`      a pair there, with no relay around it
`neighbours`     what tests that run side by side agree on: whose turn it is, whose ports are whose
===============  ===================================================================================

Fixtures of several folders are in tests/conftest.py: `relay`, `any_relay`, their factories, `stack`, `small_disk`.
"""
