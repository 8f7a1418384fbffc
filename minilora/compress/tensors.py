"""Approximation of many weights at once: a Tucker form or a train of cores that they share.

Everything is computed in float64 and handed back in the dtype that came in.
"""

from typing import NamedTuple

import numpy as np

from ..peft.lora import is_whole
from .factor import _checked, _left


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


def _check_ranks(ranks, n):
    ranks = tuple(ranks) if np.ndim(ranks) == 1 else ranks
    if not isinstance(ranks, tuple) or len(ranks) != n:
        raise ValueError(f"ranks is {ranks!r}; expected {n} whole numbers")
    return ranks


def _check_tucker(t, ranks):
    t, dtype = _checked(t, "t")
    ranks = _check_ranks(ranks, t.ndim)
    if not all(is_whole(r) and 1 <= r <= n for r, n in zip(ranks, t.shape, strict=True)):
        raise ValueError(f"ranks is {ranks}; expected whole numbers from 1 to those of {t.shape}")
    return t, ranks, dtype


def _tucker(t, factors, dtype):
    core = _project(t, factors)  # (n_1, …) -> (r_1, …)
    return Tucker(core.astype(dtype), tuple(u.astype(dtype) for u in factors))


def hosvd(t, ranks):
    """Cut every axis down to its leading directions, each found on its own.

    The squared error is at most the sum over the axes of what each of them cuts off, so the
    error is at most √N times the least there is.

    Args:
        t: (n_1, …, n_N), float32 or float64, N ≥ 2.
        ranks: N whole numbers, r_k from 1 to n_k.

    Returns:
        A `Tucker`, in the dtype of `t`.

    Raises:
        ValueError: for ranks out of range or of another number than the axes, or a `t` that has
            fewer than two axes or is not finite.
        TypeError: if `t` is neither float32 nor float64.

    Source: De Lathauwer, De Moor & Vandewalle 2000, "A multilinear SVD", section 4.
    """
    t, ranks, dtype = _check_tucker(t, ranks)
    return _tucker(t, [_leading(t, k, r) for k, r in enumerate(ranks)], dtype)


def tucker(t, ranks, iterations=10):
    """Start from `hosvd`, then improve one axis at a time, given the others (HOOI).

    No step makes the error larger, so the result is never worse than that of `hosvd`; it need
    not be the best there is.

    Args:
        t, ranks: as for `hosvd`.
        iterations: how many times to go over all axes, from 1.

    Returns:
        A `Tucker`, in the dtype of `t`.

    Raises:
        ValueError, TypeError: as `hosvd`, and for `iterations` out of range.

    Source: De Lathauwer et al. 2000, "On the best rank-1 and rank-(R1, …, RN) approximation";
    Kolda & Bader 2009, "Tensor decompositions and applications", figure 4.4.
    """
    t, ranks, dtype = _check_tucker(t, ranks)
    if not is_whole(iterations) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; expected a whole number from 1")
    factors = [_leading(t, k, r) for k, r in enumerate(ranks)]
    for _ in range(iterations):
        for k, r in enumerate(ranks):
            factors[k] = _leading(_project(t, factors, but=k), k, r)
    return _tucker(t, factors, dtype)


def tensor_train(t, ranks):
    """A chain of three-way cores: t[i, j, …] ≈ G_1[:, i] G_2[:, j] …, a product of matrices.

    Each step truncates the matrix of all axes so far by all that are left. The squared error is
    the sum of the squares cut off, at most √(N − 1) times the least error there is.

    Args:
        t: (n_1, …, n_N), float32 or float64, N ≥ 2.
        ranks: N − 1 whole numbers, r_k from 1 to min(r_{k−1} · n_k, n_{k+1} · … · n_N), r_0 = 1.

    Returns:
        A list of N cores (r_{k−1}, n_k, r_k), r_0 = r_N = 1, in the dtype of `t`; all but the
        last have orthonormal columns as matrices (r_{k−1} · n_k, r_k).

    Raises:
        ValueError: for ranks out of range or not N − 1 of them, or a `t` that has fewer than
            two axes or is not finite.
        TypeError: if `t` is neither float32 nor float64.

    Source: Oseledets 2011, "Tensor-train decomposition", theorem 2.2 and algorithm 1.
    """
    rest, dtype = _checked(t, "t")
    *shape, last = rest.shape
    ranks = _check_ranks(ranks, len(shape))
    cores, before = [], 1
    for k, (n, r) in enumerate(zip(shape, ranks, strict=True)):
        rest = rest.reshape(before * n, -1)  # -> (r_{k−1} · n_k, all that is left)
        if not is_whole(r) or not 1 <= r <= min(rest.shape):
            raise ValueError(
                f"ranks[{k}] is {r!r}; expected a whole number from 1 to {min(rest.shape)}"
            )
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        cores.append(u[:, :r].reshape(before, n, r).astype(dtype))
        rest, before = s[:r, None] * vt[:r], r  # (r_k, all that is left)
    return [*cores, rest.reshape(before, last, 1).astype(dtype)]


def tt_dense(cores):
    """The tensor (n_1, …, n_N) that cores (r_{k−1}, n_k, r_k) stand for, r_0 = r_N = 1.

    Raises:
        ValueError: if the cores do not fit one another.
    """
    shapes = [np.shape(core) for core in cores]
    chain = shapes and all(len(s) == 3 for s in shapes)
    if not chain or [1, *(s[2] for s in shapes)] != [*(s[0] for s in shapes), 1]:
        raise ValueError(f"cores have shapes {shapes}; expected (1, n, r), (r, n, s), … (z, n, 1)")
    t = cores[0]
    for core in cores[1:]:
        t = np.tensordot(t, core, 1)  # (1, n_1, …, r) · (r, n_k, r_k) -> (1, n_1, …, n_k, r_k)
    return t[0, ..., 0]
