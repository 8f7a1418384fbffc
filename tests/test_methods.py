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
    "houlsby": lambda m: ml.adapter(m, 3, norms=False, rng=_rng()),
    "pfeiffer": lambda m: ml.adapter(m, 3, "pfeiffer", rng=_rng()),
    "near": lambda m: ml.adapter(m, 3, start="near", norms=False, rng=_rng()),
    "norms": lambda m: ml.adapter(m, 3, rng=_rng()),
    "parallel": lambda m: ml.adapter(m, 3, "pfeiffer", parallel=True, scale=4, rng=_rng()),
    "token rows": lambda m: ml.token_rows(m, [7, 2]),
    "prefix": lambda m: ml.prefix(m, 3, rng=_rng()),
    "prefix mlp": lambda m: ml.prefix(m, 3, hidden=5, rng=_rng()),
    "prompt": lambda m: ml.prompt(m, 3, rng=_rng()),
    "full": ml.full,
}
MERGE = ("lora", "rslora", "dora", "pissa", "ia3", "token rows")
REFUSE = ("houlsby", "pfeiffer", "near", "norms", "parallel", "prefix", "prefix mlp", "prompt")
EXACT = ("lora", "rslora", "ia3", "bitfit", "houlsby", "pfeiffer", "norms", "parallel")
EXACT += ("token rows", "full")


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


@pytest.mark.parametrize("name", EXACT)
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
        ("parallel", accounting.adapter_parameters(8, 3, 2)),
        ("token rows", 2 * 8),
        ("prefix", 2 * accounting.prefix_parameters(8, 3, n_layer=2)),
        ("prefix mlp", 2 * (3 * 8 + (8 * 5 + 5) + (5 * 16 + 16))),
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
        ("parallel", 2 * 2),
        ("token rows", 0),
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


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_the_configuration_as_it_was(name):
    assert METHODS[name](tiny()).config == tiny().config


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
    with pytest.raises(TypeError, match=rf"\({kind}\) cannot be merged"):
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


# ------------------------------------------------------------------ adapters, prefixes, prompts


def test_an_adapter_is_the_papers_formula(rng):
    attention = tiny().blocks[0].attn
    adapter = Adapter(attention, 3, start="near", rng=rng)
    x = ml.Tensor(rng.standard_normal((2, 5, 8)))
    h = attention(x).data
    inner = ops.gelu(ml.Tensor(h @ adapter.adapter_down.weight.data.T)).data
    np.testing.assert_allclose(adapter(x).data, h + inner @ adapter.adapter_up.weight.data.T)


@pytest.mark.parametrize(
    "settings, train",
    [
        ({}, True),
        ({"where": "pfeiffer"}, False),
        ({"parallel": True}, False),
        ({"where": ["blocks.*.mlp"]}, False),
        ({"norms": False}, False),
        ({"where": "pfeiffer", "norms": True}, True),
    ],
)
def test_the_norms_train_where_the_paper_has_it(settings, train):
    model = ml.adapter(tiny(), 3, rng=_rng(), **settings)
    norms = {n for n, _ in model.named_parameters() if "norm" in n}
    assert len(norms) == 10
    assert norms & set(model.trainable()) == (norms if train else set())


def test_a_parallel_adapter_takes_what_the_base_takes(rng):
    mlp = tiny().blocks[0].mlp
    adapter = Adapter(mlp, 3, start="near", parallel=True, scale=4, rng=rng)
    x = rng.standard_normal((2, 5, 8))
    inner = ops.gelu(ml.Tensor(x @ adapter.adapter_down.weight.data.T)).data
    wanted = mlp(ml.Tensor(x)).data + 4 * inner @ adapter.adapter_up.weight.data.T
    np.testing.assert_allclose(adapter(ml.Tensor(x)).data, wanted)


def test_token_rows_move_their_tokens_and_no_other():
    model = moved("token rows")
    gap = (model.tokens.dense() != tiny().tokens.dense()).any(axis=1)
    assert list(np.flatnonzero(gap)) == [2, 7]
    np.testing.assert_array_equal(model.tokens(IDS).data, model.tokens.dense()[IDS])
    ids = IDS[~np.isin(IDS, (2, 7)).any(axis=1)]
    assert len(ids)
    assert np.array_equal(model(ids).data, tiny()(ids).data)


def test_a_prefix_moves_no_position():
    """By PEFT 0.21 on the same base, token t stands at m + t; here it stays at t."""
    model = ml.prefix(tiny(), 3, rng=_rng())
    before = logits(model)
    model.positions.weight.data[6:] = np.nan  # the positions of a seventh token and on
    assert np.array_equal(logits(model), before)


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
    frozen = ml.fold(ml.freeze(moved("prefix mlp")))
    assert not frozen.trainable()


def test_a_prompt_leaves_the_tokens_their_positions_and_takes_the_last_rows():
    model = tiny()
    n, table = model.config["n_positions"], model.positions.dense()
    ml.prompt(model, 3, rng=_rng())
    rows = model.positions(np.arange(n)).data
    np.testing.assert_array_equal(rows[:3], table[-3:])
    np.testing.assert_array_equal(rows[3:], table[:-3])
    back = ml.detach(model)
    assert "positions" in back
    np.testing.assert_array_equal(model.positions(np.arange(n)).data, table)


@pytest.mark.parametrize("recipe", [ml.prefix, ml.prompt])
def test_the_length_that_is_left(recipe):
    model = recipe(tiny(), 7, rng=_rng())
    assert model(IDS[:, :5]).shape == (4, 5, 9)
    with pytest.raises(ValueError, match="room for 5"):
        model(IDS)
    assert ml.generate(model, IDS[:, :2], 4).shape == (4, 6)  # reads 5, and writes a sixth
    with pytest.raises(ValueError, match="room for 5|up to 12 in all"):
        ml.generate(model, IDS[:, :2], 5)


def test_room_for_a_prefix_on_the_base():
    plain, roomy = ml.load_base(), ml.load_base(n_positions=40)
    ids = ml.load_eval("copy")[:8, :-1]
    with ml.no_grad():
        assert np.array_equal(plain(ids).data, roomy(ids).data)
    assert roomy.config["n_positions"] == len(roomy.positions.dense()) == 40
    with pytest.raises(ValueError, match="n_positions is 3; expected 17 or more"):
        ml.load_base(n_positions=3)


def bare(model):
    """A model without a single bias."""
    for _, module in model.named_modules():
        if hasattr(module, "bias"):
            module.bias = None
    return model


BAD = {
    "r is 0": lambda m: ml.adapter(m, 0, rng=_rng()),
    "start": lambda m: ml.adapter(m, 2, start="no", rng=_rng()),
    "matches no": lambda m: ml.adapter(m, 2, "*.norm1", rng=_rng()),
    "m is 0": lambda m: ml.prefix(m, 0, rng=_rng()),
    "leaves 0 positions": lambda m: ml.prefix(m, 12, rng=_rng()),
    "1 to 11": lambda m: ml.prompt(m, 12, rng=_rng()),
    "out.*nope": lambda m: ml.ia3(m, out="blocks.*.out.nope"),
    "into.*nope": lambda m: ml.ia3(m, into="blocks.*.into.nope"),
    "both match blocks.0.mlp.down": lambda m: ml.ia3(m, "blocks.*.mlp.*", "blocks.*.mlp.down"),
    "tokens is \\[\\]": lambda m: ml.token_rows(m, []),
    "0 to 8": lambda m: ml.token_rows(m, [9]),
    "each once": lambda m: ml.token_rows(m, [1, 1]),
    "Generator": lambda m: ml.adapter(m, 2, rng=0),
    "rng is 1": lambda m: ml.prefix(m, 2, rng=1),
    "rng is 2": lambda m: ml.prompt(m, 2, rng=2),
    "bias": lambda m: ml.bitfit(bare(m)),
}


@pytest.mark.parametrize("word", BAD)
def test_bad_input_is_refused_and_the_model_is_left_as_it_was(word):
    model = tiny()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises((ValueError, LookupError, TypeError), match=word):
        BAD[word](model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_one_method_at_a_time(name):
    model = ml.lora(tiny(), rng=_rng())
    with pytest.raises(ValueError, match="carries an adapter"):
        METHODS[name](model)


def tied(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"vocab_size": 9, "n_positions": 12, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return ml.Transformer(**sizes, tied=True, rng=rng, dtype=np.float64)


@pytest.mark.parametrize("name", METHODS)
def test_a_tie_stands_in_the_way_of_none_but_its_own_layers(name):
    if name == "token rows":
        with pytest.raises(ValueError, match="tied"):
            METHODS[name](tied())
    else:
        model = METHODS[name](tied())
        assert backward(model) == set(model.trainable())


def test_ia3_knows_two_sides(rng):
    with pytest.raises(ValueError, match="side is 'up'"):
        IA3(ml.Linear(3, 4, rng=rng), "up")


# ------------------------------------------------------------------ weights at the edge


def row(w):
    w[1] = 0


def nothing(w):
    w[...] = 0


def one_direction(w):
    w[...] = np.outer(w[:, 0], w[0])


def column(w):
    w[:, 2] = 0


def too_small_to_square(w):
    w[1] = 1e-200


@pytest.mark.parametrize("edge", [row, nothing, one_direction, column, too_small_to_square])
@pytest.mark.parametrize("name", METHODS)
def test_at_the_edge_a_method_starts_as_the_base_stays_finite_and_merges(name, edge):
    model = tiny()
    for weight in ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down"):
        edge(dict(model.blocks[0].named_parameters())[f"{weight}.weight"].data)
    before = logits(model)
    METHODS[name](model)
    if name in (*EXACT, "dora", "pissa"):
        np.testing.assert_allclose(logits(model), before, rtol=0, atol=1e-12)
    ml.fit(model, lambda rng: (IDS, TARGETS), steps=3, lr=1e-2, progress=False)
    after = logits(model)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-6
    if name in MERGE:
        np.testing.assert_allclose(logits(ml.merge(model)), after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", [LoRA, DoRA, PiSSA])
@pytest.mark.parametrize("edge", [row, nothing, one_direction, too_small_to_square])
def test_what_was_nothing_can_learn(variant, edge, rng):
    """Every row of the weight, by small steps, and every one of the r directions."""
    layer = ml.Linear(6, 5, rng=rng, bias=False, dtype=np.float64)
    edge(layer.weight.data)
    wrapper = variant(layer, 3, rng=rng)
    x, wanted = ml.Tensor(rng.standard_normal((50, 6))), rng.standard_normal((50, 5))
    optimizer = ml.AdamW(wrapper.learned().values(), 1e-3)
    for _ in range(2):
        before = wrapper.dense()
        error = wrapper(x) - ml.Tensor(wanted)
        (error * error).sum().backward()
        optimizer.step()
        step = np.linalg.norm(wrapper.dense() - before, axis=1)  # of each row
        assert (step > 1e-5).all()
        assert (step < 0.1).all()
    for factor, axis in ((wrapper.A, 1), (wrapper.B, 0)):
        assert (np.linalg.norm(factor.data, axis=axis) > 1e-4).all()  # of each direction


@pytest.mark.parametrize("variant", [LoRA, DoRA, PiSSA])
def test_the_rank_may_reach_the_smaller_side(variant, rng):
    layer = ml.Linear(6, 4, rng=rng, dtype=np.float64)
    wrapper = variant(layer, 4, rng=rng)
    np.testing.assert_allclose(wrapper.dense(), layer.dense(), atol=1e-12)


def test_prepend_goes_both_ways(rng):
    error = ml.check_vjp(ops.prepend, rng.standard_normal((2, 3)), rng.standard_normal((4, 5, 3)))
    assert error < 1e-6
