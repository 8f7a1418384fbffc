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
from .quantise import Quantised, dequantise, gptq, quantise


class QuantLinear(Linear):
    """A linear layer whose weight is stored as a `Quantised`: y = x @ dense().T + bias.

    The dense weight is made for each product, forward and backward, and let go after it, so
    that a graph holds the packed codes alone. The weight cannot train; a LoRA over it can.

    Args:
        layer: a `Linear`, or a layer with `dense()` (d_out, d_in) and `bias`.
        bits, block, kind, double: as for `quantise`.
        gram: (d_in, d_in), the mean of x xᵀ, to round by `gptq`; None to round to nearest.

    The bias is copied, and frozen. Source: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    def __init__(self, layer, bits=4, *, gram=None, **settings):
        w, bias = layer.dense(), None if layer.bias is None else layer.bias.data
        found = quantise(w, bits, **settings) if gram is None else gptq(w, gram, bits, **settings)
        self._settle(found, bias, w.dtype)

    def _settle(self, quantised, bias, dtype):
        self.quantised, self.dtype = quantised, np.dtype(dtype)
        self.bias = None if bias is None else Parameter(bias.copy(), requires_grad=False)

    @classmethod
    def of(cls, quantised, bias=None, dtype=np.float32):
        """A layer around a `Quantised` (d_out, d_in) and a bias (d_out,) or None."""
        layer = cls.__new__(cls)
        layer._settle(quantised, bias, dtype)
        return layer

    @property
    def shape(self):
        """(d_out, d_in) of the weight."""
        return self.quantised.shape

    @property
    def packed_size(self):
        """How many weights the codes stand for."""
        return self.d_out * self.d_in

    @property
    def nbytes(self):
        """The bytes of what is stored, the bias included."""
        return sum(a.nbytes for a in self.arrays().values())

    def dense(self):
        """The weight that the codes stand for, (d_out, d_in), made afresh."""
        return dequantise(self.quantised, self.dtype)

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
        w, bias = layer.dense(), None if layer.bias is None else layer.bias.data
        q = quantise(w, **self.quantised.settings(), levels=self.quantised.levels)
        return QuantLinear.of(q, bias, w.dtype)

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

        Raises:
            ValueError: if an array is missing, unknown, not finite, or of another shape or dtype
                than the config says, or if the config holds a bad setting.
        """
        dtype, n = np.dtype(dtype or config["dtype"]), prod(config["shape"])
        if n > 8 * arrays["codes"].size:  # a bit each is the least; before anything is made
            raise ValueError(f"{n} weights are claimed, for codes of {arrays['codes'].size} bytes")
        w, bias = np.zeros(config["shape"], dtype), arrays.get("bias")
        settings = {name: config[name] for name in ("bits", "block", "double")}
        settings |= {"kind": config["format"], "levels": arrays.get("levels")}
        # What is stored has the form of a quantised zero; so it says what to expect.
        like = cls.of(quantise(w, **settings), None if bias is None else w[:, 0], dtype)
        if bias is not None:
            arrays = arrays | {"bias": bias.astype(dtype)}
        found, wanted = (
            {name: (str(a.dtype), *a.shape) for name, a in each.items()}
            for each in (arrays, like.arrays())
        )
        if found != wanted or not all(np.isfinite(a).all() for a in arrays.values()):
            raise ValueError(f"arrays are {found}; expected {wanted}, all finite")
        q = like.quantised
        scale = arrays.get("scale")
        if isinstance(q.scale, Quantised):
            scale = q.scale._replace(packed=arrays["scale.codes"], scale=arrays["scale.scale"])
        parts = {name: arrays.get(name) for name in ("zero", "mean")}
        return cls.of(
            q._replace(packed=arrays["codes"], scale=scale, **parts), arrays.get("bias"), dtype
        )

    def __repr__(self):
        q = self.quantised
        block = {None: "one block", "row": "blocks of a row"}.get(q.block, f"blocks of {q.block}")
        bias = "" if self.bias is not None else ", no bias"
        return f"QuantLinear({self.d_in} -> {self.d_out}, {q.bits}-bit {q.kind} in {block}{bias})"


# ------------------------------------------------------------------ training towards the grid


def fake_quantise(w, **settings):
    """dequantise(quantise(w)) as an operation whose gradient is passed on unchanged.

    Rounding has a slope of zero or none; the *straight-through* estimator takes it for 1.

    Args:
        w: a tensor. settings: those of `quantise`.

    Source: Bengio et al. 2013, arXiv 1308.3432, section 3.
    """
    return record(dequantise(quantise(w.data, **settings), w.dtype), (w, lambda g: g))


class StraightThrough(Wrapper):
    """A linear layer that computes with its quantised weight and trains the one behind it.

    Args:
        base: a `Linear`. bits, form: as for `quantise` (`block`, `kind`, `double`).

    `merged()` is the `QuantLinear` that computes the same.
    """

    def __init__(self, base, bits=4, **form):
        self.base, self.form = base, {"bits": bits, **form}
        self.dense()  # for the checks of `quantise`

    def dense(self):
        """The weight that the layer acts with."""
        return fake_quantise(Tensor(self.base.dense()), **self.form).data

    def merged(self):
        """A new `QuantLinear` that computes the same; nothing in it trains."""
        return QuantLinear(self.base, **self.form)

    def forward(self, x):
        return ops.linear(x, fake_quantise(self.base.weight, **self.form), self.base.bias)

    def __repr__(self):
        return f"StraightThrough({self.form['bits']} bits, base={self.base!r})"


# ------------------------------------------------------------------ the recipes


def quantise_model(model, bits=4, targets="blocks.*", *, grams=None, sequential=None, **settings):
    """Put a `QuantLinear` in the place of each matching linear layer, and freeze the model.

    Args:
        model: changed in place.
        bits, settings: as for `quantise`: `block`, `kind`, `double`.
        targets: one pattern or several for plain linear layers.
        grams: layer names to second moments, as `observe` returns them, to round by `gptq`.
        sequential: token ids (N, T) in place of `grams`: each block is rounded for what the
            rounded blocks before it make of these.
    """

    def make(name, layer, gram):
        return QuantLinear(layer, bits, gram=gram, **settings)

    fresh = by_data(model, plain(model, targets), make, grams, sequential)
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
        model: changed in place.
        r, alpha, targets, rng: as for `lora`, linear layers only.
        bits, settings: as for `quantise`: `block`, `kind`, `double`.
        iterations: how many turns, 1 or more.

    Returns:
        The model, LoRA over `QuantLinear`, of which A and B train.

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
