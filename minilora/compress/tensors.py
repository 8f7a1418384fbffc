"""Approximation of many weights at once: a Tucker form or a train of cores that they share.

Everything is computed in float64 and handed back in the dtype that came in.
"""

from typing import NamedTuple

import numpy as np

from .factor import _left


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

    Source: De Lathauwer, De Moor & Vandewalle 2000, "A multilinear SVD", section 4.
    """
    return tucker(t, ranks, iterations=0)


def tucker(t, ranks, iterations=10):
    """Start from `hosvd`, then improve one axis at a time, given the others (HOOI).

    No step makes the error larger, so the result is never worse than that of `hosvd`; it need
    not be the best there is.

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

    Returns:
        A list of N cores (r_{k−1}, n_k, r_k), r_0 = r_N = 1; all but the last have orthonormal
        columns as matrices (r_{k−1} · n_k, r_k).

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
