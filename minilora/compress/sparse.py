"""Sparse arrays in the forms that a file can hold: a bitmap, or a list of places."""

import math

import numpy as np


def to_bitmap(w):
    """A bit for each of n weights, set where it is not zero, uint8 (⌈n / 8⌉,), and those weights.

    The first weight is in the highest bit, as `np.packbits` does. Only the sign of -0.0 is lost.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    return np.packbits(flat != 0), flat[flat != 0]


def from_bitmap(bits, values, shape):
    """The array of this shape that `to_bitmap` packed."""
    if math.prod(shape) > 8 * bits.size or bits.size * 8 - 7 > math.prod(shape):
        raise ValueError(f"{bits.size} bytes of bits for shape {shape}; expected a bit a weight")
    w = np.zeros(shape, values.dtype)
    w[np.unpackbits(bits, count=w.size).astype(bool).reshape(shape)] = values
    return w


def to_indices(w):
    """Where the weights that are not zero stand in the flattened array, and those weights.

    Places have the smallest unsigned dtype that holds n - 1. With 16 bits this is smaller than a
    bitmap if fewer than one weight in 16 is left.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    at = np.flatnonzero(flat)  # (nnz,)
    return at.astype(np.min_scalar_type(max(flat.size - 1, 0))), flat[at]


def from_indices(indices, values, shape):
    """The array of this shape that `to_indices` packed."""
    w = np.zeros(int(np.prod(shape)), values.dtype)
    w[indices] = values
    return w.reshape(shape)


def break_even_sparsity(bits):
    """The share of zeros beyond which a bitmap is smaller than the dense array: 1 / bits.

    The bitmap costs a bit for every weight, and each zero saves the `bits` of one.
    """
    return 1 / bits
