"""Approximation by products: of one weight, and of many at once by what they share.

Everything is computed in float64 and handed back in the dtype that came in.
"""

from typing import NamedTuple

import numpy as np

from ..peft.lora import check_rank

# ------------------------------------------------------------------ one weight


def _left(w, r):
    """The r leading left singular vectors of (m, n), r ≤ m: orthonormal, (m, r)."""
    return np.linalg.svd(w, full_matrices=w.shape[0] > w.shape[1])[0][:, :r]


def truncated_svd(w, r):
    """The nearest matrix of rank r, as a product: w ≈ left @ right, (m, r) and (r, n).

    The error is √(σ²_{r+1} + …) in the Frobenius norm and σ_{r+1} in the spectral norm, the least
    there is. Each side takes the root of the singular values, so that both learn at one pace.

    Source: Eckart & Young 1936; Mirsky 1960 for the spectral norm.
    """
    check_rank(r, w.shape)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:r])
    return (u[:, :r] * root).astype(w.dtype), (root[:, None] * vt[:r]).astype(w.dtype)


def root_of(gram, damping=1e-6):
    """S (d, d), lower triangular, with S Sᵀ = C / c + damping · I, c the mean of C's diagonal.

    The damping, a millionth if not given, is far above rounding and far below what data shows.
    """
    mean = np.mean(np.diagonal(gram)) or 1.0
    return np.linalg.cholesky(gram / mean + damping * np.eye(len(gram)))


def make_up(w, gram, settle, damping=0.01, chunk=128):
    """Settle a weight column by column; those still to come make up for each error.

    Of all changes to later columns, the one made here keeps the error on the data, tr(E C Eᵀ),
    smallest. With C + λI = R Rᵀ, R upper triangular, row j of U = R⁻¹ says how, and removing
    w_j costs (w_j / U_jj)². It is the Optimal Brain Surgeon, in a fixed order.

    Args:
        settle: `settle(j, rest, u)` says what column j shall be, (d_out,), from all columns as
            they now stand, (d_in, d_out), and U.
        damping: λ over the mean of C's diagonal.
        chunk: columns settled before those after them hear of it; `settle` may look so far.

    Returns: the settled weight, (d_out, d_in), float64.

    Source: LeCun et al. 1989, "Optimal brain damage"; Hassibi & Stork 1992, "Second order
    derivatives for network pruning"; Frantar et al. 2022, arXiv 2210.17323.
    """
    # Cholesky from the last row up, by turning the matrix round twice
    u = np.linalg.inv(root_of(gram[::-1, ::-1], damping)[::-1, ::-1])
    rest = w.T.astype(np.float64, order="C")  # (d_in, d_out), so that a column lies together
    errors = np.empty(rest.shape)
    for start in range(0, len(rest), chunk):  # columns far off wait, for one matrix product
        stop = min(start + chunk, len(rest))
        for j in range(start, stop):
            fixed = settle(j, rest, u)  # (d_out,)
            errors[j], rest[j] = (rest[j] - fixed) / u[j, j], fixed
            rest[j + 1 : stop] -= u[j, j + 1 : stop, None] * errors[j]
        rest[stop:] -= u[start:stop, stop:].T @ errors[start:stop]
    return rest.T


def weighted_svd(w, gram, r):
    """The matrix of rank r that does least harm to the outputs: w ≈ left @ right.

    It has the least tr(E C Eᵀ), the mean of ‖E x‖² with E = w − left @ right; what no input
    excites hardly counts. With C = S Sᵀ that is ‖E S‖², so W S is what must be truncated.

    Source: Wang et al. 2024, arXiv 2403.07378, section 3.1.
    """
    check_rank(r, w.shape)
    u = _left(w @ root_of(gram), r)  # (d_out, r)
    # W S cut at r is U Uᵀ W S, so S⁻¹ takes S off again and nothing need be solved
    left, right = truncated_svd(u.T @ w.astype(np.float64), r)  # (r, d_in) -> (r, r), (r, d_in)
    return (u @ left).astype(w.dtype), right.astype(w.dtype)


def rank_for_energy(w, energy):
    """The smallest r at which truncation keeps this share (0, 1] of the sum of squares, Σσ²."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; expected a share above 0 and up to 1")
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    kept = np.cumsum((s / (s[0] or 1)) ** 2)  # over the largest, so that no square overflows
    return int(np.searchsorted(kept, energy * kept[-1])) + 1


def rank_for_budget(shape, numbers):
    """The largest r for which left (m, r) and right (r, n) hold no more than `numbers`, or 0."""
    m, n = map(int, shape)
    return int(min(numbers // (m + n), m, n))


# ------------------------------------------------------------------ many weights


class Tucker(NamedTuple):
    """A tensor as a small core and one matrix for each axis: t ≈ core ×₁ U₁ ×₂ U₂ …"""

    core: np.ndarray  # (r_1, …, r_N)
    factors: tuple  # of (n_k, r_k), with orthonormal columns

    @property
    def size(self):
        """How many numbers are stored."""
        return self.core.size + sum(u.size for u in self.factors)

    def dense(self):
        """The tensor that it stands for, (n_1, …, n_N)."""
        return _project(self.core, [u.T for u in self.factors])


def _project(t, factors, but=None):
    """`t` times Uᵀ along every axis (but one): n_k -> r_k for factors (n_k, r_k)."""
    for k, u in enumerate(factors):
        if k != but:
            t = np.moveaxis(np.tensordot(t, u, (k, 0)), -1, k)
    return t


def _leading(t, k, r):
    """The r leading directions of axis k: (n_k, r)."""
    return _left(np.moveaxis(t, k, 0).reshape(t.shape[k], -1), r)  # (n_k, all the rest)


def hosvd(t, ranks):
    """Cut every axis down to its leading directions, each found on its own: a `Tucker`.

    The squared error is at most the sum over the axes of what each of them cuts off, so the
    error is at most √N times the least there is.

    Source: De Lathauwer, De Moor & Vandewalle 2000, "A multilinear SVD".
    """
    return tucker(t, ranks, iterations=0)


def tucker(t, ranks, iterations=10):
    """Start from `hosvd`, then improve one axis at a time, given the others (HOOI).

    No step makes the error larger, so it is never worse than `hosvd`; it need not be the best.

    Args:
        t: (n_1, …, n_N), N ≥ 2. ranks: N whole numbers, r_k from 1 to n_k.
        iterations: how many times to go over all axes.

    Source: De Lathauwer et al. 2000, "On the best rank-1 and rank-(R1, …, RN) approximation";
    Kolda & Bader 2009, "Tensor decompositions and applications", figure 4.4.
    """
    if len(ranks) != t.ndim or not all(1 <= r <= n for r, n in zip(ranks, t.shape, strict=True)):
        raise ValueError(f"ranks is {ranks}; expected whole numbers from 1 to those of {t.shape}")
    t, dtype = t.astype(np.float64), t.dtype
    factors = [_leading(t, k, r) for k, r in enumerate(ranks)]
    for _ in range(iterations):
        for k, r in enumerate(ranks):
            factors[k] = _leading(_project(t, factors, but=k), k, r)
    core = _project(t, factors)  # (n_1, …) -> (r_1, …)
    return Tucker(core.astype(dtype), tuple(u.astype(dtype) for u in factors))


def tensor_train(t, ranks):
    """A chain of three-way cores: t[i, j, …] ≈ G_1[:, i] G_2[:, j] …, a product of matrices.

    Each step truncates the matrix of all axes so far by all that are left. The squared error is
    the sum of the squares cut off, at most √(N − 1) times the least error there is.

    Args:
        t: (n_1, …, n_N), N ≥ 2.
        ranks: N − 1 whole numbers, r_k from 1 to min(r_{k−1} · n_k, n_{k+1} · … · n_N), r_0 = 1.

    Returns: N cores (r_{k−1}, n_k, r_k), r_0 = r_N = 1; all but the last have orthonormal columns
    as matrices (r_{k−1} · n_k, r_k).

    Source: Oseledets 2011, "Tensor-train decomposition", theorem 2.2 and algorithm 1.
    """
    rest, (*shape, last), cores, before = t.astype(np.float64), t.shape, [], 1
    for n, r in zip(shape, ranks, strict=True):
        rest = rest.reshape(before * n, -1)  # -> (r_{k−1} · n_k, all that is left)
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        cores.append(u[:, :r].reshape(before, n, r).astype(t.dtype))
        rest, before = s[:r, None] * vt[:r], r  # (r_k, all that is left)
    return [*cores, rest.reshape(before, last, 1).astype(t.dtype)]


def tt_dense(cores):
    """The tensor (n_1, …, n_N) that cores (r_{k−1}, n_k, r_k) stand for, r_0 = r_N = 1."""
    t = cores[0]
    for core in cores[1:]:
        t = np.tensordot(t, core, 1)  # (1, n_1, …, r) · (r, n_k, r_k) -> (1, n_1, …, n_k, r_k)
    return t[0, ..., 0]
