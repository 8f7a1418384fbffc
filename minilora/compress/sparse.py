"""Sparse arrays in the forms that a file can hold: a bitmap, or a list of places."""

import numpy as np

from ..peft.lora import is_whole


def to_bitmap(w):
    """A bit for each weight, set where it is not zero, and the weights that are not.

    Args:
        w: an array of n numbers, in any shape and dtype.

    Returns:
        bits, uint8 (⌈n / 8⌉,), the first weight in the highest bit, as `np.packbits` does; and
        values (nnz,) in the dtype of `w`. Nothing is lost but the sign of -0.0.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    return np.packbits(flat != 0), flat[flat != 0]


def from_bitmap(bits, values, shape):
    """The array of this shape that `to_bitmap` packed.

    Raises:
        ValueError: if bits, values and shape do not fit one another.
    """
    n, bits, values = int(np.prod(shape)), np.asarray(bits), np.asarray(values)
    if bits.dtype != np.uint8 or bits.shape != (-(-n // 8),):
        raise ValueError(f"bits is {bits.dtype} {bits.shape}; expected uint8 {(-(-n // 8),)}")
    on = np.unpackbits(bits).astype(bool)  # (⌈n / 8⌉,) -> (8 ⌈n / 8⌉,)
    if values.shape != (on.sum(),) or on[n:].any():
        raise ValueError(f"values has shape {values.shape}; expected one for each bit that is set")
    w = np.zeros(n, values.dtype)
    w[on[:n]] = values
    return w.reshape(shape)


def to_indices(w):
    """The places of the weights that are not zero, and those weights.

    Args:
        w: an array of n numbers, in any shape and dtype.

    Returns:
        indices (nnz,), where they stand in the flattened array, rising, in the smallest unsigned
        dtype that holds n - 1; and values (nnz,) in the dtype of `w`. With indices of 16 bits
        this is smaller than a bitmap if fewer than one weight in 16 is left.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    at = np.flatnonzero(flat)  # (nnz,)
    return at.astype(np.min_scalar_type(max(flat.size - 1, 0))), flat[at]


def from_indices(indices, values, shape):
    """The array of this shape that `to_indices` packed.

    Raises:
        ValueError: if indices, values and shape do not fit one another.
    """
    n, indices, values = int(np.prod(shape)), np.asarray(indices), np.asarray(values)
    if indices.dtype.kind != "u" or indices.ndim != 1 or values.shape != indices.shape:
        raise ValueError(
            f"indices is {indices.dtype} {indices.shape}, values {values.shape}; expected unsigned "
            "integers, one for each value"
        )
    at = indices.astype(np.int64)
    if (np.diff(at) <= 0).any() or (at >= n).any():
        raise ValueError(f"indices do not rise or pass {n - 1}; expected places in shape {shape}")
    w = np.zeros(n, values.dtype)
    w[at] = values
    return w.reshape(shape)


def break_even_sparsity(bits):
    """The share of zeros beyond which a bitmap is smaller than the dense array: 1 / bits.

    The bitmap costs a bit for every weight, and each zero saves `bits`.

    Args:
        bits: of one weight, such as 32.

    Raises:
        ValueError: if it is not a whole number from 1.
    """
    if not is_whole(bits) or bits < 1:
        raise ValueError(f"bits is {bits!r}; expected a whole number from 1")
    return 1 / bits
