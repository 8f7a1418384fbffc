"""Quantisation: weights as a few bits each, and the scales that give them their size back.

How it goes: the weights are cut into blocks, each block is divided by its scale, each quotient
becomes the code of the level nearest to it, and the codes are packed. `dequantise` goes back.
All of it is done in float64, so that a float32 model and its float64 copy have the same codes.
"""

from functools import cache
from math import prod
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from .factor import make_up

KINDS = ("symmetric", "affine", "nf4", "levels", "mxfp4", "nvfp4")
TINY = float(np.finfo(np.float32).tiny)  # the smallest step: a block of zeros needs no care
LIMIT = float(np.finfo(np.float32).max) / 4  # above any weight: no scale or zero overflows


class Quantised(NamedTuple):
    """Packed codes and what restores them. `quantise` makes one and `dequantise` reads it."""

    packed: np.ndarray  # uint8, ceil(n · bits / 8)
    # float32, one a block; with double quantisation a Quantised of (scale − mean); for FP4 uint8
    scale: Any
    shape: tuple  # of the weights
    bits: int
    block: Any  # None, "row" or how many weights
    kind: str  # one of KINDS
    zero: Any = None  # affine: what code 0 stands for in each block, float32 or a Quantised of it
    levels: Any = None  # a codebook: float32, increasing
    mean: Any = None  # float32 (1,); double quantisation: the mean scale; NVFP4: that of all

    def settings(self):
        """The settings of `quantise` that gave this, but for a codebook's levels."""
        double = isinstance(self.scale, Quantised)
        return {"bits": self.bits, "block": self.block, "kind": self.kind, "double": double}

    def arrays(self, prefix=""):
        """All arrays by name, for a file: codes, scale (with double, scale.codes …), zero …"""
        found = {f"{prefix}codes": self.packed}
        for name in ("scale", "zero", "levels", "mean"):
            part = getattr(self, name)
            if isinstance(part, Quantised):
                found |= part.arrays(f"{prefix}{name}.")
            elif part is not None:
                found[prefix + name] = part
        return found

    def filled(self, arrays, prefix=""):
        """The same with other arrays, by the names that `arrays` gives them."""
        parts = {"packed": arrays[f"{prefix}codes"]}
        for name in ("scale", "zero", "levels", "mean"):
            parts[name], part = arrays.get(prefix + name), getattr(self, name)
            if isinstance(part, Quantised):
                parts[name] = part.filled(arrays, f"{prefix}{name}.")
        return self._replace(**parts)

    @property
    def nbytes(self):
        """The bytes of everything stored: codes, scales, zeros, levels."""
        return sum(a.nbytes for a in self.arrays().values())

    @property
    def bits_per_weight(self):
        """8 · nbytes over the number of weights."""
        return 8 * self.nbytes / prod(self.shape)

    def scales(self):
        """One scale for each block, float32 (blocks,): for uniform kinds, the step."""
        if isinstance(self.scale, Quantised):
            return np.maximum(dequantise(self.scale) + self.mean, 0)
        if self.scale.dtype == np.uint8:  # FP8: no mantissa, or three bits of it
            scale = (E8M0 if self.mean is None else E4M3).take(self.scale, mode="clip")
            return scale if self.mean is None else scale * self.mean
        return self.scale

    def zeros(self):
        """What code 0 stands for in each block, float32 (blocks,), or None."""
        return dequantise(self.zero) if isinstance(self.zero, Quantised) else self.zero

    def spread(self, each):
        """A number for each block, (blocks,), as one for each weight, in the weights' shape."""
        size = block_size(self.shape, self.block)
        return np.repeat(each, size)[: prod(self.shape)].reshape(self.shape)


# ------------------------------------------------------------------ packing


def pack(codes, bits):
    """Codes from 0 to 2^bits − 1 as a string of bits, the first code in the lowest bits: uint8.

    Eight codes make one 64-bit word, of which `bits` bytes are left.
    """
    codes = np.asarray(codes).ravel().astype(np.uint8)
    lanes = np.pad(codes, (0, -codes.size % 8)).reshape(-1, 8)  # (n,) -> (m, 8)
    words = sum(lanes[:, i].astype("<u8") << np.uint64(i * bits) for i in range(8))  # (m,)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :bits]  # (m, 8) -> (m, bits)
    return packed.ravel()[: -(-codes.size * bits // 8)]


def unpack(packed, bits, n):
    """The `n` codes (uint8) that `pack` made these bytes of."""
    if bits == 8:
        return packed[:n]
    if bits == 4:  # the usual case, in words of two codes: the upper one moves to its own byte
        words = packed.astype("<u2")
        words |= words << 4
        words &= 0x0F0F
        return words.view(np.uint8)[:n]
    words = np.zeros((-(-n // 8), 8), np.uint8)
    words[:, :bits] = np.pad(packed, (0, len(words) * bits - packed.size)).reshape(-1, bits)
    lanes = words.view("<u8") >> np.arange(0, 8 * bits, bits, dtype="<u8")  # (m, 1) -> (m, 8)
    return (lanes & np.uint64((1 << bits) - 1)).astype(np.uint8).ravel()[:n]


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


def small_floats(exponent, mantissa):
    """The floats without a sign of so many bits, in the order of their codes, float64.

    With a mantissa the lowest exponent is that of the numbers below normal, zero among them.

    Source: Micikevicius et al. 2022, arXiv 2209.05433; Rouhani et al. 2023, arXiv 2310.10537.
    """
    e, m = np.divmod(np.arange(1 << exponent + mantissa), 1 << mantissa)
    low = (e == 0) & (mantissa > 0)
    power = np.where(low, 1, e) - float((1 << exponent - 1) - 1)
    return (m / (1 << mantissa) + ~low) * 2**power


# Two kinds of FP8, for scales; the last code of each is not a number.
E8M0, E4M3 = (small_floats(*bits)[:-1].astype(np.float32) for bits in ((8, 0), (4, 3)))


def kmeans_levels(w, k, iterations=30):
    """The `k` levels that lie nearest the weights: Lloyd's algorithm in one dimension.

    With the weights sorted, a cluster is a run of them, found by its ends and averaged from
    cumulative sums. It starts at the quantiles, and an empty cluster keeps its level. Levels come
    increasing, float64 (k,), or fewer if `w` holds fewer different numbers.

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
        levels = np.sort(np.where(sizes > 0, means, levels))
    return np.unique(levels)


def level_set(bits, kind, levels=None):
    """What the codes stand for, in units of the scale, and over the zero: increasing, float64."""
    if kind == "symmetric":
        top = (1 << bits - 1) - 1
        return np.arange(-top, top + 1.0) if top else np.array([-1.0, 1.0])
    if kind == "affine":
        return np.arange(float(1 << bits))
    if kind in ("mxfp4", "nvfp4"):
        positive = small_floats(2, 1)
        return np.concatenate([-positive[:0:-1], positive])  # 0, .5, 1, 1.5, 2, 3, 4, 6
    return nf4_levels() if kind == "nf4" else levels.astype(np.float64)


def nearest(x, levels):
    """The index of the level nearest each number of `x`, uint8; halfway, that of either."""
    if (np.diff(levels) == 1).all():  # a uniform grid
        x = x - levels[0]
        return np.clip(np.rint(x, out=x), 0, len(levels) - 1, out=x).astype(np.uint8)
    codes = np.zeros(x.shape, np.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:  # for a few levels faster than a search
        codes += x > middle
    return codes


# ------------------------------------------------------------------ there and back


def block_size(shape, block):
    """How many weights share a scale."""
    if block in (None, "row"):
        return prod(shape[1:]) if block else prod(shape)
    if not (block >= 1 and block % 1 == 0):
        raise ValueError(f"block is {block!r}; expected None, 'row' or a whole number from 1")
    return min(int(block), prod(shape))


def _scales(w, starts, bits, kind, top):
    """(scale, zero) of the blocks of w (n,), float32 (blocks,); zero is None but for affine."""
    most, zero = np.maximum.reduceat(w if kind == "affine" else np.abs(w), starts), None
    if kind == "affine":
        zero = np.minimum.reduceat(w, starts).astype(np.float32)
        most = most - zero
    scale = most / top
    if kind == "mxfp4":  # the power of two of which `most` is from 4 to 8, though 6 is the top
        scale = np.ldexp(1.0, np.frexp(most)[1] - 3)
    if kind == "symmetric" and bits == 1:  # no grid: zeros must stay zeros
        scale = np.add.reduceat(np.abs(w), starts) / np.diff(starts, append=w.size)
        return scale.astype(np.float32), None
    return np.maximum(scale, TINY).astype(np.float32), zero


def _coded(q, w, grid):
    """The same with the codes of the weights w, float64."""
    x = w if q.zero is None else w - q.spread(q.zeros())
    x = x * q.spread(1 / np.maximum(q.scales().astype(np.float64), TINY))
    return q._replace(packed=pack(nearest(x, grid), q.bits))


def _clipped(q, w, grid, starts):
    """The same, each block's range cut, around its middle, to the share that errs least."""
    best, least = q, np.inf
    for share in (1, 2, 0.5) if q.kind == "mxfp4" else np.linspace(1, 0.3, 15):
        cut = None if q.zero is None else q.zero + q.scale * np.float32((1 - share) / 2 * grid[-1])
        tried = _coded(q._replace(scale=q.scale * np.float32(share), zero=cut), w, grid)
        errors = np.square(dequantise(tried, np.float64) - w).reshape(-1)
        errors = np.add.reduceat(errors, starts)  # (n,) -> (blocks,)
        scale = np.where(errors < least, tried.scale, best.scale)
        zero = None if q.zero is None else np.where(errors < least, cut, best.zero)
        best, least = q._replace(scale=scale, zero=zero), np.minimum(errors, least)
    return best


def quantise(w, bits=4, *, block=64, kind="symmetric", double=False, clip=False, levels=None):
    """Round weights to a few levels a block, and pack their codes.

    Args:
        w: weights, of any shape with an axis.
        bits: of a code, from 1 to 8.
        block: how many weights, in row-major order, share a scale (the last block may be
            short); `"row"` for one scale per output channel, `None` for one in all.
        kind: `"symmetric"`: w ≈ scale · q, q from −(2^(bits−1) − 1) to 2^(bits−1) − 1, with
            scale = max|w| over the latter; for 1 bit, w ≈ ±mean|w|, which on Gaussian weights
            has a smaller error than the three levels that 2 bits leave.
            `"affine"`: w ≈ zero + scale · q, q from 0 to 2^bits − 1, zero = min w.
            `"nf4"`: w ≈ max|w| · level, of the 16 levels of `nf4_levels`.
            `"mxfp4"`, `"nvfp4"`: w ≈ scale · level, of 0, ±.5, ±1, ±1.5, ±2, ±3, ±4 and ±6; a
            scale is 8 bits: a power of two, its blocks 32 in the standard, or a float with 3
            bits of mantissa over one for all, its blocks 16.
            `"levels"`: w ≈ max|w| · level, of those in `levels`.
        double: quantise the scales too, to 8 bits in groups of 256, around their mean: .127 bits
            a weight for blocks of 64, not .5. A scale far below its group's largest may
            become zero. Zeros likewise, between the ends of each group.
        clip: make each block's range as small as makes the squared error least: the largest
            weights err more, and all others less. At 4 bits and fewer it pays.
        levels: increasing, 1 to 2^bits of them, in units of max|w|; only for kind `"levels"`.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; for 1 bit, Rastegari et al. 2016,
    arXiv 1603.05279, section 3.1.
    """
    if bits not in range(1, 9) or kind not in KINDS or (kind[-1] == "4" and bits != 4):
        raise ValueError(f"bits is {bits!r}, kind {kind!r}; expected 1 to 8 (4 for …4), {KINDS}")
    bits, levels = int(bits), None if levels is None else np.asarray(levels, np.float32)
    fits = levels is None or (0 < levels.size <= 1 << bits and (np.diff(levels) > 0).all())
    if not fits or (levels is None) == (kind == "levels"):
        raise ValueError(f"levels is {levels}; expected up to {1 << bits}, rising, or another kind")
    if not max(w.max(), -w.min()) < LIMIT:
        raise ValueError(f"w is not finite and below {LIMIT:.1e}; expected weights")
    w, size, grid = w.astype(np.float64), block_size(w.shape, block), level_set(bits, kind, levels)
    starts, top = np.arange(0, w.size, size), 1 if kind == "levels" else grid[-1]
    scale, zero = _scales(w.reshape(-1), starts, bits, kind, top)
    block = block if block in (None, "row") else int(block)  # JSON takes no NumPy integer
    q = Quantised(None, scale, w.shape, bits, block, kind, zero, levels)
    q = _clipped(q, w, grid, starts) if clip else q
    if double:
        mean = q.scale.mean(keepdims=True, dtype=np.float64).astype(np.float32)
        zero = None if zero is None else quantise(q.zero, 8, block=256, kind="affine")
        q = q._replace(scale=quantise(q.scale - mean, 8, block=256), mean=mean, zero=zero)
    elif kind == "mxfp4":
        q = q._replace(scale=(np.frexp(q.scale)[1] + 126).astype(np.uint8))  # 2^k -> k + 127
    elif kind == "nvfp4":
        mean = np.maximum(q.scale.max(keepdims=True) / E4M3[-1], np.float32(TINY))
        q = q._replace(scale=nearest(q.scale / mean, E4M3), mean=mean)
    return _coded(q, w, grid)


def dequantise(q, dtype=np.float32):
    """The weights that a `Quantised` stands for, an array of its shape."""
    n, size = prod(q.shape), block_size(q.shape, q.block)
    levels = level_set(q.bits, q.kind, q.levels).astype(dtype)
    # No code is taken to be higher than its kind allows, whatever a file may hold.
    if q.kind == "affine":  # the levels are the codes themselves
        w = unpack(q.packed, q.bits, n).astype(dtype)
    elif 8 % q.bits:
        w = levels.take(unpack(q.packed, q.bits, n), mode="clip")
    else:  # a byte holds whole codes: all that it may stand for is looked up at once
        each = unpack(np.arange(256, dtype=np.uint8), q.bits, 256 * 8 // q.bits)
        table = levels.take(each, mode="clip").reshape(256, -1)  # (256, 8 / bits)
        w = table.take(q.packed, axis=0).reshape(-1)[:n]
    parts = [p.astype(dtype, copy=False) for p in (q.scales(), q.zeros()) if p is not None]
    if n % size:  # the last block is short
        parts = [q.spread(part).reshape(-1) for part in parts]
    else:
        w, parts = w.reshape(-1, size), [part[:, None] for part in parts]  # (blocks, size)
    w *= parts[0]
    for zero in parts[1:]:
        w += zero
    return w.reshape(q.shape)


def kmeans(w, bits=4, *, block=None, iterations=30):
    """Quantise to 2^bits levels that k-means finds in the weights themselves, one set for all.

    Source: Han et al. 2016, arXiv 1510.00149, section 3.
    """
    q = quantise(w, bits, block=block, kind="levels", levels=[0.0])  # for its scales
    x = w.astype(np.float64) / q.spread(q.scale)
    levels = np.unique(kmeans_levels(x, 1 << bits, iterations).astype(np.float32))
    return quantise(w, bits, block=block, kind="levels", levels=levels)


# ------------------------------------------------------------------ rounding by the data


def gptq(w, gram, bits=4, *, block=64, damping=0.01, act_order=False, **settings):
    """Round a weight column by column, each column making up for the errors before it.

    By `make_up`: what rounding one column does wrong is spread over the columns still to come.
    The scales are those that `quantise` gives, and so are the bytes. It helps where features are
    correlated and the grid leaves room to make up for an error; with 1 bit it may do harm.

    Args:
        bits, block, settings: as for `quantise`.
        damping: as for `make_up`.
        act_order: go over the features from the loudest, E[x_j²], to the faintest: those that
            count most are rounded while most others can still make up for them.

    Source: Frantar et al. 2022, arXiv 2210.17323.
    """
    q, order = quantise(w, bits, block=block, **settings), np.arange(w.shape[1])
    grid, codes = level_set(q.bits, q.kind, q.levels), np.empty(w.shape, np.uint8)
    scale = q.spread(q.scales().astype(np.float64))  # (d_out, d_in)
    zero = np.zeros(w.shape) if q.zero is None else q.spread(q.zeros())
    if act_order:
        order = np.argsort(-np.diagonal(gram), kind="stable")

    def settle(j, rest, u):
        k = order[j]
        codes[:, k] = nearest((rest[j] - zero[:, k]) * (1 / np.maximum(scale[:, k], TINY)), grid)
        return grid[codes[:, k]] * scale[:, k] + zero[:, k]

    make_up(w[:, order], gram[np.ix_(order, order)], settle, damping)
    return q._replace(packed=pack(codes, bits))
