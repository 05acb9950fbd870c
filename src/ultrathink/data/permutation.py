"""Keyed permutations of 0 … size-1, evaluated at any point without a table.

A Feistel network over pairs (https://en.wikipedia.org/wiki/Feistel_cipher) whose halves are
counted modulo a and b with a * b barely above ``size``; points that fall outside walk the cycle
until they are back inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permute(
    ranks: npt.NDArray[np.int64],
    size: int,
    key: tuple[int, ...],
    epochs: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Image of ``ranks`` ``[N]`` under the permutation that ``key`` and its epoch name.

    ``epochs`` ``[N]`` says which permutation each rank belongs to.
    """
    if size == 1:
        return np.zeros_like(ranks)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _mix(epochs.astype(np.uint64) + np.uint64(_fold(key)))
    values = _feistel(ranks.astype(np.uint64), keys, rows, columns)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], rows, columns)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: Words, keys: Words, rows: int, columns: int) -> Words:
    """A permutation of 0 … rows * columns - 1: each round adds a hash of one half to the other."""
    a, b = np.uint64(rows), np.uint64(columns)
    high, low = np.divmod(values, b)
    for number in range(_NUM_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * _GOLDEN & _MASK)
        if number % 2 == 0:
            high = (high + _mix(low ^ round_keys) % a) % a
        else:
            low = (low + _mix(high ^ round_keys) % b) % b
    return high * b + low


def _mix(words: Words) -> Words:
    """splitmix64's finalizer: every bit of a word depends on every bit of the input."""
    words = (words ^ (words >> _SHIFTS[0])) * _FACTORS[0]
    words = (words ^ (words >> _SHIFTS[1])) * _FACTORS[1]
    return words ^ (words >> _SHIFTS[2])


def _fold(key: tuple[int, ...]) -> int:
    """One 64-bit number for a tuple of them."""
    folded = 0
    for part in key:
        word = np.array([(folded + (part & _MASK) + _GOLDEN) & _MASK], dtype=np.uint64)
        folded = int(_mix(word)[0])
    return folded
