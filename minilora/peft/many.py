"""Many LoRA adapters on one base: sums of them, and a batch in which each sample has its own."""

from contextlib import contextmanager

import numpy as np

from .. import ops
from ..nn import Linear
from ..surgery import Wrapper, plain, put_all, wrappers
from ..tensor import Tensor
from .lora import LoRA


def _bases(adapters):
    """The layer that each name stands for, if all are plain LoRA on the layers of one base."""
    bases = {}
    for name, wrapper in (item for adapter in adapters for item in adapter.items()):
        if type(wrapper) is not LoRA:
            raise TypeError(f"the adapter at {name} is a {type(wrapper).__name__}; need LoRA")
        if bases.setdefault(name, wrapper.base) is not wrapper.base:
            raise ValueError(f"the adapters wrap two different layers at {name}; need one base")
    return bases


def combine(adapters, weights, r=None):
    """One adapter whose update is the weighted sum Σ wᵢ sᵢ Bᵢ Aᵢ of the updates of several.

    The stacked factors [w₁s₁B₁ w₂s₂B₂ …] and [A₁; A₂; …] have this product, and rank up to Σ rᵢ.
    (Adding up the A's and the B's instead would give cross terms Bᵢ Aⱼ.) Their QR factors bring
    it down to a small SVD, so that no weight-sized matrix is ever formed.

    Args:
        adapters: what `detach` returned, plain LoRA on one base; a layer that some of them leave
            out counts as zero there.
        weights: a number for each.
        r: the rank of the result: the best approximation of that rank (Eckart & Young 1936). If
            not given, as high as the sum needs, up to the smaller side of the layer: exact.

    Returns an adapter for `attach`. Its `scaling` is 1.
    """
    adapters, weights, combined = list(adapters), [float(w) for w in weights], {}
    for name, base in _bases(adapters).items():
        parts = [(w, a[name]) for w, a in zip(weights, adapters, strict=True) if name in a]
        left = np.concatenate([w * p.scaling * p.B.data for w, p in parts], axis=1)  # (d_out, Σr)
        right = np.concatenate([p.A.data for _, p in parts])  # (Σr, d_in)
        qb, rb = np.linalg.qr(left)  # (d_out, k), (k, Σr)
        qa, ra = np.linalg.qr(right.T)  # (d_in, l), (l, Σr)
        u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)  # (k, l) -> (k, n), (n,), (n, l)
        rank = len(s) if r is None else min(len(s), r)
        combined[name] = new = LoRA(base, rank, rank, rng=np.random.default_rng(0))
        new.fill(qb @ u[:, :rank], s[:rank], vt[:rank] @ qa.T)  # (d_out, rank), (rank, d_in)
    return combined


class Many(Wrapper):
    """A linear layer with several frozen bypasses, of which each sample of a batch takes one.

    y[b] = W x[b] + bias + sᵢ Bᵢ Aᵢ x[b] with i = which[b]. The factors are stacked, (n, r, d_in)
    and (n, d_out, r), lower ranks filled up with zeros, and gathered by sample: one batched
    product serves all. The last of the stack is zero: the bare base.

    `bypasses` maps the name of each adapter to its `LoRA` here, or to None.

    Source: the idea of serving many adapters in one batch: Chen et al. 2023 (Punica),
    arXiv 2310.18547.
    """

    why_not_merged = "it holds several adapters; attach one of them and merge that"

    def __init__(self, base, bypasses):
        self.base, self.names, self.which = base, [*bypasses, None], None
        here = {i: p for i, p in enumerate(bypasses.values()) if p is not None}
        n, r, dtype = len(self.names), max(p.r for p in here.values()), base.dense().dtype
        self.A, self.B = np.zeros((n, r, base.d_in), dtype), np.zeros((n, base.d_out, r), dtype)
        for i, p in here.items():
            self.A[i, : p.r], self.B[i, :, : p.r] = p.A.data, p.scaling * p.B.data

    def forward(self, x):
        if self.which is None or len(self.which) != x.shape[0]:
            raise ValueError(f"a batch of {x.shape[0]} needs an adapter for each; see `choose`")
        a, b = self.A[self.which], self.B[self.which]  # (B, r, d_in), (B, d_out, r)
        h = ops.matmul(x, Tensor(a.transpose(0, 2, 1)))  # (B, T, d_in) -> (B, T, r)
        return self.base(x) + ops.matmul(h, Tensor(b.transpose(0, 2, 1)))  # -> (B, T, d_out)


def many(model, adapters):
    """Put several LoRA adapters on a model at once, for inference. Returns the model.

    `adapters` maps names to what `detach` gave on this model; `detach` takes them all off again.
    Use it as `with choose(model, ["sort", None, "sort"]): model(ids)`.
    """
    bases, fresh = _bases(adapters.values()), {}
    for name, layer in plain(model, bases, (Linear,)).items():
        if layer is not bases[name]:
            raise LookupError(f"many: the layer at {name} is not the one these adapters wrap")
        fresh[name] = Many(layer, {key: part.get(name) for key, part in adapters.items()})
    return put_all(model, fresh)


@contextmanager
def choose(model, names):
    """Inside this block, sample i of a batch goes through the adapter `names[i]`; None: the base.

    Blocks nest: after an inner one the outer choice holds again.
    """
    layers = [w for w in wrappers(model).values() if isinstance(w, Many)]
    if not layers:
        raise ValueError("choose: this model does not carry several adapters; see `many`")
    before = layers[0].which
    which = np.array([layers[0].names.index(name) for name in names], int)  # (B,)
    try:
        for layer in layers:
            layer.which = which
        yield model
    finally:
        for layer in layers:
            layer.which = before
