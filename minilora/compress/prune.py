"""Pruning: connections (a mask), neurons and heads (smaller matrices), blocks (fewer of them).

A mask saves bytes in a file and no time; what is cut out saves both. In each case the lowest
scores go, and of equal ones those that come first. A sparsity is a share of zeros, from 0 up to,
not at, 1; masks are booleans, True = keep.
"""

from math import prod

import numpy as np

from .. import ops
from ..nn import Linear, Module
from ..surgery import Wrapper, detached, find, like, plain, put_all, wrappers
from .factor import make_up
from .observe import by_data, watch

STEP = 8  # by tests/benchmarks/by_data.py: 1 to 8 columns do as well, 32 and more do worse

# ------------------------------------------------------------------ which to keep


def _lowest(score, n):
    """Where the `n` smallest of each row are, and of equals the first: (…, m) to booleans."""
    if n == 0:
        return np.zeros(score.shape, bool)
    cut = np.partition(score, n - 1, axis=-1)[..., n - 1 : n]  # (…, 1), the n-th smallest
    below, at = score < cut, score == cut
    room = n - below.sum(axis=-1, keepdims=True, dtype=np.int64)
    return below | (at & (at.cumsum(axis=-1, dtype=np.int64) <= room))


def _drop(score, sparsity, scope="row"):
    """Where the lowest share is, of each row, of all, or of each `scope` neighbours in a row."""
    d_in = score.shape[-1]
    sizes = {n: n for n in range(1, d_in + 1) if d_in % n == 0} | {"row": d_in, "layer": score.size}
    if not 0 <= sparsity < 1 or scope not in sizes:
        names = "'row', 'layer', 'global', a divisor"
        raise ValueError(f"sparsity is {sparsity!r}, scope {scope!r}; expected 0 to 1, {names}")
    groups = score.reshape(-1, sizes[scope])  # (…, d_in) -> (groups, size)
    return _lowest(groups, round(sparsity * groups.shape[1])).reshape(score.shape)


def magnitude_mask(w, sparsity):
    """Keep the weights that are farthest from zero: the least squared error for so many zeros.

    `w` has any shape, and exactly `round(sparsity * w.size)` of the mask is False. The masks of
    one `w` are nested: a higher sparsity only takes more away.

    Source: Han et al. 2015, arXiv 1506.02626, section 3.
    """
    return ~_drop(np.abs(w), sparsity, "layer")


def _score(w, gram):
    return np.abs(w) if gram is None else np.abs(w) * np.sqrt(np.diagonal(gram))  # (d_out, d_in)


def wanda_mask(w, gram, sparsity):
    """Keep, in each row, the weights with the largest |w_j| · ‖x_j‖: size times what it meets.

    If the features of x were uncorrelated, this would be the least mean squared error of each
    output, Σ w_j² E[x_j²] over what is taken away. Exactly `round(sparsity * d_in)` go in a row.

    Source: Sun et al. 2023, arXiv 2306.11695, section 3.
    """
    return ~_drop(_score(w, gram), sparsity)


def sparse_gpt(w, gram, sparsity, *, scope="layer", kept=True, damping=0.01):
    """Take weights away column by column, those still to come making up for what goes.

    In each `STEP` columns, or those of a `scope`, once their turn comes, the weights go whose
    removal costs least, (w / U_jj)²: see `make_up`, and `gptq` for the same with rounding. The
    paper's 128 of some thousand columns are about as large a part of a layer.

    Args:
        scope: what holds this share of zeros: `"layer"`, `"row"`, or so many neighbours in a row.
        kept: booleans (d_out, d_in), False = gone from the start; or True.
        damping: as for `make_up`.

    Returns: the weight, (d_out, d_in), with zeros; and its mask.

    Source: Frantar & Alistarh 2023, arXiv 2301.00774, section 3.
    """
    mask = np.broadcast_to(kept, w.shape).copy()
    width = {"layer": STEP, "row": w.shape[1]}.get(scope, scope)

    def settle(j, rest, u):
        if j % width == 0:
            at = slice(j, j + width)
            cost = (rest[at].T / np.diagonal(u)[at]) ** 2  # (d_out, width)
            mask[:, at] &= ~_drop(np.where(mask[:, at], cost, -1), sparsity, scope)
        return rest[j] * mask[:, j]

    chunk = width * max(1, 128 // width)
    return make_up(w * mask, gram, settle, damping, chunk).astype(w.dtype), mask


# ------------------------------------------------------------------ connections


class Masked(Wrapper):
    """A linear layer in which some weights count as zero: h = (mask ⊙ W) x + b.

    Args:
        base: a plain `Linear`; it stays whole, so a masked weight keeps its value.
        mask: booleans (d_out, d_in). It is no parameter and never trains.

    A masked weight gets a gradient of exactly zero. So a fresh optimiser without weight decay
    leaves it as it was, bit for bit. One product of the size of W is added to each step.
    """

    def __init__(self, base, mask):
        self.base, self.mask = base, np.array(np.broadcast_to(mask, base.shape), bool)

    @property
    def sparsity(self):
        """The share of weights that are masked, from 0 to 1."""
        return 1 - np.count_nonzero(self.mask) / self.mask.size

    def dense(self):
        return self.base.dense() * self.mask  # (d_out, d_in)

    def forward(self, x):
        w = self.base.weight * self.mask
        return ops.linear(x, w, self.base.bias)  # (…, d_in) -> (…, d_out)

    def __repr__(self):
        return f"Masked(sparsity={self.sparsity:.4g}, base={self.base!r})"


def sparsify(
    model, sparsity, targets="blocks.*", *, scope=None, grams=None, in_turn=None, compensate=False
):
    """Put a mask on the layers whose names match, by |w|, or by |w| · ‖x‖ with grams.

    On a model that is masked already this prunes further, so that a loop of training and
    `sparsify` prunes step by step: a mask only ever loses entries, and a sparsity below the one
    there is changes nothing. `merge` makes plain layers with zeros of it, `detach` lifts the mask.

    Args:
        sparsity: the share of zeros, counted from the whole layer.
        scope: this share of what: each `"layer"`; each `"row"`, as Wanda does, and as is done
            with grams if nothing is said; `"global"`, all layers together, by one threshold; or
            each so many neighbours in a row: 4 with a sparsity of .5 is the 2:4 of GPUs.
        grams, in_turn: `observe` wants a plain model: to prune by fresh grams, `merge` first;
            zeros have the lowest score. `in_turn` takes a masked one, but is not for `"global"`.
        compensate: prune by `sparse_gpt`, with grams: the weights that stay change, and `detach`
            does not bring them back.

    Source: Han et al. 2015, arXiv 1506.02626, section 3; Sun et al. 2023, arXiv 2306.11695.
    """
    blind = grams is None and in_turn is None
    scope = scope or ("layer" if blind or compensate else "row")
    if (compensate and blind) or (scope == "global" and (compensate or in_turn is not None)):
        raise ValueError(f"scope is {scope!r}; expected grams, and no 'global', to compensate")
    on = wrappers(model)
    if not all(isinstance(wrapper, Masked) for wrapper in on.values()):
        plain(model, "*", Module, ties=True)  # refuses an adapter
    with detached(model):
        layers = plain(model, targets)
    kept = {name: on[name].mask if name in on else np.True_ for name in layers}
    gone = {}

    def score(name, layer, gram):
        return np.where(kept[name], _score(layer.weight.data, gram), -1)  # what is masked stays so

    def make(name, layer, gram):
        if compensate:
            old, layer = layer, _cut(layer)  # a copy: the old layer stays what it was
            w, mask = sparse_gpt(old.weight.data, gram, sparsity, scope=scope, kept=kept[name])
            layer.weight.data[...] = w
            return Masked(layer, mask)
        lost = gone[name] if gone else _drop(score(name, layer, gram), sparsity, scope)
        return Masked(layer, kept[name] & ~lost.reshape(layer.shape))

    if scope == "global":
        scores = [a.reshape(-1) for a in by_data(model, layers, score, grams).values()]
        every = _drop(np.concatenate(scores), sparsity)  # (all weights,)
        ends = np.cumsum([a.size for a in scores], dtype=np.int64)[:-1]
        gone = dict(zip(layers, np.split(every, ends), strict=True))
    return put_all(model, by_data(model, layers, make, grams, in_turn))


def rewind(model, weights):
    """Set the weights back to an earlier state and keep the masks: a lottery ticket.

    Args:
        weights: names in the plain model to arrays, such as
            `{name: p.data.copy() for name, p in model.named_parameters()}` before `sparsify`.

    Source: Frankle & Carbin 2019, arXiv 1803.03635, section 1.
    """
    own = {name.replace(".base.", "."): p.data for name, p in model.named_parameters()}
    for name, data in own.items():
        if weights[name].shape != data.shape or np.may_share_memory(weights[name], data):
            raise ValueError(f"{name} is the model's own array, or does not fit; expected a copy")
    for name, data in own.items():
        data[...] = weights[name]
    return model


# ------------------------------------------------------------------ neurons and heads


def _whole(model, targets, parts):
    """The modules that have these parts, all of whose linear layers are plain and their own."""
    found = find(model, targets, parts)
    plain(model, [f"{name}.*" for name in found])
    return found


def _stay(score, keep):
    """Where the highest scores are, (n,) to (kept,), of which `keep` is the share or number."""
    n = len(score)
    kept = round(keep * n) if isinstance(keep, float) else keep
    if kept not in range(1, n + 1) or keep is True:
        raise ValueError(f"keep is {keep!r}; expected 1 to {n}, or a share that leaves one or more")
    return np.flatnonzero(~_lowest(score, n - kept))


def _cut(layer, rows=slice(None), columns=slice(None)):
    """The layer with some of its outputs, or some of its inputs."""
    weight = np.array(layer.weight.data[rows][:, columns], order="C")  # (d_out, d_in), smaller
    bias = None if layer.bias is None else layer.bias.data[rows].copy()
    return like(layer, Linear.of(weight, bias))


def _squares(w, axis):
    return np.square(w, dtype=np.float64).sum(axis=axis)


def prune_neurons(model, keep, targets="blocks.*.mlp", *, grams=None):
    """Take inner neurons out of the MLPs: rows of `up` and the same columns of `down`.

    Neuron j scores ‖up_j‖ · ‖down_:,j‖, or with grams √E[a_j²] · ‖down_:,j‖ with a_j its
    activation. Each neuron costs 2·d weights and a bias. Those kept stay in their order.

    Args:
        keep: how many neurons of each MLP, from 1, or a share: 1 is one neuron, 1.0 all of them.
        targets: modules with `up` and `down`. A `gate` beside `up` is cut, and scored, like it.
        grams: the one of `<name>.down` is used.

    Source: Li et al. 2017, arXiv 1608.08710, section 3.1, who score filters by their norm.
    """
    fresh = {}
    for name, mlp in _whole(model, targets, "up down").items():
        inner = [part for part in ("gate", "up") if hasattr(mlp, part)]
        if grams is None:
            sizes = [_squares(getattr(mlp, part).weight.data, 1) for part in inner]  # of (n,)
        else:
            sizes = [np.diagonal(grams[f"{name}.down"])]
        stay = _stay(prod(sizes, start=_squares(mlp.down.weight.data, 0)), keep)  # (kept,)
        fresh |= {f"{name}.{part}": _cut(getattr(mlp, part), rows=stay) for part in inner}
        fresh[f"{name}.down"] = _cut(mlp.down, columns=stay)
    return put_all(model, fresh)


def prune_heads(model, keep, targets="blocks.*.attn", *, grams=None):
    """Take heads out of attention: rows of q, k and v, columns of o, and `n_head`.

    Head h adds O_h a_h to the output, with a_h its mix of values. It scores ‖O_h‖ · ‖V_h‖, or
    with grams the root mean square of what it adds, √tr(O_h C_h O_hᵀ) with C_h = E[a_h a_hᵀ].
    Each head costs 4·d·d_head weights and 3·d_head biases.

    Args:
        keep: how many heads of each layer, from 1, or a share: 1 is one head, 1.0 all of them.
        targets: modules with `q`, `k`, `v`, `o` and `n_head`.
        grams: the one of `<name>.o` is used.

    Source: Michel et al. 2019, arXiv 1905.10650, who score heads by gradients instead.
    """
    fresh, counts = {}, []
    for name, attn in _whole(model, targets, "q k v o n_head").items():
        heads, size = attn.n_head, attn.o.d_in // attn.n_head
        if attn.k.d_out != attn.q.d_out:
            raise ValueError(f"{name}: several heads of q share one of k; they cannot be pruned")
        o = attn.o.weight.data.reshape(-1, heads, size)  # (d, H·s) -> (d, H, s)
        if grams is None:
            v = attn.v.weight.data.reshape(heads, size, -1)  # (H·s, d) -> (H, s, d)
            score = _squares(o, (0, 2)) * _squares(v, (1, 2))  # (H,)
        else:
            c = grams[f"{name}.o"].reshape(heads, size, heads, size)
            c = np.einsum("hihj->hij", c)  # (H, s, H, s) -> (H, s, s), the blocks on the diagonal
            o = o.transpose(1, 0, 2)  # (d, H, s) -> (H, d, s)
            score = np.einsum("hoi,hoi->h", o @ c, o)  # (H,)
        stay = _stay(score, keep)  # (kept,)
        at = (stay[:, None] * size + np.arange(size)).reshape(-1)  # (kept, s) -> (kept·s,)
        fresh |= {f"{name}.{part}": _cut(getattr(attn, part), rows=at) for part in "qkv"}
        fresh[f"{name}.o"] = _cut(attn.o, columns=at)
        counts.append((attn, len(stay)))
    for attn, kept in counts:
        attn.n_head = kept
    return put_all(model, fresh)


# ------------------------------------------------------------------ blocks


def block_similarity(model, inputs):
    """The mean cosine between what enters and what leaves each block, over all positions.

    float64 (n_layer,), for token ids (N, T), run in one pass. Near 1, a block hardly turns the
    stream and may be left out; ShortGPT's *block influence* is 1 less this.

    Source: Men et al. 2024, arXiv 2403.03853.
    """
    found = []

    def see(name, a, b):  # (B, T, d) both
        a, b = a.astype(np.float64), b.astype(np.float64)
        lengths = np.sqrt(_squares(a, -1) * _squares(b, -1))  # (B, T)
        dot = np.einsum("btd,btd->bt", a, b)
        found.append(np.mean(dot / np.where(lengths, lengths, 1)))  # a zero has cosine 0

    watch(model, inputs, find(model, "blocks.*", "attn mlp"), see)
    return np.array(found)


def drop_blocks(model, which):
    """Take whole blocks out of a `Transformer`: one index or several, but not all of them.

    Source: Men et al. 2024, arXiv 2403.03853.
    """
    plain(model, "*", Module, ties=True)  # no wrapper
    which, n = set(np.atleast_1d(which).tolist()), len(model.blocks)
    if not which < set(range(n)):
        raise ValueError(f"which is {which}; expected some, not all, of 0 to {n - 1}")
    model.blocks = [block for i, block in enumerate(model.blocks) if i not in which]
    return model


# ------------------------------------------------------------------ sparse forms, for a file


def to_bitmap(w):
    """A bit for each of n weights, set where it is not zero, uint8 (⌈n / 8⌉,), and those weights.

    The first weight is in the highest bit, as `np.packbits` does. Only the sign of -0.0 is lost.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    return np.packbits(flat != 0), flat[flat != 0]


def from_bitmap(bits, values, shape):
    """The array of this shape that `to_bitmap` packed; an error if they do not fit."""
    at, n = np.flatnonzero(np.unpackbits(bits)), prod(shape)
    if bits.shape != (-(-n // 8),) or at.shape != values.shape or (at >= n).any():
        raise ValueError(f"bits, values do not fit shape {shape}; expected a bit a weight")
    return from_indices(at, values, shape)


def to_indices(w):
    """Where the weights that are not zero stand in the flattened array, and those weights.

    Places have the smallest unsigned dtype that holds n - 1. With 16 bits this is smaller than a
    bitmap if fewer than one weight in 16 is left.
    """
    flat = np.asarray(w).reshape(-1)  # (…) -> (n,)
    at = np.flatnonzero(flat)  # (nnz,)
    return at.astype(np.min_scalar_type(max(flat.size - 1, 0))), flat[at]


def from_indices(indices, values, shape):
    """The array of this shape that `to_indices` packed."""
    w = np.zeros(shape, values.dtype)
    w.reshape(-1)[indices] = values
    return w


def break_even_sparsity(bits):
    """The share of zeros beyond which a bitmap is smaller than the dense array.

    The bitmap costs a bit for every weight, and each zero saves the `bits` of one.
    """
    return 1 / bits
