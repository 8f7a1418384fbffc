"""Pruning neurons and heads (smaller matrices) and blocks (fewer of them): what saves time too.

In each case the lowest scores go, and of equal ones those that come first.
"""

from numbers import Real

import numpy as np

from ..nn import MLP, Linear, Module
from ..peft.lora import _tied, check_plain, is_whole, like
from ..surgery import replace
from ..tensor import no_grad
from ..transformer import Attention, Block
from .checks import check_layer
from .masks import _gram, _lowest

# ------------------------------------------------------------------ neurons and heads


def _how_many(keep, n, what):
    """`keep`, a share or a whole number, as a whole number from 1 to `n`."""
    share = isinstance(keep, Real) and not is_whole(keep) and not isinstance(keep, bool)
    if not (share and 0 < keep <= 1) and not (is_whole(keep) and 1 <= keep <= n):
        raise ValueError(
            f"keep is {keep!r}; expected a whole number from 1 to {n}, the {what}, or a share "
            "above 0 and up to 1.0"
        )
    kept = round(keep * n) if share else int(keep)
    if kept == 0:
        raise ValueError(f"keep is {keep!r}, which leaves none of {n} {what}; expected 1 or more")
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


def _targets(model, targets, kind, parts):
    """The modules of a kind whose names match, after a look at their linear layers."""
    check_plain(model)
    modules, tied = dict(model.named_modules()), _tied(model)
    found = {name: modules[name] for name in replace(model, targets, lambda m: m, kind=kind)}
    for name, module in found.items():
        for part in parts:
            check_layer(f"{name}.{part}", getattr(module, part), tied)
    return found


def prune_neurons(model, keep, targets="blocks.*.mlp", *, grams=None):
    """Take inner neurons out of the MLPs: rows of `up` and the same columns of `down`.

    Neuron j scores ‖up_j‖ · ‖down_:,j‖, or with grams √E[a_j²] · ‖down_:,j‖ with a_j its
    activation. Each neuron costs 2·d weights and a bias. Those kept stay in their order.

    Args:
        model: changed in place; new layers train where the old ones did.
        keep: how many neurons of each MLP, from 1, or a share: 1 is one neuron, 1.0 all of them.
        targets: one pattern or several for `MLP` modules.
        grams: what `observe` gave; the one of `<name>.down` is used.

    Returns:
        The model.

    Raises:
        LookupError: if a pattern matches no MLP.
        TypeError: if `up` or `down` is not a plain `Linear`.
        ValueError: for a bad `keep`, for grams that lack a layer or do not fit, for weights that
            are tied or not finite, or for a model that carries an adapter.
            In each case the model is left as it was.

    Source: Li et al. 2017, arXiv 1608.08710, section 3.1, who score filters by their norm.
    """
    fresh = []
    for name, mlp in _targets(model, targets, MLP, ("up", "down")).items():
        kept = _how_many(keep, mlp.up.d_out, "neurons")
        if grams is None:
            score = _squares(mlp.up.weight.data, 1)  # (n, d) -> (n,)
        else:
            score = np.diagonal(_gram(grams, f"{name}.down", mlp.down.d_in))
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

    Returns:
        The model.

    Raises:
        LookupError: if a pattern matches no attention.
        TypeError: if a projection is not a plain `Linear`.
        ValueError: as for `prune_neurons`. In each case the model is left as it was.

    Source: Michel et al. 2019, arXiv 1905.10650, who score heads by gradients instead.
    """
    fresh = []
    for name, attn in _targets(model, targets, Attention, "qkvo").items():
        heads, size = attn.n_head, attn.o.d_in // attn.n_head
        kept = _how_many(keep, heads, "heads")
        o = attn.o.weight.data.reshape(-1, heads, size)  # (d, H·s) -> (d, H, s)
        if grams is None:
            v = attn.v.weight.data.reshape(heads, size, -1)  # (H·s, d) -> (H, s, d)
            score = _squares(o, (0, 2)) * _squares(v, (1, 2))  # (H,)
        else:
            c = _gram(grams, f"{name}.o", attn.o.d_in).reshape(heads, size, heads, size)
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


class _Watch(Module):
    """Stands in for a block, and notes the mean cosine between what enters and what leaves."""

    def __init__(self, block, found):
        self.block, self.found = block, found

    def forward(self, x):
        y = self.block(x)
        a, b = (t.data.astype(np.float64) for t in (x, y))  # (B, T, d)
        lengths = np.sqrt(_squares(a, -1) * _squares(b, -1))  # (B, T)
        dot = np.einsum("btd,btd->bt", a, b)
        self.found.append(np.mean(dot / np.where(lengths, lengths, 1)))  # a zero has cosine 0
        return y


def block_similarity(model, inputs):
    """The mean cosine between what enters and what leaves each block, over all positions.

    Near 1, a block hardly turns the stream and may be left out; ShortGPT's *block influence* is
    1 less this.

    Args:
        model: left as it was.
        inputs: token ids (N, T), run in one pass.

    Returns:
        float64 (n_layer,), from -1 to 1.

    Raises:
        LookupError: if the model has no blocks.

    Source: Men et al. 2024, arXiv 2403.03853, section 3.
    """
    found = []
    names = replace(model, "blocks.*", lambda block: _Watch(block, found), kind=Block)
    try:
        with no_grad():
            model(inputs)
    finally:
        replace(model, names, lambda watch: watch.block, kind=_Watch)
    return np.array(found)


def drop_blocks(model, which):
    """Take whole blocks out of a `Transformer`, and keep its `config["n_layer"]` right.

    Args:
        model: changed in place.
        which: one index or several, from 0, each once.

    Returns:
        The model.

    Raises:
        ValueError: for an index that is out of range or stands twice, if no block would be left,
            or for a model that carries an adapter. The model is left as it was.

    Source: Men et al. 2024, arXiv 2403.03853, section 3.
    """
    check_plain(model)
    which, n = [which] if is_whole(which) else list(which), len(model.blocks)
    for i in which:
        if not is_whole(i) or not 0 <= i < n or which.count(i) > 1:
            raise ValueError(
                f"which holds {i!r}; expected whole numbers from 0 to {n - 1}, once each"
            )
    if len(which) == n:
        raise ValueError(f"which holds all {n} blocks; expected one or more to be left")
    model.blocks = [block for i, block in enumerate(model.blocks) if i not in which]
    model.config["n_layer"] = len(model.blocks)
    return model
