"""Pruning connections: a mask over the weights. It saves bytes in a file, and no time.

In each case the lowest scores go, and of equal ones those that come first.
"""

import numpy as np

from .. import ops
from ..surgery import Wrapper, detached, plain, put_all, wrappers

# ------------------------------------------------------------------ which to keep


def magnitude_mask(w, sparsity):
    """Keep the weights that are farthest from zero: the least squared error for so many zeros.

    Args:
        w: an array of any shape.
        sparsity: the share of zeros, from 0 up to, not at, 1.

    Returns:
        Booleans in the shape of `w`, True = keep, with exactly `round(sparsity * w.size)` False.
        The masks of one `w` are nested: a higher sparsity only takes more away.

    Source: Han et al. 2015, arXiv 1506.02626, section 3.
    """
    score = np.abs(w).reshape(1, -1)  # (…) -> (1, n)
    return ~_lowest(score, _share(sparsity, score.size)).reshape(np.shape(w))  # -> (…)


def wanda_mask(w, gram, sparsity):
    """Keep, in each row, the weights with the largest |w_j| · ‖x_j‖: size times what it meets.

    If the features of x were uncorrelated, this would be the least mean squared error of each
    output, Σ w_j² E[x_j²] over what is taken away.

    Args:
        w: (d_out, d_in).
        gram: (d_in, d_in), the mean of x xᵀ as `observe` gives it; its diagonal is E[x_j²].
        sparsity: the share of zeros in each row, from 0 up to, not at, 1.

    Returns:
        Booleans (d_out, d_in), True = keep, with exactly `round(sparsity * d_in)` False a row.

    Source: Sun et al. 2023, arXiv 2306.11695, section 3.
    """
    return ~_lowest(_wanda(w, gram), _share(sparsity, w.shape[1]))


def _wanda(w, gram):
    return np.abs(w) * np.sqrt(np.diagonal(gram))  # (d_out, d_in)


def _lowest(score, n):
    """Where the `n` smallest of each row are, and of equals the first: (…, m) to booleans."""
    if n == 0:
        return np.zeros(score.shape, bool)
    cut = np.partition(score, n - 1, axis=-1)[..., n - 1 : n]  # (…, 1), the n-th smallest
    below, at = score < cut, score == cut
    room = n - below.sum(axis=-1, keepdims=True)
    return below | (at & (at.cumsum(axis=-1) <= room))


def _share(sparsity, n):
    """So many of `n` as a share from 0 up to, not at, 1."""
    if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}; expected a share from 0 up to, not at, 1")
    return round(sparsity * n)


# ------------------------------------------------------------------ connections


class Masked(Wrapper):
    """A linear layer in which some weights count as zero: h = (mask ⊙ W) x + b.

    Args:
        base: a plain `Linear`; it stays whole, so a masked weight keeps its value.
        mask: booleans (d_out, d_in), True = keep. It is no parameter and never trains.

    A masked weight gets a gradient of exactly zero. So a fresh optimiser without weight decay
    leaves it as it was, bit for bit. One product of the size of W is added to each step.
    """

    def __init__(self, base, mask):
        if np.shape(mask) != base.shape:
            raise ValueError(f"mask has shape {np.shape(mask)}; expected {base.shape}")
        self.base, self.mask = base, np.array(mask, bool)

    @property
    def sparsity(self):
        """The share of weights that are masked, from 0 to 1."""
        return 1 - np.count_nonzero(self.mask) / self.mask.size

    def dense(self):
        """The weight that the layer acts with, (d_out, d_in)."""
        return self.base.dense() * self.mask

    def forward(self, x):
        return ops.linear(
            x, self.base.weight * self.mask, self.base.bias
        )  # (…, d_in) -> (…, d_out)

    def __repr__(self):
        return f"Masked(sparsity={self.sparsity:.4g}, base={self.base!r})"


def sparsify(model, sparsity, targets="blocks.*", *, scope="layer", grams=None):
    """Put a mask on the layers whose names match, by |w|, or by |w| · ‖x‖ if `grams` are given.

    On a model that is masked already this prunes further, so that a loop of training and
    `sparsify` prunes step by step: a mask only ever loses entries, and a sparsity below the one
    there is changes nothing. `merge` makes plain layers with zeros of it, `detach` lifts the mask.

    Args:
        model: changed in place; what trains goes on training.
        sparsity: the share of zeros, from 0 up to, not at, 1, counted from the whole layer.
        targets: one pattern or several for plain linear layers.
        scope: `"layer"`: this share of each layer; `"global"`: this share of all of them
            together, by one threshold.
        grams: what `observe` gave; compared within each row, as Wanda does. `observe` wants a
            plain model: to prune by fresh grams, `merge` first; zeros have the lowest score.

    Source: Han et al. 2015, arXiv 1506.02626, section 3; Sun et al. 2023, arXiv 2306.11695.
    """
    on = wrappers(model)
    if scope not in ("layer", "global") or (grams and scope == "global"):
        raise ValueError(f"scope is {scope!r}; expected 'layer', or 'global' without grams")
    if not all(isinstance(wrapper, Masked) for wrapper in on.values()):
        raise ValueError("this model carries an adapter; merge or detach it first")
    with detached(model):
        layers = plain(model, targets)
    scores = {}
    for name, layer in layers.items():
        if grams is None:
            score = np.abs(layer.weight.data).reshape(1, -1)  # (d_out, d_in) -> (1, n)
        else:
            score = _wanda(layer.weight.data, grams[name])
        if name in on:  # what is masked stays so: below every score
            score = np.where(on[name].mask.reshape(score.shape), score, -1)
        scores[name] = score
    if scope == "global":
        every = np.concatenate([score[0] for score in scores.values()])  # (all weights,)
        ends = np.cumsum([score.size for score in scores.values()])[:-1]
        gone = np.split(_lowest(every, _share(sparsity, every.size)), ends)
    else:
        gone = [_lowest(score, _share(sparsity, score.shape[1])) for score in scores.values()]
    kept = {
        name: ~lost.reshape(layers[name].shape) for name, lost in zip(layers, gone, strict=True)
    }
    return put_all(
        model,
        {n: Masked(layers[n], m & on[n].mask if n in on else m) for n, m in kept.items()},
    )


def rewind(model, weights):
    """Set the weights back to an earlier state and keep the masks: a lottery ticket.

    Args:
        model: with or without masks; changed in place.
        weights: names in the plain model to arrays, such as
            `{name: p.data.copy() for name, p in model.named_parameters()}` before `sparsify`.

    Source: Frankle & Carbin 2019, arXiv 1803.03635, section 1.
    """
    for name, p in model.named_parameters():
        p.data[...] = weights[name.replace(".base.", ".")]
    return model
