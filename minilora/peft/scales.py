"""The lightest methods: train the biases, or one scale for each feature, or everything."""

import numpy as np

from ..nn import Linear, Module, Parameter
from ..surgery import Wrapper, freeze, plain, put_all, unfreeze


def full(model):
    """Full fine-tuning: everything trains. Returns the model."""
    return unfreeze(model)


def bitfit(model):
    """Freeze the model but for its biases, those of the LayerNorms included. Returns the model.

    Source: Ben Zaken et al. 2022, arXiv 2106.10199, section 3.
    """
    plain(model, "*", Module)
    freeze(model)
    return unfreeze(model, "*.bias")


class IA3(Wrapper):
    """A linear layer with a learned scale for each feature that comes out, or that goes in.

    Args:
        base: a layer with `d_in`, `d_out` and `dense()`.
        side: `"out"`: scale ⊙ (W x + b); `"in"`: W (scale ⊙ x) + b.

    The scale starts at ones, so the layer starts as it was, bit for bit.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    settings = ("side",)

    def __init__(self, base, side="out", *, rng=None):
        if side not in ("out", "in"):
            raise ValueError(f"side is {side!r}; expected 'out' or 'in'")
        self.base, self.side = base, side
        size = base.d_out if side == "out" else base.d_in
        self.scale = Parameter(np.ones(size, base.dense().dtype))

    def dense(self):
        """The weight that the layer acts with."""
        scale = self.scale.data
        return self.base.dense() * (scale[:, None] if self.side == "out" else scale)

    def merged_bias(self):
        """The bias is scaled only on the way out."""
        bias = super().merged_bias()
        return bias if bias is None or self.side == "in" else bias * self.scale.data

    def forward(self, x):
        if self.side == "out":
            return self.base(x) * self.scale  # (…, d_out)
        return self.base(x * self.scale)  # (…, d_in) -> (…, d_out)


def ia3(model, out="blocks.*.attn.[kv]", into="blocks.*.mlp.down"):
    """Freeze the model and learn scales for keys, values and the inner features of the MLPs.

    Args:
        model: changed in place.
        out: patterns for the layers whose outputs are scaled.
        into: patterns for the layers whose inputs are scaled.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """
    sides = {"out": out, "in": into}
    found = {side: plain(model, patterns, (Linear,)) for side, patterns in sides.items()}
    fresh = {n: IA3(m, side) for side, layers in found.items() for n, m in layers.items()}
    freeze(put_all(model, fresh))
    return unfreeze(model, [f"{name}.scale" for name in fresh])
