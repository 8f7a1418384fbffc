"""Arithmetic, shapes and matrix products, and the helpers that every primitive uses."""

import builtins
from contextvars import ContextVar
from math import prod

import numpy as np

from ..tensor import Tensor, record, within

try:  # the browser edition's own: NumPy has no BLAS there
    from minilora_gemm import matmul as _matmul
except ImportError:
    _matmul = np.matmul

# ------------------------------------------------------------------ helpers


def as_pair(a, b):
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


def once(f):
    """`f`, computed once for the edges of one node, which `backward` calls with the same `g`."""
    last = [None, None]

    def call(g):
        if last[0] is not g:
            last[:] = g, f(g)
        return last[1]

    return call


_gemm_log = ContextVar("gemm_log", default=None)


def count_gemms():
    """Inside this block, list every matrix product of the engine as (batch, m, k, n).

    Each entry stands for `batch` products (m, k) @ (k, n), that is 2·batch·m·k·n FLOPs.
    """
    return within(_gemm_log, [])


def flops(log):
    """The FLOPs of a list of matrix products: a multiplication and an addition for each pair."""
    return 2 * builtins.sum(batch * m * k * n for batch, m, k, n in log)


def gemm(a, b):
    """Every matrix product goes through here, so that it can be counted."""
    log = _gemm_log.get()
    if log is not None:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        log.append((prod(batch), a.shape[-2], a.shape[-1], b.shape[-1]))
    return _matmul(a, b)


def shape_error(op, a, b, expected):
    """An error that names the operation and both shapes, and says what was expected."""
    return ValueError(f"{op}: shapes {a} and {b} do not fit; {expected}")


# ------------------------------------------------------------------ arithmetic


def add(a, b):
    """a + b, with broadcasting."""
    a, b = as_pair(a, b)
    sa, sb = a.shape, b.shape
    return record(
        a.data + b.data,
        (a, lambda g: _unbroadcast(g, sa)),
        (b, lambda g: _unbroadcast(g, sb)),
    )


def mul(a, b):
    """a · b element by element, with broadcasting."""
    a, b = as_pair(a, b)
    xa, xb = a.data, b.data
    sa, sb = a.shape, b.shape
    return record(
        xa * xb,
        (a, lambda g: _unbroadcast(g * xb, sa)),
        (b, lambda g: _unbroadcast(g * xa, sb)),
    )


def sub(a, b):
    """a - b, with broadcasting."""
    a, b = as_pair(a, b)
    return add(a, mul(b, -1))


def div(a, b):
    """a / b, with broadcasting."""
    a, b = as_pair(a, b)
    return mul(a, power(b, -1))


def power(x, n):
    """x ** n for a constant number n."""
    if isinstance(n, Tensor):
        raise TypeError("power: the exponent must be a plain number, not a Tensor")
    a, n = x.data, np.asarray(n).item()  # a NumPy scalar would decide the dtype of the result
    return record(
        _power(a, n), (x, lambda g: g * (n * _power(a, n - 1)) if n else np.zeros_like(g))
    )


def _power(a, n):
    return 1 / np.sqrt(a) if n == -0.5 else a**n  # -∞ at -0, as the root has -0 there


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
    off = x.data <= 0  # NaN is not: it goes through, both ways
    return record(np.where(off, 0, x.data), (x, lambda g: np.where(off, 0, g)))


# ------------------------------------------------------------------ shape


def reshape(x, *shape):
    """The same numbers in another shape; `-1` once for what is left over."""
    old = x.shape
    return record(x.data.reshape(*shape), (x, lambda g: g.reshape(old)))


def transpose(x, *axes):
    """The axes in another order, one by one or as a tuple; reversed if none is given."""
    axes = axes[0] if axes and isinstance(axes[0], (tuple, list)) else axes
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
    m = len(rows.data)
    front = np.broadcast_to(rows.data, (len(x.data), *rows.shape))  # (m, d) -> (B, m, d)
    return record(
        np.concatenate([front, x.data], axis=1),  # (B, m + T, d)
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
    a, b = as_pair(a, b)
    xa, xb = a.data, b.data
    if xa.ndim < 2 or xb.ndim < 2 or xa.shape[-1] != xb.shape[-2]:
        raise shape_error("matmul", a.shape, b.shape, "expected (…, m, k) and (…, k, n)")
    sa, sb = a.shape, b.shape
    return record(
        gemm(xa, xb),  # (…, m, n)
        (a, lambda g: _unbroadcast(gemm(g, xb.swapaxes(-1, -2)), sa)),
        (b, lambda g: _unbroadcast(gemm(xa.swapaxes(-1, -2), g), sb)),
    )


def linear(x, weight, bias=None):
    """x @ weight.T + bias, as one 2-D matrix product each way: x (…, d_in) to (…, d_out).

    The weight is (d_out, d_in), the bias (d_out,) or None.
    """
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in:
        raise shape_error("linear", x.shape, weight.shape, "expected (…, d_in) and (d_out, d_in)")
    if x.dtype != weight.dtype:
        raise TypeError(f"linear: x is {x.dtype} and weight {weight.dtype}; convert one first")
    old, w = x.shape, weight.data
    x2 = x.data.reshape(-1, d_in)  # (…, d_in) -> (N, d_in)
    y = gemm(x2, w.T)  # (N, d_in) @ (d_in, d_out) -> (N, d_out)
    if bias is not None:
        y += bias.data
    edges = [
        (x, lambda g: gemm(g.reshape(-1, d_out), w).reshape(old)),
        (weight, lambda g: gemm(g.reshape(-1, d_out).T, x2)),
    ]
    if bias is not None:
        edges.append((bias, lambda g: g.reshape(-1, d_out).sum(axis=0)))
    return record(y.reshape(*old[:-1], d_out), *edges)


def embedding(weight, ids):
    """Row `ids` of `weight`: (V, d) and integers (…) to (…, d)."""
    ids = np.asarray(ids)
    v, d = weight.shape
    if ids.size and (ids.min() < 0 or ids.max() >= v):  # NumPy would take -1 for the last row
        raise IndexError(f"ids run from {ids.min()} to {ids.max()}; expected 0 to {v - 1}")

    def vjp(g):
        # Sorted, equal ids stand together, so each row's gradient is one sum over a run.
        order = np.argsort(ids, axis=None, kind="stable")
        rows, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        dw = np.zeros((v, d), g.dtype)
        dw[rows] = np.add.reduceat(g.reshape(-1, d)[order], starts, axis=0)
        return dw

    return record(weight.data[ids], (weight, vjp))
