"""Where quantisation and LoRA meet: LoRA over a quantised base, LoftQ's start, and merging."""

import numpy as np
import pytest

from minilora import (
    Linear,
    LoRA,
    Transformer,
    count,
    fit,
    ia3,
    load_adapter,
    load_base,
    load_eval,
    lora,
    merge,
    no_grad,
    save_adapter,
)
from minilora.compress import QuantLinear, loftq, quantise_model
from minilora.surgery import wrappers

IDS = np.random.default_rng(9).integers(7, size=(2, 5))
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def rng(seed=0):
    return np.random.default_rng(seed)


def small(dtype=np.float64):
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return Transformer(**sizes, rng=rng(), dtype=dtype)


def logits(model):
    with no_grad():
        return model(IDS).data


def qlora(bits=4, r=2, dtype=np.float64):
    model = lora(quantise_model(small(dtype), bits), r, targets="blocks.*", rng=rng(1))
    for p in model.trainable().values():
        p.data[...] = 0.1 * rng(p.size).standard_normal(p.shape)
    return model


# ------------------------------------------------------------------ QLoRA


@both
def test_lora_over_a_quantised_layer_starts_as_that_layer_and_trains(dtype):
    plain = logits(quantise_model(small(dtype), 4))
    model = lora(quantise_model(small(dtype), 4), 2, targets="blocks.*", rng=rng(1))
    np.testing.assert_array_equal(logits(model), plain)
    assert all(type(w.base) is QuantLinear for w in wrappers(model).values())
    assert len(wrappers(model)) == 12
    assert logits(model).dtype == dtype
    codes = {name: w.base.quantised.packed.copy() for name, w in wrappers(model).items()}
    model.head.weight.data *= 20  # it starts small and stays frozen
    history = fit(model, lambda rng: (IDS, IDS), steps=60, lr=3e-2, progress=False)
    assert history.loss[-1] < 0.8 * history.loss[0]
    for name, w in wrappers(model).items():
        np.testing.assert_array_equal(w.base.quantised.packed, codes[name])


def test_packed_weights_are_counted():
    base = count(small(), quiet=True)
    assert count(quantise_model(small(), 4), quiet=True).total == base.total
    found = count(qlora(), quiet=True)
    trainable = 2 * 2 * (4 * 16 + 2 * 40)
    assert found == (trainable, base.total + trainable)


@pytest.mark.parametrize("recipe", ["lora", "ia3"])
def test_a_merge_over_a_quantised_base_asks(recipe):
    model = qlora() if recipe == "lora" else ia3(quantise_model(small(), 4))
    before = logits(model)
    with pytest.raises(ValueError, match=r"blocks.0.attn.\w: the base is quantised; say requant"):
        merge(model)
    np.testing.assert_array_equal(logits(model), before)
    merge(model, requantise=False)
    np.testing.assert_allclose(logits(model), before, atol=1e-12)
    assert not wrappers(model)


def test_a_requantised_merge_is_packed_again_and_loses_a_little():
    model = qlora()
    wanted = {name: w.dense() for name, w in wrappers(model).items()}
    merge(model, requantise=True)
    modules = dict(model.named_modules())
    for name, w in wanted.items():
        layer = modules[name]
        assert type(layer) is QuantLinear and layer.quantised.bits == 4
        step = layer.quantised.scales().max()
        error = np.abs(layer.dense() - w).max()
        assert 0 < error <= 0.51 * step


@pytest.mark.parametrize("size, survives", [(1e-4, False), (1.0, True)])
def test_a_small_update_is_rounded_away_and_a_large_one_is_not(size, survives):
    layer = LoRA(QuantLinear(Linear(64, 64, rng=rng(), dtype=np.float64)), 4, rng=rng(1))
    layer.B.data[...] = size * rng(2).standard_normal(layer.B.shape)
    new, old = layer.base.requantised(layer.merged()), layer.base
    lost = np.linalg.norm(new.dense() - layer.dense()) / np.linalg.norm(layer.delta())
    same = (new.quantised.packed == old.quantised.packed).mean()
    if survives:
        assert lost < 0.2 and same < 0.2
    else:  # no code has changed: what is left of the update is in the scales
        assert lost > 0.8 and same == 1


def test_requantising_where_nothing_is_quantised_is_refused():
    model = lora(small(), 2, rng=rng())
    with pytest.raises(ValueError, match="requantise is True, but no layer here is quantised"):
        merge(model, requantise=True)
    assert len(wrappers(model)) == 4


def test_an_adapter_fits_only_the_quantised_base_that_it_was_trained_on(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = qlora()
    save_adapter(model, path)
    again = load_adapter(quantise_model(small(), 4), path)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)
    for other in (small(), quantise_model(small(), 3), quantise_model(small(), 4, kind="nf4")):
        with pytest.raises(ValueError, match="made for another model"):
            load_adapter(other, path)
        assert not wrappers(other)


# ------------------------------------------------------------------ LoftQ


@both
@pytest.mark.parametrize("bits, kind", [(2, "symmetric"), (3, "affine"), (4, "nf4")])
def test_loftq_starts_nearer_to_the_weight_than_rounding(dtype, bits, kind):
    settings = {"block": 16, "kind": kind}
    plain = dict(small(dtype).named_modules())
    rounded = dict(quantise_model(small(dtype), bits, **settings).named_modules())
    model = loftq(small(dtype), 2, bits, rng=rng(), **settings)
    once = wrappers(loftq(small(dtype), 2, bits, iterations=1, rng=rng(), **settings))
    for name, layer in wrappers(model).items():
        assert type(layer) is LoRA and type(layer.base) is QuantLinear
        assert layer.A.dtype == layer.B.dtype == dtype
        w = plain[name].dense()
        error = [np.linalg.norm(w - m.dense()) for m in (layer, once[name], rounded[name])]
        assert error[0] <= error[1] * (1 + 1e-6) < error[2]


def test_one_turn_of_loftq_is_the_best_fit_to_what_rounding_took_away():
    model, base = loftq(small(), 3, 3, iterations=1, rng=rng()), dict(small().named_modules())
    for name, layer in wrappers(model).items():
        rest = base[name].dense() - layer.base.dense()
        tail = np.linalg.svd(rest, compute_uv=False)[3:]
        error = np.linalg.norm(rest - layer.delta())
        assert error == pytest.approx(np.linalg.norm(tail), rel=1e-9)


def test_loftq_keeps_more_of_the_base_than_rounding():
    ids = load_eval("sort")[:100]
    inputs = ids[:, :-1]

    def gap(model):
        with no_grad():
            return np.square(model(inputs).data - wanted).mean()

    with no_grad():
        wanted = load_base()(inputs).data
    assert gap(loftq(load_base(), 4, 3, rng=rng())) < 0.8 * gap(quantise_model(load_base(), 3))


def test_loftq_trains_a_and_b_and_keeps_the_biases():
    model = loftq(small(), 2, rng=rng())
    assert {name.rsplit(".", 1)[1] for name in model.trainable()} == {"A", "B"}
    assert len(model.trainable()) == 24
    base = small()
    base.blocks[0].mlp.up.bias.data[...] = 3
    layer = wrappers(loftq(base, 2, rng=rng()))["blocks.0.mlp.up"]
    np.testing.assert_array_equal(layer.base.bias.data, 3)
    layer = Linear(8, 8, bias=False, rng=rng())
    assert QuantLinear(layer).bias is None


@pytest.mark.parametrize(
    "settings, error, word",
    [
        ({"bits": 9}, ValueError, "bits"),
        ({"r": 9}, ValueError, "r is 9"),
        ({"iterations": 0}, ValueError, "empty"),
        ({"targets": "blocks.9.*"}, LookupError, "right kind"),
        ({"targets": "tokens"}, ValueError, "Embedding"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, error, word):
    model = small()
    with pytest.raises(error, match=word):
        loftq(model, rng=rng(), **settings)
    assert not wrappers(model)
    assert all(type(m) is not QuantLinear for _, m in model.named_modules())


def test_loftq_of_a_float32_model_has_the_codes_of_its_float64_copy():
    narrow, wide = load_base(np.float32), load_base(np.float64)
    for model in (narrow, wide):
        loftq(model, 4, 3, kind="affine", rng=rng())
    for name, layer in wrappers(narrow).items():
        again = wrappers(wide)[name]
        np.testing.assert_array_equal(layer.base.quantised.packed, again.base.quantised.packed)
        np.testing.assert_allclose(layer.B.data, again.B.data, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"block": "row"}, {"kind": "affine"}])
def test_an_adapter_of_a_float32_base_loads_on_the_float64_one(settings, tmp_path):
    narrow, wide = (quantise_model(load_base(d), 8, **settings) for d in (np.float32, np.float64))
    ids = load_eval("sort")[:4, :-1]
    for p in lora(narrow, 4, rng=rng()).trainable().values():
        p.data += 0.1 * rng(p.size).standard_normal(p.shape).astype(p.dtype)
    save_adapter(narrow, tmp_path / "adapter")
    load_adapter(wide, tmp_path / "adapter")
    with no_grad():
        np.testing.assert_allclose(wide(ids).data, narrow(ids).data, atol=1e-3)
