"""Quantised layers: `QuantLinear` holds packed codes, `StraightThrough` trains towards them."""

from math import prod

import numpy as np

from .. import ops
from ..nn import Linear, Parameter
from ..ops.basic import gemm
from ..peft.lora import LoRA, lora
from ..surgery import Wrapper, freeze, plain, put_all, unfreeze
from ..tensor import Tensor, no_grad, record
from .factor import truncated_svd
from .observe import by_data
from .quantise import dequantise, gptq, quantise


class QuantLinear(Linear):
    """A linear layer whose weight is stored as a `Quantised`: y = x @ dense().T + bias.

    The dense weight is made for each product, forward and backward, and let go after it, so
    that a graph holds the packed codes alone. The weight cannot train; a LoRA over it can.

    Args:
        layer: a layer with `dense()` (d_out, d_in) and `bias`, of which a copy is kept, frozen.
        bits, settings: as for `quantise`.
        gram: to round by `gptq`; None to round to nearest.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    def __init__(self, layer, bits=4, *, gram=None, **settings):
        w, bias = layer.dense(), None if layer.bias is None else layer.bias.data
        found = quantise(w, bits, **settings) if gram is None else gptq(w, gram, bits, **settings)
        self._settle(found, bias, w.dtype)

    def _settle(self, quantised, bias, dtype):
        self.quantised, self.dtype = quantised, np.dtype(dtype)
        self.bias = None if bias is None else Parameter(bias.copy(), requires_grad=False)
        return self

    @classmethod
    def of(cls, quantised, bias=None, dtype=np.float32):
        """A layer around a `Quantised` (d_out, d_in) and a bias (d_out,) or None."""
        return cls.__new__(cls)._settle(quantised, bias, dtype)

    @property
    def shape(self):
        return self.quantised.shape

    @property
    def packed_size(self):
        """How many weights the codes stand for."""
        return self.d_out * self.d_in

    def dense(self):
        return dequantise(self.quantised, self.dtype)  # (d_out, d_in), made afresh

    def forward(self, x):
        old = x.shape
        with no_grad():
            y = ops.linear(x, Tensor(self.dense())).data  # (…, d_in) -> (…, d_out)

        def vjp(g):  # made dense again: to keep it until now would cost what packing saved
            return gemm(g.reshape(-1, self.d_out), self.dense()).reshape(old)

        y = record(y, (x, vjp))
        return y if self.bias is None else y + self.bias

    def requantised(self, layer):
        """A new layer in the same format around the weight and bias of another, to nearest."""
        return QuantLinear(layer, **self.quantised.settings(), levels=self.quantised.levels)

    def config(self):
        """What `restore` needs beside `arrays`, for a file: plain strings and numbers."""
        settings = self.quantised.settings()
        described = {"kind": "QuantLinear", "shape": list(self.shape), "dtype": self.dtype.name}
        return described | {"format": settings.pop("kind"), **settings}

    def arrays(self):
        """Everything stored, by name: codes, scale (or scale.codes, …), zero, levels, bias."""
        return self.quantised.arrays() | ({} if self.bias is None else {"bias": self.bias.data})

    @classmethod
    def restore(cls, arrays, config, dtype=None):
        """The layer that `arrays()` and `config()` came from, in its own dtype or in another.

        A ValueError if an array is missing, unknown, not finite, or of another shape or dtype
        than the config says, or if the config holds a bad setting.
        """
        dtype, n = np.dtype(dtype or config["dtype"]), prod(config["shape"])
        if n > 8 * arrays["codes"].size:  # a bit each is the least; before anything is made
            raise ValueError(f"{n} weights are claimed, for codes of {arrays['codes'].size} bytes")
        settings = {name: config[name] for name in ("bits", "block", "double")}
        settings |= {"kind": config["format"], "levels": arrays.get("levels")}
        # What is stored has the form of a quantised zero; so it says what to expect.
        w = np.zeros(config["shape"], dtype)
        like, found = quantise(w, **settings), dict(arrays)
        wanted = like.arrays()
        if "bias" in found:
            found["bias"], wanted["bias"] = found["bias"].astype(dtype), w[:, 0]
        forms = [{n: (str(a.dtype), *a.shape) for n, a in d.items()} for d in (found, wanted)]
        if forms[0] != forms[1] or not all(np.isfinite(a).all() for a in arrays.values()):
            raise ValueError(f"arrays are {forms[0]}; expected {forms[1]}, all finite")
        return cls.of(like.filled(found), found.get("bias"), dtype)

    def __repr__(self):
        q = self.quantised
        block = {None: "one block", "row": "blocks of a row"}.get(q.block, f"blocks of {q.block}")
        bias = "" if self.bias is not None else ", no bias"
        return f"QuantLinear({self.d_in} -> {self.d_out}, {q.bits}-bit {q.kind} in {block}{bias})"


# ------------------------------------------------------------------ training towards the grid


class StraightThrough(Wrapper):
    """A linear layer that computes with its quantised weight and trains the one behind it.

    `base` is a `Linear`; `bits` and `form` are as for `quantise`. Rounding has a slope of zero or
    none; the *straight-through* estimator takes it for 1. (A "fake quantised" weight.)

    Source: Bengio et al. 2013, arXiv 1308.3432.
    """

    def __init__(self, base, bits=4, **form):
        self.base, self.form = base, {"bits": bits, **form}
        self.dense()  # for the checks of `quantise`

    def dense(self):
        w = self.base.dense()
        return dequantise(quantise(w, **self.form), w.dtype)  # (d_out, d_in)

    def merged(self):
        return QuantLinear(self.base, **self.form)

    def forward(self, x):
        w = record(self.dense(), (self.base.weight, lambda g: g))
        return ops.linear(x, w, self.base.bias)

    def __repr__(self):
        return f"StraightThrough({self.form['bits']} bits, base={self.base!r})"


# ------------------------------------------------------------------ the recipes


def quantise_model(model, bits=4, targets="blocks.*", *, grams=None, in_turn=None, **settings):
    """Put a `QuantLinear` in the place of each matching linear layer, and freeze the model.

    By `gptq` if `grams` or `in_turn` are given; `bits` and `settings` are as for `quantise`.
    """

    def make(name, layer, gram):
        return QuantLinear(layer, bits, gram=gram, **settings)

    fresh = by_data(model, plain(model, targets), make, grams, in_turn)
    return freeze(put_all(model, fresh))


def quantise_aware(model, bits=4, targets="blocks.*", **settings):
    """Let all of the model train, the matching linear layers through `StraightThrough`.

    `merge` then puts a `QuantLinear` in the place of each. Arguments as for `quantise_model`.
    """
    layers = plain(model, targets).items()
    fresh = {name: StraightThrough(layer, bits, **settings) for name, layer in layers}
    return unfreeze(put_all(model, fresh))


def loftq(model, r=4, bits=4, alpha=8.0, targets="blocks.*", *, iterations=5, rng, **settings):
    """Quantise the base and start LoRA at what rounding took away: W ≈ Q + scaling · B A.

    In turn, Q is W − scaling · B A quantised, and B A the best rank-r fit to W − Q. The plain
    way, QLoRA, is one step of Q and B = 0. The layer then starts nearer to what it was, not at
    the quantised base. Neither step is bound to help the other, so the best of all is kept.

    Args:
        r, alpha, rng: as for `lora`. bits, settings: as for `quantise`.
        iterations: how many turns, 1 or more.

    Source: Li et al. 2023, arXiv 2310.08659, algorithm 1.
    """

    def start(base, r, alpha, **more):
        w, bias = base.dense(), None if base.bias is None else base.bias.data
        low, found = np.zeros(w.shape), []  # scaling · B A, float64 whatever w is
        for _ in range(iterations):
            q = quantise(w - low, bits, **settings)
            rest = w - dequantise(q, np.float64)
            left, right = truncated_svd(rest, r)  # (d_out, r), (r, d_in)
            low = left @ right
            found.append((np.linalg.norm(rest - low), q, left, right))
        _, q, left, right = min(found, key=lambda each: each[0])
        layer = LoRA(QuantLinear.of(q, bias, w.dtype), r, alpha, **more)
        layer.B.data[...], layer.A.data[...] = left / layer.scaling, right
        return layer

    return lora(model, r, alpha, targets, variant=start, rng=rng)
