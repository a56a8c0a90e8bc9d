"""Random numbers that depend on (seed, purpose, number) alone, so that no generator has a state to save."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for; two purposes never share numbers."""

    ORDER = 1
    SOURCE = 2
    REPLACE = 3
    CROP = 4
    PHOTOMETRIC = 5
    MASK = 6
    STREAM = 7


def generator(seed: int, purpose: Purpose, number: int, attempt: int = 0) -> np.random.Generator:
    """The generator of one sample, block or pass (Philox: Salmon et al. 2011, counter-based).

    The key is (seed, purpose) and the upper half of the counter (number, attempt), so generators never overlap within
    2**128 draws, and making one costs no hashing of seeds.
    """
    key = np.array([seed % 2**64, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, number, attempt], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
