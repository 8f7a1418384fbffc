"""LoRA, and its relatives DoRA, PiSSA and LoRA+: a low-rank bypass beside a frozen weight."""

from collections import Counter
from fnmatch import fnmatchcase
from numbers import Real

import numpy as np

from .. import ops
from ..nn import Embedding, Linear, Parameter
from ..optim import AdamW
from ..surgery import Wrapper, as_patterns, freeze, replace, unfreeze, wrappers
from ..tensor import Tensor


def is_whole(n):
    """Whether `n` is a whole number, and not `True` or `False`."""
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool)


class LoRA(Wrapper):
    """A linear layer with a low-rank bypass: h = W x + b + scaling · B A x, W and b frozen.

    Args:
        base: a layer with `d_in`, `d_out` and `dense()`, such as `Linear`.
        r: the rank, from 1 to min(d_in, d_out).
        alpha: the strength: `scaling = alpha / r`, so that a change of r needs no new alpha.
        dropout: the share of the bypass's input that is dropped while training.
        rslora: `scaling = alpha / sqrt(r)` instead.
        rng: a `numpy.random.Generator`, for the start of A and for dropout.

    A (r, d_in) starts as N(0, 1 / d_in), so that an input of variance 1 gives an A x of
    variance 1 whatever d_in is. B (d_out, r) starts at zero, so that the bypass starts at
    exactly zero; A must not, or neither would ever get a gradient.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
    arXiv 2312.03732.
    """

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        if not all(hasattr(base, name) for name in ("d_in", "d_out", "dense")):
            raise TypeError(f"base is {base!r}; expected a layer with d_in, d_out and dense()")
        d_out, d_in = base.dense().shape
        self._settle(base, r, alpha, dropout, rslora, rng)
        dtype = base.dense().dtype
        self.A = Parameter((rng.standard_normal((r, d_in)) / d_in**0.5).astype(dtype))
        self.B = Parameter(np.zeros((d_out, r), dtype))

    def _settle(self, base, r, alpha, dropout, rslora, rng):
        shape = base.dense().shape
        if not is_whole(r) or not 1 <= r <= min(shape):
            raise ValueError(
                f"r is {r!r}; expected a whole number from 1 to {min(shape)}, the smaller side "
                f"of a {shape[0]} x {shape[1]} weight"
            )
        if not (isinstance(alpha, Real) and 0 < alpha < np.inf):
            raise ValueError(f"alpha is {alpha!r}; expected a number above 0")
        if not (isinstance(dropout, Real) and 0 <= dropout < 1):
            raise ValueError(f"dropout is {dropout!r}; expected a share from 0 up to, not at, 1")
        self.base, self.r, self.alpha = base, int(r), float(alpha)
        self.dropout, self.rslora, self.rng = float(dropout), bool(rslora), rng

    @property
    def scaling(self):
        """What multiplies B A x: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def config(self):
        """What rebuilds this wrapper around its base, for a file."""
        names = ("r", "alpha", "dropout", "rslora")
        return {"kind": type(self).__name__} | {name: getattr(self, name) for name in names}

    def delta(self):
        """The update that the bypass stands for, as an array in the shape of the weight."""
        return self.scaling * (self.B.data @ self.A.data)  # (d_out, r) @ (r, d_in)

    def dense(self):
        """The weight that the layer acts with, base and bypass together."""
        return self.base.dense() + self.delta()

    def merged(self, requantise=None):
        """A new layer that computes the same, without the bypass: a plain `Linear`.

        Args:
            requantise: only for a base that is quantised, where it must be said: `False` for a
                plain layer, `True` for one with the settings of the base, which rounds the
                update away where it is small against the step of the grid.

        Raises:
            ValueError: if the merged weight is not finite, or `requantise` is not said.
        """
        bias = None if self.base.bias is None else self.base.bias.data.copy()
        return merged_onto(self.base, finite(self.dense()), bias, requantise)

    def _dropped(self, x):
        return ops.dropout(x, self.dropout, self.rng) if self.training and self.dropout else x

    def forward(self, x):
        # scaling goes onto the r numbers between A and B, the fewest there are
        h = ops.linear(self._dropped(x), self.A) * self.scaling  # (…, d_in) -> (…, r)
        return self.base(x) + ops.linear(h, self.B)  # (…, r) -> (…, d_out)

    def __repr__(self):
        return f"{type(self).__name__}(r={self.r}, alpha={self.alpha:g}, base={self.base!r})"


class DoRA(LoRA):
    """LoRA that learns how long each row of the weight is apart from where it points.

    h = m ⊙ (V x) / ‖V‖ + b, with V = W + scaling · B A, one norm and one m for each of the
    d_out rows; m starts as the norms of W, so the layer starts as it was. As in the paper, no
    gradient flows through ‖V‖. Each training step must form V, which costs one more product.

    Source: Liu et al. 2024, arXiv 2402.09353, sections 4.1 and 4.3.
    """

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        super().__init__(base, r, alpha, dropout=dropout, rslora=rslora, rng=rng)
        self.magnitude = Parameter(self._norms(base.dense()))

    @staticmethod
    def _norms(weight):
        return np.sqrt(np.einsum("oi,oi->o", weight, weight))  # (d_out, d_in) -> (d_out,)

    def dense(self):
        """The weight that the layer acts with."""
        v = super().dense()
        return (self.magnitude.data / self._norms(v))[:, None] * v

    def forward(self, x):
        norms = self._norms(super().dense())
        h = ops.linear(self._dropped(x), self.A) * self.scaling  # (…, d_in) -> (…, r)
        y = ops.linear(x, Tensor(self.base.dense())) + ops.linear(h, self.B)  # (…, d_out)
        y = y * (self.magnitude / norms)
        return y if self.base.bias is None else y + self.base.bias


class PiSSA(LoRA):
    """LoRA that starts on the largest singular directions of W, and freezes what is left of it.

    With W = U S Vᵀ cut at r: scaling · B A = U_r S_r V_rᵀ, and the frozen part is W less that.
    The layer starts as it was, to rounding. `base` stays the whole W, so that the adapter can be
    taken off; a second copy of the weight, `residual`, is what the forward pass uses.

    Source: Meng et al. 2024, arXiv 2404.02948, section 3.
    """

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        super().__init__(base, r, alpha, dropout=dropout, rslora=rslora, rng=rng)
        weight = base.dense()
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(s[:r] / self.scaling).astype(weight.dtype)
        self.A.data[...] = root[:, None] * vt[:r]  # (r, d_in)
        self.B.data[...] = u[:, :r] * root  # (d_out, r)
        self.residual = Tensor(weight - super().delta())

    def delta(self):
        """How far the layer has moved from W, as an array (d_out, d_in); its rank is up to 2r."""
        return self.dense() - self.base.dense()

    def dense(self):
        """The weight that the layer acts with."""
        return self.residual.data + super().delta()

    def forward(self, x):
        h = ops.linear(self._dropped(x), self.A) * self.scaling  # (…, d_in) -> (…, r)
        return ops.linear(x, self.residual, self.base.bias) + ops.linear(h, self.B)  # (…, d_out)


class LoRAEmbedding(LoRA):
    """A table (n, d) with a low-rank bypass: row i is E[i] + scaling · B A[:, i].

    The one-hot input picks a column of A, so the sides swap: A (r, n) starts at zero and
    B (d, r) as N(0, 1 / r), so that an update is as large as A is, whatever r.

    Source: the convention of the LoRA authors' code for embeddings.
    """

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        if dropout:
            raise ValueError(f"dropout is {dropout!r}; expected 0 for an embedding")
        if not isinstance(base, Embedding):
            raise TypeError(f"base is {base!r}; expected an Embedding")
        n, d = base.dense().shape
        self._settle(base, r, alpha, dropout, rslora, rng)
        dtype = base.dense().dtype
        self.A = Parameter(np.zeros((r, n), dtype))
        self.B = Parameter((rng.standard_normal((d, r)) / r**0.5).astype(dtype))

    def delta(self):
        """The update that the bypass stands for, as an array (n, d)."""
        return super().delta().T  # (d, n) -> (n, d)

    def merged(self):
        """A new plain `Embedding` that looks up the same rows."""
        return like(self.base, Embedding.of(finite(self.dense())))

    def forward(self, ids):
        h = ops.embedding(ops.transpose(self.A), ids) * self.scaling  # (…) -> (…, r)
        return self.base(ids) + ops.linear(h, self.B)  # (…, r) -> (…, d)


def finite(weight):
    """`weight`, or a ValueError if some of it is nan or infinite."""
    if not np.isfinite(weight).all():
        raise ValueError("the merged weight would hold a nan or an infinity; training diverged")
    return weight


def like(base, layer):
    """`layer`, frozen where `base` is; a base without that parameter counts as frozen."""
    for name, p in layer.named_parameters():
        p.requires_grad = getattr(getattr(base, name, None), "requires_grad", False)
    return layer


def merged_onto(base, weight, bias, requantise):
    """A new layer of this weight and bias in place of `base`: plain, or quantised as it was."""
    if requantise is None and hasattr(base, "requantised"):
        raise ValueError(
            "the base is quantised; say requantise=False for a plain layer, or requantise=True for "
            "a quantised one, which loses what is small against the step of its grid"
        )
    layer = like(base, Linear.of(weight, bias))
    return base.requantised(layer) if requantise else layer


def check_plain(model):
    """Raise a ValueError if the model carries an adapter already."""
    if wrappers(model):
        raise ValueError("this model carries an adapter already; merge or detach it first")


def lora(
    model,
    r=4,
    alpha=8.0,
    targets="blocks.*.attn.[qv]",
    *,
    dropout=0.0,
    rslora=False,
    variant=LoRA,
    rng,
):
    """Freeze the model and put a LoRA bypass on the layers whose names match.

    Args:
        model: changed in place.
        r: the rank, or a dictionary from patterns to ranks, which then stand for `targets`; a
            layer takes the first pattern that it matches.
        alpha, dropout, rslora, rng: as for `LoRA`.
        targets: one pattern or several for `Linear` and `Embedding` layers; `blocks.*` is every
            linear layer of the blocks, `*` the head and the tables too.
        variant: `LoRA`, `DoRA` or `PiSSA`, or a function that makes one of them of a layer; all
            but `LoRA` are for linear layers only.

    Returns:
        The model.

    Raises:
        LookupError: if a pattern matches no layer.
        ValueError: for a bad `r`, `alpha` or `dropout`, for a layer whose weight is tied to
            another's, or for a model that carries an adapter already. The model is left as it was.
    """
    check_plain(model)
    ranks = r if isinstance(r, dict) else dict.fromkeys(as_patterns(targets), r)
    tied, names = _tied(model), {id(m): name for name, m in model.named_modules()}

    def wrap(layer):
        weight = id(getattr(layer, "weight", None))  # a compressed layer has none
        if weight in tied:
            raise ValueError(
                f"the weight of {layer!r} is tied: {' and '.join(tied[weight])} are one "
                "parameter, so merging a bypass on one side would move the other; leave it out of "
                "targets, or untie it"
            )
        table = isinstance(layer, Embedding)
        if table and variant is not LoRA:
            raise ValueError(f"variant is {variant.__name__}; expected LoRA for {layer!r}")
        rank = next(r for pattern, r in ranks.items() if fnmatchcase(names[id(layer)], pattern))
        kind = LoRAEmbedding if table else variant
        return kind(layer, rank, alpha, dropout=dropout, rslora=rslora, rng=rng)

    hits = replace(model, tuple(ranks), wrap, kind=(Linear, Embedding))
    freeze(model)
    parts = ("A", "B", "magnitude") if variant is DoRA else ("A", "B")
    return unfreeze(model, [f"{name}.{part}" for name in hits for part in parts])


def lora_plus(model, lr, ratio=16.0, **kwargs):
    """An `AdamW` in which every B learns `ratio` times as fast as the rest: LoRA+.

    Args:
        model: one that `lora` made.
        lr: of A. ratio: of B's learning rate to that. kwargs: for `AdamW`.

    Source: Hayou, Ghosh & Yu 2024, arXiv 2402.12354, section 4.
    """
    trained = model.trainable()
    factors = [ratio if name.endswith(".B") else 1.0 for name in trained]
    return AdamW(trained.values(), lr, factors=factors, **kwargs)


def _tied(model):
    """The names under which each shared parameter stands, by its id."""
    names = [
        (id(p), f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        for name, p in vars(module).items()
        if isinstance(p, Parameter)
    ]
    times = Counter(key for key, _ in names)
    return {k: [name for key, name in names if key == k] for k, n in times.items() if n > 1}
