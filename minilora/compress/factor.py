"""Approximation of one weight: a product of two thin matrices.

Everything is computed in float64 and handed back in the dtype that came in.
"""

import numpy as np

from ..peft.lora import check_rank

_DAMPING = 1e-6  # over the mean of C's diagonal: far above rounding, far below what data shows


def _left(w, r):
    """The r leading left singular vectors of (m, n), r ≤ m: orthonormal, (m, r)."""
    return np.linalg.svd(w, full_matrices=w.shape[0] > w.shape[1])[0][:, :r]


def truncated_svd(w, r):
    """The nearest matrix of rank r, as a product: w ≈ left @ right, (m, r) and (r, n).

    The error is √(σ²_{r+1} + …) in the Frobenius norm and σ_{r+1} in the spectral norm, and no
    other matrix of rank r has a smaller one. Each side takes the root of the singular values,
    so that both learn at the same pace afterwards.

    Source: Eckart & Young 1936; Mirsky 1960 for the spectral norm.
    """
    check_rank(r, w.shape)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:r])
    return (u[:, :r] * root).astype(w.dtype), (root[:, None] * vt[:r]).astype(w.dtype)


def root_of(gram):
    """S (d, d) with S Sᵀ = C, a little damped so that there is one."""
    damping = _DAMPING * np.mean(np.diagonal(gram)) if gram.any() else 1.0
    return np.linalg.cholesky(gram + damping * np.eye(len(gram)))


def weighted_svd(w, gram, r):
    """The matrix of rank r that does least harm to the outputs: w ≈ left @ right.

    It has the least tr(E C Eᵀ), the mean of ‖E x‖² with E = w − left @ right; what no input
    excites hardly counts. With C = S Sᵀ that is ‖E S‖², so W S is what must be truncated.

    Args:
        w: (d_out, d_in). gram: C (d_in, d_in), the mean of x xᵀ, as `observe` finds it.
        r: the rank, from 1 to min(d_out, d_in).

    Source: Wang et al. 2024, arXiv 2403.07378, section 3.1.
    """
    check_rank(r, w.shape)
    u = _left(w @ root_of(gram), r)  # (d_out, r)
    # W S cut at r is U Uᵀ W S, so S⁻¹ takes S off again and nothing need be solved
    left, right = truncated_svd(u.T @ w.astype(np.float64), r)  # (r, d_in) -> (r, r), (r, d_in)
    return (u @ left).astype(w.dtype), right.astype(w.dtype)


def rank_for_energy(w, energy):
    """The smallest r at which truncation keeps this share (0, 1] of the sum of squares, Σσ²."""
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    kept = np.cumsum((s / (s[0] or 1)) ** 2)  # over the largest, so that no square overflows
    return int(np.searchsorted(kept, energy * kept[-1])) + 1


def rank_for_budget(shape, numbers):
    """The largest r for which left (m, r) and right (r, n) hold no more than `numbers`."""
    if numbers < sum(shape):
        raise ValueError(f"numbers is {numbers!r}; expected {sum(shape)} or more, which is rank 1")
    return int(min(numbers // sum(shape), *shape))
