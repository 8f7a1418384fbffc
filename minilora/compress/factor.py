"""Approximation of one weight: a product of two thin matrices.

Everything is computed in float64 and handed back in the dtype that came in.
"""

from numbers import Real

import numpy as np

from ..peft.lora import is_whole

_DAMPING = 1e-6  # over the mean of C's diagonal: far above rounding, far below what data shows


def _checked(w, name, axes=None):
    """`w` in float64, and the dtype it had."""
    w = np.asarray(w)
    if w.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {w.dtype}; expected float32 or float64")
    if (w.ndim < 2 if axes is None else w.ndim != axes) or not w.size:
        raise ValueError(
            f"{name} has shape {w.shape}; expected {axes or '2 or more'} axes, none of length 0"
        )
    if not np.isfinite(w).all():
        raise ValueError(f"{name} holds a nan or an infinity; expected finite weights")
    return w.astype(np.float64), w.dtype


def _check_rank(r, shape):
    if not is_whole(r) or not 1 <= r <= min(shape):
        raise ValueError(
            f"r is {r!r}; expected a whole number from 1 to {min(shape)}, the smaller side of a "
            f"{shape[0]} x {shape[1]} weight"
        )


def _left(w, r):
    """The r leading left singular vectors of (m, n), r ≤ m: orthonormal, (m, r)."""
    return np.linalg.svd(w, full_matrices=w.shape[0] > w.shape[1])[0][:, :r]


def truncated_svd(w, r):
    """The nearest matrix of rank r, as a product: w ≈ left @ right.

    The error is √(σ²_{r+1} + …) in the Frobenius norm and σ_{r+1} in the spectral norm, and no
    other matrix of rank r has a smaller one. Each side takes the root of the singular values,
    so that both learn at the same pace afterwards.

    Args:
        w: (m, n), float32 or float64.
        r: the rank, from 1 to min(m, n).

    Returns:
        left (m, r) and right (r, n), in the dtype of `w`.

    Raises:
        ValueError: for an `r` out of range, or a `w` that is not a matrix or not finite.
        TypeError: if `w` is neither float32 nor float64.

    Source: Eckart & Young 1936; Mirsky 1960 for the spectral norm.
    """
    w, dtype = _checked(w, "w", 2)
    _check_rank(r, w.shape)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:r])
    return (u[:, :r] * root).astype(dtype), (root[:, None] * vt[:r]).astype(dtype)


def _root(gram, d):
    """S (d, d) with S Sᵀ = C, a little damped so that there is one."""
    gram = np.asarray(gram, np.float64)
    if gram.shape != (d, d) or not np.isfinite(gram).all():
        raise ValueError(f"gram has shape {gram.shape}; expected {(d, d)}, all finite")
    damping = _DAMPING * np.mean(np.diagonal(gram)) if gram.any() else 1.0
    try:
        return np.linalg.cholesky(gram + damping * np.eye(d))
    except np.linalg.LinAlgError:
        raise ValueError(
            "gram is not positive semidefinite; expected the mean of x xᵀ over inputs"
        ) from None


def weighted_svd(w, gram, r):
    """The matrix of rank r that does least harm to the outputs: w ≈ left @ right.

    It has the least tr(E C Eᵀ), the mean of ‖E x‖² with E = w − left @ right; what no input
    excites hardly counts. With C = S Sᵀ that is ‖E S‖², so W S is what must be truncated.

    Args:
        w: (d_out, d_in), float32 or float64.
        gram: C (d_in, d_in), the mean of x xᵀ over inputs, as `observe` finds it. A millionth
            of its mean diagonal is added to the diagonal.
        r: the rank, from 1 to min(d_out, d_in).

    Returns:
        left (d_out, r) and right (r, d_in), in the dtype of `w`, the singular values of the
        product split evenly.

    Raises:
        ValueError: as `truncated_svd`; if `gram` has another shape or is no mean of x xᵀ.
        TypeError: if `w` is neither float32 nor float64.

    Source: Wang et al. 2024, arXiv 2403.07378, section 3.1.
    """
    w, dtype = _checked(w, "w", 2)
    _check_rank(r, w.shape)
    u = _left(w @ _root(gram, w.shape[1]), r)  # (d_out, r)
    # W S cut at r is U Uᵀ W S, so S⁻¹ takes S off again and nothing need be solved
    left, right = truncated_svd(u.T @ w, r)  # (r, d_in) -> (r, r), (r, d_in)
    return (u @ left).astype(dtype), right.astype(dtype)


def rank_for_energy(w, energy):
    """The smallest r at which truncation keeps this share of the sum of squares, Σσ².

    Args:
        w: (m, n), float32 or float64.
        energy: from above 0 to 1.

    Raises:
        ValueError: for an `energy` out of range, or a `w` that is not a matrix or not finite.
        TypeError: if `w` is neither float32 nor float64.
    """
    w, _ = _checked(w, "w", 2)
    if isinstance(energy, bool) or not (isinstance(energy, Real) and 0 < energy <= 1):
        raise ValueError(f"energy is {energy!r}; expected a share above 0 and up to 1")
    s = np.linalg.svd(w, compute_uv=False)
    kept = np.cumsum((s / (s[0] or 1)) ** 2)  # over the largest, so that no square overflows
    return int(np.searchsorted(kept, energy * kept[-1])) + 1


def rank_for_budget(shape, numbers):
    """The largest r for which left (m, r) and right (r, n) hold no more than `numbers`.

    Args:
        shape: (m, n).
        numbers: how many may be stored. From mn up, factors save nothing over the weight itself.

    Returns:
        numbers // (m + n), but never above min(m, n).

    Raises:
        ValueError: if not even r = 1 fits, or `shape` is not two whole numbers.
    """
    shape = tuple(shape)
    if len(shape) != 2 or not all(is_whole(n) and n >= 1 for n in shape):
        raise ValueError(f"shape is {shape}; expected two whole numbers from 1")
    if not is_whole(numbers) or numbers < sum(shape):
        raise ValueError(
            f"numbers is {numbers!r}; expected a whole number from {sum(shape)}, which is rank 1"
        )
    return int(min(numbers // sum(shape), *shape))
