"""Modules: things that hold parameters, and the four layers a Transformer is built from."""

from contextlib import contextmanager

import numpy as np

from . import ops
from .tensor import Tensor


class Parameter(Tensor):
    """A tensor that a module owns and that training may move."""

    def __init__(self, data, requires_grad=True):
        super().__init__(data, requires_grad)


def held(value, name=""):
    """(dotted name, item) for each module and parameter in an attribute, a list or a dictionary."""
    if isinstance(value, (Module, Parameter)):
        yield name, value
    elif isinstance(value, (list, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from held(item, f"{name}.{key}")


class Module:
    """Holds parameters and other modules as attributes, and finds them by dotted names.

    A subclass sets attributes in `__init__` and computes in `forward`. Lists and dictionaries
    count too: the name of `self.blocks[0].attn.q.weight` is `blocks.0.attn.q.weight`.
    """

    training = False  # only dropout asks; `fit` turns it on while it runs

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def __setattr__(self, name, value):
        if isinstance(value, tuple) and any(True for _ in held(list(value))):
            raise TypeError(f"{name} is a tuple of layers or parameters; expected a list")
        super().__setattr__(name, value)

    def own(self, kind):
        """(name, item) for each `Module` or `Parameter` held directly, such as `blocks.0`."""
        for name, value in vars(self).items():
            yield from ((n, item) for n, item in held(value, name) if isinstance(item, kind))

    def named_modules(self, prefix=""):
        """(dotted name, module) for this module and all below it, depth first."""
        yield prefix, self
        for name, child in self.own(Module):
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self):
        """(dotted name, parameter), each parameter once: a tied weight under its first name."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, p in module.own(Parameter):
                if p not in seen:
                    seen.add(p)
                    yield f"{prefix}.{name}" if prefix else name, p

    def parameters(self):
        """Every parameter once."""
        return [p for _, p in self.named_parameters()]

    def trainable(self):
        """The parameters that have a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode=True):
        """Turn dropout on (or off), here and below. No weight is touched. Returns self."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        """Turn dropout off, here and below. No weight is touched. Returns self."""
        return self.train(False)

    @contextmanager
    def mode(self, training):
        """Inside this block dropout is on or off; then each module is as it was found."""
        before = {module: module.training for _, module in self.named_modules()}
        try:
            yield self.train(training)
        finally:
            for module, was in before.items():
                module.training = was

    def zero_grad(self):
        """Forget all gradients."""
        for p in self.parameters():
            p.grad = None

    def __repr__(self):
        inner = [f"{name}: {child!r}".replace("\n", "\n  ") for name, child in self.own(Module)]
        return type(self).__name__ + "(" + "".join(f"\n  {line}" for line in inner) + ")"


def check_rng(rng):
    """`rng` itself, if it is a generator and not a seed."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng is {rng!r}; expected a Generator, as numpy.random.default_rng(0) is")
    return rng


def normal(rng, shape, std, dtype):
    """A parameter that starts as N(0, std²).

    With `rng=None` it is a view of a single zero, which takes no memory whatever its shape: for
    the reader of a file, who checks shapes first and puts in what the file holds.
    """
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"dtype is {np.dtype(dtype)}; expected float32 or float64")
    if rng is None:
        return Parameter(np.broadcast_to(np.zeros((), dtype), shape))
    return Parameter((std * check_rng(rng).standard_normal(shape)).astype(dtype))


class Linear(Module):
    """y = x @ weight.T + bias, with `weight` (d_out, d_in) and `bias` (d_out,) or None.

    The weight starts as N(0, std²) and the bias at zero. `std` is 1 / sqrt(d_in) if not given, so
    that inputs of variance 1 give outputs of variance 1.
    """

    def __init__(self, d_in, d_out, *, rng, bias=True, std=None, dtype=np.float32):
        self.weight = normal(rng, (d_out, d_in), d_in**-0.5 if std is None else std, dtype)
        self.bias = Parameter(np.zeros(d_out, dtype)) if bias else None

    @classmethod
    def of(cls, weight, bias=None):
        """A layer with these arrays: weight (d_out, d_in), bias (d_out,) or None."""
        layer = cls.__new__(cls)
        layer.weight = Parameter(weight)
        layer.bias = None if bias is None else Parameter(bias)
        return layer

    @property
    def shape(self):
        """(d_out, d_in) of the weight; with `dense`, what another form of storage must give."""
        return self.weight.shape

    d_out = property(lambda self: self.shape[0])
    d_in = property(lambda self: self.shape[1])

    def dense(self):
        """The weight as a plain array (d_out, d_in), whatever form it is stored in."""
        return self.weight.data

    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)  # (…, d_in) -> (…, d_out)

    def __repr__(self):
        bias = "" if self.bias is not None else ", no bias"
        return f"{type(self).__name__}({self.d_in} -> {self.d_out}{bias})"


class Embedding(Module):
    """A table `weight` (n, d), which starts as N(0, std²): integers (…) to vectors (…, d)."""

    def __init__(self, n, d, *, rng, std=0.1, dtype=np.float32):
        self.weight = normal(rng, (n, d), std, dtype)

    @classmethod
    def of(cls, weight):
        """A table with this array, (n, d)."""
        table = cls.__new__(cls)
        table.weight = Parameter(weight)
        return table

    def dense(self):
        """The table as a plain array (n, d)."""
        return self.weight.data

    def forward(self, ids):
        return ops.embedding(self.weight, ids)  # (…) -> (…, d)

    def __repr__(self):
        return f"Embedding({self.weight.shape[0]} rows of {self.weight.shape[1]})"


class LayerNorm(Module):
    """Rows to mean 0 and variance 1, then a learned scale `weight` and shift `bias`, both (d,)."""

    eps = 1e-5  # added to the variance

    def __init__(self, d, *, dtype=np.float32):
        self.weight = Parameter(np.ones(d, dtype))
        self.bias = Parameter(np.zeros(d, dtype))

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, self.eps)  # (…, d) -> (…, d)

    def __repr__(self):
        return f"LayerNorm({self.weight.size})"


class MLP(Module):
    """up, GELU, down: each position on its own, through `d_ff` features, 4 d if not given."""

    def __init__(self, d, *, d_ff=None, rng, dtype=np.float32):
        self.up = Linear(d, d_ff or 4 * d, rng=rng, dtype=dtype)
        self.down = Linear(d_ff or 4 * d, d, rng=rng, dtype=dtype)

    d_out = property(lambda self: self.down.d_out)

    def forward(self, x):
        return self.down(ops.gelu(self.up(x)))  # (…, d) -> (…, 4d) -> (…, d)
