"""Optimisers and learning-rate schedules. State is kept only for what trains."""

import math

import numpy as np


class Optimizer:
    """What moves those of the `parameters` that train; its state is a dictionary of arrays.

    To go on another day: `safetensors.write(path, optimizer.state_arrays())` beside the model or
    the adapter, and then `optimizer.load_state(safetensors.read(path)[0])` into a new one.
    """

    t = 0  # steps taken

    def _named(self):
        slots = {slot: getattr(self, slot) for slot in ("m", "v") if hasattr(self, slot)}
        return {f"{slot}.{i}": a for slot, arrays in slots.items() for i, a in enumerate(arrays)}

    def state_arrays(self):
        """A copy of all that a step remembers: `t`, and the running means of each parameter."""
        return {"t": np.array(self.t)} | {name: a.copy() for name, a in self._named().items()}

    def load_state(self, arrays):
        """Take over what `state_arrays` gave: the next step is that of the unbroken run."""
        own = self._named()
        shapes = [{k: a.shape for k, a in d.items() if k != "t"} for d in (own, arrays)]
        if shapes[0] != shapes[1] or "t" not in arrays:
            raise ValueError("load_state: this is the state of other parameters; expected the same")
        self.t = int(arrays["t"])
        for name, a in own.items():
            a[...] = arrays[name]


class SGD(Optimizer):
    """p ← p - lr · g; `momentum` is the share of the last step that is taken again."""

    def __init__(self, parameters, lr, momentum=0.0):
        self.parameters = _that_train(parameters)
        self.lr, self.momentum = lr, momentum
        self.m = [np.zeros_like(p.data) for p in self.parameters] if momentum else []

    def step(self, lr=None):
        """Move every parameter that has a gradient, with `lr` if given."""
        lr = self.lr if lr is None else lr
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            g = p.grad
            if self.momentum:
                self.m[i] *= self.momentum
                self.m[i] += g
                g = self.m[i]
            p.data -= lr * g


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Args:
        parameters: the frozen ones among them are left out: no state, no decay.
        betas: how slowly the two running means forget.
        eps: keeps the division finite.
        weight_decay: each step, p shrinks by lr · weight_decay · p. For matrices and tables
            only: biases and norms (1-D) do not decay.
        factors: a number for each of `parameters`, by which its learning rate is multiplied.

    Source: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov & Hutter 2019,
    arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, factors=None
    ):
        parameters = list(parameters)
        pairs = zip(parameters, factors or [1.0] * len(parameters), strict=True)
        self.factors = [factor for p, factor in pairs if p.requires_grad]
        self.parameters = _that_train(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m = [np.zeros_like(p.data) for p in self.parameters]
        self.v = [np.zeros_like(p.data) for p in self.parameters]

    @property
    def state_size(self):
        """Numbers kept beside the parameters: two for each that trains."""
        return sum(a.size for a in self.m + self.v)

    def step(self, lr=None):
        """Move every parameter that has a gradient, with `lr` if given."""
        lr = self.lr if lr is None else lr
        self.t += 1
        b1, b2 = self.betas
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t  # the means start at 0: undo that bias
        for p, factor, m, v in zip(self.parameters, self.factors, self.m, self.v, strict=True):
            g, rate = p.grad, lr * factor
            if g is None:
                continue
            if self.weight_decay and p.ndim > 1:
                p.data *= 1 - rate * self.weight_decay
            m *= b1
            m += (1 - b1) * g
            square = g * g
            square *= 1 - b2
            v *= b2
            v += square
            # p -= lr · (m / c1) / (√(v / c2) + eps), in one spare array
            step = np.divide(v, c2, out=square)
            np.sqrt(step, out=step)
            step += self.eps
            np.divide(m, step, out=step)
            step *= rate / c1
            p.data -= step


def _that_train(parameters):
    chosen = [p for p in parameters if p.requires_grad]
    if not chosen:
        raise ValueError("the optimiser has nothing to train: every parameter is frozen")
    return chosen


def constant(step, steps):
    """The learning rate stays as it is: a factor of 1."""
    return 1.0


def cosine(step, steps, warmup=0.05):
    """A factor up in a straight line over the first `warmup` share, then down to 0 by a cosine."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
