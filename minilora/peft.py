"""Parameter-efficient fine-tuning. Each recipe freezes the model, then lets a little train."""

from collections import Counter

import numpy as np

from . import ops
from .nn import Embedding, Linear, Module, Parameter
from .surgery import freeze, replace, unfreeze, wrappers


class LoRA(Module):
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
        d_out, d_in = base.dense().shape
        self._settle(base, r, alpha, dropout, rslora, rng)
        dtype = base.dense().dtype
        self.A = Parameter((rng.standard_normal((r, d_in)) / d_in**0.5).astype(dtype))
        self.B = Parameter(np.zeros((d_out, r), dtype))

    def _settle(self, base, r, alpha, dropout, rslora, rng):
        shape = base.dense().shape
        if not isinstance(r, (int, np.integer)) or not 1 <= r <= min(shape):
            raise ValueError(
                f"r is {r!r}; expected a whole number from 1 to {min(shape)}, the smaller side "
                f"of a {shape[0]} x {shape[1]} weight"
            )
        if not (np.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha is {alpha!r}; expected a number above 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; expected a share from 0 up to, not at, 1")
        self.base, self.r, self.alpha = base, int(r), float(alpha)
        self.dropout, self.rslora, self.rng = float(dropout), bool(rslora), rng

    @property
    def scaling(self):
        """What multiplies B A x: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    @property
    def d_in(self):
        """Features that come in."""
        return self.base.d_in

    @property
    def d_out(self):
        """Features that go out."""
        return self.base.d_out

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

    def merged(self):
        """A new plain `Linear` that computes the same, without the bypass.

        Raises:
            ValueError: if the merged weight is not finite.
        """
        bias = None if self.base.bias is None else self.base.bias.data.copy()
        return _like(self.base, Linear.of(self._finite(), bias))

    def _finite(self):
        weight = self.dense()
        if not np.isfinite(weight).all():
            raise ValueError("the merged weight would hold a nan or an infinity; training diverged")
        return weight

    def _dropped(self, x):
        return ops.dropout(x, self.dropout, self.rng) if self.training and self.dropout else x

    def forward(self, x):
        # scaling goes onto the r numbers between A and B, the fewest there are
        h = ops.linear(self._dropped(x), self.A) * self.scaling  # (…, d_in) -> (…, r)
        return self.base(x) + ops.linear(h, self.B)  # (…, r) -> (…, d_out)

    def __repr__(self):
        return f"{type(self).__name__}(r={self.r}, alpha={self.alpha:g}, base={self.base!r})"


class LoRAEmbedding(LoRA):
    """A table (n, d) with a low-rank bypass: row i is E[i] + scaling · B A[:, i].

    The one-hot input picks a column of A, so the sides swap: A (r, n) starts at zero and
    B (d, r) as N(0, 1 / r), so that an update is as large as A is, whatever r.

    Source: the convention of the LoRA authors' code for embeddings.
    """

    def __init__(self, base, r, alpha=8.0, *, dropout=0.0, rslora=False, rng):
        if dropout:
            raise ValueError(f"dropout is {dropout!r}; expected 0 for an embedding")
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
        return _like(self.base, Embedding.of(self._finite()))

    def forward(self, ids):
        h = ops.embedding(ops.transpose(self.A), ids) * self.scaling  # (…) -> (…, r)
        return self.base(ids) + ops.linear(h, self.B)  # (…, r) -> (…, d)


def _like(base, layer):
    """`layer`, frozen where `base` is."""
    for name, p in layer.named_parameters():
        p.requires_grad = getattr(base, name).requires_grad
    return layer


def lora(model, r=4, alpha=8.0, targets="blocks.*.attn.[qv]", *, dropout=0.0, rslora=False, rng):
    """Freeze the model and put a LoRA bypass on the layers whose names match.

    Args:
        model: changed in place.
        r, alpha, dropout, rslora, rng: as for `LoRA`.
        targets: one pattern or several for `Linear` and `Embedding` layers; `blocks.*` is every
            linear layer of the blocks, `*` the head and the tables too.

    Returns:
        The model.

    Raises:
        LookupError: if a pattern matches no layer.
        ValueError: for a bad `r`, `alpha` or `dropout`, for a layer whose weight is tied to
            another's, or for a model that carries an adapter already. The model is left as it was.
    """
    if wrappers(model):
        raise ValueError("this model carries an adapter already; merge or detach it first")
    tied = _tied(model)

    def wrap(layer):
        if id(layer.weight) in tied:
            raise ValueError(
                f"the weight of {layer!r} is tied: {' and '.join(tied[id(layer.weight)])} are one "
                "parameter, so merging a bypass on one side would move the other; leave it out of "
                "targets, or untie it"
            )
        kind = LoRAEmbedding if isinstance(layer, Embedding) else LoRA
        return kind(layer, r, alpha, dropout=dropout, rslora=rslora, rng=rng)

    replace(model, targets, wrap, kind=(Linear, Embedding))
    freeze(model)
    for wrapper in wrappers(model).values():
        wrapper.A.requires_grad = wrapper.B.requires_grad = True
    return model


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


def full(model):
    """Full fine-tuning: everything trains. Returns the model."""
    return unfreeze(model)


WRAPPERS = {"LoRA": LoRA, "LoRAEmbedding": LoRAEmbedding}  # what a file may ask for
