"""What every kind of compression asks of a layer first."""

import numpy as np

from ..nn import Linear


def finite_array(w, name):
    """`w` as an array, or a ValueError that says `name` holds a nan or an infinity."""
    w = np.asarray(w)
    if not np.isfinite(w).all():
        raise ValueError(f"{name} holds a nan or an infinity; expected finite weights")
    return w


def check_layer(name, layer, tied):
    """Raise unless this is a plain layer whose finite numbers are its own.

    Args:
        name: of the layer in its model. tied: what `_tied` found there.
    """
    if type(layer) is not Linear:
        raise TypeError(f"{name} is {layer!r}; expected a plain Linear")
    for p in layer.parameters():
        if id(p) in tied:
            raise ValueError(
                f"{name} is tied: {' and '.join(tied[id(p)])} are one parameter, so to compress "
                "one side would untie it; leave it out of targets"
            )
        finite_array(p.data, name)
