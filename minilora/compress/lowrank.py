"""Layers made of thin factors, and the recipes that put them into a model."""

from fnmatch import fnmatchcase

import numpy as np

from .. import ops
from ..nn import Linear, Parameter
from ..surgery import as_patterns, plain, put_all
from .factor import rank_for_energy, root_of, truncated_svd, tucker, weighted_svd
from .observe import by_data

# ------------------------------------------------------------------ layers


class LowRankLinear(Linear):
    """y = (x @ right.T) @ left.T + bias: a linear layer of rank r, in r (d_in + d_out) numbers.

    Args:
        left, right: arrays (d_out, r) and (r, d_in), as `truncated_svd` gives them.
        bias: an array (d_out,) or None.
    """

    def __init__(self, left, right, bias=None):
        sizes = left.shape, right.shape, left.shape[:1] if bias is None else bias.shape
        if [*map(len, sizes)] != [2, 2, 1] or sizes[0] != sizes[2] + sizes[1][:1]:
            raise ValueError(f"left, right, bias are {sizes}; expected (m, r), (r, n), (m,)")
        self.left, self.right = Parameter(left), Parameter(right)
        self.bias = None if bias is None else Parameter(bias)

    @property
    def shape(self):
        return self.left.shape[0], self.right.shape[1]

    def dense(self):
        return self.left.data @ self.right.data  # (d_out, d_in)

    def config(self):
        return {"kind": "LowRankLinear"}

    def arrays(self):
        """Everything stored, by name: left, right and bias."""
        return {name: p.data for name, p in self.named_parameters()}

    @classmethod
    def restore(cls, arrays, config, dtype):
        """The layer that `arrays()` came from, in a dtype; an error if they do not fit."""
        return cls(**{name: a.astype(dtype) for name, a in arrays.items()})

    def forward(self, x):
        h = ops.linear(x, self.right)  # (…, d_in) -> (…, r)
        return ops.linear(h, self.left, self.bias)  # (…, r) -> (…, d_out)

    def __repr__(self):
        bias = "" if self.bias is not None else ", no bias"
        return f"LowRankLinear({self.d_in} -> {self.left.shape[1]} -> {self.d_out}{bias})"


class TuckerLinear(Linear):
    """One of n layers that share a Tucker form: W_i = left · (Σ_a mix[i, a] core[a]) · right.

    Args:
        i: which of the n, from 0.
        mix, core, left, right: `Parameter`s (n, r1), (r1, r2, r3), (d_out, r2) and (r3, d_in).
            The n layers hold the same four, so these count once and learn from all.
        bias: an array (d_out,) or None; of this layer alone.
    """

    shape = LowRankLinear.shape

    def __init__(self, i, mix, core, left, right, bias=None):
        self.i, self.mix, self.core, self.left, self.right = i, mix, core, left, right
        self.bias = None if bias is None else Parameter(bias)

    def dense(self):
        inner = np.tensordot(self.mix.data[self.i], self.core.data, 1)  # (r2, r3)
        return self.left.data @ inner @ self.right.data  # (d_out, d_in)

    def forward(self, x):
        r1, r2, r3 = self.core.shape
        own = self.mix[self.i : self.i + 1] @ self.core.reshape(r1, r2 * r3)  # (1, r2 · r3)
        h = ops.linear(x, self.right)  # (…, d_in) -> (…, r3)
        h = ops.linear(h, own.reshape(r2, r3))  # (…, r3) -> (…, r2)
        return ops.linear(h, self.left, self.bias)  # (…, r2) -> (…, d_out)

    def __repr__(self):
        n, (_, r2, r3) = len(self.mix), self.core.shape
        sizes = f"{self.d_in} -> {r3} -> {r2} -> {self.d_out}"
        bias = "" if self.bias is not None else ", no bias"
        return f"TuckerLinear({sizes}{bias}, {self.i} of {n} that share)"


# ------------------------------------------------------------------ recipes


def _alike(layer, kind, *parts):
    """A layer of a kind made of parts, with a copy of the bias of `layer`, that trains like it."""
    new = kind(*parts, None if layer.bias is None else layer.bias.data.copy())
    for name, p in new.named_parameters():
        p.requires_grad = (layer.bias if name == "bias" else layer.weight).requires_grad
    return new


def low_rank(model, r, targets="blocks.*", *, grams=None, in_turn=None):
    """Put two thin layers in place of each linear layer whose name matches.

    They save numbers if r < mn / (m + n).

    Args:
        r: the rank; or a share of energy to keep, above 0 and up to 1.0 (1 is rank 1); or a
            dictionary from patterns to either, which then stand for `targets`; a layer takes the
            first pattern that it matches.
        grams, in_turn: with either the outputs are kept near, by `weighted_svd`, and energy is
            that of the outputs.

    Source: Denton et al. 2014, arXiv 1404.0736; Wang et al. 2024, arXiv 2403.07378.
    """
    ranks = r if isinstance(r, dict) else dict.fromkeys(as_patterns(targets), r)

    def make(name, layer, gram):
        w, rank = layer.weight.data, next(r for p, r in ranks.items() if fnmatchcase(name, p))
        if isinstance(rank, float):
            rank = rank_for_energy(w if gram is None else w @ root_of(gram), rank)
        found = truncated_svd(w, rank) if gram is None else weighted_svd(w, gram, rank)
        return _alike(layer, LowRankLinear, *found)

    return put_all(model, by_data(model, plain(model, tuple(ranks)), make, grams, in_turn))


def tucker_layers(model, ranks, targets="blocks.*.attn.[qkvo]"):
    """Stack equal-shaped layers, (n, d_out, d_in), fit one Tucker and share it between them.

    Together they hold n·r1 + r1·r2·r3 + d_out·r2 + r3·d_in numbers beside their biases. `ranks`
    is (r1, r2, r3), for layers, outputs and inputs; layers are stacked in the model's order.

    Source: Tucker 1966; Kolda & Bader 2009, "Tensor decompositions and applications", section 4.
    """
    layers = plain(model, targets)
    if len({(m.shape, m.weight.requires_grad) for m in layers.values()}) > 1:
        raise ValueError("targets: layers differ in shape, or some are frozen; expected all alike")
    found = tucker(np.stack([m.weight.data for m in layers.values()]), ranks)
    mix, left, right = found.factors
    right = np.ascontiguousarray(right.T)  # (d_in, r3) -> (r3, d_in)
    shared = [*map(Parameter, (mix, found.core, left, right))]
    named = enumerate(layers.items())
    return put_all(model, {n: _alike(m, TuckerLinear, i, *shared) for i, (n, m) in named})
