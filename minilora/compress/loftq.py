"""LoftQ: where quantisation and LoRA meet, a start for both that fits the weight together."""

import numpy as np

from ..nn import Linear
from ..peft.lora import LoRA, lora
from .factor import truncated_svd
from .quantlinear import QuantLinear


def loftq(model, r=4, bits=4, alpha=8.0, targets="blocks.*", *, iterations=5, rng, **settings):
    """Quantise the base and start LoRA at what rounding took away: W ≈ Q + scaling · B A.

    In turn, Q is W − scaling · B A quantised, and B A the best rank-r fit to W − Q. The plain
    way, QLoRA, is one step of Q and B = 0. The layer then starts nearer to what it was, not at
    the quantised base. Neither step is bound to help the other, so the best of all is kept.

    Args:
        model: changed in place.
        r, alpha, targets, rng: as for `lora`, linear layers only.
        bits, settings: as for `QuantLinear` (`block`, `kind`, `double`).
        iterations: how many turns, 1 or more.

    Returns:
        The model, LoRA over `QuantLinear`, of which A and B train.

    Raises:
        TypeError: if a layer is not a plain `Linear`.
        ValueError, LookupError: as for `lora` and `quantise`. The model is left as it was.

    Source: Li et al. 2023, arXiv 2310.08659, algorithm 1.
    """

    def start(base, r, alpha, *, dropout, rslora, rng):
        w, best = base.dense(), (np.inf,)
        low = np.zeros_like(w)  # scaling · B A
        for _ in range(iterations):
            # the layer with this weight, so that the bias comes along
            q = QuantLinear(Linear.of(w - low, base.bias and base.bias.data), bits, **settings)
            left, right = truncated_svd(w - q.dense(), r)  # (d_out, r), (r, d_in)
            low = left @ right
            error = np.linalg.norm(w - q.dense() - low)
            if error < best[0]:
                best = error, q, left, right
        _, q, left, right = best
        layer = LoRA(q, r, alpha, dropout=dropout, rslora=rslora, rng=rng)
        layer.B.data[...], layer.A.data[...] = left / layer.scaling, right
        return layer

    return lora(model, r, alpha, targets, variant=start, rng=rng)
