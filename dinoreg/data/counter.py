"""Random numbers that depend on (seed, purpose, number) alone, so that no generator has a state to save."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a stream of random numbers is for; two purposes never share numbers."""

    ORDER = 1
    SOURCE = 2
    REPLACE = 3
    CROP = 4
    PHOTOMETRIC = 5
    MASK = 6
    STREAM = 7
    PERMUTE = 8


def generator(seed: int, purpose: Purpose, number: int, attempt: int = 0) -> np.random.Generator:
    """The generator of one sample, block or pass (Philox: Salmon et al. 2011, counter-based).

    The key is (seed, purpose) and the upper half of the counter (number, attempt), so generators never overlap within
    2**128 draws, and making one costs no hashing of seeds.
    """
    key = np.array([seed % 2**64, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, number, attempt], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


ROUNDS = 6
SMALL = 256
WORD = 2**64 - 1
Words = TypeVar("Words", int, NDArray[Any])


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in a pseudo-random permutation of range(size), chosen by `key`.

    A balanced Feistel network on the next even number of bits; values beyond `size` go through it again until they
    fall inside (cycle walking: Black and Rogaway 2002), at most four times on average. Small sizes are shuffled
    outright, for there the network has too few bits to be uniform.
    """
    if size <= SMALL:
        return _shuffled(size, key)[index]
    half = ((size - 1).bit_length() + 1) // 2
    mask, rounds = (1 << half) - 1, _rounds(half, key)
    while True:
        left, right = index >> half, index & mask
        for one, other in rounds:
            left ^= one[right]
            right ^= other[left]
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=256)  # samples that are read one after another lie in one window of each source of a mixture
def _rounds(half: int, key: int) -> list[tuple[memoryview, memoryview]]:
    """The network's rounds as tables, by twos; O(sqrt(size)) memory: 12 KiB for 160,000 samples, 768 KiB for 10^9."""
    values = np.arange(1 << half, dtype=np.uint64)
    tables = [mix64(values ^ (key & WORD ^ turn << 56)) & ((1 << half) - 1) for turn in range(ROUNDS)]
    views = [table.astype(np.uint32).data for table in tables]
    return list(zip(views[::2], views[1::2], strict=True))


@lru_cache(maxsize=256)
def _shuffled(size: int, key: int) -> list[int]:
    order: list[int] = generator(key, Purpose.PERMUTE, size).permutation(size).tolist()
    return order


def mix64(value: Words) -> Words:
    """A bijective hash of 64 bits (the finaliser of SplitMix64: Steele et al. 2014), of one number or of many."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def make_key(*numbers: int) -> int:
    """One 64-bit key of several integers, order counting."""
    key = 0
    for number in numbers:
        key = mix64(key ^ (number & WORD))
    return key
