"""The lightest methods: train the biases, a scale for each feature, a few rows, or everything."""

import numpy as np

from .. import ops
from ..nn import Embedding, Linear, Module, Parameter
from ..surgery import Wrapper, freeze, plain, unfreeze, wear


def full(model):
    """Full fine-tuning: everything trains. Returns the model."""
    return unfreeze(model)


def bitfit(model):
    """Freeze the model but for its biases, those of the LayerNorms included. Returns the model.

    Source: Ben Zaken et al. 2022, arXiv 2106.10199.
    """
    plain(model, "*", Module, ties=True)
    unfreeze(model, "*.bias")  # no bias at all? then nothing is changed yet
    return unfreeze(freeze(model), "*.bias")


class IA3(Wrapper):
    """A linear layer with a learned scale for each feature that comes out, or that goes in.

    The side is `"out"`, scale ⊙ (W x + b), or `"in"`, W (scale ⊙ x) + b. The scale starts at
    ones. A feature that is always zero stays so, whatever its scale.

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
        scale = self.scale.data
        return self.base.dense() * (scale[:, None] if self.side == "out" else scale)

    def merged_bias(self):
        bias = super().merged_bias()  # scaled only on the way out
        return bias if bias is None or self.side == "in" else bias * self.scale.data

    def forward(self, x):
        if self.side == "out":
            return self.base(x) * self.scale  # (…, d_out)
        return self.base(x * self.scale)  # (…, d_in) -> (…, d_out)


def ia3(model, out="blocks.*.attn.[kv]", into="blocks.*.mlp.down"):
    """Freeze the model and learn scales for keys, values and the inner features of the MLPs.

    `out` and `into` are patterns for the layers whose outputs and inputs are scaled: see `IA3`.
    """
    found = {side: plain(model, at, (Linear,)) for side, at in (("out", out), ("in", into))}
    if both := found["out"].keys() & found["in"]:
        raise ValueError(f"out and into both match {min(both)}; expected one side for each layer")
    return wear(model, {n: IA3(m, side) for side in found for n, m in found[side].items()})


class TokenRows(Wrapper):
    """A token table of which a few rows learn: row i is E[i] + rows[j] for the j-th of `tokens`.

    `rows` (k, d) start at zero, so the table starts as it was, bit for bit.

    Source: the idea of PEFT's `trainable_tokens`: a new word needs no more than its own row.
    """

    settings = ("tokens",)

    def __init__(self, base, tokens, *, rng=None):
        n, d = base.dense().shape
        self.base, self.tokens = base, [int(t) for t in tokens]
        if not 0 < len(tokens) == len(set(self.tokens) & set(range(n))):
            raise ValueError(f"tokens is {tokens}; expected one or more of 0 to {n - 1}, each once")
        self.rows = Parameter(np.zeros((len(self.tokens), d), base.dense().dtype))

    def dense(self):
        table = self.base.dense().copy()
        table[self.tokens] += self.rows.data
        return table

    def forward(self, ids):
        hits = np.asarray(ids)[..., None] == self.tokens  # (…) -> (…, k)
        rows = ops.embedding(self.rows, hits.argmax(axis=-1))  # (…, k) -> (…, d)
        return self.base(ids) + rows * hits.any(axis=-1, keepdims=True)  # (…, d)


def token_rows(model, tokens):
    """Freeze the model but for the rows of these tokens in its token table. Returns the model."""
    (table,) = plain(model, "tokens", Embedding).values()
    return wear(model, {"tokens": TokenRows(table, tokens)})
