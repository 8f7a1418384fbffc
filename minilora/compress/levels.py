"""What quantised weights are made of: codes packed into bytes, and the levels they stand for."""

from functools import cache
from statistics import NormalDist

import numpy as np

from ..peft.lora import is_whole


def check_bits(bits):
    """`bits` as an int, or a ValueError if it is not a whole number from 1 to 8."""
    if not is_whole(bits) or not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; expected a whole number from 1 to 8")
    return int(bits)


# ------------------------------------------------------------------ packing


@cache
def _halvings(bits):
    """(shift, mask of the lower neighbour, mask of the upper one) for lanes of 8, 16, 32 bits."""
    steps = []
    for lane in (8, 16, 32):
        used = bits * lane // 8
        low = sum(((1 << used) - 1) << at for at in range(0, 64, 2 * lane))
        steps.append((np.uint64(lane - used), np.uint64(low), np.uint64(low << used)))
    return steps


def squeeze(codes, bits):
    """`pack` without its checks, for codes of uint8 that are known to be good."""
    n, short = codes.size, -codes.size % 8
    if short:
        codes = np.concatenate([codes, np.zeros(short, np.uint8)])
    v = codes.view("<u8")  # (8 m,) codes, one a byte -> (m,) words
    if bits < 8:
        for shift, low, high in _halvings(bits):  # neighbours move together: 2, 4, then 8 codes
            v = (v & low) | ((v >> shift) & high)
    if bits in (1, 2, 4, 8):
        packed = v.astype(f"<u{bits}").view(np.uint8)  # the lowest `bits` bytes of each word
    else:
        packed = v.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)  # (m, 8) -> (m bits,)
    return packed[: -(-n * bits // 8)]


def pack(codes, bits):
    """Codes as a string of bits, the first code in the lowest bits of the first byte.

    Eight codes, one a byte, are one 64-bit word; three shifts close the gaps between them, for
    all words at once, and `bits` bytes of each word are left.

    Args:
        codes: whole numbers from 0 to 2^bits − 1, of any shape.
        bits: from 1 to 8.

    Returns:
        uint8, exactly ceil(n · bits / 8) bytes for n codes.

    Raises:
        ValueError: if `bits` or a code is out of range.
        TypeError: if the codes are not integers.
    """
    bits, codes = check_bits(bits), np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes have dtype {codes.dtype}; expected integers")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(
            f"codes run from {codes.min()} to {codes.max()}; expected 0 to {(1 << bits) - 1} "
            f"for {bits} bits"
        )
    return squeeze(np.ascontiguousarray(codes, np.uint8).reshape(-1), bits)


def unpack(packed, bits, n):
    """The `n` codes that `pack` made these bytes of.

    Args:
        packed: uint8, exactly ceil(n · bits / 8) bytes.
        bits: from 1 to 8. n: how many codes.

    Returns:
        uint8 codes (n,).

    Raises:
        ValueError: if `packed` has another dtype or length, or `bits` is out of range.
    """
    bits, packed = check_bits(bits), np.asarray(packed)
    wanted = -(-n * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (wanted,):
        raise ValueError(
            f"packed is {packed.dtype} of shape {packed.shape}; expected uint8 of shape "
            f"({wanted},) for {n} codes of {bits} bits"
        )
    words = -(-n // 8)
    if packed.size < words * bits:
        packed = np.concatenate([packed, np.zeros(words * bits - packed.size, np.uint8)])
    if bits in (1, 2, 4, 8):
        v = np.ascontiguousarray(packed).view(f"<u{bits}").astype("<u8")  # (m,)
    else:
        v = np.zeros((words, 8), np.uint8)
        v[:, :bits] = packed.reshape(words, bits)
        v = v.view("<u8").reshape(-1)  # (m, 8) -> (m,)
    if bits < 8:
        for shift, low, high in reversed(_halvings(bits)):
            v = (v & low) | ((v & high) << shift)
    return v.view(np.uint8)[:n]


# ------------------------------------------------------------------ levels


@cache
def nf4_levels():
    """The 16 levels of NormalFloat-4, from −1 to 1: float64, increasing, read-only.

    Each stands for about as many weights as the next if the weights are normal. Positive and
    negative sides are cut separately, 8 levels and 7 beside a zero, so that 0 is exact.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3, equation 4; the outermost
    quantile, 1 − ½(1/32 + 1/30), is that of the authors' code.
    """
    offset, quantile = 1 - (1 / 32 + 1 / 30) / 2, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*above, 0.0, *below])) / max(above)
    levels.flags.writeable = False  # `cache` hands the same array to all
    return levels


def kmeans_levels(w, k, iterations=30):
    """The `k` levels that lie nearest the weights: Lloyd's algorithm in one dimension.

    With the weights sorted, a cluster is a run of them, found by its ends and averaged from
    cumulative sums. It starts at the quantiles, and an empty cluster keeps its level.

    Args:
        w: finite weights of any shape.
        k: how many levels, from 1 to 256.
        iterations: the most that are made; it stops when nothing moves.

    Returns:
        Levels, increasing, float64 (k,), or fewer if `w` holds fewer different numbers.

    Raises:
        ValueError: if `w` is empty or not finite, or `k` or `iterations` is out of range.

    Source: Han et al. 2016, arXiv 1510.00149, section 3; Lloyd 1982.
    """
    w = np.sort(np.asarray(w, np.float64), axis=None)
    if not w.size or not np.isfinite(w).all():
        raise ValueError(f"w has {w.size} weights, finite or not; expected some, all finite")
    if not is_whole(k) or not 1 <= k <= 256:
        raise ValueError(f"k is {k!r}; expected a whole number from 1 to 256")
    if not is_whole(iterations) or iterations < 0:
        raise ValueError(f"iterations is {iterations!r}; expected a whole number from 0")
    sums = np.concatenate([[0.0], np.cumsum(w)])  # (n + 1,)
    levels = np.quantile(w, (np.arange(k) + 0.5) / k)
    for _ in range(iterations):
        inner = np.searchsorted(w, (levels[1:] + levels[:-1]) / 2, side="right")
        ends = np.concatenate([[0], inner, [w.size]])  # cluster i is w[ends[i] : ends[i + 1]]
        sizes = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(sizes, 1)
        fresh = np.where(sizes > 0, means, levels)
        if np.array_equal(fresh, levels):
            break
        levels = np.sort(fresh)
    return np.unique(levels)


def nearest(x, levels):
    """The index of the level nearest each number of `x`: uint8 codes, of its shape.

    A number on the midpoint of two levels takes the lower one.
    """
    midpoints = ((levels[1:] + levels[:-1]) / 2).astype(x.dtype)
    if len(midpoints) > 31:
        return np.searchsorted(midpoints, x).astype(np.uint8)
    # For a few levels a comparison with every midpoint beats a search: no branch, no look-up.
    codes, above = np.zeros(x.shape, np.uint8), np.empty(x.shape, bool)
    for midpoint in midpoints:
        np.greater(x, midpoint, out=above)
        codes += above.view(np.uint8)
    return codes
