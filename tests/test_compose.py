"""Compression and fine-tuning together: every recipe on every compressed base works, or says no.

What is refused is refused by the recipe, in one line, and leaves the model as it was; never by the
first forward pass.
"""

import numpy as np
import pytest

import minilora as ml
from minilora import compress, ops
from minilora.peft import DoRA, PiSSA
from minilora.surgery import wrappers

IDS = np.random.default_rng(5).integers(9, size=(3, 6))
TARGETS = np.random.default_rng(6).integers(9, size=(3, 6))


def rng():
    return np.random.default_rng(1)


def tiny(dtype=np.float64, n_layer=1):
    """A model with biases off zero, so that losing one is seen."""
    sizes = {"vocab_size": 9, "n_positions": 12, "n_embd": 8, "n_head": 2, "n_layer": n_layer}
    model = ml.Transformer(**sizes, rng=np.random.default_rng(0), dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data[...] = 0.3 * np.random.default_rng(p.size).standard_normal(p.shape)
    return model


def without_biases(model):
    """So that a quantised attention holds no parameter at all."""
    for _, layer in model.named_modules():
        if isinstance(layer, ml.Linear):
            layer.bias = None
    return model


def lora(**settings):
    return lambda m: ml.lora(m, 2, **{"targets": "blocks.*", "rng": rng()} | settings)


def many(model):
    """Two adapters that do something, and a choice among them that holds for good."""
    adapters = {}
    for name in ("a", "b"):
        lora()(model)
        for p in model.trainable().values():
            p.data[...] = 0.3 * rng().standard_normal(p.shape)
        adapters[name] = ml.detach(model)
    for layer in wrappers(ml.many(model, adapters)).values():
        layer.which = np.array([0, 2, 1])  # "a", None, "b"
    return model


RECIPES = {
    "full": ml.full,
    "bitfit": ml.bitfit,
    "lora": lora(),
    "rslora": lora(rslora=True),
    "dora": lora(variant=DoRA),
    "pissa": lora(variant=PiSSA),
    "tables": lora(targets=["tokens", "positions", "head"]),
    "ia3": ml.ia3,
    "houlsby": lambda m: ml.adapter(m, 3, rng=rng()),
    "pfeiffer": lambda m: ml.adapter(m, 3, "pfeiffer", norms=True, rng=rng()),
    "parallel": lambda m: ml.adapter(m, 3, "pfeiffer", parallel=True, scale=4, rng=rng()),
    "prefix": lambda m: ml.prefix(m, 3, rng=rng()),
    "prefix mlp": lambda m: ml.prefix(m, 3, hidden=5, rng=rng()),
    "prompt": lambda m: ml.prompt(m, 3, rng=rng()),
    "token rows": lambda m: ml.token_rows(m, [3, 0]),
    "many": many,
}
BASES = {
    "heads": lambda m: compress.prune_heads(m, 1),
    "neurons": lambda m: compress.prune_neurons(m, 5),
    "low rank": lambda m: compress.low_rank(m, 2),
    "Tucker": lambda m: compress.tucker_layers(m, (4, 4, 4)),
    "8 bits": lambda m: compress.quantise_model(m, 8),
    "4 bits": lambda m: compress.quantise_model(m, 4, double=True),
    "2 bits": lambda m: compress.quantise_model(m, 2, block=4),
    "nf4": lambda m: compress.quantise_model(without_biases(m), 4, kind="nf4"),
    "masked": lambda m: compress.sparsify(m, 0.5),
    "sparse": lambda m: ml.merge(compress.sparsify(m, 0.9)),
    "blocks": lambda m: compress.drop_blocks(tiny(n_layer=2), 0),
}
SHIFTED = ("prefix", "prefix mlp", "prompt", "many")  # do not start as the base
MERGED = ("lora", "rslora", "dora", "pissa", "tables", "ia3", "token rows")


def refused(recipe, base):
    """The key word of the recipe's refusal, if there is one."""
    if base == "masked" and recipe != "full":  # a mask is a wrapper
        return "carries an adapter"
    return None


def logits(model):
    with ml.no_grad():
        return model(IDS).data


def loss_of(model):
    return ops.cross_entropy(model(IDS), TARGETS)


def state(model):
    """What a refusal must not change: modules, weights, what trains, and packed codes."""
    arrays = {n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()}
    for name, layer in model.named_modules():
        if hasattr(layer, "packed_size"):
            packed = {key: a.tobytes() for key, a in layer.arrays().items() if key != "bias"}
            arrays |= {f"{name}.{key}": a for key, a in packed.items()}
    return {name: id(m) for name, m in model.named_modules()}, arrays


def moved(before, after):
    """The names of all that differs between two states."""
    return {name for name in before[1] if before[1][name] != after[1][name]}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_every_compressed_base(recipe, base, tmp_path):
    model = BASES[base](tiny())
    start, before = logits(model), state(model)
    if word := refused(recipe, base):
        with pytest.raises(ValueError, match=word) as error:
            RECIPES[recipe](model)
        assert "\n" not in str(error.value) and state(model) == before
        return
    RECIPES[recipe](model)

    # it starts where the base is
    if recipe not in SHIFTED:
        tolerance = 1e-12 if recipe in ("dora", "pissa") else 0
        np.testing.assert_allclose(logits(model), start, rtol=0, atol=tolerance)

    # two steps move what trains, all of it, and nothing else
    trains = set(model.trainable())
    if trains:
        before = state(model)
        optimizer = ml.AdamW(model.parameters(), 1e-2)
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            assert {n for n, p in model.named_parameters() if p.grad is not None} == trains
            assert all(np.isfinite(p.grad).all() for p in optimizer.parameters)
            optimizer.step()
        still = {n for n in trains if n.endswith("attn.k.bias")}  # a shift of all scores: no matter
        assert trains - still <= moved(before, state(model)) <= trains
    trained = logits(model)
    assert np.isfinite(trained).all()
    assert np.abs(trained - start).max() > 1e-3

    # with a cache it writes what it writes without one
    grown = IDS[:, :3]
    for _ in range(2):
        with ml.no_grad():
            grown = np.hstack([grown, model(grown).data[:, -1:].argmax(axis=-1)])
    assert np.array_equal(ml.generate(model, IDS[:, :3], 2), grown)

    # a file brings it back on the same base
    if recipe == "many" or base == "masked":
        with pytest.raises(TypeError, match="no adapter"):
            ml.save_adapter(model, tmp_path / "adapter")
    else:
        ml.save_adapter(model, tmp_path / "adapter")
        again = ml.load_adapter(BASES[base](tiny()), tmp_path / "adapter")
        tolerance = 1e-12 if recipe == "pissa" else 0
        np.testing.assert_allclose(logits(again), trained, rtol=0, atol=tolerance)
        assert set(again.trainable()) == trains

    # merged, it computes the same
    if recipe in MERGED:
        packed = any(hasattr(w.base, "requantised") for w in wrappers(model).values())
        ml.merge(model, requantise=False if packed else None)
        assert not wrappers(model)
        np.testing.assert_allclose(logits(model), trained, rtol=0, atol=1e-10)
    elif wrappers(model) and base != "masked":
        with pytest.raises(TypeError, match="cannot be merged"):
            ml.merge(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_the_dtype_of_a_base_without_a_float_parameter(recipe):
    model = RECIPES[recipe](BASES["nf4"](tiny(np.float32)))
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert logits(model).dtype == np.float32
