"""The primitives: each forward pass with its vector-Jacobian products beside it.

How to read one: the value first, then `record(value, (parent, vjp), …)`, where `vjp` maps the
gradient `g` of the value to the gradient of that parent. A VJP captures the arrays it needs and
no more. Shapes: B batch, T positions, H heads, d features; `…` any leading axes.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from .tensor import Tensor, record

# ------------------------------------------------------------------ helpers


def _pair(a, b):
    """Both operands as tensors of one dtype: what is not a tensor takes the other's dtype."""
    if not isinstance(a, Tensor):
        a = Tensor(np.asarray(a, b.dtype))
    if not isinstance(b, Tensor):
        b = Tensor(np.asarray(b, a.dtype))
    if a.dtype != b.dtype:
        raise TypeError(f"tensors of dtype {a.dtype} and {b.dtype} do not mix; convert one first")
    return a, b


def _unbroadcast(g, shape):
    """Sum `g` over the axes that broadcasting added or stretched, back to `shape`."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))  # leading axes that were added
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True)


def _once(f):
    """`f`, computed once for the edges of one node, which `backward` calls with the same `g`."""
    last = [None, None]

    def call(g):
        if last[0] is not g:
            last[:] = g, f(g)
        return last[1]

    return call


_gemm_log = ContextVar("gemm_log", default=None)


@contextmanager
def count_gemms():
    """Inside this block, list every matrix product of the engine as (batch, m, k, n).

    Each entry stands for `batch` products (m, k) @ (k, n), that is 2·batch·m·k·n FLOPs.
    """
    token = _gemm_log.set([])
    try:
        yield _gemm_log.get()
    finally:
        _gemm_log.reset(token)


def _gemm(a, b, out=None):
    """Every matrix product goes through here, so that it can be counted."""
    log = _gemm_log.get()
    if log is not None:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        log.append((int(np.prod(batch)), a.shape[-2], a.shape[-1], b.shape[-1]))
    return np.matmul(a, b, out=out)


def _shape_error(op, a, b, expected):
    return ValueError(f"{op}: shapes {a} and {b} do not fit; {expected}")


# ------------------------------------------------------------------ arithmetic


def add(a, b):
    """a + b, with broadcasting."""
    a, b = _pair(a, b)
    try:
        value = a.data + b.data
    except ValueError:
        raise _shape_error("add", a.shape, b.shape, "they must broadcast") from None
    sa, sb = a.shape, b.shape
    return record(
        value,
        (a, lambda g: _unbroadcast(g, sa)),
        (b, lambda g: _unbroadcast(g, sb)),
    )


def mul(a, b):
    """a · b element by element, with broadcasting."""
    a, b = _pair(a, b)
    xa, xb = a.data, b.data
    try:
        value = xa * xb
    except ValueError:
        raise _shape_error("mul", a.shape, b.shape, "they must broadcast") from None
    sa, sb = a.shape, b.shape
    return record(
        value,
        (a, lambda g: _unbroadcast(g * xb, sa)),
        (b, lambda g: _unbroadcast(g * xa, sb)),
    )


def sub(a, b):
    """a - b, with broadcasting."""
    a, b = _pair(a, b)
    return add(a, mul(b, -1))


def div(a, b):
    """a / b, with broadcasting."""
    a, b = _pair(a, b)
    return mul(a, power(b, -1))


def power(x, n):
    """x ** n for a constant number n."""
    if isinstance(n, Tensor):
        raise TypeError("power: the exponent must be a plain number, not a Tensor")
    a, n = x.data, np.asarray(n).item()  # a NumPy scalar would decide the dtype of the result
    return record(a**n, (x, lambda g: g * (n * a ** (n - 1)) if n else np.zeros_like(g)))


def exp(x):
    """e ** x."""
    y = np.exp(x.data)
    return record(y, (x, lambda g: g * y))


def log(x):
    """The natural logarithm."""
    a = x.data
    return record(np.log(a), (x, lambda g: g / a))


def tanh(x):
    """The hyperbolic tangent."""
    y = np.tanh(x.data)
    return record(y, (x, lambda g: g * (1 - y * y)))


def relu(x):
    """max(x, 0); the gradient at exactly 0 is taken as 0."""
    on = x.data > 0
    return record(x.data * on, (x, lambda g: g * on))


# ------------------------------------------------------------------ shape


def reshape(x, *shape):
    """The same numbers in another shape; `-1` once for what is left over."""
    old = x.shape
    return record(x.data.reshape(*shape), (x, lambda g: g.reshape(old)))


def transpose(x, *axes):
    """The axes in another order; reversed if none is given."""
    axes = tuple(a % x.ndim for a in axes) or tuple(reversed(range(x.ndim)))
    back = tuple(np.argsort(axes))
    return record(x.data.transpose(axes), (x, lambda g: g.transpose(back)))


def index(x, key):
    """x[key] for slices, integers and integer arrays."""
    old, dtype = x.shape, x.dtype

    def vjp(g):
        dx = np.zeros(old, dtype)
        np.add.at(dx, key, g)  # an element taken twice gets both gradients
        return dx

    return record(x.data[key], (x, vjp))


def prepend(rows, x):
    """`rows` (m, d) put before every sequence of a batch, (B, T, d) to (B, m + T, d)."""
    m, d = rows.shape
    if x.ndim != 3 or x.shape[2] != d:
        raise _shape_error("prepend", rows.shape, x.shape, "expected (m, d) and (B, T, d)")
    front = np.broadcast_to(rows.data, (x.shape[0], m, d))
    value = np.concatenate([front, x.data], axis=1)  # (B, m + T, d)
    return record(
        value,
        (rows, lambda g: g[:, :m].sum(axis=0)),
        (x, lambda g: g[:, m:]),
    )


def sum(x, axis=None, keepdims=False):
    """The sum over `axis` (an integer, a tuple, or all)."""
    old = x.shape

    def vjp(g):
        if axis is not None and not keepdims:
            g = np.expand_dims(g, axis)
        return np.broadcast_to(g, old)

    return record(x.data.sum(axis=axis, keepdims=keepdims), (x, vjp))


def mean(x, axis=None, keepdims=False):
    """The mean over `axis`."""
    total = sum(x, axis, keepdims)
    return mul(total, total.size / x.size)


# ------------------------------------------------------------------ matrix products


def matmul(a, b):
    """a @ b for matrices, or for stacks of matrices with broadcasting: (…, m, k) @ (…, k, n)."""
    a, b = _pair(a, b)
    xa, xb = a.data, b.data
    if xa.ndim < 2 or xb.ndim < 2 or xa.shape[-1] != xb.shape[-2]:
        raise _shape_error("matmul", a.shape, b.shape, "expected (…, m, k) and (…, k, n)")
    sa, sb = a.shape, b.shape
    return record(
        _gemm(xa, xb),  # (…, m, n)
        (a, lambda g: _unbroadcast(_gemm(g, xb.swapaxes(-1, -2)), sa)),
        (b, lambda g: _unbroadcast(_gemm(xa.swapaxes(-1, -2), g), sb)),
    )


def linear(x, weight, bias=None):
    """x @ weight.T + bias, as one 2-D matrix product each way.

    Args:
        x: (…, d_in). weight: (d_out, d_in). bias: (d_out,) or None.

    Returns:
        (…, d_out).
    """
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in:
        raise _shape_error("linear", x.shape, weight.shape, "expected (…, d_in) and (d_out, d_in)")
    if bias is not None and bias.shape != (d_out,):
        raise _shape_error(
            "linear", weight.shape, bias.shape, "expected (d_out, d_in) and (d_out,)"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"linear: x is {x.dtype} and weight {weight.dtype}; convert one first")
    old, w = x.shape, weight.data
    x2 = x.data.reshape(-1, d_in)  # (…, d_in) -> (N, d_in)
    y = _gemm(x2, w.T)  # (N, d_in) @ (d_in, d_out) -> (N, d_out)
    if bias is not None:
        y += bias.data
    edges = [
        (x, lambda g: _gemm(g.reshape(-1, d_out), w).reshape(old)),
        (weight, lambda g: _gemm(g.reshape(-1, d_out).T, x2)),
    ]
    if bias is not None:
        edges.append((bias, lambda g: g.reshape(-1, d_out).sum(axis=0)))
    return record(y.reshape(*old[:-1], d_out), *edges)


def embedding(weight, ids):
    """Row `ids` of `weight`: (V, d) and integers (…) to (…, d)."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids have dtype {ids.dtype}; expected integers")
    v, d = weight.shape
    if ids.size and (ids.min() < 0 or ids.max() >= v):
        raise IndexError(
            f"embedding: ids run from {ids.min()} to {ids.max()}; expected 0 to {v - 1}"
        )

    def vjp(g):
        # Sorted, equal ids stand together, so each row's gradient is one sum over a run.
        order = np.argsort(ids, axis=None, kind="stable")
        rows, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        dw = np.zeros((v, d), g.dtype)
        dw[rows] = np.add.reduceat(g.reshape(-1, d)[order], starts, axis=0)
        return dw

    return record(weight.data[ids], (weight, vjp))


# ------------------------------------------------------------------ fused by hand: the hot path


def layer_norm(x, weight, bias, eps=1e-5):
    """Each row of x to mean 0 and variance 1, then times `weight` plus `bias`.

    Args:
        x: (…, d). weight, bias: (d,). eps: added to the variance.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450, section 3.1.
    """
    d, w = x.shape[-1], weight.data
    if weight.shape != (d,) or bias.shape != (d,):
        raise ValueError(
            f"layer_norm: x {x.shape}, weight {weight.shape} and bias {bias.shape} do not fit; "
            "expected (…, d), (d,) and (d,)"
        )
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
    """The mean of -ln softmax(logits)[target] over the targets that count.

    Args:
        logits: (…, V). targets: integers (…); those equal to `ignore_index` do not count.

    Returns:
        A scalar, in nats.
    """
    targets = np.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: targets have dtype {targets.dtype}; expected integers")
    if targets.shape != logits.shape[:-1]:
        raise _shape_error("cross_entropy", logits.shape, targets.shape, "expected (…, V) and (…)")
    old, v = logits.shape, logits.shape[-1]
    rows = np.flatnonzero(targets != ignore_index)
    hit = targets.reshape(-1)[rows]
    if len(rows) == 0:
        raise ValueError("cross_entropy: every target is ignored, so there is no loss")
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
    """softmax(q kᵀ / √d_head) v for every batch and head at once.

    Args:
        q: (…, T, d_head). k, v: (…, S, d_head), S ≥ T if causal.
        causal: query i sees key j only if j ≤ i + S - T: the last query sees every key, and
            keys put before the others (a prefix, a cache) are seen by all.

    Returns:
        (…, T, d_head).

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.
    """
    if q.shape[-1] != k.shape[-1] or k.shape != v.shape:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    xq, xk, xv = q.data, k.data, v.data
    scale = 1 / xq.shape[-1] ** 0.5
    p = _gemm(xq, xk.swapaxes(-1, -2))  # (…, T, d_head) @ (…, d_head, S) -> (…, T, S)
    p *= scale
    if causal:
        p += causal_mask(*p.shape[-2:], p.dtype)
    _softmax_rows(p)

    @_once
    def scores_vjp(g):
        ds = _softmax_vjp(p, _gemm(g, xv.swapaxes(-1, -2)))  # (…, T, S)
        ds *= scale
        return ds

    return record(
        _gemm(p, xv),  # (…, T, S) @ (…, S, d_head) -> (…, T, d_head)
        (q, lambda g: _gemm(scores_vjp(g), xk)),
        (k, lambda g: _gemm(scores_vjp(g).swapaxes(-1, -2), xq)),
        (v, lambda g: _gemm(p.swapaxes(-1, -2), g)),
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


# ------------------------------------------------------------------ operators

Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = mul
Tensor.__neg__ = lambda a: mul(a, -1)
Tensor.__sub__, Tensor.__rsub__ = sub, lambda a, b: sub(b, a)
Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda a, b: div(b, a)
Tensor.__pow__ = power
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = lambda a, b: matmul(b, a)
Tensor.__getitem__ = index
Tensor.sum, Tensor.mean = sum, mean
Tensor.reshape, Tensor.transpose = reshape, transpose
Tensor.T = property(transpose)
