"""Pseudo-random numbers from 64-bit words, always the same for the same word."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64


class Mixer(NamedTuple):
    """Rounds of a shift and a multiplication, and a last shift: each bit of a word moves every bit of the result."""

    rounds: tuple[tuple[int, int], ...]
    last_shift: int


SPLITMIX64 = Mixer(((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31)
MURMUR3 = Mixer(((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)), 33)


def mix_words(words: UInt64[np.ndarray, "*shape"], mixer: Mixer) -> UInt64[np.ndarray, "*shape"]:
    """The words, mixed in place; no two different words become equal, and 0 stays 0."""
    for shift, factor in mixer.rounds:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(mixer.last_shift)
    return words
