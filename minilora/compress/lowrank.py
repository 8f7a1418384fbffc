"""Layers made of thin factors, and the recipes that put them into a model."""

from fnmatch import fnmatchcase

import numpy as np

from .. import ops
from ..nn import Linear, Parameter
from ..surgery import as_patterns, plain, put_all
from .factor import rank_for_energy, root_of, truncated_svd, tucker, weighted_svd

# ------------------------------------------------------------------ layers


class LowRankLinear(Linear):
    """y = (x @ right.T) @ left.T + bias: a linear layer of rank r, in r (d_in + d_out) numbers.

    Args:
        left, right: arrays (d_out, r) and (r, d_in), as `truncated_svd` gives them.
        bias: an array (d_out,) or None.
    """

    def __init__(self, left, right, bias=None):
        shapes = left.shape, right.shape, left.shape[:1] if bias is None else bias.shape
        if [len(s) for s in shapes] != [2, 2, 1] or shapes[0] != (*shapes[2], shapes[1][0]):
            raise ValueError(
                f"left, right, bias have {shapes}; expected (d_out, r), (r, d_in), (d_out,)"
            )
        self.left, self.right = Parameter(left), Parameter(right)
        self.bias = None if bias is None else Parameter(bias)

    @property
    def shape(self):
        """(d_out, d_in) of the weight."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self):
        """The weight that the factors stand for, a plain array (d_out, d_in)."""
        return self.left.data @ self.right.data

    def config(self):
        """What `restore` needs beside `arrays`, for a file."""
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
        """The weight that the factors stand for, a plain array (d_out, d_in)."""
        inner = np.tensordot(self.mix.data[self.i], self.core.data, 1)  # (r2, r3)
        return self.left.data @ inner @ self.right.data

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


def _with_bias(new, layer):
    """`new` with a copy of the bias of `layer`, frozen where that is."""
    if layer.bias is not None:
        new.bias = Parameter(layer.bias.data.copy(), layer.bias.requires_grad)
    return new


def low_rank(model, r, targets="blocks.*", *, grams=None):
    """Put two thin layers in place of each linear layer whose name matches.

    Factors train where the weight trained. They save numbers if r < mn / (m + n).

    Args:
        model: changed in place.
        r: the rank; or a share of energy to keep, above 0 and up to 1.0 (1 is rank 1); or a
            dictionary from patterns to either, which then stand for `targets`; a layer takes the
            first pattern that it matches.
        targets: one pattern or several for plain linear layers.
        grams: what `observe` gave: then the outputs are kept near, by `weighted_svd`, and energy
            is that of the outputs.

    Source: Denton et al. 2014, arXiv 1404.0736; Wang et al. 2024, arXiv 2403.07378.
    """
    ranks = r if isinstance(r, dict) else dict.fromkeys(as_patterns(targets), r)
    fresh = {}
    for name, layer in plain(model, tuple(ranks)).items():
        w, gram = layer.weight.data, None if grams is None else grams[name]
        rank = next(r for pattern, r in ranks.items() if fnmatchcase(name, pattern))
        if isinstance(rank, float):
            rank = rank_for_energy(w if gram is None else w @ root_of(gram), rank)
        found = truncated_svd(w, rank) if gram is None else weighted_svd(w, gram, rank)
        fresh[name] = _with_bias(LowRankLinear(*found), layer)
        for p in (fresh[name].left, fresh[name].right):
            p.requires_grad = layer.weight.requires_grad
    return put_all(model, fresh)


def tucker_layers(model, ranks, targets="blocks.*.attn.[qkvo]"):
    """Stack equal-shaped layers, (n, d_out, d_in), fit one Tucker and share it between them.

    Together they hold n·r1 + r1·r2·r3 + d_out·r2 + r3·d_in numbers beside their biases.

    Args:
        model: changed in place; the factors train if the weights did.
        ranks: (r1, r2, r3), for layers, outputs and inputs.
        targets: one pattern or several for plain linear layers, stacked in the model's order.

    Source: Tucker 1966; Kolda & Bader 2009, "Tensor decompositions and applications", section 4.
    """
    layers = plain(model, targets)
    weights = [layer.weight for layer in layers.values()]
    if len({(w.shape, w.requires_grad) for w in weights}) > 1:
        raise ValueError("targets: layers differ in shape, or some are frozen; expected all alike")
    found = tucker(np.stack([w.data for w in weights]), ranks)  # of (n, d_out, d_in)
    mix, left, right = found.factors
    shared = [
        Parameter(part, weights[0].requires_grad)
        for part in (mix, found.core, left, np.ascontiguousarray(right.T))  # right (r3, d_in)
    ]
    named = enumerate(layers.items())
    return put_all(model, {n: _with_bias(TuckerLinear(i, *shared), m) for i, (n, m) in named})
