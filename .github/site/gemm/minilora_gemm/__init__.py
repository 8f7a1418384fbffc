"""Matrix products for a browser, where NumPy has no BLAS: gemm.c, compiled with the site."""

import ctypes
from pathlib import Path

import numpy as np

_gemm = ctypes.CDLL(str(Path(__file__).parent / "gemm.so")).gemm
_gemm.argtypes, _gemm.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 4, None
WORTH = 20_000  # multiplications, below which the way to C takes longer


def matmul(a, b):
    """np.matmul, to the bit: fast for float64 and as many (…, m, k) as (…, k, n)."""
    *batch, m, k = a.shape
    fits = [*batch, k] == [*b.shape[:-1]] and a.dtype == b.dtype == np.float64
    if not fits or a.size * b.shape[-1] < WORTH:
        return np.matmul(a, b)
    c = np.empty((*batch, m, b.shape[-1]))
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    where = (x.__array_interface__["data"][0] for x in (a, b, c))
    _gemm(*where, c.size // (m * c.shape[-1]), m, k, c.shape[-1])
    return c
