"""The lightest methods: train the biases, or one scale for each feature, or everything."""

import numpy as np

from ..nn import Linear, Parameter
from ..surgery import Wrapper, freeze, replace, unfreeze
from .lora import check_plain, finite, merged_onto


def full(model):
    """Full fine-tuning: everything trains. Returns the model."""
    return unfreeze(model)


def bitfit(model):
    """Freeze the model but for its biases, those of the LayerNorms included. Returns the model.

    Source: Ben Zaken et al. 2022, arXiv 2106.10199, section 3.
    """
    check_plain(model)
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

    def __init__(self, base, side="out", *, rng=None):
        if side not in ("out", "in"):
            raise ValueError(f"side is {side!r}; expected 'out' or 'in'")
        self.base, self.side = base, side
        size = base.d_out if side == "out" else base.d_in
        self.scale = Parameter(np.ones(size, base.dense().dtype))

    def config(self):
        """What rebuilds this wrapper around its base, for a file."""
        return {"kind": "IA3", "side": self.side}

    def dense(self):
        """The weight that the layer acts with."""
        scale = self.scale.data
        return self.base.dense() * (scale[:, None] if self.side == "out" else scale)

    def merged(self, requantise=None):
        """A new layer that computes the same; `requantise` is as for `LoRA.merged`.

        Raises:
            ValueError: if the merged weight is not finite, or `requantise` is not said.
        """
        bias = None if self.base.bias is None else self.base.bias.data.copy()
        if bias is not None and self.side == "out":
            bias *= self.scale.data
        return merged_onto(self.base, finite(self.dense()), bias, requantise)

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
    check_plain(model)
    replace(model, into, lambda base: base, kind=Linear)  # no match? then nothing is changed yet
    hits = replace(model, out, lambda base: IA3(base, "out"), kind=Linear)
    hits += replace(model, into, lambda base: IA3(base, "in"), kind=Linear)
    freeze(model)
    return unfreeze(model, [f"{name}.scale" for name in hits])
