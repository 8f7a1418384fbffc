"""Quantisation: weights as a few bits each, and the scales that give them their size back.

How it goes: the weights are cut into blocks, each block is divided by its scale, each quotient
becomes the code of a level near it, and the codes are packed. `dequantise` goes back.
"""

from typing import Any, NamedTuple

import numpy as np

from ..peft.lora import is_whole
from .levels import check_bits, kmeans_levels, nearest, nf4_levels, squeeze, unpack

KINDS = ("symmetric", "affine", "nf4", "levels")
_CHUNK = 1 << 16  # weights worked on at a time, so that what is made of them stays in the cache
TINY = np.finfo(np.float32).tiny


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

    @property
    def nbytes(self):
        """The bytes of everything stored: codes, scales, zeros, levels."""
        stored = (self.packed, self.scale, self.zero, self.levels, self.mean)
        return sum(part.nbytes for part in stored if part is not None)

    @property
    def bits_per_weight(self):
        """8 · nbytes over the number of weights."""
        return 8 * self.nbytes / np.prod(self.shape)

    def scales(self):
        """One scale for each block, float32 (blocks,): for uniform kinds, the step."""
        if self.mean is None:
            return self.scale
        return np.maximum(dequantise(self.scale) + self.mean, 0)

    def arrays(self):
        """All arrays by name, for a file: codes, scale (with double, scale.codes …), zero …"""
        found = {"codes": self.packed}
        if self.mean is None:
            found["scale"] = self.scale
        else:
            found |= {f"scale.{name}": array for name, array in self.scale.arrays().items()}
        extra = {"zero": self.zero, "levels": self.levels, "mean": self.mean}
        return found | {name: array for name, array in extra.items() if array is not None}


# ------------------------------------------------------------------ blocks


def block_size(shape, block):
    """How many weights share a scale."""
    n = int(np.prod(shape))
    if block is None:
        return n
    if isinstance(block, str) and block == "row":
        return n // shape[0]
    if not is_whole(block) or block < 1:
        raise ValueError(f"block is {block!r}; expected None, 'row' or a whole number from 1")
    return min(int(block), n)


def _reduce(function, flat, size):
    """`function` of each block, the last of which may be short: (n,) -> (blocks,)."""
    whole = flat.size // size * size
    found = function(flat[:whole].reshape(-1, size), axis=1)
    if whole == flat.size:
        return found
    return np.append(found, function(flat[whole:]))


def _apply(op, flat, each, size, out):
    """`op` between every block of `flat` (n,) and its own number of `each`, into `out` (n,)."""
    full = flat.size // size
    whole = full * size
    rows = flat[:whole].reshape(full, size)
    op(rows, each[:full, None], out=out[:whole].reshape(full, size))
    if whole < flat.size:
        op(flat[whole:], each[full], out=out[whole:])
    return out


def _chunks(n, size):
    """(slice of weights, slice of their blocks): whole blocks, and whole bytes of codes."""
    span = max(8, _CHUNK // size // 8 * 8) * size
    for start in range(0, n, span):
        stop = min(start + span, n)
        yield slice(start, stop), slice(start // size, -(-stop // size))


def check_weights(w):
    """`w` as a contiguous array of floats, or an error."""
    w = np.asarray(w)
    if w.dtype not in (np.float32, np.float64):
        raise TypeError(f"w has dtype {w.dtype}; expected float32 or float64")
    if w.ndim == 0 or not w.size:
        raise ValueError(f"w has shape {w.shape}; expected one weight or more")
    return np.ascontiguousarray(w)


# ------------------------------------------------------------------ formats


def level_set(bits, kind, levels):
    """The levels of a codebook, or None for a uniform grid."""
    if kind == "nf4":
        return nf4_levels()
    if kind == "symmetric" and bits == 1:
        return np.array([-1.0, 1.0])
    return levels


def _check_format(bits, kind, levels):
    bits = check_bits(bits)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}")
    if kind == "nf4" and bits != 4:
        raise ValueError(f"bits is {bits}; expected 4 for kind 'nf4'")
    if (kind == "levels") != (levels is not None):
        raise ValueError(f"kind is {kind!r} and levels {levels!r}; expected both or neither")
    if levels is not None:
        levels = np.asarray(levels, np.float32)
        rising = levels.ndim == 1 and np.isfinite(levels).all() and (np.diff(levels) > 0).all()
        if not rising or not 1 <= levels.size <= 1 << bits:
            raise ValueError(
                f"levels is {levels}; expected 1 to {1 << bits} finite numbers, increasing"
            )
    return bits, levels


def _scales(flat, size, bits, kind):
    """(scale, zero) for each block, float32 (blocks,); zero is None but for affine."""
    blocks = -(-flat.size // size)
    scale = np.empty(blocks, np.float64)
    zero = np.empty(blocks, np.float64) if kind == "affine" else None
    for part, own in _chunks(flat.size, size):
        w = flat[part]
        if kind == "affine":
            zero[own] = _reduce(np.min, w, size)
            scale[own] = _reduce(np.max, w, size)
        elif kind == "symmetric" and bits == 1:
            scale[own] = _reduce(np.mean, np.abs(w, dtype=np.float64), size)
        else:
            scale[own] = _reduce(np.max, np.abs(w), size)
    limit = np.finfo(np.float32).max / 4
    if not all((np.abs(each) < limit).all() for each in (scale, zero) if each is not None):
        raise ValueError(f"w is not finite, or above {limit:.1e}; expected finite weights")
    if kind == "affine":
        zero = zero.astype(np.float32)
        scale = (scale - zero) / ((1 << bits) - 1)
    elif kind == "symmetric" and bits == 1:
        return scale.astype(np.float32), None  # no grid and no division: zeros must stay zeros
    elif kind == "symmetric":
        scale /= (1 << bits - 1) - 1
    # Not below the smallest normal number: then 1 / scale is finite, and zeros need no care.
    return np.maximum(scale, TINY).astype(np.float32), zero


def _double(scale):
    """Scales as 8-bit codes around their mean: QLoRA's double quantisation."""
    mean = np.array([scale.mean(dtype=np.float64)], np.float32)
    return quantise(scale - mean, 8, block=256), mean


def round_codes(x, bits, kind, levels):
    """The codes (uint8) of the levels nearest to `x`, weights over their scales; spoils `x`."""
    found = level_set(bits, kind, levels)
    if found is not None:
        return nearest(x, found)
    middle = (1 << bits - 1) - 1  # the code of zero
    x += 0.5 if kind == "affine" else middle + 0.5  # the cast below cuts the fraction off
    np.clip(x, 0, (1 << bits) - 1 if kind == "affine" else 2 * middle, out=x)
    return x.astype(np.uint8)


# ------------------------------------------------------------------ there and back


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
            `"levels"`: w ≈ max|w| · level, of those in `levels`.
        double: quantise the scales too, to 8 bits in groups of 256, around their mean: .127 bits
            a weight for blocks of 64, not .5. A scale far below its group's largest may
            become zero.
        levels: increasing, 1 to 2^bits of them, in units of max|w|; only for kind `"levels"`.

    Returns:
        A `Quantised`.

    Raises:
        ValueError: if `w` is empty or not finite, or a setting is out of range.
        TypeError: if `w` is neither float32 nor float64.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; for 1 bit, Rastegari et al. 2016,
    arXiv 1603.05279, section 3.1.
    """
    bits, levels = _check_format(bits, kind, levels)
    w = check_weights(w)
    flat, size = w.reshape(-1), block_size(w.shape, block)
    scale, zero = _scales(flat, size, bits, kind)
    packed = np.empty(-(-w.size * bits // 8), np.uint8)
    block = int(block) if is_whole(block) else block  # JSON takes no NumPy integer
    q = Quantised(packed, scale, w.shape, bits, block, kind, zero, levels)
    if double:
        scale, mean = _double(scale)
        q = q._replace(scale=scale, mean=mean)
    inverse = 1 / np.maximum(q.scales().astype(w.dtype), TINY)
    chunks = list(_chunks(w.size, size))
    room = np.empty(chunks[0][0].stop, w.dtype)  # one chunk, made once
    for part, own in chunks:
        x, here = flat[part], room[: part.stop - part.start]
        if zero is not None:
            x = _apply(np.subtract, x, zero[own], size, here)
        _apply(np.multiply, x, inverse[own], size, here)
        packed[part.start * bits // 8 : -(-part.stop * bits // 8)] = squeeze(
            round_codes(here, bits, kind, levels), bits
        )
    return q


def dequantise(q, dtype=np.float32):
    """The weights that a `Quantised` stands for, an array of its shape."""
    n = int(np.prod(q.shape))
    size = block_size(q.shape, q.block)
    codes = unpack(q.packed, q.bits, n)
    levels = level_set(q.bits, q.kind, q.levels)
    if levels is not None:
        w = levels.astype(dtype)[codes]
    else:
        w = codes.astype(dtype)
        if q.kind == "symmetric":
            w -= (1 << q.bits - 1) - 1
    _apply(np.multiply, w, q.scales().astype(dtype), size, w)
    if q.zero is not None:
        _apply(np.add, w, q.zero.astype(dtype), size, w)
    return w.reshape(q.shape)


def kmeans(w, bits=4, *, block=None, iterations=30):
    """Quantise to 2^bits levels that k-means finds in the weights themselves.

    Args:
        w, bits, block: as for `quantise`. The levels are shared by all blocks.
        iterations: as for `kmeans_levels`.

    Returns:
        A `Quantised` of kind `"levels"`.

    Source: Han et al. 2016, arXiv 1510.00149, section 3.
    """
    bits, w = check_bits(bits), check_weights(w)
    flat, size = w.reshape(-1), block_size(w.shape, block)
    scale, _ = _scales(flat, size, bits, "levels")
    x = _apply(np.divide, flat, scale, size, np.empty_like(flat))
    levels = np.unique(kmeans_levels(x, 1 << bits, iterations).astype(np.float32))
    return quantise(w, bits, block=block, kind="levels", levels=levels)
