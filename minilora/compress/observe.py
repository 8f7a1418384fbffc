"""What flows through a model's layers: the one statistic that compression by data needs."""

import numpy as np

from ..nn import Linear, Module
from ..peft.lora import check_plain
from ..surgery import replace
from ..tensor import no_grad


class _Spy(Module):
    """Stands in for a layer, and adds up the products of its inputs with one another."""

    def __init__(self, layer):
        self.layer, self.total, self.rows = layer, 0.0, 0

    def forward(self, x):
        rows = x.data.reshape(-1, x.shape[-1]).astype(np.float64)  # (…, d_in) -> (N, d_in)
        self.total = self.total + rows.T @ rows  # (d_in, d_in)
        self.rows += len(rows)
        return self.layer(x)


def observe(model, inputs, targets="blocks.*"):
    """The second moments of what each linear layer is given: the mean of x xᵀ.

    Its diagonal is the mean square of each feature; ‖(W − Ŵ) x‖² has the mean tr(E C Eᵀ) with
    E = W − Ŵ and C this matrix. So it serves truncation, quantisation and pruning alike.

    Args:
        model: left as it was.
        inputs: token ids (N, T), run in one pass.
        targets: one pattern or several for linear layers.

    Returns:
        Layer names to arrays (d_in, d_in), float64.

    Raises:
        LookupError: if a pattern matches no linear layer.
        ValueError: if the model carries an adapter or masks: merge them first.
    """
    check_plain(model)
    layers = dict(model.named_modules())
    spies = {}

    def watch(layer):
        spies[id(layer)] = _Spy(layer)
        return spies[id(layer)]

    names = replace(model, targets, watch, kind=Linear)
    try:
        with no_grad():
            model(inputs)
    finally:
        replace(model, names, lambda spy: spy.layer, kind=_Spy)
    found = {name: spies[id(layers[name])] for name in names}
    return {name: spy.total / spy.rows for name, spy in found.items()}
