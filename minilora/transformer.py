"""A decoder-only Transformer in the shape of GPT-2: pre-LayerNorm, learned positions, GELU.

It knows nothing of LoRA or its relatives: they are put in from outside, by `surgery.replace`.
"""

from contextvars import ContextVar

import numpy as np

from . import ops
from .nn import MLP, Embedding, LayerNorm, Linear, Module, check_rng
from .tensor import Tensor, no_grad, within

_cache = ContextVar("cache", default=None)


class Cache(dict):
    """What each attention has read, module to (keys, values), each (B, past, d): a mode.

    `past` is how many positions were read. Inside `cached()` a model is given only what is new.
    """

    past = 0


def cached():
    """Inside this block attention remembers the keys and values of all that it was given."""
    return within(_cache, Cache())


def past():
    """How many positions the cache holds; 0 outside of `cached()`."""
    return _cache.get().past if _cache.get() is not None else 0


def recall(module, k, v):
    """The keys and values (B, T, d) of a module after those that it has read before."""
    cache = _cache.get()
    if cache is None:
        return k, v
    if module in cache:
        pairs = zip(cache[module], (k, v), strict=True)
        k, v = (Tensor(np.concatenate([old, new.data], axis=1)) for old, new in pairs)
    cache[module] = k.data, v.data
    return k, v


def attend(q, k, v, n_head, causal=True):
    """Multi-head attention without the projections: q (B, T, d), k and v (B, S, d) to (B, T, d).

    S ≥ T if causal; keys put in front are seen by all. Each head works on d / n_head features. If k
    and v are narrower, with d / G features, G heads of q share one of k and v. `causal` is as for
    `ops.attention`.

    Source: Ainslie et al. 2023, arXiv 2305.13245, for shared keys.
    """
    (b, t, d), (_, s, narrow) = q.shape, k.shape
    group = d // narrow  # G

    def split(x):  # (B, T, h · d/H) -> (B, T, h, d/H) -> (B, h, T, d/H)
        return ops.transpose(ops.reshape(x, b, x.shape[1], -1, d // n_head), 0, 2, 1, 3)

    q, k, v = split(q), split(k), split(v)
    if group > 1:  # heads that share a key are no more than further queries for it
        q = ops.reshape(q, b, n_head // group, group * t, -1)  # -> (B, H/G, G·T, d/H)
        if causal is True:  # (T, S) -> (G·T, S)
            causal = np.tile(ops.causal_mask(t, s, q.dtype), (group, 1))
    out = ops.attention(q, k, v, causal)  # (B, H/G, G·T, d/H)
    if group > 1:
        out = ops.reshape(out, b, n_head, t, -1)  # -> (B, H, T, d/H)
    return ops.reshape(ops.transpose(out, 0, 2, 1, 3), b, t, d)  # -> (B, T, H, d/H) -> (B, T, d)


class Attention(Module):
    """Causal self-attention: x (B, T, d) to (B, T, d), with projections q, k, v and o."""

    def __init__(self, d, n_head, *, d_head=None, rng, dtype=np.float32):
        if d_head is None and d % n_head:
            raise ValueError(f"n_head is {n_head}; expected a divisor of the width {d}")
        self.n_head, inner = n_head, n_head * (d_head or d // n_head)
        self.q, self.k, self.v = (Linear(d, inner, rng=rng, dtype=dtype) for _ in range(3))
        self.o = Linear(inner, d, rng=rng, dtype=dtype)

    d_out = property(lambda self: self.o.d_out)

    def qkv(self, x):
        """The queries (B, T, d), and the keys and values (B, past + T, d), of x and before it."""
        return self.q(x), *recall(self, self.k(x), self.v(x))

    def forward(self, x):
        return self.o(attend(*self.qkv(x), self.n_head))


class Block(Module):
    """x + attn(norm(x)), then x + mlp(norm(x)): (B, T, d) to (B, T, d)."""

    def __init__(self, d, n_head, *, d_head=None, d_ff=None, rng, dtype=np.float32):
        self.norm1 = LayerNorm(d, dtype=dtype)
        self.attn = Attention(d, n_head, d_head=d_head, rng=rng, dtype=dtype)
        self.norm2 = LayerNorm(d, dtype=dtype)
        self.mlp = MLP(d, d_ff=d_ff, rng=rng, dtype=dtype)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(Module):
    """Token ids (B, T) to logits (B, T, vocab_size).

    Args:
        n_positions: the longest input.
        n_embd: the width of the model, d_model in the papers.
        d_head, d_ff: features of a head and of an MLP; n_embd / n_head and 4 n_embd if not given.
            `n_head` and `d_ff` may be lists, a number a block: what pruning leaves.
        tied: whether the head is the token table itself, one parameter for both.

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
        d_head=None,
        d_ff=None,
        tied=False,
        rng,
        dtype=np.float32,
    ):
        sizes = {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": n_embd}
        sizes |= {"n_head": np.min(n_head), "n_layer": n_layer, "d_ff": np.min(d_ff or 1)}
        if min(sizes.values()) < 1:
            raise ValueError(f"the sizes are {sizes}; expected 1 or more of each")
        heads, inner = (n if isinstance(n, list) else [n] * n_layer for n in (n_head, d_ff))
        new, each = {"rng": rng, "dtype": dtype}, zip(heads, inner, strict=True)
        self.tokens = Embedding(vocab_size, n_embd, **new)
        self.positions = Embedding(n_positions, n_embd, **new)
        self.blocks = [Block(n_embd, h, d_head=d_head, d_ff=n, **new) for h, n in each]
        self.norm = LayerNorm(n_embd, dtype=dtype)
        # a small head: at the start all tokens are about equally likely, and the loss about ln V
        self.head = Linear(n_embd, vocab_size, bias=False, std=0.02, **new)
        if tied:
            self.head.weight = self.tokens.weight

    @property
    def longest(self):
        """How many positions it can read."""
        return len(self.positions.dense())

    @property
    def config(self):
        """What builds a model of these shapes, read off its layers, so that surgery counts too."""
        (vocab_size, d), n_positions = self.tokens.dense().shape, len(self.positions.dense())
        # what a wrapper holds has the sizes
        attn = [getattr(b.attn, "base", b.attn) for b in self.blocks]
        mlp = [getattr(b.mlp, "base", b.mlp) for b in self.blocks]
        n_head, inner = [a.n_head for a in attn], [m.up.d_out for m in mlp]
        d_head = attn[0].o.d_in // n_head[0]
        found = {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": d}
        found |= {"n_head": n_head if len(set(n_head)) > 1 else n_head[0], "n_layer": len(attn)}
        found["tied"] = getattr(self.head, "weight", None) is getattr(self.tokens, "weight", 0)
        if n_head != [d // d_head] * len(attn):
            found["d_head"] = d_head
        if inner != [4 * d] * len(attn):
            found["d_ff"] = inner if len(set(inner)) > 1 else inner[0]
        return found

    def forward(self, ids):
        ids, before = np.asarray(ids), past()
        x = self.tokens(ids)  # (B, T) -> (B, T, d)
        after = before + x.shape[1]
        if ids.ndim != 2 or not before < after <= self.longest:
            found = f"{ids.shape} after {before} positions"
            most = f"expected (B, T), up to {self.longest} in all"
            raise ValueError(f"ids have shape {found}; {most}")
        if self.positions is not None:  # else the keys and queries turn with them
            x = x + self.positions(np.arange(before, after))
        for block in self.blocks:
            x = block(x)
        if _cache.get() is not None:
            _cache.get().past = after
        return self.head(self.norm(x))  # (B, T, d) -> (B, T, vocab_size)


def generate(model, ids, n, *, temperature=0.0, top_k=None, rng=None, stop=()):
    """Continue each row by `n` tokens, one after another; each is read once and then remembered.

    Args:
        model: token ids (B, T) to logits (B, T, V).
        ids: integers (B, T), the prompts; T + n must not exceed the model's `n_positions`.
        temperature: 0 takes the most likely token; above, one is drawn from the softmax of
            logits / temperature, sharper below 1 and flatter beyond. Drawing needs `rng`.
        top_k: draw from the so many most likely tokens only.
        stop: tokens that end a row; when every row has had one, no more are added.

    Returns integers (B, T + n), or fewer columns after a stop.
    """
    ids = new = np.asarray(ids)
    longest, done = getattr(model, "longest", np.inf), np.zeros(len(ids), bool)
    if ids.shape[1] + n - 1 > longest:  # the last token is never read
        raise ValueError(f"n is {n} after {ids.shape[1]} tokens; the model reads {longest}")
    with model.mode(training=False), no_grad(), cached():
        for _ in range(n):
            z = model(new).data[:, -1]  # (B, T, V) -> (B, V)
            if top_k and temperature:
                lowest = np.partition(z, -top_k, axis=-1)[:, -top_k, None]  # (B, 1)
                z = np.where(z < lowest, -np.inf, z)
            if temperature:  # the largest of z / temperature + Gumbel noise is a draw from softmax
                noise = -np.log(check_rng(rng).exponential(size=z.shape))
                z = z / temperature + noise
            new = z.argmax(axis=-1)[:, None]  # (B, V) -> (B, 1)
            ids = np.concatenate([ids, new], axis=1)  # -> (B, T + 1)
            done |= np.isin(new[:, 0], stop)
            if done.all():
                break
    return ids
