"""Before a pair: from accept to a partner, or to a refusal.

Read it in the order in which a connection meets it:

==============  =======================================================================================
`door`          the TCP port, and whose turn it is to accept; `listening`, what all connections have in common;
                `congestion`, how TCP sends on them
`health_port`   beside the door, a port for health checks
`client`        one connection that is not yet in a pair
`places`        how many connections there are, and from whom; `bounds`, pure: what nobody may have more of
`sources`       pure: whom a connection counts for, by its address
`origins`       the same where proxies may say it: `trusted_proxies` are those whose word is taken, in a header
                (`proxied`; `proxy_header`, pure) or in X-Forwarded-For (`forwarded_for`, pure); a `claim` is that word
`reception`     from accept to a whole handshake
`iteration`     what an iteration of the event loop does for those who have no partner, and what waits for the next one
`speech`        how a client speaks until it has a partner: plainly, or in WebSocket frames, see `web`
`handshake`     pure: the bytes so far, and what they can still become
`websocket`     pure: the opening handshake of a WebSocket client, and plain HTTP
`frames`        pure: WebSocket frames, read and written; `masks`, how their mask comes off
`line`          pure: the handshake line out of a WebSocket client's messages
`pings`         for WebSocket clients to which nothing was said for a while
`matching`      those whose handshake is whole meet, wait, or turn out to be spares
`gateway`       in place of `matching`, the same for clients that are carried to another relay, the `upstream`
`waiting_room`  pure: who waits for which token, a newcomer's match, and the spares
`sites`         pure: who gives way when too many wait, or have not said their line
`deadlines`     pure: who has to be done by when
`farewell`      ways to go without a partner: records, last words, the lingering close
==============  =======================================================================================

Nothing here waits: all of it runs in the hub. Nothing here knows of transfers or of other workers; who is matched, and
who belongs elsewhere, goes to a callable or to an object that whoever builds this has given.
"""
