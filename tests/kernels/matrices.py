"""The random matrices once more, in NumPy and from their definition: the oracle of every backend."""

import numpy as np

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
MASK = np.uint64(0xFFFFFFFF)


def threefry(key, counter):
    """Threefry-2x32-20 in 64-bit arithmetic that is cut to 32 bits after every step."""
    k = [np.uint64(int(word)) for word in key]
    k.append(np.uint64(0x1BD11BDA) ^ k[0] ^ k[1])
    x, y = (np.asarray(word).astype(np.uint64) & MASK for word in counter)
    x, y = (x + k[0]) & MASK, (y + k[1]) & MASK
    for i in range(20):
        r = np.uint64(ROTATIONS[i % 8])
        x = (x + y) & MASK
        y = (((y << r) | (y >> (np.uint64(32) - r))) & MASK) ^ x
        if i % 4 == 3:
            s = i // 4 + 1
            x = (x + k[s % 3]) & MASK
            y = (y + k[(s + 1) % 3] + np.uint64(s)) & MASK
    return x, y


def stream(key, *tags):
    """The key of a stream: the old one encrypts (0, tag)."""
    for tag in tags:
        key = threefry(key, (0, tag))
    return key


def dense_signs(key, p, k, *, block=0, col=0):
    """R (p, k) of ±1: one hash for 64 rows of a column."""
    row = np.uint64(64 * block) + np.arange(p, dtype=np.uint64)[:, None]
    column = np.uint64(col) + np.arange(k, dtype=np.uint64)[None, :]
    w = threefry(stream(key, 1), np.broadcast_arrays(row // np.uint64(64), column))
    word = np.where((row // np.uint64(32)) % np.uint64(2) == 0, w[0], w[1])
    return 1 - 2 * ((word >> (row % np.uint64(32))) & np.uint64(1)).astype(np.int64)


def dense_normal(key, p, k, *, block=0, col=0):
    """R (p, k) of normal numbers in float64: Box and Muller's two for every pair of rows."""
    row = np.uint64(64 * block) + np.arange(p, dtype=np.uint64)[:, None]
    column = np.uint64(col) + np.arange(k, dtype=np.uint64)[None, :]
    u, v = (w >> np.uint64(8) for w in threefry(stream(key, 2), np.broadcast_arrays(row // np.uint64(2), column)))
    radius = np.sqrt(-2 * np.log((u + 0.5) / 2**24))
    return radius * np.where(row % np.uint64(2) == 0, np.cos(2 * np.pi * v / 2**24), np.sin(2 * np.pi * v / 2**24))


def sketch(key, p, k, *, block=0, copies=1):
    """S (p, k): row i has ±1/√s in the bucket that each of the s copies rotates it to."""
    b, j = np.divmod(np.arange(p, dtype=np.uint64), np.uint64(k))
    b = b + np.uint64(block)
    out = np.zeros((p, k))
    for copy in range(copies):
        w = threefry(stream(key, 3, copy), (b // np.uint64(64), j))
        word = np.where((b // np.uint64(32)) % np.uint64(2) == 0, w[0], w[1])
        sign = 1 - 2 * ((word >> (b % np.uint64(32))) & np.uint64(1)).astype(np.int64)
        turn = threefry(stream(key, 4, copy), (b, np.zeros_like(b)))[0] % np.uint64(k)
        np.add.at(out, (np.arange(p), ((j + turn) % np.uint64(k)).astype(np.int64)), sign / np.sqrt(copies))
    return out


def count_sketch(rng, p, k, copies=1):
    """The textbook CountSketch (or SJLT): a bucket and a sign for every coordinate, from another generator."""
    out = np.zeros((p, k))
    for _ in range(copies):
        np.add.at(out, (np.arange(p), rng.integers(0, k, p)), rng.choice([-1.0, 1.0], p) / np.sqrt(copies))
    return out
