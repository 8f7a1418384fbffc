"""What many test files share: a tiny model, ways to move it, and what must stay as it was.

A test file takes what it needs by name: `from helpers import IDS, both, logits, rng, small`.
"""

from contextlib import contextmanager

import numpy as np
import pytest

from minilora import Transformer, lora, no_grad

SIZES = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
IDS = np.random.default_rng(9).integers(7, size=(4, 5))  # tokens for `small()`

both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def rng(seed=0):
    """A fresh generator."""
    return np.random.default_rng(seed)


def normal(*shape, seed=0, dtype=np.float64):
    """An array of this shape, N(0, 1)."""
    return rng(seed).standard_normal(shape).astype(dtype)


def moments(d, seed=0, rows=20):
    """What `observe` gives of a layer's inputs, (d, d); singular if there are fewer rows than d."""
    x = rng(seed).standard_normal((rows, d)) * np.geomspace(0.1, 10, d)
    return x.T @ x / rows


# ------------------------------------------------------------------ models


def small(dtype=np.float64, seed=0, **changes):
    """A Transformer of two blocks, small enough for a law; `changes` go over `SIZES`."""
    return Transformer(**SIZES | changes, rng=rng(seed), dtype=dtype)


def biased(model):
    """Biases off their zero start, so that losing one is seen. Returns the model."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data[...] = 0.3 * rng(p.size).standard_normal(p.shape)
    return model


def shake(model, seed=5, size=0.5):
    """Move whatever trains, as training would: an adapter then does something. Returns it."""
    generator = rng(seed)
    for p in model.trainable().values():
        p.data += (size * generator.standard_normal(p.shape)).astype(p.dtype)
    return model


def adapted(model, seed=1, **settings):
    """The model under a LoRA of rank 2 that does something: B is off its zero."""
    return shake(lora(model, **{"r": 2, "rng": rng(seed)} | settings), seed)


def logits(model, ids=IDS):
    """What the model answers, as an array, without a tape."""
    with no_grad():
        return model(ids).data


# ------------------------------------------------------------------ what stays as it was


def weights(model):
    """A copy of every parameter's array, by name."""
    return {name: p.data.copy() for name, p in model.named_parameters()}


def same_arrays(got, wanted):
    """Two dictionaries of arrays are equal to the bit: names, order, dtypes, shapes and values."""
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def same_models(got, wanted):
    """Two models hold equal parameters, frozen alike."""
    same_arrays(weights(got), weights(wanted))
    assert list(got.trainable()) == list(wanted.trainable())


def state(model):
    """All that an operation may change: which modules stand where, their modes, the parameters.

    Bytes stand for the arrays, so that two states can be compared by `==`.
    """
    modules = {
        name: (id(m), m.training, getattr(m, "n_head", None)) for name, m in model.named_modules()
    }
    return modules, {
        name: (id(p), p.requires_grad, p.data.tobytes()) for name, p in model.named_parameters()
    }


@contextmanager
def unchanged(model):
    """Inside this block nothing may change the model, an error included."""
    before = state(model)
    yield model
    assert state(model) == before


@contextmanager
def refused(model, kind, match):
    """Inside this block there is an error of this kind, and the model is left as it was."""
    with unchanged(model), pytest.raises(kind, match=match) as error:
        yield error
