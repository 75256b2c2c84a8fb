"""Orders that are computed where they are needed, and take no memory."""

from math import isqrt

import numpy as np

ROUNDS = 8  # of the Feistel network: each half is changed by four


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """Return a hash of some numbers, uint64: SplitMix64's (Steele, Lea and Flood 2014), which is
    frozen for good, as the order of the data is made from it."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = state + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def shuffled(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Return the element at each place of 0 to count, in the order that its key draws.

    A Feistel network over pairs of numbers below (rows, columns), of which there are a few more
    than `count`: what falls outside walks on through the network until it is inside (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    rows = isqrt(count - 1) + 1
    columns = -(-count // rows)
    elements = places.astype(np.uint64)
    keys = np.broadcast_to(keys, places.shape)
    outside = np.arange(len(places))
    while len(outside):
        left, right = np.divmod(elements[outside], np.uint64(columns))
        for i in range(ROUNDS):
            if i % 2 == 0:
                left = (left + hashed(keys[outside], i, right) % rows) % rows
            else:
                right = (right + hashed(keys[outside], i, left) % columns) % columns
        elements[outside] = left * columns + right
        outside = outside[elements[outside] >= count]
    return elements.astype(np.int64)
