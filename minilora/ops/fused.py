"""The hot path, fused by hand: one node each, with only what its backward pass needs."""

import math
from functools import cache

import numpy as np

from ..tensor import record
from .basic import gemm, mul, once, shape_error


def layer_norm(x, weight, bias, eps=1e-5):
    """Each row of x (…, d) to mean 0 and variance 1, then times `weight` (d,) plus `bias` (d,).

    `eps` is added to the variance, so that a row of equal numbers is no division by zero.
    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450.
    """
    d, w = x.shape[-1], weight.data
    old = x.shape
    xhat = x.data.reshape(-1, d)  # (…, d) -> (N, d)
    xhat = xhat - _row_mean(xhat)
    rstd = 1 / np.sqrt(_row_dot(xhat, xhat) / d + x.dtype.type(eps))  # (N, 1)
    xhat *= rstd
    y = xhat * w
    y += bias.data

    def vjp_x(g):
        # What moves the row's mean or its length is projected out; the rest is scaled by rstd.
        dx = g.reshape(-1, d) * w
        along = _row_dot(dx, xhat) / d
        dx -= _row_mean(dx)
        dx -= xhat * along
        dx *= rstd
        return dx.reshape(old)

    return record(
        y.reshape(old),
        (x, vjp_x),
        (weight, lambda g: np.einsum("nd,nd->d", g.reshape(-1, d), xhat)),
        (bias, lambda g: g.reshape(-1, d).sum(axis=0)),
    )


def _row_dot(a, b):
    return np.einsum("nd,nd->n", a, b)[:, None]  # (N, d), (N, d) -> (N, 1)


def _row_mean(a):
    return a.mean(axis=1, keepdims=True)  # (N, d) -> (N, 1)


def rms_norm(x, weight, eps=1e-5):
    """Each row of x over its root mean square, times `weight`: layer_norm without mean or bias.

    Args:
        x: (…, n · d): a row of n runs of d features, as n heads are, counts as n rows.
        weight: (d,). eps: added to the mean square.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, section 4.
    """
    old, (d,), w = x.shape, weight.shape, weight.data
    if old[-1] % d:
        raise shape_error("rms_norm", old, weight.shape, "expected (…, n · d) and (d,)")
    xhat = x.data.reshape(-1, d)  # (…, n · d) -> (N, d)
    rrms = 1 / np.sqrt(_row_dot(xhat, xhat) / d + x.dtype.type(eps))  # (N, 1)
    xhat = xhat * rrms

    def vjp_x(g):
        dx = g.reshape(-1, d) * w
        dx -= xhat * (_row_dot(dx, xhat) / d)  # what moves the row's length is projected out
        dx *= rrms
        return dx.reshape(old)

    return record(
        (xhat * w).reshape(old),
        (x, vjp_x),
        (weight, lambda g: np.einsum("nd,nd->d", g.reshape(-1, d), xhat)),
    )


GELU_BLOCK = 2**15  # elements; a few arrays of this many floats stay in a core's own cache


def gelu(x):
    """x · Φ(x) in the tanh form, written with the logistic function: x · σ(2u).

    With u = √(2/π)(x + .044715x³), ½(1 + tanh u) = σ(2u), and exp is cheaper than tanh.
    Worked in blocks that stay in cache, and the slope is found on the way, so that only the
    slope is kept and not x.

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2.
    """
    flat = x.data.reshape(-1)
    one, a = x.dtype.type(2 * np.sqrt(2 / np.pi)), x.dtype.type(2 * np.sqrt(2 / np.pi) * 0.044715)
    y = np.empty_like(flat)
    slope = np.empty_like(flat) if x.requires_grad else None
    size = min(GELU_BLOCK, len(flat))
    u_buffer, s_buffer = np.empty(size, x.dtype), np.empty(size, x.dtype)
    with np.errstate(over="ignore"):  # exp to inf is right: σ is then exactly 0
        for start in range(0, len(flat), GELU_BLOCK):
            block = slice(start, start + GELU_BLOCK)
            xb, yb = flat[block], y[block]
            u, s = u_buffer[: len(xb)], s_buffer[: len(xb)]
            np.multiply(xb, xb, out=u)
            np.multiply(u, -a, out=s)
            s -= one
            s *= xb  # -2u
            np.exp(s, out=s)
            s += 1
            np.divide(1, s, out=s)  # σ(2u)
            np.multiply(xb, s, out=yb)
            if slope is not None:  # σ + x σ (1 - σ) · d(2u)/dx
                db = slope[block]
                u *= 3 * a
                u += one
                u *= yb
                np.subtract(1, s, out=db)
                db *= u
                db += s
    old = x.shape
    return record(y.reshape(old), (x, lambda g: (g.reshape(-1) * slope).reshape(old)))


@cache
def _phi_table():
    """Φ and its slope, each times what a cubic needs, on a grid of 64 to the unit up to ±8."""
    x = np.arange(-8 * 64, 8 * 64 + 1) / 64
    phi = np.array([math.erf(each / 2**0.5) for each in x]) / 2 + 0.5
    return phi, np.exp(-x * x / 2) / (64 * (2 * np.pi) ** 0.5)


def gelu_erf(x):
    """x · Φ(x) with Φ the normal distribution itself, which BERT has where GPT-2 has `gelu`.

    NumPy has no erf: Φ comes from cubics through a table of values and slopes, to 2e-10.

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2.
    """
    a = x.data
    phi, bell = (table.astype(a.dtype) for table in _phi_table())
    t = np.clip(a, -7.99, 7.99) * 64
    i = np.floor(t)
    t -= i  # how far between grid points i and i + 1
    i = i.astype(np.intp) + 8 * 64
    here, bend = bell[i], bell[i + 1] - bell[i]
    rise = phi[i + 1] - phi[i] - here  # beyond the tangent
    cdf = phi[i] + t * (here + t * (3 * rise - bend + t * (bend - 2 * rise)))
    slope = None
    if x.requires_grad:
        slope = np.exp(a * a * -0.5) * a * float((2 * np.pi) ** -0.5) + cdf  # Φ + x φ
    return record(a * cdf, (x, lambda g: g * slope))


def swiglu(gate, up):
    """silu(gate) · up, with silu(x) = x · σ(x): what a gated MLP puts between its matrices.

    Only the two inputs are kept; the logistic function is found again on the way back.

    Source: Shazeer 2020, arXiv 2002.05202, section 2.
    """
    a, b = gate.data, up.data
    if a.shape != b.shape:
        raise shape_error("swiglu", a.shape, b.shape, "expected the same")

    def logistic():
        with np.errstate(over="ignore"):  # exp to inf is right: σ is then exactly 0
            s = np.exp(-a)
        s += 1
        return np.divide(1, s, out=s)

    def vjp_gate(g):
        s = logistic()
        slope = 1 - s
        slope *= a
        slope += 1
        slope *= s  # σ (1 + x (1 - σ))
        slope *= b
        slope *= g
        return slope

    y = logistic()
    y *= a
    y *= b
    return record(y, (gate, vjp_gate), (up, lambda g: g * a * logistic()))


def rotary(x, cos, sin):
    """Turn feature i of each head against feature i + d_head/2, by an angle of their position.

    The product of a query and a key then depends on how far apart they stand, and not on where.

    Args:
        x: (B, T, H · d_head). cos, sin: (T, d_head / 2), of the angles.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2; which features make a pair is a
    matter of convention, and this is the one of Llama's weights as Hugging Face stores them.
    """
    half, c, s = cos.shape[1], cos[:, None], sin[:, None]  # (T, 1, d_head / 2)

    def turn(a, s):
        a = a.reshape(*a.shape[:2], -1, 2, half)  # (B, T, H · d_head) -> (B, T, H, 2, d_head / 2)
        first, second, out = a[:, :, :, 0], a[:, :, :, 1], np.empty_like(a)
        np.subtract(first * c, second * s, out=out[:, :, :, 0])
        np.add(second * c, first * s, out=out[:, :, :, 1])
        return out.reshape(*a.shape[:2], -1)

    return record(turn(x.data, s), (x, lambda g: turn(g, -s)))  # turned back


def _softmax_rows(z):
    """The softmax of the last axis, in place."""
    z -= z.max(axis=-1, keepdims=True)  # no overflow, and the same result
    np.exp(z, out=z)
    z /= z.sum(axis=-1, keepdims=True)
    return z


def softmax(x):
    """exp(x) over its sum along the last axis."""
    p = _softmax_rows(x.data.copy())
    return record(p, (x, lambda g: _softmax_vjp(p, g)))


def _softmax_vjp(p, g):
    dz = g - np.einsum("...i,...i->...", g, p)[..., None]
    dz *= p
    return dz


def cross_entropy(logits, targets, ignore_index=-100):
    """The mean of -ln softmax(logits)[target], in nats: logits (…, V) and integers (…) to ().

    Targets equal to `ignore_index` do not count; one or more must.
    """
    targets = np.asarray(targets)
    if targets.shape != logits.shape[:-1]:
        raise shape_error("cross_entropy", logits.shape, targets.shape, "expected (…, V) and (…)")
    old, v = logits.shape, logits.shape[-1]
    rows = np.flatnonzero(targets != ignore_index)
    hit = targets.reshape(-1)[rows]
    if hit.min() < 0 or hit.max() >= v:
        raise IndexError(f"cross_entropy: targets run from {hit.min()} to {hit.max()}, V is {v}")
    z = logits.data.reshape(-1, v)[rows]  # (…, V) -> (M, V), M targets that count
    z -= z.max(axis=-1, keepdims=True)
    at_hit = z[np.arange(len(rows)), hit]
    np.exp(z, out=z)
    total = z.sum(axis=-1, keepdims=True)
    value = (np.log(total[:, 0]) - at_hit).mean()

    def vjp(g):
        p = z / total
        p[np.arange(len(rows)), hit] -= 1
        p *= g / len(rows)
        dlogits = np.zeros((int(np.prod(old[:-1])), v), p.dtype)
        dlogits[rows] = p
        return dlogits.reshape(old)

    return record(value, (logits, vjp))


def attention(q, k, v, causal=True):
    """softmax(q kᵀ / √d_head) v for every batch and head at once: q and the result (…, T, d_head).

    k and v are (…, S, d_head). If causal, query i sees key j only if j ≤ i + S - T: the last query
    sees every key, and keys put before the others (a prefix, a cache) are seen by all. Or causal
    is an array that broadcasts to (…, T, S), added to the scores before the softmax.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.
    """
    xq, xk, xv = q.data, k.data, v.data
    scale = 1 / xq.shape[-1] ** 0.5
    p = gemm(xq, xk.swapaxes(-1, -2))  # (…, T, d_head) @ (…, d_head, S) -> (…, T, S)
    p *= scale
    if causal is not False:
        p += causal_mask(*p.shape[-2:], p.dtype) if causal is True else causal
    _softmax_rows(p)

    @once
    def scores_vjp(g):
        ds = _softmax_vjp(p, gemm(g, xv.swapaxes(-1, -2)))  # (…, T, S)
        ds *= scale
        return ds

    return record(
        gemm(p, xv),  # (…, T, S) @ (…, S, d_head) -> (…, T, d_head)
        (q, lambda g: gemm(scores_vjp(g), xk)),
        (k, lambda g: gemm(scores_vjp(g).swapaxes(-1, -2), xq)),
        (v, lambda g: gemm(p.swapaxes(-1, -2), g)),
    )


def causal_mask(t, s, dtype=np.float64):
    """(t, s): 0 where query i may see key j, that is j ≤ i + s - t, and -inf elsewhere."""
    if s < t:
        raise ValueError(f"causal attention: {s} keys for {t} queries; expected at least as many")
    return np.triu(np.full((t, s), -np.inf, dtype), s - t + 1)


def dropout(x, p, rng):
    """Zero each element with probability `p` and divide the others by 1 - p."""
    keep = (rng.random(x.shape) >= p) / x.dtype.type(1 - p)
    return mul(x, keep)
