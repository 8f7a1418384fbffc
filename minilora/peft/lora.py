"""LoRA, and its relatives DoRA, PiSSA and LoRA+: a low-rank bypass beside a frozen weight."""

from fnmatch import fnmatchcase

import numpy as np

from .. import ops
from ..nn import Embedding, Linear, Parameter, check_rng
from ..optim import AdamW
from ..surgery import Wrapper, as_patterns, plain, wear
from ..tensor import Tensor


def check_rank(r, shape):
    """Raise unless a matrix of this shape can have a factor of this rank."""
    if r not in range(1, min(shape) + 1):
        side = f"{min(shape)}, the smaller side of a {shape[0]} x {shape[1]} weight"
        raise ValueError(f"r is {r!r}; expected a whole number from 1 to {side}")


class LoRA(Wrapper):
    """A linear layer with a low-rank bypass: h = W x + b + scaling · B A x, W and b frozen.

    Args:
        base: a layer with `d_in`, `d_out` and `dense()`, such as `Linear`.
        r: the rank, from 1 to min(d_in, d_out).
        alpha: the strength: `scaling = alpha / r`, so that a change of r needs no new alpha.
        dropout: the share of the bypass's input that is dropped while training.
        rslora: `scaling = alpha / sqrt(r)` instead.

    A (r, d_in) starts as N(0, 1 / d_in), so that an input of variance 1 gives an A x of
    variance 1 whatever d_in is. B (d_out, r) starts at zero, so that the bypass starts at
    exactly zero; A must not, or neither would ever get a gradient.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
    arXiv 2312.03732.
    """

    settings = ("r", "alpha", "dropout", "rslora")

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        weight = base.dense()
        check_rank(r, weight.shape)
        if not 0 < alpha < np.inf or not 0 <= dropout < 1:
            raise ValueError(f"alpha is {alpha}, dropout {dropout}; expected above 0, and 0 to 1")
        self.base, self.r, self.alpha = base, int(r), float(alpha)
        self.dropout, self.rslora, self.rng = float(dropout), bool(rslora), check_rng(rng)
        self.start(weight)

    def start(self, weight):
        """Make A and B for a base of this weight."""
        d_out, d_in = weight.shape
        a = self.rng.standard_normal((self.r, d_in)) / d_in**0.5
        self.A = Parameter(a.astype(weight.dtype))
        self.B = Parameter(np.zeros((d_out, self.r), weight.dtype))

    def fill(self, u, s, vt):
        """Set scaling · B A to U S Vᵀ, given (d_out, r), (r,) and (r, d_in), each side the root.

        A direction of no length, s = 0 to rounding, keeps its start, A random and B zero: with
        both sides at zero it could never learn.
        """
        there = s > s.max() * np.finfo(u.dtype).eps * max(len(u), vt.shape[1])
        root = np.sqrt(s / self.scaling).astype(self.A.dtype)
        self.A.data[there] = (root[:, None] * vt)[there]  # (r, d_in)
        self.B.data[:, there] = (u * root)[:, there]  # (d_out, r)

    @property
    def scaling(self):
        """What multiplies B A x: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def delta(self):
        """The update that the bypass stands for, as an array in the shape of the weight."""
        return self.scaling * (self.B.data @ self.A.data)  # (d_out, r) @ (r, d_in)

    def dense(self):
        return self.base.dense() + self.delta()

    def inner(self, x):
        """scaling · A x: scaling goes onto the r numbers between A and B, the fewest there are."""
        if self.training and self.dropout:
            x = ops.dropout(x, self.dropout, self.rng)
        return ops.linear(x, self.A) * self.scaling  # (…, d_in) -> (…, r)

    def forward(self, x):
        h = self.inner(x)
        return self.base(x) + ops.linear(h, self.B)  # (…, r) -> (…, d_out)

    def __repr__(self):
        return f"{type(self).__name__}(r={self.r}, alpha={self.alpha:g}, base={self.base!r})"


class DoRA(LoRA):
    """LoRA that learns how long each row of the weight is apart from where it points.

    h = m ⊙ (V x) / ‖V‖ + b, with V = W + scaling · B A, one norm and one m for each of the
    d_out rows; m starts as the norms of W, so the layer starts as it was. As in the paper, no
    gradient flows through ‖V‖. Each training step must form V, which costs one more product.

    A row of zeros, as pruning leaves them, points nowhere: its norm is taken for 1 throughout, so
    it starts as it was and learns as LoRA's row does.

    Source: Liu et al. 2024, arXiv 2402.09353, sections 4.1 and 4.3.
    """

    def start(self, weight):
        """Make A, B and m."""
        super().start(weight)
        self.nowhere = np.zeros(len(weight), bool)
        self.nowhere = self.norms(weight) == 0  # (d_out,)
        self.magnitude = Parameter(self.norms(weight))

    def norms(self, v):
        """The length of each row of V (d_out, d_in), or 1 where W has a row of zeros."""
        lengths = np.sqrt(np.einsum("oi,oi->o", v, v))  # (d_out, d_in) -> (d_out,)
        return np.where(self.nowhere, 1, lengths).astype(v.dtype)

    def dense(self):
        v = super().dense()
        return (self.magnitude.data / self.norms(v))[:, None] * v

    def forward(self, x):
        w, h = self.base.dense(), self.inner(x)
        y = ops.linear(x, Tensor(w)) + ops.linear(h, self.B)  # (…, d_in), (…, r) -> (…, d_out)
        y = y * (self.magnitude / self.norms(w + self.delta()))
        return y if self.base.bias is None else y + self.base.bias


class PiSSA(LoRA):
    """LoRA that starts on the largest singular directions of W, and freezes what is left of it.

    With W = U S Vᵀ cut at r: scaling · B A = U_r S_r V_rᵀ, and the frozen part is W less that.
    The layer starts as it was, to rounding. `base` stays the whole W, so that the adapter can be
    taken off; a second copy of the weight, `residual`, is what the forward pass uses. Where W has
    fewer than r directions, the others start as LoRA's do.

    Source: Meng et al. 2024, arXiv 2404.02948, section 3.
    """

    def start(self, weight):
        """Make A and B of the largest singular directions, and the residual of the others."""
        super().start(weight)
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        self.fill(u[:, : self.r], s[: self.r], vt[: self.r])
        self.residual = Tensor(weight - super().delta())

    def delta(self):
        """How far the layer has moved from W, as an array (d_out, d_in); its rank is up to 2r."""
        return self.dense() - self.base.dense()

    def dense(self):
        return self.residual.data + super().delta()

    def forward(self, x):
        h = self.inner(x)
        return ops.linear(x, self.residual, self.base.bias) + ops.linear(h, self.B)  # (…, d_out)


class LoRAEmbedding(LoRA):
    """A table (n, d) with a low-rank bypass: row i is E[i] + scaling · B A[:, i]. No dropout.

    The one-hot input picks a column of A, so the sides swap: A (r, n) starts at zero and
    B (d, r) as N(0, 1 / r), so that an update is as large as A is, whatever r.

    Source: the convention of the LoRA authors' code for embeddings.
    """

    def start(self, weight):
        """Make A and B."""
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}; expected 0 for a table")
        n, d = weight.shape
        self.A = Parameter(np.zeros((self.r, n), weight.dtype))
        b = self.rng.standard_normal((d, self.r)) / self.r**0.5
        self.B = Parameter(b.astype(weight.dtype))

    def delta(self):
        """The update that the bypass stands for, as an array (n, d)."""
        return super().delta().T  # (d, n) -> (n, d)

    def forward(self, ids):
        h = ops.embedding(ops.transpose(self.A), ids) * self.scaling  # (…) -> (…, r)
        return self.base(ids) + ops.linear(h, self.B)  # (…, r) -> (…, d)


def lora(model, r=4, alpha=8.0, targets="blocks.*.attn.[qv]", *, variant=LoRA, **settings):
    """Freeze the model and put a LoRA bypass on the layers whose names match.

    Args:
        r: the rank, or a dictionary from patterns to ranks, which then stand for `targets`; a
            layer takes the first pattern that it matches.
        alpha, settings: as for `LoRA`; among them `rng`, which it needs.
        targets: `Linear` and `Embedding` layers; `blocks.*` is every linear layer of the blocks,
            `*` the head and the tables too.
        variant: `LoRA`, `DoRA` or `PiSSA`, or a function that makes one of them of a layer; all
            but `LoRA` are for linear layers only.
    """
    ranks = r if isinstance(r, dict) else dict.fromkeys(as_patterns(targets), r)
    fresh = {}
    for name, layer in plain(model, tuple(ranks), (Linear, Embedding)).items():
        kind = LoRAEmbedding if isinstance(layer, Embedding) else variant
        if kind is LoRAEmbedding and variant is not LoRA:
            raise ValueError(f"variant is {variant.__name__}; expected LoRA for {layer!r}")
        rank = next(r for pattern, r in ranks.items() if fnmatchcase(name, pattern))
        fresh[name] = kind(layer, rank, alpha, **settings)
    return wear(model, fresh)


def lora_plus(model, lr, ratio=16.0, **kwargs):
    """An `AdamW` in which every B learns `ratio` times as fast as the rest: LoRA+.

    `lr` is that of A; `kwargs` are for `AdamW`.

    Source: Hayou, Ghosh & Yu 2024, arXiv 2402.12354.
    """
    trained = model.trainable()
    factors = [ratio if name.endswith(".B") else 1.0 for name in trained]
    return AdamW(trained.values(), lr, factors=factors, **kwargs)
