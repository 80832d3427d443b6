"""A pair: pumps, turns, rest."""
