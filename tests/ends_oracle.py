"""Values and gradients at the ends of their range against PyTorch: infinity, zero, NaN.

    pip install torch && python tests/ends_oracle.py

Exit code 1 and a line for each difference. What it finds is a table in `tests/test_ops.py`. Left
out, as PyTorch has answers of its own: a mean that overflows in LayerNorm (it has NaN, we have the
formula), scores that are all -inf in attention (it has zeros, as for a row that is masked whole).
"""

import itertools
import sys

import numpy as np

from minilora import Tensor, ops

ENDS = [-np.inf, -1e30, -1.0, -0.0, 0.0, 1.0, 1e30, np.inf, np.nan]
ROWS = [[0, 0, 0], [np.inf, 0, 0], [-np.inf, 0, 1], [-np.inf] * 3, [np.nan, 0, 0]]
ROWS += [[1e308, -1e308, 0], [np.inf, np.inf, 0], [1e200, 0, -1e200]]
POWERS = (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3)


def cases():
    """(name, ours, theirs, arrays) for each primitive that has an end."""
    import torch
    from torch.nn import functional as F

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, (3,), weight, bias)

    def attention(*qkv):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            more = [x[None, None] for x in qkv]  # (T, d) -> (1, 1, T, d)
            return F.scaled_dot_product_attention(*more, is_causal=True)[0, 0]

    ends, pairs = np.array(ENDS), np.array(list(itertools.product(ENDS, ENDS))).T
    for name in ("exp", "log", "tanh", "relu"):
        yield name, getattr(ops, name), getattr(torch, name), [ends]
    yield "gelu", ops.gelu, lambda x: F.gelu(x, approximate="tanh"), [ends]
    for n in POWERS:
        yield f"power {n}", lambda x, n=n: x**n, lambda x, n=n: x**n, [ends]
    for name, f in {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
    }.items():
        yield name, f, f, pairs
    for row in np.array(ROWS)[:, None]:  # (1, 3)
        ones, zeros, other = np.ones(3), np.zeros((2, 3)), np.array([[0.0, 1, 2]])
        q, k = np.array([[0.5, 1, 0], [1, 0, 0]]), np.concatenate([row, other])
        yield "softmax", ops.softmax, lambda x: torch.softmax(x, -1), [row]
        for hit in (0, 1):
            yield (
                "cross_entropy",
                lambda x, hit=hit: ops.cross_entropy(x, np.array([hit])),
                lambda x, hit=hit: F.cross_entropy(x, torch.tensor([hit])),
                [row],
            )
        if np.abs(row).max() != 1e308:
            yield "layer_norm", ops.layer_norm, layer_norm, [row, ones, 0 * ones]
        yield "sum", ops.sum, torch.sum, [row]
        yield "mean", ops.mean, torch.mean, [row]
        yield "matmul", ops.matmul, torch.matmul, [row, zeros.T]
        yield "linear", ops.linear, F.linear, [row, zeros]
        yield "attention", ops.attention, attention, [q, np.ones((2, 3)), k]
        if -np.inf not in row:
            yield "attention", ops.attention, attention, [q, k, np.ones((2, 3))]


def differences():
    """A line for each value or gradient that is not what PyTorch gives."""
    import torch

    for name, ours, theirs, arrays in cases():
        for g in (1.0, 0.0) if name == "cross_entropy" else (1.0, 0.0, np.inf):
            mine = [Tensor(a, requires_grad=True) for a in arrays]
            other = [torch.tensor(a, requires_grad=True) for a in arrays]
            y, z = ours(*mine), theirs(*other)
            y.backward(np.full(y.shape, g))
            z.backward(torch.full(z.shape, g, dtype=z.dtype))
            found = [
                (y.data, z.detach()),
                *((a.grad, b.grad) for a, b in zip(mine, other, strict=True)),
            ]
            for i, (a, b) in enumerate(found):
                if not np.allclose(a, b.numpy(), rtol=1e-9, atol=0, equal_nan=True):
                    what = f"gradient {i} for {g}" if i else "value"
                    yield f"{name}, {what}: {arrays}\n  here  {a}\n  torch {b.numpy()}"


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        found = list(differences())
    print("\n".join(found) or "all the same")
    sys.exit(bool(found))
