"""What flows through a model's layers: the one statistic that compression by data needs."""

from functools import partial
from itertools import groupby

import numpy as np

from ..nn import Linear, Module
from ..ops.basic import gemm
from ..surgery import find, plain, put_all
from ..tensor import no_grad


def watch(model, inputs, modules, see):
    """Run the model once; `see(name, x, y)` is given the arrays that enter and leave each module.

    No module is replaced: each gets a `forward` of its own that looks on, taken off at the end.
    """

    def spied(name, forward, x):
        y = forward(x)
        see(name, x.data, y.data)
        return y

    try:
        for name, module in modules.items():
            module.forward = partial(spied, name, module.forward)
        with no_grad():
            model(inputs)
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _moments(model, inputs, layers):
    totals, rows = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def see(name, x, y):
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)  # (…, d_in) -> (N, d_in)
        totals[name] = totals[name] + gemm(x.T, x)  # (d_in, d_in)
        rows[name] += len(x)

    watch(model, inputs, layers, see)
    for name in layers:  # in place: a real model's moments take a gigabyte
        totals[name] /= rows[name]
    return totals


def observe(model, inputs, targets="blocks.*"):
    """The second moments of what each linear layer is given: the mean of x xᵀ, (d_in, d_in).

    Its diagonal is the mean square of each feature; ‖(W − Ŵ) x‖² has the mean tr(E C Eᵀ) with
    E = W − Ŵ and C this matrix. So it serves truncation, quantisation and pruning alike.

    Args:
        model: without adapters or masks, which `merge` takes in; left as it was.
        inputs: token ids (N, T), run in one pass.

    Returns: layer names to arrays (d_in, d_in), float64.
    """
    plain(model, "*", Module, ties=True)  # with a wrapper, names would be those of its base
    return _moments(model, inputs, find(model, targets, Linear))


def by_data(model, layers, make, grams=None, in_turn=None):
    """The new layers of a recipe by name: `make(name, layer, gram)` of each of `layers`.

    A gram is None, or that of `grams`, or, block by block, of `in_turn`: then a block can make
    up for what the new blocks before it do wrong. The model is left as it was.

    Source: Frantar et al. 2022, arXiv 2210.17323, for blocks in turn.
    """
    if in_turn is None:
        return {n: make(n, m, None if grams is None else grams[n]) for n, m in layers.items()}
    fresh, modules = {}, dict(model.named_modules())
    old = {name: modules[name] for name in layers}  # under a mask, the mask
    try:
        for _, block in groupby(layers, lambda name: name.split(".")[:2]):
            grams = _moments(model, in_turn, {name: old[name] for name in block})
            fresh |= {name: make(name, layers[name], gram) for name, gram in grams.items()}
            put_all(model, {name: fresh[name] for name in grams})
    finally:
        put_all(model, old)
    return fresh
