"""Adapters in series or beside, and learned keys, values and prompts: what cannot be merged."""

import numpy as np

from .. import ops
from ..nn import Embedding, Linear, Parameter, check_rng, normal
from ..surgery import Wrapper, plain, put_all, wear
from ..transformer import attend, past


def dtype_of(module):
    """The dtype of the numbers in a module that has a layer inside, quantised or not."""
    return next(m.dense().dtype for _, m in module.named_modules() if hasattr(m, "dense"))


def check_room(tokens, what, room):
    """Raise if an input has more tokens than a prefix or a prompt leaves room for."""
    if tokens > room:
        left = f"a {what} leaves room for {room} (n_positions - m)"
        raise ValueError(f"the input has {tokens} tokens; {left}")


class Adapter(Wrapper):
    """A bottleneck in series: h + up(GELU(down(h))), where h is what the base gives.

    Or in parallel, where `down` takes what the base takes, x: h + up(scale · GELU(down(x))). It
    then adds nothing to the longest chain of products.

    Args:
        base: a module with `d_out`, such as `Attention` or `MLP`.
        r: the width of the bottleneck.
        start: `"exact"`: `up` starts at zero, so the adapter starts as the identity, bit for
            bit; `"near"`: `up` starts as N(0, 0.01²), as in the paper, so it is only close to it.
        scale: the strength of what it adds; He et al. take 4 in parallel.

    Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1; in parallel: He et al. 2022,
    arXiv 2110.04366, where the nonlinearity is a ReLU.
    """

    why_not_merged = (
        "a nonlinearity stands between its two matrices, so no one matrix does the same"
    )
    settings = ("r", "start", "parallel", "scale")

    def __init__(self, base, r, *, start="exact", parallel=False, scale=1.0, rng):
        if r < 1 or start not in ("exact", "near"):
            raise ValueError(f"r is {r}, start {start!r}; expected 1 or more, 'exact' or 'near'")
        d, dtype, std = base.d_out, dtype_of(base), 0.01 if start == "near" else 0.0
        self.base, self.r, self.start = base, int(r), start
        self.parallel, self.scale = bool(parallel), float(scale)
        self.adapter_down = Linear(d, r, rng=rng, dtype=dtype)
        self.adapter_up = Linear(r, d, rng=rng, std=std, dtype=dtype)

    def config(self):
        found = super().config()  # the usual kind says no more than it must
        plain = not self.parallel and self.scale == 1
        return {k: found[k] for k in ("kind", "r", "start")} if plain else found

    def forward(self, x):
        h = self.base(x)  # (…, d)
        inner = ops.gelu(self.adapter_down(x if self.parallel else h))  # (…, d) -> (…, r)
        return h + self.adapter_up(inner * self.scale)  # (…, r) -> (…, d)


def adapter(model, r=8, where="houlsby", *, parallel=False, norms=None, **settings):
    """Freeze the model and put bottleneck adapters inside the residual branches.

    Args:
        r, parallel, settings: as for `Adapter`; among them `rng`, which it needs.
        where: `"houlsby"`: after attention and after the MLP, two a block; `"pfeiffer"`: after
            the MLP, one a block; or patterns for attention and MLPs.
        norms: whether the LayerNorms train too. If not given, as the papers have it: Houlsby's do
            ("new layer normalization parameters per task", section 2.1), Pfeiffer's stay as they
            were pre-trained. They are not in the wrappers: `detach` leaves them as they are.

    Source of `"pfeiffer"`: Pfeiffer et al. 2021, arXiv 2005.00247.
    """
    named = {"houlsby": ("blocks.*.attn", "blocks.*.mlp"), "pfeiffer": "blocks.*.mlp"}
    patterns = named.get(where, where) if isinstance(where, str) else where
    found = plain(model, patterns, "q k v o|up down")
    norms = where == "houlsby" and not parallel if norms is None else norms
    beside = [p for name, p in model.named_parameters() if norms and "norm" in name]
    settings |= {"parallel": parallel}
    wear(model, {name: Adapter(base, r, **settings) for name, base in found.items()})
    for p in beside:
        p.requires_grad = True
    return model


class Prefix(Wrapper):
    """Attention with `m` learned keys and values before the real ones, seen by every query.

    Args:
        base: attention with q, k, v, o and `n_head`.
        room: the longest input that is left, `n_positions - m`.
        hidden: if given, keys and values come from an MLP with this many hidden features, which
            trains more calmly; `fold` puts what it computes in its place afterwards.

    The real tokens keep the causal mask and their positions: token t stands at position t, with
    a prefix or without. (In GPT-2, as Li & Liang and PEFT have it, a prefix is a past, which
    moves token t to position m + t; so it leaves `room`, and that much is allowed here too.)
    A prefix of zeros is *not* the identity: each of its keys takes a share of the softmax, so
    the output shrinks by Z / (Z + m).

    Source: Li & Liang 2021, arXiv 2101.00190, sections 4.1 to 4.3.
    """

    why_not_merged = "its keys and values depend on no input, so no weight of the layer holds them"
    settings = ("m", "room", "hidden")

    def __init__(self, base, m, room, *, hidden=None, rng):
        if m < 1 or room < 1:
            left = f"which leaves {room} positions; expected room for 1 or more"
            raise ValueError(f"m is {m}, {left}")
        self.base, self.m, self.room, self.hidden = base, int(m), int(room), hidden
        d, inner, dtype = base.d_out, base.k.d_out, dtype_of(base)  # inner < d in pruned heads
        draw = lambda d: normal(rng, (m, d), 1.0, dtype)  # noqa: E731
        if hidden is None:
            self.keys, self.values = draw(inner), draw(inner)
        else:
            self.seeds = draw(d)
            self.up = Linear(d, hidden, rng=rng, dtype=dtype)
            self.down = Linear(hidden, 2 * inner, rng=rng, dtype=dtype)

    def pair(self):
        """The keys and the values, each (m, inner), with inner = n_head · d_head."""
        if self.hidden is None:
            return self.keys, self.values
        both = self.down(ops.tanh(self.up(self.seeds)))  # (m, d) -> (m, hidden) -> (m, 2 inner)
        inner = both.shape[1] // 2
        return both[:, :inner], both[:, inner:]

    def folded(self):
        """The same prefix with plain keys and values, without the MLP."""
        plain = Prefix(self.base, self.m, self.room, rng=np.random.default_rng(0))
        plain.keys, plain.values = (
            Parameter(p.data.copy(), self.seeds.requires_grad) for p in self.pair()
        )
        return plain

    def forward(self, x):
        check_room(past() + x.shape[1], f"prefix of {self.m}", self.room)
        (q, k, v), (keys, values) = self.base.qkv(x), self.pair()
        k, v = ops.prepend(keys, k), ops.prepend(values, v)  # (B, T, inner) -> (B, m + T, inner)
        return self.base.o(attend(q, k, v, self.base.n_head))  # (B, T, d)


def positions(model):
    """How many positions a decoder reads; another model takes no prefix and no prompt."""
    if "n_positions" not in model.config:
        raise TypeError(f"this is a {type(model).__name__}; expected one that reads left to right")
    return model.config["n_positions"]


def prefix(model, m=4, *, hidden=None, rng):
    """Freeze the model and give every layer `m` learned keys and values.

    As in GPT-2, where the prefix counts as past tokens, `m + T` must not exceed `n_positions`.
    """
    room, found = positions(model) - m, plain(model, "blocks.*.attn", "q k v o n_head")
    settings = {"hidden": hidden, "rng": rng}
    return wear(model, {n: Prefix(base, m, room, **settings) for n, base in found.items()})


def fold(model):
    """Replace every prefix that comes from an MLP by the keys and values that it computes."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Prefix) and m.hidden}
    return put_all(model, {name: m.folded() for name, m in found.items()})


class Prompt(Wrapper):
    """A token table that puts `m` learned vectors before the vectors of the tokens.

    They start as copies of random rows of the table.

    Source: Lester et al. 2021, arXiv 2104.08691, section 2.
    """

    why_not_merged = "it lengthens the input, which no weight can do"
    settings = ("m", "n_positions")

    def __init__(self, base, m, n_positions, *, rng):
        if not 1 <= m < n_positions:
            raise ValueError(f"m is {m!r}; expected a whole number from 1 to {n_positions - 1}")
        table = base.dense()
        self.base, self.m, self.n_positions = base, int(m), int(n_positions)
        self.prompt = Parameter(table[check_rng(rng).integers(len(table), size=m)])

    def dense(self):
        return self.base.dense()

    def forward(self, ids):
        check_room(ids.shape[1], f"prompt of {self.m}", self.n_positions - self.m)
        if past():  # it was read already
            return self.base(ids)
        return ops.prepend(self.prompt, self.base(ids))  # (B, T) -> (B, m + T, d)


class WithoutPrompt(Wrapper):
    """A LayerNorm that drops the first `m` positions again, so that the logits fit the tokens."""

    why_not_merged, settings = Prompt.why_not_merged, ("m",)

    def __init__(self, base, m, *, rng=None):
        self.base, self.m = base, m

    def forward(self, x):
        return self.base(x if past() > x.shape[1] else x[:, self.m :])  # (B, m + T, d) -> (B, T, d)


class TokensFirst(Wrapper):
    """A table of positions whose first rows stay with the tokens; a prompt has the last `m`.

    Were each token moved on by `m`, it would stand on a row that was trained for another, or for
    none. (Where positions are relative, as in the T5 of Lester et al., nothing of it is needed.)
    """

    why_not_merged, settings = Prompt.why_not_merged, ("m",)

    def __init__(self, base, m, *, rng=None):
        self.base, self.m = base, m

    def dense(self):
        return self.base.dense()

    def forward(self, ids):
        return self.base((np.asarray(ids) - self.m) % len(self.dense()))  # (T,) -> (T, d)


def prompt(model, m=4, *, rng):
    """Freeze the model and put `m` learned vectors before every input.

    Tokens keep their positions; the prompt takes the last `m` of the table, which they leave free.
    """
    n = positions(model)
    (tokens,) = plain(model, "tokens", Embedding, ties=True).values()
    fresh = {"tokens": Prompt(tokens, m, n, rng=rng), "norm": WithoutPrompt(model.norm, m)}
    if model.positions is not None:  # else they are relative, and nothing moves
        fresh["positions"] = TokensFirst(model.positions, m)
    return wear(model, fresh)
