"""Shuffles that need no memory: bijections of 0..size-1 computed one number at a time."""

from math import gcd

ROUNDS = 4
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


def shuffled(index: int, size: int, key: int) -> int:
    """Where `index` goes in the shuffle of 0..size-1 that belongs to `key`.

    A Feistel network over the least even number of bits, walked along its cycle until it lands below `size`
    (Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mixed(key ^ mixed(right * ROUNDS + turn)) & low)
        index = left << half | right
        if index < size:
            return index


def mixed(value: int) -> int:
    """A 64-bit number that looks unrelated to `value` (splitmix64's output function)."""
    value = (value + GOLDEN) & WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def even_stride(size: int) -> int:
    """A step coprime to `size` whose first n multiples lie evenly over 0..size-1 for every n (the golden ratio's)."""
    stride = max(1, size * GOLDEN >> 64)
    while gcd(stride, size) != 1:
        stride += 1
    return stride
