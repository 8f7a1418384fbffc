"""Pruning connections: a mask over the weights. It saves bytes in a file, and no time.

In each case the lowest scores go, and of equal ones those that come first.
"""

from numbers import Real

import numpy as np

from .. import ops
from ..nn import Linear
from ..peft.lora import _tied, finite, like
from ..surgery import Wrapper, detached, put, replace, wrappers
from .checks import check_layer, finite_array

# ------------------------------------------------------------------ which to keep


def magnitude_mask(w, sparsity):
    """Keep the weights that are farthest from zero: the least squared error for so many zeros.

    Args:
        w: an array of any shape.
        sparsity: the share of zeros, from 0 up to, not at, 1.

    Returns:
        Booleans in the shape of `w`, True = keep, with exactly `round(sparsity * w.size)` False.
        The masks of one `w` are nested: a higher sparsity only takes more away.

    Raises:
        ValueError: for a sparsity out of range, or weights that are not finite.

    Source: Han et al. 2015, arXiv 1506.02626, section 3.
    """
    share = _share(sparsity)
    score = np.abs(finite_array(w, "w")).reshape(1, -1)  # (…) -> (1, n)
    return ~_lowest(score, round(share * score.size)).reshape(np.shape(w))  # -> (…)


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

    Raises:
        ValueError: for a sparsity out of range, a gram of another shape, or what is not finite.

    Source: Sun et al. 2023, arXiv 2306.11695, section 3.
    """
    share, score = _share(sparsity), _wanda(w, gram)
    return ~_lowest(score, round(share * score.shape[1]))


def _wanda(w, gram, w_name="w", gram_name="gram"):
    w = finite_array(w, w_name)
    if w.ndim != 2:
        raise ValueError(f"{w_name} has shape {w.shape}; expected (d_out, d_in)")
    return np.abs(w) * np.sqrt(np.diagonal(_moments(gram, w.shape[1], gram_name)))  # (d_out, d_in)


def _lowest(score, n):
    """Where the `n` smallest of each row are, and of equals the first: (…, m) to booleans."""
    if n == 0:
        return np.zeros(score.shape, bool)
    cut = np.partition(score, n - 1, axis=-1)[..., n - 1 : n]  # (…, 1), the n-th smallest
    below, at = score < cut, score == cut
    room = n - below.sum(axis=-1, keepdims=True)
    return below | (at & (at.cumsum(axis=-1) <= room))


def _share(sparsity):
    if isinstance(sparsity, bool) or not (isinstance(sparsity, Real) and 0 <= sparsity < 1):
        raise ValueError(f"sparsity is {sparsity!r}; expected a share from 0 up to, not at, 1")
    return float(sparsity)


def _moments(gram, d, name):
    gram = np.asarray(gram)
    if gram.shape != (d, d):
        raise ValueError(f"{name} has shape {gram.shape}; expected {(d, d)}, one side an input")
    if not np.isfinite(gram).all() or (np.diagonal(gram) < 0).any():
        raise ValueError(f"{name} is no mean of x xᵀ; expected finite numbers, diagonal 0 or more")
    return gram


def _gram(grams, name, d):
    """What `observe` found for the layer `name` with `d` inputs."""
    if name not in grams:
        raise ValueError(f"grams lacks {name!r}; expected what observe gives for each layer pruned")
    return _moments(grams[name], d, f"grams[{name!r}]")


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
        if type(base) is not Linear:
            raise TypeError(f"base is {base!r}; expected a plain Linear")
        mask = np.array(mask)
        if mask.dtype != bool or mask.shape != base.weight.shape:
            raise ValueError(
                f"mask is {mask.dtype} {mask.shape}; expected bool {base.weight.shape}"
            )
        self.base, self.mask = base, mask

    @property
    def sparsity(self):
        """The share of weights that are masked, from 0 to 1."""
        return 1 - np.count_nonzero(self.mask) / self.mask.size

    def dense(self):
        """The weight that the layer acts with, (d_out, d_in)."""
        return self.base.dense() * self.mask

    def merged(self):
        """A new plain `Linear` with zeros in it. Training it would fill them again.

        Raises:
            ValueError: if the weight is not finite.
        """
        bias = None if self.base.bias is None else self.base.bias.data.copy()
        return like(self.base, Linear.of(finite(self.dense()), bias))

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

    Returns:
        The model.

    Raises:
        LookupError: if a pattern matches no linear layer.
        TypeError: if a layer is not a plain `Linear`.
        ValueError: for a bad `sparsity` or `scope`, for grams that lack a layer or do not fit,
            for weights that are tied or not finite, or for a model that carries another wrapper.
            In each case the model is left as it was.

    Source: Han et al. 2015, arXiv 1506.02626, section 3; Sun et al. 2023, arXiv 2306.11695.
    """
    share, on = _share(sparsity), wrappers(model)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is {scope!r}; expected 'layer' or 'global'")
    if grams is not None and scope != "layer":
        raise ValueError(f"scope is {scope!r}; expected 'layer' with grams, which compare in rows")
    for name, wrapper in on.items():
        if not isinstance(wrapper, Masked):
            raise ValueError(
                f"{name} is {wrapper!r}; expected no wrapper but Masked; merge it first"
            )
    with detached(model):
        tied, modules = _tied(model), dict(model.named_modules())
        layers = {n: modules[n] for n in replace(model, targets, lambda m: m, kind=Linear)}
    scores = {}
    for name, layer in layers.items():
        check_layer(name, layer, tied)
        if grams is None:
            score = np.abs(layer.weight.data).reshape(1, -1)  # (d_out, d_in) -> (1, n)
        else:
            score = _wanda(layer.weight.data, _gram(grams, name, layer.d_in))
        if name in on:  # what is masked stays so: below every score
            score = np.where(on[name].mask.reshape(score.shape), score, -1)
        scores[name] = score
    if scope == "global":
        every = np.concatenate([score[0] for score in scores.values()])  # (all weights,)
        ends = np.cumsum([score.size for score in scores.values()])[:-1]
        gone = np.split(_lowest(every, round(share * every.size)), ends)
    else:
        gone = [_lowest(score, round(share * score.shape[1])) for score in scores.values()]
    for (name, layer), lost in zip(layers.items(), gone, strict=True):
        mask = ~lost.reshape(layer.weight.shape)  # -> (d_out, d_in)
        put(model, name, Masked(layer, mask & on[name].mask if name in on else mask))
    return model


def rewind(model, weights):
    """Set the weights back to an earlier state and keep the masks: a lottery ticket.

    Args:
        model: with or without masks; changed in place.
        weights: names in the plain model to arrays, such as
            `{name: p.data.copy() for name, p in model.named_parameters()}` before `sparsify`.

    Returns:
        The model.

    Raises:
        ValueError: if the names or shapes are not this model's, or an array is the model's own,
            which has moved along. The model is left as it was.

    Source: Frankle & Carbin 2019, arXiv 1803.03635, section 1.
    """
    own = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[0]
        raise ValueError(f"weights and the model differ in {odd}; expected the same names")
    for name, p in own.items():
        if np.shape(weights[name]) != p.shape:
            raise ValueError(f"{name} has shape {np.shape(weights[name])}; expected {p.shape}")
        if np.may_share_memory(weights[name], p.data):
            raise ValueError(f"{name} is the model's own array; expected a copy from earlier")
    for name, p in own.items():
        p.data[...] = weights[name]
    return model
