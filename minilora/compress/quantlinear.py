"""Quantised layers: `QuantLinear` holds packed codes, `StraightThrough` trains towards them."""

import numpy as np

from ..nn import Linear, Parameter
from ..ops.basic import gemm, linear, shape_error
from ..surgery import Wrapper, freeze, plain, put_all, unfreeze
from ..tensor import record
from .quantise import Quantised, dequantise, gptq, quantise, unpack


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

    def __init__(self, layer, bits=4, *, block=64, kind="symmetric", double=False, gram=None):
        if not (hasattr(layer, "dense") and hasattr(layer, "bias")):
            raise TypeError(f"layer is {layer!r}; expected a layer with dense() and bias")
        weight, settings = layer.dense(), {"block": block, "kind": kind, "double": double}
        if gram is None:
            found = quantise(weight, bits, **settings)
        else:
            found = gptq(weight, gram, bits, **settings)
        bias = None if layer.bias is None else layer.bias.data
        self._settle(found, bias, weight.dtype)

    def _settle(self, quantised, bias, dtype):
        if len(quantised.shape) != 2:
            raise ValueError(f"the weight has shape {quantised.shape}; expected (d_out, d_in)")
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
        return self.quantised.nbytes + (0 if self.bias is None else self.bias.data.nbytes)

    def dense(self):
        """The weight that the codes stand for, (d_out, d_in), made afresh."""
        return dequantise(self.quantised, self.dtype)

    def forward(self, x):
        q, dtype, old = self.quantised, self.dtype, x.shape
        d_out, d_in = q.shape
        if old[-1] != d_in:
            raise shape_error("QuantLinear", old, q.shape, "expected (…, d_in) and (d_out, d_in)")
        if x.dtype != dtype:
            raise TypeError(f"QuantLinear: x is {x.dtype}, the layer {dtype}; convert one first")
        y = gemm(x.data.reshape(-1, d_in), dequantise(q, dtype).T)  # (N, d_in) -> (N, d_out)

        def vjp(g):  # made dense again: to keep it until now would cost what packing saved
            return gemm(g.reshape(-1, d_out), dequantise(q, dtype)).reshape(old)

        edges = [(x, vjp)]
        if self.bias is not None:
            y += self.bias.data
            edges.append((self.bias, lambda g: g.reshape(-1, d_out).sum(axis=0)))
        return record(y.reshape(*old[:-1], d_out), *edges)

    def requantised(self, layer):
        """A new layer in the same format around the weight and bias of another.

        Args:
            layer: a `Linear`, or a layer with `dense()` and `bias`, such as a LoRA over this one
                merged; its weight is rounded to nearest.

        Raises:
            ValueError: if its weight has another shape, or is not finite.
        """
        weight, q = layer.dense(), self.quantised
        if weight.shape != q.shape:
            raise ValueError(f"the weight has shape {weight.shape}; expected {q.shape}")
        bias = None if layer.bias is None else layer.bias.data
        found = quantise(weight, **_settings(q), levels=q.levels)
        return QuantLinear.of(found, bias, weight.dtype)

    def config(self):
        """What `restore` needs beside `arrays`, for a file: plain strings and numbers."""
        shape = [int(n) for n in self.quantised.shape]
        described = {"kind": "QuantLinear", "shape": shape, "dtype": self.dtype.name}
        settings = _settings(self.quantised)
        return described | {"format": settings.pop("kind"), **settings}

    def arrays(self):
        """Everything stored, by name: codes, scale (or scale.codes, …), zero, levels, bias."""
        bias = {} if self.bias is None else {"bias": self.bias.data}
        return self.quantised.arrays() | bias

    @classmethod
    def restore(cls, arrays, config, dtype=None):
        """The layer that `arrays()` and `config()` came from, in its own dtype or in another.

        Raises:
            ValueError: if an array is missing, unknown, or of another shape or dtype than the
                config says, or if the config holds a bad setting.
        """
        shape, dtype = tuple(config["shape"]), np.dtype(dtype or config["dtype"])
        if "bias" in arrays:
            arrays = arrays | {"bias": arrays["bias"].astype(dtype)}
        settings = {name: config[name] for name in ("bits", "block", "double")}
        codebook = arrays.get("levels")
        # What is stored has the form of a quantised zero; so it says what to expect.
        form = quantise(np.zeros(shape, dtype), kind=config["format"], levels=codebook, **settings)
        wanted = form.arrays()
        if "bias" in arrays:
            wanted["bias"] = np.zeros(shape[:1], dtype)
        if arrays.keys() != wanted.keys():
            raise ValueError(f"arrays are {sorted(arrays)}; expected {sorted(wanted)}")
        for name, like in wanted.items():
            found = arrays[name]
            if (found.shape, found.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{name} is {found.dtype} of shape {found.shape}; expected {like.dtype} of "
                    f"shape {like.shape}"
                )
            if not np.isfinite(found).all():
                raise ValueError(f"{name} is not finite; expected finite numbers")
        scale = arrays.get("scale")
        if form.mean is not None:
            scale = form.scale._replace(packed=arrays["scale.codes"], scale=arrays["scale.scale"])
        parts = {name: arrays.get(name) for name in ("zero", "mean")}
        found = form._replace(packed=arrays["codes"], scale=scale, **parts)
        if codebook is not None:
            highest = unpack(found.packed, found.bits, shape[0] * shape[1]).max()
            if highest >= codebook.size:
                raise ValueError(f"a code is {highest}; expected less than {codebook.size} levels")
        return cls.of(found, arrays.get("bias"), dtype)

    def __repr__(self):
        q = self.quantised
        block = {None: "one block", "row": "blocks of a row"}.get(q.block, f"blocks of {q.block}")
        bias = "" if self.bias is not None else ", no bias"
        return f"QuantLinear({self.d_in} -> {self.d_out}, {q.bits}-bit {q.kind} in {block}{bias})"


def _settings(q: Quantised):
    """The settings of `quantise` that gave this, but for a codebook's levels."""
    double = q.mean is not None
    return {"bits": q.bits, "block": q.block, "kind": q.kind, "double": double}


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
        base: a `Linear`.
        bits, block, kind, double: as for `quantise`.

    `merged()` is the `QuantLinear` that computes the same.
    """

    def __init__(self, base, bits=4, *, block=64, kind="symmetric", double=False):
        if not isinstance(base, Linear) or isinstance(base, QuantLinear):
            raise TypeError(f"base is {base!r}; expected a Linear with a weight that can train")
        quantise(base.dense(), bits, block=block, kind=kind, double=double)  # for its checks
        self.base = base
        self.settings = {"bits": bits, "block": block, "kind": kind, "double": double}

    def dense(self):
        """The weight that the layer acts with."""
        return dequantise(quantise(self.base.dense(), **self.settings), self.base.dense().dtype)

    def merged(self):
        """A new `QuantLinear` that computes the same; nothing in it trains.

        Raises:
            ValueError: if the weight is not finite.
        """
        return QuantLinear(self.base, **self.settings)

    def forward(self, x):
        return linear(x, fake_quantise(self.base.weight, **self.settings), self.base.bias)

    def __repr__(self):
        return f"StraightThrough({self.settings['bits']} bits, base={self.base!r})"


# ------------------------------------------------------------------ the recipes


def quantise_model(model, bits=4, targets="blocks.*", *, grams=None, **settings):
    """Put a `QuantLinear` in the place of each matching linear layer, and freeze the model.

    Args:
        model: changed in place.
        bits, settings: as for `quantise`: block, kind, double.
        targets: one pattern or several for plain linear layers.
        grams: layer names to second moments, as `observe` returns them, to round by `gptq`.
    """
    fresh = {
        name: QuantLinear(layer, bits, gram=grams and grams[name], **settings)
        for name, layer in plain(model, targets).items()
    }
    return freeze(put_all(model, fresh))


def quantise_aware(model, bits=4, targets="blocks.*", **settings):
    """Let all of the model train, the matching linear layers through `StraightThrough`.

    `merge` then puts a `QuantLinear` in the place of each. Arguments as for `quantise_model`.
    """
    layers = plain(model, targets).items()
    fresh = {name: StraightThrough(layer, bits, **settings) for name, layer in layers}
    return unfreeze(put_all(model, fresh))
