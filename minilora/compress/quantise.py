"""Quantisation: weights as a few bits each, and the scales that give them their size back.

How it goes: the weights are cut into blocks, each block is divided by its scale, each quotient
becomes the code of a level near it, and the codes are packed. `dequantise` goes back.
"""

from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

KINDS = ("symmetric", "affine", "nf4", "levels")
TINY = np.finfo(np.float32).tiny  # the smallest scale: 1 / scale is finite, zeros need no care


class Quantised(NamedTuple):
    """Packed codes and what restores them. `quantise` makes one and `dequantise` reads it."""

    packed: np.ndarray  # uint8, ceil(n · bits / 8)
    scale: Any  # float32, one a block; with double quantisation a Quantised of (scale − mean)
    shape: tuple  # of the weights
    bits: int
    block: Any  # None, "row" or how many weights
    kind: str  # one of KINDS
    zero: Any = None  # affine: float32, what code 0 stands for in each block
    levels: Any = None  # a codebook: float32, increasing
    mean: Any = None  # double quantisation: float32 (1,), the mean scale

    def arrays(self):
        """All arrays by name, for a file: codes, scale (with double, scale.codes …), zero …"""
        double = {} if self.mean is None else self.scale.arrays()
        found = {"codes": self.packed, "zero": self.zero, "levels": self.levels, "mean": self.mean}
        found |= {f"scale.{k}": a for k, a in double.items()} or {"scale": self.scale}
        return {name: a for name, a in found.items() if a is not None}

    @property
    def nbytes(self):
        """The bytes of everything stored: codes, scales, zeros, levels."""
        return sum(a.nbytes for a in self.arrays().values())

    @property
    def bits_per_weight(self):
        """8 · nbytes over the number of weights."""
        return 8 * self.nbytes / np.prod(self.shape)

    def scales(self):
        """One scale for each block, float32 (blocks,): for uniform kinds, the step."""
        if self.mean is None:
            return self.scale
        return np.maximum(dequantise(self.scale) + self.mean, 0)

    def spread(self, each):
        """A number for each block, (blocks,), as one for each weight, (n,)."""
        n = int(np.prod(self.shape))
        return np.repeat(each, block_size(self.shape, self.block))[:n]


# ------------------------------------------------------------------ packing


def pack(codes, bits):
    """Codes from 0 to 2^bits − 1 as a string of bits, the first code in the lowest bits: uint8.

    Eight codes are exactly `bits` bytes, and one 64-bit word has room for them.
    """
    codes = np.asarray(codes).ravel()
    words = np.pad(codes, (0, -codes.size % 8)).reshape(-1, 8).astype("<u8")  # (m, 8)
    words = np.bitwise_or.reduce(words << _places(bits), axis=1)  # (m,)
    used = words.view(np.uint8).reshape(-1, 8)[:, :bits]  # (m, bits)
    return used.ravel()[: -(-codes.size * bits // 8)]


def unpack(packed, bits, n):
    """The `n` codes (uint8) that `pack` made these bytes of."""
    words = np.zeros((-(-n // 8), 8), np.uint8)
    words[:, :bits] = np.pad(packed, (0, len(words) * bits - packed.size)).reshape(-1, bits)
    codes = words.view("<u8") >> _places(bits) & np.uint64((1 << bits) - 1)  # (m, 1) -> (m, 8)
    return codes.astype(np.uint8).ravel()[:n]


def _places(bits):
    return np.arange(0, 8 * bits, bits, dtype="<u8")


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

    Returns:
        Levels, increasing, float64 (k,), or fewer if `w` holds fewer different numbers.

    Source: Han et al. 2016, arXiv 1510.00149, section 3; Lloyd 1982.
    """
    w = np.sort(np.asarray(w, np.float64), axis=None)
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
    """The index of the level nearest each number of `x`, of two equally near the lower: uint8."""
    middle = ((levels[1:] + levels[:-1]) / 2).astype(x.dtype)
    return np.searchsorted(middle, x).astype(np.uint8)


def level_set(bits, kind, levels):
    """The levels of a codebook, or None for a uniform grid."""
    if kind == "nf4":
        return nf4_levels()
    if kind == "symmetric" and bits == 1:
        return np.array([-1.0, 1.0])
    return levels


# ------------------------------------------------------------------ there and back


def block_size(shape, block):
    """How many weights share a scale."""
    n = int(np.prod(shape))
    return {None: n, "row": n // shape[0]}.get(block) or min(block, n)


def _scales(flat, size, bits, kind):
    """(scale, zero) for each block, float32 (blocks,); zero is None but for affine."""
    starts = np.arange(0, flat.size, size)  # `reduceat` takes a short last block as it comes
    if kind == "affine":
        zero = np.minimum.reduceat(flat, starts).astype(np.float32)
        scale = (np.maximum.reduceat(flat, starts) - zero) / ((1 << bits) - 1)
        return np.maximum(scale, TINY).astype(np.float32), zero
    size_of = np.abs(flat, dtype=np.float64)
    if kind == "symmetric" and bits == 1:
        count = np.diff(np.append(starts, flat.size))
        return (np.add.reduceat(size_of, starts) / count).astype(np.float32), None
    scale = np.maximum.reduceat(size_of, starts)
    if kind == "symmetric":
        scale /= (1 << bits - 1) - 1
    return np.maximum(scale, TINY).astype(np.float32), None


def _middle(bits, kind):
    """The code of zero in a uniform grid."""
    return 0 if kind == "affine" else (1 << bits - 1) - 1


def round_codes(x, bits, kind, levels):
    """The codes (uint8) of the levels nearest to `x`, weights over their scales."""
    found = level_set(bits, kind, levels)
    if found is not None:
        return nearest(x, found)
    middle = _middle(bits, kind)
    top = 2 * middle or (1 << bits) - 1
    return np.clip(x + (middle + 0.5), 0, top).astype(np.uint8)  # the cast cuts the fraction off


def quantise(w, bits=4, *, block=64, kind="symmetric", double=False, levels=None):
    """Round weights to a few levels a block, and pack their codes.

    Args:
        w: float32 or float64 weights, of any shape with an axis.
        bits: of a code, from 1 to 8.
        block: how many weights, in row-major order, share a scale (the last block may be
            short); `"row"` for one scale per output channel, `None` for one in all.
        kind: `"symmetric"`: w ≈ scale · q, q from −(2^(bits−1) − 1) to 2^(bits−1) − 1, with
            scale = max|w| over the latter; for 1 bit, w ≈ ±mean|w|, which on Gaussian weights
            has a smaller error than the three levels that 2 bits leave.
            `"affine"`: w ≈ zero + scale · q, q from 0 to 2^bits − 1, zero = min w.
            `"nf4"`: w ≈ max|w| · level, of the 16 levels of `nf4_levels`.
            `"levels"`: w ≈ max|w| · level, of those in `levels`, 1 to 2^bits of them, increasing.
        double: quantise the scales too, to 8 bits in groups of 256, around their mean: .127 bits
            a weight for blocks of 64, not .5. A scale far below its group's largest may
            become zero.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; for 1 bit, Rastegari et al. 2016,
    arXiv 1603.05279, section 3.1.
    """
    if bits not in range(1, 9) or kind not in KINDS or (kind == "nf4" and bits != 4):
        raise ValueError(
            f"bits is {bits!r} and kind {kind!r}; expected 1 to 8 (4 for nf4), {KINDS}"
        )
    if not np.isfinite(w).all():
        raise ValueError("w is not finite; expected finite weights")
    levels = None if levels is None else np.asarray(levels, np.float32)
    flat = w.reshape(-1)
    scale, zero = _scales(flat, block_size(w.shape, block), bits, kind)
    q = Quantised(
        None,
        scale,
        w.shape,
        int(bits),
        block if block in (None, "row") else int(block),
        kind,
        zero,
        levels,
    )
    if double:
        mean = np.array([scale.mean(dtype=np.float64)], np.float32)
        q = q._replace(scale=quantise(scale - mean, 8, block=256), mean=mean)
    x = flat if zero is None else flat - q.spread(zero)
    x = x * q.spread(1 / np.maximum(q.scales().astype(w.dtype), TINY))
    return q._replace(packed=pack(round_codes(x, bits, kind, levels), bits))


def dequantise(q, dtype=np.float32):
    """The weights that a `Quantised` stands for, an array of its shape."""
    codes = unpack(q.packed, q.bits, int(np.prod(q.shape)))
    levels, middle = level_set(q.bits, q.kind, q.levels), _middle(q.bits, q.kind)
    w = codes.astype(dtype) - middle if levels is None else levels.astype(dtype)[codes]
    w *= q.spread(q.scales().astype(dtype))
    if q.zero is not None:
        w += q.spread(q.zero.astype(dtype))
    return w.reshape(q.shape)


def kmeans(w, bits=4, *, block=None, iterations=30):
    """Quantise to 2^bits levels that k-means finds in the weights themselves, one set for all.

    Source: Han et al. 2016, arXiv 1510.00149, section 3.
    """
    q = quantise(w, bits, block=block, kind="levels", levels=[0.0])  # for its scales
    x = w.reshape(-1) / q.spread(q.scale)
    levels = np.unique(kmeans_levels(x, 1 << bits, iterations).astype(np.float32))
    return quantise(w, bits, block=block, kind="levels", levels=levels)


def gptq(w, gram, bits=4, *, block=64, kind="symmetric", double=False, damping=0.01):
    """Round a weight column by column, each column making up for the errors before it.

    What rounding column j does wrong is spread over the columns still to come, so that the
    error on the data, the mean tr(E C Eᵀ) of ‖(W − Ŵ) x‖², is as small as they can make it.
    With C + λI = R Rᵀ, R upper triangular, row j of R⁻¹ says how. The scales are those that
    `quantise` gives, and so are the bytes. It helps where features are correlated and the grid
    leaves room to make up for an error; with 1 bit it may do harm.

    Args:
        w: (d_out, d_in), float32 or float64.
        gram: C (d_in, d_in), the mean of x xᵀ over inputs, as `observe` finds it.
        bits, block, kind, double: as for `quantise`; a whole `block` must divide d_in.
        damping: λ over the mean of C's diagonal.

    Source: Frantar et al. 2022, arXiv 2210.17323, section 3.
    """
    q, (d_out, d_in) = quantise(w, bits, block=block, kind=kind, double=double), w.shape
    if block_size(w.shape, block) not in (w.size, d_in) and d_in % block:
        raise ValueError(f"block is {block}; expected a divisor of d_in = {d_in}, 'row' or None")
    damped = gram + (damping * np.mean(np.diag(gram)) if gram.any() else 1) * np.eye(d_in)
    # The Cholesky form from the last row up, by turning the matrix round twice.
    spread = np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1])  # R⁻¹
    spread /= np.diag(spread)[:, None].copy()  # row j: how column j's error falls on the rest

    scale = q.spread(q.scales().astype(w.dtype)).reshape(w.shape).T  # (d_in, d_out)
    zero = 0 * scale if q.zero is None else q.spread(q.zero.astype(w.dtype)).reshape(w.shape).T
    levels, middle = level_set(bits, kind, None), _middle(bits, kind)
    columns = w.T.astype(np.float64, order="C")  # (d_in, d_out), so that a column lies together
    codes = np.empty((d_in, d_out), np.uint8)
    for j in range(d_in):
        x = (columns[j].astype(w.dtype) - zero[j]) / np.maximum(scale[j], TINY)  # (d_out,)
        codes[j] = round_codes(x, bits, kind, None)
        level = codes[j] - np.float64(middle) if levels is None else levels[codes[j]]
        columns[j + 1 :] -= spread[j, j + 1 :, None] * (columns[j] - level * scale[j] - zero[j])
    return q._replace(packed=pack(codes.T.ravel(), bits))
