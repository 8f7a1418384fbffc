"""The laws of each method: the start, the gradients, the products, the merge, the file."""

import numpy as np
import pytest

import minilora as ml
from minilora import accounting, ops
from minilora.peft import IA3, Adapter, DoRA, LoRA, PiSSA, Prefix
from minilora.surgery import wrappers

IDS = np.random.default_rng(5).integers(9, size=(4, 6))
TARGETS = np.random.default_rng(6).integers(9, size=(4, 6))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tiny(seed=0, n_positions=12):
    """A fresh model in float64, small enough for a law."""
    rng = np.random.default_rng(seed)
    return ml.Transformer(
        vocab_size=9,
        n_positions=n_positions,
        n_embd=8,
        n_head=2,
        n_layer=2,
        rng=rng,
        dtype=np.float64,
    )


def _rng():
    return np.random.default_rng(1)


METHODS = {
    "lora": lambda m: ml.lora(m, 2, targets="blocks.*", rng=_rng()),
    "rslora": lambda m: ml.lora(m, 2, targets="blocks.*", rslora=True, rng=_rng()),
    "dora": lambda m: ml.lora(m, 2, targets="blocks.*", variant=DoRA, rng=_rng()),
    "pissa": lambda m: ml.lora(m, 2, targets="blocks.*", variant=PiSSA, rng=_rng()),
    "ia3": ml.ia3,
    "bitfit": ml.bitfit,
    "houlsby": lambda m: ml.adapter(m, 3, rng=_rng()),
    "pfeiffer": lambda m: ml.adapter(m, 3, "pfeiffer", rng=_rng()),
    "near": lambda m: ml.adapter(m, 3, start="near", rng=_rng()),
    "norms": lambda m: ml.adapter(m, 3, norms=True, rng=_rng()),
    "prefix": lambda m: ml.prefix(m, 3, rng=_rng()),
    "prefix mlp": lambda m: ml.prefix(m, 3, hidden=5, rng=_rng()),
    "prompt": lambda m: ml.prompt(m, 3, rng=_rng()),
    "full": ml.full,
}
MERGE = ("lora", "rslora", "dora", "pissa", "ia3")
REFUSE = ("houlsby", "pfeiffer", "near", "prefix", "prefix mlp", "prompt")


def logits(model):
    with ml.no_grad():
        return model(IDS).data


def moved(name, steps=3):
    """A tiny model that a method has trained for a few steps."""
    model = METHODS[name](tiny())
    ml.fit(model, lambda rng: (IDS, TARGETS), steps=steps, lr=1e-2, progress=False)
    return model


def backward(model):
    loss = ops.cross_entropy(model(IDS), TARGETS)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------ the start


@pytest.mark.parametrize("name", ["lora", "rslora", "ia3", "bitfit", "houlsby", "pfeiffer", "full"])
def test_starts_as_the_base_bit_for_bit(name):
    assert np.array_equal(logits(METHODS[name](tiny())), logits(tiny()))


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_starts_as_the_base_to_rounding(name):
    np.testing.assert_allclose(logits(METHODS[name](tiny())), logits(tiny()), atol=1e-12)


def test_near_start_is_near_and_not_exact():
    gap = np.abs(logits(METHODS["near"](tiny())) - logits(tiny())).max()
    assert 0 < gap < 0.1 * np.abs(logits(tiny())).max()


def test_a_zero_prefix_is_not_the_identity_but_a_smaller_output(rng):
    attention = tiny().blocks[0].attn
    attention.k.bias.data[...] = 0
    m, x = 3, rng.standard_normal((2, 5, 8))
    prefix = Prefix(attention, m, 9, rng=rng)
    prefix.keys.data[...] = prefix.values.data[...] = 0
    attention.o.weight.data[...] = np.eye(8)  # so that what comes out is what attention gives
    attention.o.bias.data[...] = 0
    plain, short = attention(ml.Tensor(x)).data, prefix(ml.Tensor(x)).data
    q, k = (
        layer(ml.Tensor(x)).data.reshape(2, 5, 2, 4).transpose(0, 2, 1, 3)
        for layer in (attention.q, attention.k)
    )
    scores = np.exp(q @ k.swapaxes(-1, -2) / 2) * np.tri(5)
    z = scores.sum(axis=-1)  # (B, H, T)
    share = (z / (z + m)).transpose(0, 2, 1)[..., None]  # a zero key scores exp(0) = 1
    np.testing.assert_allclose(short.reshape(2, 5, 2, 4), plain.reshape(2, 5, 2, 4) * share)


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", METHODS)
def test_gradients_exactly_where_it_trains(name):
    model = METHODS[name](tiny())
    assert backward(model) == set(model.trainable())


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("full", "bitfit", "norms")])
def test_the_base_stays_bit_identical(name):
    model = moved(name)
    ml.detach(model)
    before = dict(tiny().named_parameters())
    assert set(before) == {n for n, _ in model.named_parameters()}
    for n, p in model.named_parameters():
        assert np.array_equal(p.data, before[n].data), n


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_what_comes_out(name):
    assert np.abs(logits(moved(name)) - logits(METHODS[name](tiny()))).max() > 1e-6


def test_bitfit_trains_the_biases_and_nothing_else():
    assert {n.rpartition(".")[2] for n in ml.bitfit(tiny()).trainable()} == {"bias"}


# ------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    "name, count",
    [
        ("lora", 2 * 2 * (4 * 16 + 2 * 40)),
        ("dora", 2 * 2 * (4 * 16 + 2 * 40) + 2 * (4 * 8 + 32 + 8)),
        ("pissa", 2 * 2 * (4 * 16 + 2 * 40)),
        ("ia3", 2 * (8 + 8 + 32)),
        ("bitfit", 2 * (4 * 8 + 32 + 8 + 2 * 8) + 8),
        ("houlsby", accounting.adapter_parameters(8, 3, 4)),
        ("pfeiffer", accounting.adapter_parameters(8, 3, 2)),
        ("norms", accounting.adapter_parameters(8, 3, 4, n_norms=5)),
        ("prefix", 2 * accounting.prefix_parameters(8, 3, n_layer=2)),
        ("prompt", accounting.prefix_parameters(8, 3)),
    ],
)
def test_parameters_by_formula(name, count):
    assert ml.count(METHODS[name](tiny()), quiet=True).trainable == count


def products(model):
    """GEMMs of one step: forward, backward."""
    with ops.count_gemms() as forward:
        loss = ops.cross_entropy(model(IDS), TARGETS)
    with ops.count_gemms() as back:
        loss.backward()
    return len(forward), len(back)


LINEAR, ATTENTION = 2 * 6, 2 * 2  # linear layers in the blocks; products in attention


@pytest.mark.parametrize(
    "name, forward",
    [
        ("full", 0),
        ("bitfit", 0),
        ("ia3", 0),
        ("lora", 2 * LINEAR),
        ("pissa", 2 * LINEAR),
        ("dora", 2 * LINEAR),
        ("houlsby", 2 * 4),
        ("pfeiffer", 2 * 2),
        ("prefix", 0),
        ("prompt", 0),
    ],
)
def test_extra_products_forward(name, forward):
    assert products(METHODS[name](tiny()))[0] == LINEAR + ATTENTION + 1 + forward


def test_products_backward_by_formula():
    # full: two for each forward product
    assert products(ml.full(tiny()))[1] == 2 * (LINEAR + ATTENTION + 1)
    # LoRA everywhere: each frozen layer one (its input's gradient), A and B two each, but the
    # inputs of the lowest q, k and v need none: three from W and three from A are left out
    assert products(METHODS["lora"](tiny()))[1] == LINEAR + 4 * LINEAR - 6 + 2 * ATTENTION + 1
    # LoRA on the last block only: nothing travels below it
    last = ml.lora(tiny(), 2, targets="blocks.1.*", rng=_rng())
    assert products(last)[1] == 6 + 4 * 6 - 6 + 4 + 1


# ------------------------------------------------------------------ merging


@pytest.mark.parametrize("name", MERGE)
def test_merged_equals_bypassed(name):
    model = moved(name)
    before = logits(model)
    ml.merge(model)
    np.testing.assert_allclose(logits(model), before, atol=1e-12)
    assert not wrappers(model)
    assert products(ml.full(model))[0] == LINEAR + ATTENTION + 1


@pytest.mark.parametrize("name", REFUSE)
def test_what_cannot_be_merged_says_why(name):
    model = moved(name)
    before = logits(model)
    kind = type(next(iter(wrappers(model).values()))).__name__
    with pytest.raises(TypeError, match=rf"\({kind}\) cannot be merged: [a-z]+ "):
        ml.merge(model)
    assert np.array_equal(logits(model), before)


def test_ia3_scales_a_bias_only_on_the_way_out(rng):
    layer = ml.Linear(3, 4, rng=rng, dtype=np.float64)
    layer.bias.data[...] = rng.standard_normal(4)
    x = ml.Tensor(rng.standard_normal((5, 3)))
    for side in ("out", "in"):
        scaled = IA3(layer, side)
        scaled.scale.data[...] = rng.standard_normal(scaled.scale.shape)
        merged = scaled.merged()
        np.testing.assert_allclose(merged(x).data, scaled(x).data, atol=1e-14)
        assert np.array_equal(merged.bias.data, layer.bias.data) == (side == "in")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("name", METHODS)
def test_a_file_brings_it_back(name, tmp_path):
    model, path = moved(name), tmp_path / "adapter.safetensors"
    ml.save_adapter(model, path)
    again = ml.load_adapter(tiny(), path)
    tolerance = 1e-12 if name == "pissa" else 0  # its frozen part is an SVD, made anew
    np.testing.assert_allclose(logits(again), logits(model), atol=tolerance)
    assert set(again.trainable()) == set(model.trainable())
    if name != "full":  # which leaves nothing of a base to be wrong about
        with pytest.raises(ValueError, match="made for another model"):
            ml.load_adapter(tiny(seed=1), path)


# ------------------------------------------------------------------ DoRA, PiSSA, LoRA+


def test_dora_moves_length_and_direction_apart(rng):
    layer = ml.Linear(6, 5, rng=rng, dtype=np.float64)
    dora = DoRA(layer, 2, rng=rng)
    dora.B.data[...] = rng.standard_normal(dora.B.shape)
    lengths = np.linalg.norm(dora.dense(), axis=1)
    np.testing.assert_allclose(lengths, dora.magnitude.data)
    v = layer.dense() + LoRA.delta(dora)
    cosines = (dora.dense() * v).sum(axis=1) / np.linalg.norm(v, axis=1) / lengths
    np.testing.assert_allclose(cosines, 1)


def test_pissa_starts_on_the_largest_singular_directions(rng):
    layer = ml.Linear(6, 5, rng=rng, dtype=np.float64)
    pissa = PiSSA(layer, 2, alpha=3.0, rng=rng)
    u, s, vt = np.linalg.svd(layer.dense())
    top = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(pissa.scaling * pissa.B.data @ pissa.A.data, top, atol=1e-12)
    np.testing.assert_allclose(pissa.residual.data, layer.dense() - top, atol=1e-12)
    assert np.abs(pissa.delta()).max() < 1e-12


def test_variants_are_for_linear_layers():
    model = tiny()
    with pytest.raises(ValueError, match="variant is DoRA; expected LoRA for Embedding"):
        ml.lora(model, 2, targets="*", variant=DoRA, rng=_rng())
    assert not wrappers(model)


def test_lora_plus_gives_b_its_own_rate():
    model = METHODS["lora"](tiny())
    optimizer = ml.lora_plus(model, 1e-3, ratio=16)
    start = {name: p.data.copy() for name, p in model.trainable().items()}
    for p in model.trainable().values():
        p.grad = np.ones(p.shape)
    optimizer.step()
    for name, p in model.trainable().items():
        step = 16e-3 if name.endswith(".B") else 1e-3  # Adam's first step is the rate itself
        np.testing.assert_allclose(start[name] - p.data, step, rtol=1e-6)


def test_a_rank_for_each_pattern():
    model = ml.lora(tiny(), {"blocks.0.attn.[qv]": 1, "blocks.*": 3}, rng=_rng())
    ranks = {name: w.r for name, w in wrappers(model).items()}
    assert ranks["blocks.0.attn.q"] == ranks["blocks.0.attn.v"] == 1
    assert ranks["blocks.0.attn.k"] == ranks["blocks.1.attn.q"] == 3
    with pytest.raises(LookupError, match="nope"):
        ml.lora(tiny(), {"nope": 1}, rng=_rng())


# ------------------------------------------------------------------ adapters, prefixes, prompts


def test_an_adapter_is_the_papers_formula(rng):
    attention = tiny().blocks[0].attn
    adapter = Adapter(attention, 3, start="near", rng=rng)
    x = ml.Tensor(rng.standard_normal((2, 5, 8)))
    h = attention(x).data
    inner = ops.gelu(ml.Tensor(h @ adapter.adapter_down.weight.data.T)).data
    np.testing.assert_allclose(adapter(x).data, h + inner @ adapter.adapter_up.weight.data.T)


def test_a_prefix_is_seen_by_all_and_the_mask_stays():
    model = METHODS["prefix"](tiny())
    changed = IDS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 9
    with ml.no_grad():
        a, b = model(IDS).data, model(changed).data
    assert np.array_equal(a[:, :4], b[:, :4])  # no query sees a later token
    assert not np.allclose(a[:, 4:], b[:, 4:])
    model.blocks[1].attn.keys.data += 1.0
    model.blocks[1].attn.values.data += 1.0
    assert (np.abs(logits(model) - a).max(axis=(0, 2)) > 0).all()  # every query sees the prefix


def test_folding_a_prefix_changes_nothing_but_its_form():
    model = moved("prefix mlp")
    before = logits(model)
    ml.fold(model)
    np.testing.assert_allclose(logits(model), before, atol=1e-14)
    assert ml.count(model, quiet=True).trainable == 2 * 2 * 3 * 8


def test_the_length_that_is_left():
    model = ml.prefix(tiny(), 7, rng=_rng())
    assert model(IDS[:, :5]).shape == (4, 5, 9)
    with pytest.raises(ValueError, match=r"has 6 tokens; a prefix of 7 leaves room for 5 \(n_pos"):
        model(IDS)
    model = ml.prompt(tiny(), 7, rng=_rng())
    assert model(IDS[:, :5]).shape == (4, 5, 9)
    with pytest.raises(ValueError, match=r"has 6 tokens; a prompt of 7 leaves room for 5 \(n_pos"):
        model(IDS)


def test_room_for_a_prefix_on_the_base():
    plain, roomy = ml.load_base(), ml.load_base(n_positions=40)
    ids = ml.load_eval("copy")[:8, :-1]
    with ml.no_grad():
        assert np.array_equal(plain(ids).data, roomy(ids).data)
    assert roomy.config["n_positions"] == len(roomy.positions.dense()) == 40
    with pytest.raises(ValueError, match="n_positions is 3; expected 17 or more"):
        ml.load_base(n_positions=3)


@pytest.mark.parametrize(
    "recipe, message",
    [
        (lambda m: ml.adapter(m, 0, rng=_rng()), "r is 0; expected a whole number"),
        (lambda m: ml.adapter(m, 2.5, rng=_rng()), r"r is 2\.5; expected a whole number"),
        (lambda m: ml.adapter(m, 2, start="no", rng=_rng()), "start is 'no'; expected 'exact'"),
        (lambda m: ml.adapter(m, 2, "*.norm1", rng=_rng()), r"'\*\.norm1' matches no"),
        (lambda m: ml.prefix(m, 0, rng=_rng()), "m is 0; expected"),
        (lambda m: ml.prefix(m, "3", rng=_rng()), "m is '3'; expected"),
        (lambda m: ml.prefix(m, 12, rng=_rng()), "m is 12, which leaves 0 positions"),
        (lambda m: ml.prompt(m, 12, rng=_rng()), "m is 12; expected a whole number from 1 to 11"),
        (lambda m: ml.ia3(m, out="blocks.*.nope"), "nope"),
        (lambda m: ml.ia3(m, into="blocks.*.nope"), "nope"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_left_as_it_was(recipe, message):
    model = tiny()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises((ValueError, LookupError), match=message):
        recipe(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_one_method_at_a_time(name):
    model = ml.lora(tiny(), rng=_rng())
    with pytest.raises(ValueError, match="carries an adapter already"):
        METHODS[name](model)


def test_ia3_knows_two_sides(rng):
    with pytest.raises(ValueError, match="side is 'up'; expected 'out' or 'in'"):
        IA3(ml.Linear(3, 4, rng=rng), "up")


def test_prepend_checks_shapes(rng):
    with pytest.raises(ValueError, match=r"prepend: shapes \(2, 3\) and \(4, 3\)"):
        ops.prepend(ml.Tensor(np.ones((2, 3))), ml.Tensor(np.ones((4, 3))))
    error = ml.check_vjp(ops.prepend, rng.standard_normal((2, 3)), rng.standard_normal((4, 5, 3)))
    assert error < 1e-6
