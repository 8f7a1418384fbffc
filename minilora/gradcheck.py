"""Is a gradient right? Ask the function itself, in one random direction at a time."""

import numpy as np

from .tensor import Tensor


def check_vjp(f, *arrays, rng=None, trials=3, eps=1e-6, tol=1e-6):
    """Check the gradients of `f` against central differences, in float64.

    For random directions u (of the output) and v (of the inputs), the chain rule says
    ⟨u, J v⟩ = ⟨Jᵀ u, v⟩. The left side comes from two calls of `f`, the right from `backward`.
    One pair checks every element of the Jacobian at once, with probability 1.

    Args:
        f: takes as many tensors as there are `arrays`, the point at which to check.
        rng: a `numpy.random.Generator` for the directions; `default_rng(0)` if not given.
        trials: how many pairs of directions.
        eps: the step of the central difference.
        tol: the largest error allowed, relative to the size of the two sides.

    Returns the largest error found; one that is above `tol`, or no number, is an AssertionError.
    """
    rng = rng or np.random.default_rng(0)
    arrays = [np.asarray(a, np.float64) for a in arrays]
    worst = 0.0
    for _ in range(trials):
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        out = f(*inputs)
        u = rng.standard_normal(out.shape)
        vs = [rng.standard_normal(a.shape) for a in arrays]
        out.backward(u)
        pulled = 0.0
        for x, v in zip(inputs, vs, strict=True):
            g = np.zeros(x.shape) if x.grad is None else x.grad
            if g.shape != x.shape:
                raise AssertionError(f"check_vjp: gradient {g.shape} for an input {x.shape}")
            pulled += np.sum(g * v)
        ahead, behind = (
            f(*[Tensor(a + step * v) for a, v in zip(arrays, vs, strict=True)]).data
            for step in (eps, -eps)
        )
        pushed = np.sum(u * (ahead - behind)) / (2 * eps)
        error = abs(pulled - pushed) / max(1.0, abs(pulled), abs(pushed))
        if not error <= tol:
            both = f"backward gives {pulled:.6g}, differences give {pushed:.6g}"
            raise AssertionError(f"check_vjp: {both} (error {error:.1e}, allowed {tol:.0e})")
        worst = max(worst, error)
    return float(worst)
