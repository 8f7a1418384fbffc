"""Pruning neurons and heads (smaller matrices) and blocks (fewer of them): what saves time too.

In each case the lowest scores go, and of equal ones those that come first.
"""

import numpy as np

from ..nn import Linear
from ..surgery import find, like, plain, wrappers
from .masks import _lowest
from .observe import watch

# ------------------------------------------------------------------ neurons and heads


def _how_many(keep, n, what):
    """`keep`, a share (a float) or a whole number, as a whole number from 1 to `n`."""
    kept = round(keep * n) if isinstance(keep, float) else keep
    if isinstance(keep, bool) or kept not in range(1, n + 1):
        raise ValueError(f"keep is {keep!r}; expected 1 to {n}, the {what}, or a share up to 1.0")
    return kept


def _rows(layer, rows):
    """The layer with these of its outputs."""
    bias = None if layer.bias is None else layer.bias.data[rows]
    return like(layer, Linear.of(layer.weight.data[rows], bias))  # (d_out, d_in) -> (kept, d_in)


def _columns(layer, columns):
    """The layer with these of its inputs."""
    weight = np.take(layer.weight.data, columns, axis=1)  # (d_out, d_in) -> (d_out, kept)
    return like(layer, Linear.of(weight, None if layer.bias is None else layer.bias.data.copy()))


def _squares(w, axis):
    return np.square(w, dtype=np.float64).sum(axis=axis)


def prune_neurons(model, keep, targets="blocks.*.mlp", *, grams=None):
    """Take inner neurons out of the MLPs: rows of `up` and the same columns of `down`.

    Neuron j scores ‖up_j‖ · ‖down_:,j‖, or with grams √E[a_j²] · ‖down_:,j‖ with a_j its
    activation. Each neuron costs 2·d weights and a bias. Those kept stay in their order.

    Args:
        model: changed in place; new layers train where the old ones did.
        keep: how many neurons of each MLP, from 1, or a share: 1 is one neuron, 1.0 all of them.
        targets: one pattern or several for `MLP` modules.
        grams: what `observe` gave; the one of `<name>.down` is used.

    Source: Li et al. 2017, arXiv 1608.08710, section 3.1, who score filters by their norm.
    """
    fresh = []
    for name, mlp in plain(model, targets, "up down").items():
        kept = _how_many(keep, mlp.up.d_out, "neurons")
        if grams is None:
            score = _squares(mlp.up.weight.data, 1)  # (n, d) -> (n,)
        else:
            score = np.diagonal(grams[f"{name}.down"])
        score = score * _squares(mlp.down.weight.data, 0)  # (d, n) -> (n,)
        stay = np.flatnonzero(~_lowest(score, len(score) - kept))  # (kept,)
        fresh.append((mlp, _rows(mlp.up, stay), _columns(mlp.down, stay)))
    for mlp, up, down in fresh:
        mlp.up, mlp.down = up, down
    return model


def prune_heads(model, keep, targets="blocks.*.attn", *, grams=None):
    """Take heads out of attention: rows of q, k and v, columns of o, and `n_head`.

    Head h adds O_h a_h to the output, with a_h its mix of values. It scores ‖O_h‖ · ‖V_h‖, or
    with grams the root mean square of what it adds, √tr(O_h C_h O_hᵀ) with C_h = E[a_h a_hᵀ].
    Each head costs 4·d·d_head weights and 3·d_head biases. `model.config` keeps the number of
    heads that decided d_head.

    Args:
        model: changed in place; new layers train where the old ones did.
        keep: how many heads of each layer, from 1, or a share: 1 is one head, 1.0 all of them.
        targets: one pattern or several for `Attention` modules.
        grams: what `observe` gave; the one of `<name>.o` is used.

    Source: Michel et al. 2019, arXiv 1905.10650, who score heads by gradients instead.
    """
    fresh = []
    for name, attn in plain(model, targets, "q k v o n_head").items():
        heads, size = attn.n_head, attn.o.d_in // attn.n_head
        kept = _how_many(keep, heads, "heads")
        o = attn.o.weight.data.reshape(-1, heads, size)  # (d, H·s) -> (d, H, s)
        if grams is None:
            v = attn.v.weight.data.reshape(heads, size, -1)  # (H·s, d) -> (H, s, d)
            score = _squares(o, (0, 2)) * _squares(v, (1, 2))  # (H,)
        else:
            c = grams[f"{name}.o"].reshape(heads, size, heads, size)
            c = np.einsum("hihj->hij", c)  # (H, s, H, s) -> (H, s, s), the blocks on the diagonal
            o = o.transpose(1, 0, 2)  # (d, H, s) -> (H, d, s)
            score = np.einsum("hoi,hoi->h", o @ c, o)  # (H,)
        stay = np.flatnonzero(~_lowest(score, heads - kept))  # (kept,)
        at = (stay[:, None] * size + np.arange(size)).reshape(-1)  # (kept, s) -> (kept·s,)
        rows = {part: _rows(getattr(attn, part), at) for part in "qkv"}
        fresh.append((attn, rows | {"o": _columns(attn.o, at), "n_head": kept}))
    for attn, parts in fresh:
        vars(attn).update(parts)
    return model


# ------------------------------------------------------------------ blocks


def block_similarity(model, inputs):
    """The mean cosine between what enters and what leaves each block, over all positions.

    Near 1, a block hardly turns the stream and may be left out; ShortGPT's *block influence* is
    1 less this.

    Args:
        model: left as it was. inputs: token ids (N, T), run in one pass.

    Returns:
        float64 (n_layer,), from -1 to 1.

    Source: Men et al. 2024, arXiv 2403.03853, section 3.
    """
    found = []

    def see(name, a, b):  # (B, T, d) both
        lengths = np.sqrt(_squares(a, -1) * _squares(b, -1))  # (B, T)
        dot = np.einsum("btd,btd->bt", a, b)
        found.append(np.mean(dot / np.where(lengths, lengths, 1)))  # a zero has cosine 0

    watch(model, inputs, find(model, "blocks.*", "attn mlp"), see)
    return np.array(found)


def drop_blocks(model, which):
    """Take whole blocks out of a `Transformer`, and keep its `config["n_layer"]` right.

    Args:
        model: changed in place.
        which: one index or several, from 0, each once.

    Source: Men et al. 2024, arXiv 2403.03853, section 3.
    """
    which, n = {which} if isinstance(which, int) else set(which), len(model.blocks)
    if wrappers(model) or not which < set(range(n)):
        raise ValueError(f"which is {which}; expected some of 0 to {n - 1}, on a plain model")
    model.blocks = [block for i, block in enumerate(model.blocks) if i not in which]
    return model
