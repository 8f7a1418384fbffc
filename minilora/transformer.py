"""A decoder-only Transformer in the shape of GPT-2: pre-LayerNorm, learned positions, GELU.

It knows nothing of LoRA or its relatives: they are put in from outside, by `surgery.replace`.
"""

import numpy as np

from . import ops
from .nn import MLP, Embedding, LayerNorm, Linear, Module
from .tensor import no_grad


def attend(q, k, v, n_head, causal=True):
    """Multi-head attention, without the projections.

    Args:
        q: (B, T, d). k, v: (B, S, d), S ≥ T if causal; keys put in front are seen by all.
        n_head: how many heads share d; each works on d / n_head features.

    Returns:
        (B, T, d).
    """

    def split(x):
        b, t, d = x.shape
        x = ops.reshape(x, b, t, n_head, d // n_head)  # (B, T, d) -> (B, T, H, d/H)
        return ops.transpose(x, 0, 2, 1, 3)  # -> (B, H, T, d/H)

    out = ops.attention(split(q), split(k), split(v), causal)  # (B, H, T, d/H)
    out = ops.transpose(out, 0, 2, 1, 3)  # -> (B, T, H, d/H)
    return ops.reshape(out, *q.shape)  # -> (B, T, d)


class Attention(Module):
    """Causal self-attention: x (B, T, d) to (B, T, d), with projections q, k, v and o."""

    def __init__(self, d, n_head, *, rng, dtype=np.float32):
        if d % n_head:
            raise ValueError(f"n_head is {n_head}; expected a divisor of the width {d}")
        self.n_head = n_head
        self.q = Linear(d, d, rng=rng, dtype=dtype)
        self.k = Linear(d, d, rng=rng, dtype=dtype)
        self.v = Linear(d, d, rng=rng, dtype=dtype)
        self.o = Linear(d, d, rng=rng, dtype=dtype)

    @property
    def d_out(self):
        """Features that go out."""
        return self.o.d_out

    def forward(self, x):
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.n_head))


class Block(Module):
    """x + attn(norm(x)), then x + mlp(norm(x)): (B, T, d) to (B, T, d)."""

    def __init__(self, d, n_head, *, rng, dtype=np.float32):
        self.norm1 = LayerNorm(d, dtype=dtype)
        self.attn = Attention(d, n_head, rng=rng, dtype=dtype)
        self.norm2 = LayerNorm(d, dtype=dtype)
        self.mlp = MLP(d, rng=rng, dtype=dtype)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(Module):
    """Token ids (B, T) to logits (B, T, vocab_size).

    Args:
        vocab_size: how many tokens there are.
        n_positions: the longest input.
        n_embd: the width of the model, d_model in the papers.
        n_head: attention heads; a divisor of `n_embd`.
        n_layer: blocks.
        tied: whether the head is the token table itself, one parameter for both.
        rng: a `numpy.random.Generator` for the start.
        dtype: float32 or float64.

    Source: Radford et al. 2019 (GPT-2); Vaswani et al. 2017, arXiv 1706.03762.
    """

    def __init__(
        self,
        *,
        vocab_size,
        n_positions,
        n_embd=64,
        n_head=4,
        n_layer=2,
        tied=False,
        rng,
        dtype=np.float32,
    ):
        self.config = {
            "vocab_size": vocab_size,
            "n_positions": n_positions,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_layer": n_layer,
            "tied": tied,
        }
        for name, value in self.config.items():
            if value < 1 and name != "tied":
                raise ValueError(f"{name} is {value}; expected 1 or more")
        self.tokens = Embedding(vocab_size, n_embd, rng=rng, dtype=dtype)
        self.positions = Embedding(n_positions, n_embd, rng=rng, dtype=dtype)
        self.blocks = [Block(n_embd, n_head, rng=rng, dtype=dtype) for _ in range(n_layer)]
        self.norm = LayerNorm(n_embd, dtype=dtype)
        # a small head: at the start all tokens are about equally likely, and the loss about ln V
        self.head = Linear(n_embd, vocab_size, rng=rng, bias=False, std=0.02, dtype=dtype)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config["n_positions"]:
            raise ValueError(
                f"ids have shape {ids.shape}; expected (B, T) with T from 1 to "
                f"{self.config['n_positions']}"
            )
        x = self.tokens(ids)  # (B, T) -> (B, T, d)
        x = x + self.positions(np.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (B, T, d) -> (B, T, vocab_size)


def generate(model, ids, n):
    """Continue each row by its `n` most likely tokens, one after another.

    Args:
        model: token ids (B, T) to logits (B, T, V).
        ids: integers (B, T), the prompts.
        n: how many tokens to add; T + n must not exceed the model's `n_positions`.

    Returns:
        Integers (B, T + n).
    """
    ids = np.asarray(ids)
    with no_grad():
        for _ in range(n):
            best = model(ids).data[:, -1].argmax(axis=-1)  # (B, T, V) -> (B,)
            ids = np.concatenate([ids, best[:, None]], axis=1)  # -> (B, T + 1)
    return ids
