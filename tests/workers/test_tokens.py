"""For whom a worker asks again where they belong, as long as that is not certain."""

from __future__ import annotations

from relay.workers.estate import Estate
from relay.workers.tokens import LOOKS, Tokens


def test_in_a_second_all_who_were_doubted_are_looked_at_and_a_few_of_the_others_so_that_it_comes_to_each() -> None:
    tokens = Tokens(Estate(), [], {})
    uncertain = [b"u%d" % number for number in range(5 * LOOKS)]
    tokens.uncertain.update(dict.fromkeys(uncertain))
    doubted = [b"d%d" % number for number in range(2 * LOOKS)]
    for token in doubted:
        tokens.doubt(token)
    chosen = [list(tokens.to_look_at()) for _ in range(7)]
    assert set(chosen[0]) == {*doubted, *uncertain[:LOOKS]}
    assert all(len(some) == LOOKS for some in chosen[1:])
    assert {token for some in chosen[:5] for token in some} >= set(uncertain)
    assert set(chosen[6]) <= set(doubted), "they are as uncertain as all others now"
    tokens.uncertain.clear()
    assert not tokens.to_look_at()
