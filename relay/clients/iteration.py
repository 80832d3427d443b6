"""What an iteration of the event loop does for clients without a partner, and what waits for the next one.

Thousands may leave, or say something, in the same moment, and the event loop would call for each of them before it
looks after anybody else. So when that has been done for long enough, whoever else is called for is late, and comes
first in the next iteration; of many such, whoever came to be late first.

To return, and be called again, would not do: libev calls last for whom the kernel reports first, and the kernel
reports last whom it has reported before (ep_send_events() in fs/eventpoll.c). So who was served, and has said something
again, would be served before whoever was not; and some of these not at all, as long as others go on talking.

Those who are late have two thirds of the time, and the rest is for whoever is called first in this iteration: as a rule
that is who has just come. So a newcomer seldom has to wait until a thousand others have had their turn.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from relay.clients.client import Client, EventLoop
from relay.process import log

SLICE_SECONDS = 0.0015
LATE_SECONDS = 0.001
"""How much of an iteration clients have, and how much of that those who are late."""


class Iteration:
    """Serves clients for a slice of each iteration of an event loop, at the least one, and those first who are late.

    Args:
        loop: the event loop.
        serve: called for a client that has something to say. One that was late may be somewhere else by then.
    """

    def __init__(self, loop: EventLoop, serve: Callable[[Client], None]) -> None:
        self._now = loop.now
        self._serve = serve
        self._began = 0.0
        self._until = 0.0
        self._left = SLICE_SECONDS  # of the slice that begins next
        self._late: OrderedDict[Client, None] = OrderedDict()
        self._before_polling = loop.prepare()

    def see_to(self, client: Client) -> None:
        """Serve `client`, for which the event loop calls, now or in its turn."""
        if client not in self._late and not self._is_over():
            self._serve(client)
            return
        if not self._late:
            self._before_polling.start(self._see_to_late)
        self._late[client] = None

    def _is_over(self) -> bool:
        """Whether the slice of this iteration is used up; False for the first that is called for."""
        began = self._now()  # the loop's own time, which stands still during an iteration
        if began != self._began:
            self._began = began
            self._until = time.monotonic() + self._left
            self._left = SLICE_SECONDS
            return False
        return time.monotonic() >= self._until

    def _see_to_late(self) -> None:
        """Serve those who are late. The kernel is asked only then who has something to say: none of these, unless it is
        more."""
        began = now = time.monotonic()
        while self._late and now < began + LATE_SECONDS:
            client, _ = self._late.popitem(last=False)
            try:
                self._serve(client)
            except Exception:  # of one, and the others are still to be served
                log.tell_mistake("a mistake with one that has something to say; it is not heard any more")
                client.stop_listening()
            now = time.monotonic()
        self._left = SLICE_SECONDS - (now - began)
        if not self._late:
            self._before_polling.stop()
