"""What flows through a model's layers: the one statistic that compression by data needs."""

import numpy as np

from ..nn import Linear, Module
from ..surgery import find, plain, put_all
from ..tensor import no_grad


class _Spy(Module):
    """Stands in for a layer, and shows what enters and what leaves."""

    def __init__(self, layer, see):
        self.layer, self.see = layer, see

    def forward(self, x):
        y = self.layer(x)
        self.see(x.data.astype(np.float64), y.data.astype(np.float64))
        return y


def watch(model, inputs, modules, see):
    """Run the model once, and call `see(name, x, y)` for each of the `modules`, by name."""
    spies = {n: _Spy(m, lambda x, y, n=n: see(n, x, y)) for n, m in modules.items()}
    try:
        put_all(model, spies)
        with no_grad():
            model(inputs)
    finally:
        put_all(model, modules)


def observe(model, inputs, targets="blocks.*"):
    """The second moments of what each linear layer is given: the mean of x xᵀ, (d_in, d_in).

    Its diagonal is the mean square of each feature; ‖(W − Ŵ) x‖² has the mean tr(E C Eᵀ) with
    E = W − Ŵ and C this matrix. So it serves truncation, quantisation and pruning alike.

    Args:
        model: left as it was. inputs: token ids (N, T), run in one pass.
        targets: one pattern or several for linear layers.

    Returns:
        Layer names to arrays (d_in, d_in), float64.
    """
    found = {}

    def see(name, x, y):
        rows = x.reshape(-1, x.shape[-1])  # (…, d_in) -> (N, d_in)
        found[name] = rows.T @ rows / len(rows)

    watch(model, inputs, plain(model, targets, (Linear,)), see)
    return {name: found[name] for name in find(model, targets, Linear)}
