"""LoRA: its start, its formula, what it freezes, and everything that it refuses."""

import numpy as np
import pytest

from minilora import (
    DoRA,
    Embedding,
    Linear,
    LoRA,
    Tensor,
    Transformer,
    check_vjp,
    detach,
    full,
    lora,
)
from minilora.peft import LoRAEmbedding
from minilora.surgery import wrappers

IDS = np.random.default_rng(9).integers(7, size=(2, 5))
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def rng(seed=0):
    return np.random.default_rng(seed)


def small(dtype=np.float64, **changes):
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return Transformer(**sizes | changes, rng=rng(), dtype=dtype)


def bypassed(r=2, kind=LoRA, dtype=np.float64, **settings):
    """One layer with a bypass that does something: neither A nor B is zero."""
    make = Linear if kind is LoRA else Embedding
    wrapper = kind(make(6, 5, rng=rng(), dtype=dtype), r, rng=rng(1), **settings)
    for p in (wrapper.A, wrapper.B):
        p.data[...] = rng(p.shape[0]).standard_normal(p.shape)
    return wrapper


# ------------------------------------------------------------------ one layer


@both
def test_h_is_wx_plus_b_plus_scaling_bax(dtype):
    layer = bypassed(dtype=dtype, alpha=6.0)
    x = rng(2).standard_normal((3, 4, 6)).astype(dtype)
    w, b = layer.base.weight.data, layer.base.bias.data
    wanted = x @ w.T + b + 6 / 2 * (x @ layer.A.data.T @ layer.B.data.T)
    got = layer(Tensor(x))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.data, wanted, rtol=1e-5, atol=1e-5)
    if dtype == np.float64:
        np.testing.assert_allclose(got.data, wanted, rtol=1e-12)


def test_sizes_follow_the_paper():
    layer = bypassed(r=2)
    assert (layer.A.shape, layer.B.shape, layer.delta().shape) == ((2, 6), (5, 2), (5, 6))
    assert (layer.d_in, layer.d_out) == (6, 5)


def test_delta_and_dense_are_the_update_and_the_whole():
    layer = bypassed(r=2, alpha=6.0)
    wanted = 3 * layer.B.data @ layer.A.data
    np.testing.assert_allclose(layer.delta(), wanted, rtol=1e-14)
    np.testing.assert_allclose(layer.dense(), layer.base.weight.data + wanted, rtol=1e-14)


@pytest.mark.parametrize("r, plain, rslora", [(1, 8, 8), (2, 4, 8 / 2**0.5), (4, 2, 4)])
def test_scaling_is_alpha_over_r_or_over_its_root(r, plain, rslora):
    assert bypassed(r, alpha=8.0).scaling == plain
    layer = bypassed(r, alpha=8.0, rslora=True)
    assert layer.scaling == pytest.approx(rslora, rel=1e-15)
    np.testing.assert_allclose(layer.delta(), rslora * layer.B.data @ layer.A.data, rtol=1e-13)
    x = Tensor(rng(3).standard_normal((2, 6)))
    np.testing.assert_allclose(layer(x).data, layer.merged()(x).data, rtol=1e-11)


@both
def test_a_starts_with_variance_one_over_d_in_and_b_at_zero(dtype):
    layer = LoRA(Linear(400, 300, rng=rng(), dtype=dtype), 100, rng=rng(1))
    assert layer.A.data.std() == pytest.approx(0.05, rel=0.02)  # by d_in = 400, not r or d_out
    assert layer.A.data.mean() == pytest.approx(0, abs=0.001)
    assert not layer.B.data.any()
    assert layer.A.dtype == layer.B.dtype == dtype


def test_the_start_comes_from_the_generator_alone():
    one, two, other = (LoRA(Linear(6, 5, rng=rng()), 2, rng=rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.A.data, two.A.data)
    assert (one.A.data != other.A.data).all()


def test_gradients_agree_with_differences():
    layer = bypassed()

    def f(x, a, b):
        layer.A, layer.B = a, b
        return layer(x)

    check_vjp(f, rng(2).standard_normal((3, 6)), layer.A.data, layer.B.data)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_a_new_plain_layer(bias):
    base = Linear(6, 5, rng=rng(), bias=bias, dtype=np.float64)
    layer = LoRA(base, 2, rng=rng(1))
    layer.B.data[...] = 1
    plain = layer.merged()
    assert type(plain) is Linear and (plain.bias is None) == (not bias)
    assert not np.shares_memory(plain.weight.data, base.weight.data)
    x = Tensor(rng(2).standard_normal((3, 6)))
    np.testing.assert_allclose(plain(x).data, layer(x).data, rtol=1e-12, atol=1e-12)


def test_repr_names_the_settings_and_the_base():
    assert repr(bypassed(alpha=16.0)) == "LoRA(r=2, alpha=16, base=Linear(6 -> 5))"


def test_config_rebuilds_the_wrapper():
    layer = bypassed(r=np.int64(3), alpha=5, rslora=True, dropout=0.5)
    config = layer.config()
    assert config == {"kind": "LoRA", "r": 3, "alpha": 5.0, "dropout": 0.5, "rslora": True}
    assert type(config["r"]) is int  # JSON takes no NumPy integer
    again = LoRA(layer.base, rng=rng(), **{k: v for k, v in config.items() if k != "kind"})
    assert again.config() == config and again.scaling == layer.scaling


def test_a_lora_on_a_lora_stands_for_both():
    inner = bypassed()
    outer = LoRA(inner, 1, rng=rng(3))
    outer.B.data[...] = 1
    wanted = inner.base.weight.data + inner.delta() + outer.delta()
    np.testing.assert_allclose(outer.dense(), wanted, rtol=1e-12)
    assert (outer.d_in, outer.d_out) == (6, 5)


# ------------------------------------------------------------------ dropout


def test_dropout_falls_on_the_input_of_the_bypass_only_and_only_while_training():
    layer = bypassed(dropout=0.5)
    x = rng(2).standard_normal((200, 6))
    plain = layer.base(Tensor(x)).data
    calm = layer(Tensor(x)).data
    np.testing.assert_array_equal(layer(Tensor(x)).data, calm)  # off at the start

    layer.train()
    layer.rng = rng(5)
    keep = (rng(5).random(x.shape) >= 0.5) / 0.5
    wanted = plain + layer.scaling * ((x * keep) @ layer.A.data.T @ layer.B.data.T)
    np.testing.assert_allclose(layer(Tensor(x)).data, wanted, rtol=1e-11, atol=1e-11)
    assert (layer(Tensor(x)).data != wanted).any()  # a fresh mask each time

    layer.eval()
    np.testing.assert_array_equal(layer(Tensor(x)).data, calm)


def test_dropout_leaves_the_base_alone():
    layer = bypassed(dropout=0.9).train()
    layer.B.data[...] = 0
    x = Tensor(np.ones((50, 6)))
    np.testing.assert_array_equal(layer(x).data, layer.base(x).data)


def test_dropout_plays_no_part_in_merging():
    with_dropout, without = bypassed(dropout=0.5).train(), bypassed()
    np.testing.assert_array_equal(with_dropout.merged().weight.data, without.merged().weight.data)


def test_without_dropout_the_generator_is_not_asked_while_training():
    layer = bypassed().train()
    layer.rng = None
    layer(Tensor(np.ones((1, 6))))


# ------------------------------------------------------------------ embeddings


@both
def test_an_embedding_adds_scaling_b_a_column(dtype):
    table = bypassed(kind=LoRAEmbedding, alpha=6.0, dtype=dtype)
    ids = np.array([[0, 5, 5], [1, 2, 0]])
    assert (table.A.shape, table.B.shape, table.delta().shape) == ((2, 6), (5, 2), (6, 5))
    got = table(ids)
    assert got.dtype == dtype
    wanted = table.base.weight.data[ids] + 3 * table.A.data.T[ids] @ table.B.data.T
    np.testing.assert_allclose(got.data, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table.dense()[ids], wanted, rtol=1e-5, atol=1e-5)
    plain = table.merged()
    assert type(plain) is Embedding
    np.testing.assert_allclose(plain(ids).data, wanted, rtol=1e-5, atol=1e-5)


def test_an_embedding_starts_with_a_at_zero_and_b_of_variance_one_over_r():
    table = LoRAEmbedding(Embedding(300, 400, rng=rng()), 100, rng=rng(1))
    assert not table.A.data.any()
    assert table.B.data.std() == pytest.approx(0.1, rel=0.02)


def test_embedding_gradients_agree_with_differences_and_repeated_ids_add_up():
    table = bypassed(kind=LoRAEmbedding)

    def f(a, b):
        table.A, table.B = a, b
        return table([[0, 5, 5], [1, 2, 0]])

    check_vjp(f, table.A.data, table.B.data)


def test_an_embedding_takes_no_dropout():
    with pytest.raises(ValueError, match="dropout"):
        bypassed(kind=LoRAEmbedding, dropout=0.1)


# ------------------------------------------------------------------ the recipes


def test_lora_freezes_everything_but_a_and_b():
    model = small()
    assert lora(model, r=2, rng=rng()) is model
    targets = [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in "qv"]
    assert sorted(model.trainable()) == sorted(f"{t}.{p}" for t in targets for p in "AB")


def test_lora_trains_its_own_even_where_all_was_frozen():
    model = small()
    for p in model.parameters():
        p.requires_grad = False
    lora(model, r=1, rng=rng())
    assert len(model.trainable()) == 8


def test_a_star_takes_every_linear_layer_and_table_but_no_norm():
    model = lora(small(), r=2, targets="*", rng=rng())
    kinds = {name: type(w) for name, w in wrappers(model).items()}
    assert len(kinds) == 2 * 6 + 3
    assert {n for n, kind in kinds.items() if kind is LoRAEmbedding} == {"tokens", "positions"}


def test_lora_hands_its_settings_on():
    model = lora(small(), 3, 5, "head", dropout=0.25, rslora=True, rng=rng())
    assert model.head.config() == {
        "kind": "LoRA",
        "r": 3,
        "alpha": 5.0,
        "dropout": 0.25,
        "rslora": True,
    }


def test_each_layer_gets_a_start_of_its_own():
    model = lora(small(), rng=rng())
    assert (model.blocks[0].attn.q.A.data != model.blocks[1].attn.q.A.data).all()


def test_full_trains_everything():
    model = small()
    model.head.weight.requires_grad = False
    assert full(model) is model and len(model.trainable()) == len(model.parameters())


# ------------------------------------------------------------------ refusals leave the model alone


def untouched(model):
    modules = {name: id(m) for name, m in model.named_modules()}
    return modules, {
        n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()
    }


BAD = [
    ({"r": 0}, "r is 0"),
    ({"r": 9}, "1 to 8"),
    ({"r": 6, "targets": ["head", "positions"]}, "1 to 5"),  # the smaller side decides
    ({"r": 2.5}, "whole number"),
    ({"alpha": 0}, "alpha"),
    ({"alpha": np.nan}, "alpha"),
    ({"alpha": np.inf}, "alpha"),
    ({"dropout": 1}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": 0.1, "targets": "*"}, "dropout"),
    ({"targets": "*", "variant": DoRA}, "variant is DoRA"),
    ({"targets": "blocks.*.attn.w"}, "matches no layer"),
    ({"targets": ["blocks.*", "norm"]}, "matches no layer"),
    ({"r": {"nope": 1}}, "nope"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=[str(s) for s, _ in BAD])
def test_a_bad_setting_is_refused_and_the_model_left_as_it_was(settings, message):
    model = small()
    before = untouched(model)
    with pytest.raises((ValueError, LookupError), match=message):
        lora(model, **settings, rng=rng())
    assert untouched(model) == before


def test_a_seed_is_no_generator():
    model = small()
    before = untouched(model)
    with pytest.raises(TypeError, match="Generator"):
        lora(model, rng=0)
    assert untouched(model) == before


@pytest.mark.parametrize("targets", ["head", ["blocks.*", "tokens"]])
def test_either_side_of_a_tie_is_refused_with_the_reason(targets):
    model = small(tied=True)
    before = untouched(model)
    with pytest.raises(ValueError, match="tied: tokens.weight and head.weight"):
        lora(model, targets=targets, r=1, rng=rng())
    assert untouched(model) == before


def test_layers_that_are_not_tied_can_be_wrapped_in_a_tied_model():
    assert len(wrappers(lora(small(tied=True), rng=rng()))) == 4


def test_a_second_adapter_is_refused_until_the_first_is_off():
    model = lora(small(), rng=rng())
    before = untouched(model)
    with pytest.raises(ValueError, match="carries an adapter"):
        lora(model, targets="head", rng=rng())
    assert untouched(model) == before
    detach(model)
    assert list(wrappers(lora(model, targets="head", rng=rng()))) == ["head"]


def test_the_rank_may_reach_the_smaller_side():
    model = lora(small(), r=7, targets="head", rng=rng())
    assert model.head.A.shape == (7, 8) and model.head.B.shape == (7, 7)
