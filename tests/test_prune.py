"""Pruning: which weights go, that masks hold through training, that what is cut out is smaller."""

from itertools import combinations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import (
    MLP,
    Linear,
    LoRA,
    Module,
    Tensor,
    Transformer,
    check_vjp,
    count,
    detach,
    evaluate,
    fit,
    freeze,
    load_base,
    load_eval,
    load_model,
    lora,
    merge,
    no_grad,
    ops,
    save_model,
    tasks,
)
from minilora.compress import (
    Masked,
    block_similarity,
    break_even_sparsity,
    drop_blocks,
    from_bitmap,
    from_indices,
    low_rank,
    magnitude_mask,
    observe,
    prune_heads,
    prune_neurons,
    quantise_model,
    rewind,
    sparse_gpt,
    sparsify,
    to_bitmap,
    to_indices,
    wanda_mask,
)
from minilora.surgery import replace, wrappers
from minilora.transformer import attend

law = settings(max_examples=40)
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1, exclude_max=True)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
floats = st.sampled_from([np.float32, np.float64])

IDS = np.random.default_rng(9).integers(7, size=(4, 5))
D, HEADS, LAYERS = 8, 4, 3


def rng(seed=0):
    return np.random.default_rng(seed)


def small(dtype=np.float64, **changes):
    """A model in which nothing is zero by chance: biases too."""
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": D, "n_head": HEADS, "n_layer": LAYERS}
    model = Transformer(**sizes | changes, rng=rng(), dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data[...] = 0.3 * rng(p.size).standard_normal(p.shape)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


def state(model):
    modules = {name: id(m) for name, m in model.named_modules()}
    return (
        modules,
        str(model.config),
        [m.n_head for m in attentions(model)],
        {n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()},
    )


def attentions(model):
    return [m for _, m in model.named_modules() if hasattr(m, "n_head")]


def snapshot(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


def assert_same(got, wanted):
    """To rounding: a shorter sum adds up in another order."""
    tolerance = 1e-5 if wanted.dtype == np.float32 else 1e-13
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def draw(generator):
    ids = generator.integers(7, size=(4, 5))
    return ids, ids


def moments(d, seed=0):
    x = rng(seed).standard_normal((20, d)) * np.geomspace(0.1, 10, d)
    return x.T @ x / 20


GRAMS = observe(small(), IDS)


# ------------------------------------------------------------------ masks


@law
@given(shapes, shares, floats, seeds, st.booleans())
def test_a_mask_has_exactly_so_many_zeros_ties_or_not(shape, sparsity, dtype, seed, ties):
    w = rng(seed).standard_normal(shape).astype(dtype)
    w = np.round(w) if ties else w
    mask = magnitude_mask(w, sparsity)
    assert mask.dtype == bool and mask.shape == shape
    assert np.count_nonzero(~mask) == round(sparsity * w.size)
    mask = wanda_mask(w, moments(shape[1], seed), sparsity)
    assert (np.count_nonzero(~mask, axis=1) == round(sparsity * shape[1])).all()


@law
@given(shapes, shares, shares, seeds, st.booleans())
def test_a_higher_sparsity_only_takes_more_away(shape, one, two, seed, ties):
    w = rng(seed).standard_normal(shape)
    w, gram = np.round(w) if ties else w, moments(shape[1], seed)
    low, high = sorted((one, two))
    assert not (magnitude_mask(w, high) & ~magnitude_mask(w, low)).any()
    assert not (wanda_mask(w, gram, high) & ~wanda_mask(w, gram, low)).any()


def test_of_equals_the_first_go():
    np.testing.assert_array_equal(magnitude_mask([1, -1, 2, 1, 0], 0.6), [0, 0, 1, 1, 0])
    mask = wanda_mask(np.ones((2, 4)), np.diag([4.0, 1, 1, 1]), 0.5)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 1]] * 2)


def every_mask(n, zeros):
    for gone in combinations(range(n), zeros):
        keep = np.ones(n, bool)
        keep[list(gone)] = False
        yield keep


@law
@given(st.integers(1, 3), st.integers(1, 3), shares, seeds)
def test_no_mask_of_that_size_has_a_smaller_frobenius_error(rows, columns, sparsity, seed):
    w = rng(seed).standard_normal((rows, columns))
    mask = magnitude_mask(w, sparsity)
    masks = every_mask(w.size, np.count_nonzero(~mask))
    best = min(np.linalg.norm(w.ravel()[~keep]) for keep in masks)
    assert np.linalg.norm(w * mask - w) == pytest.approx(best, rel=1e-12)


@law
@given(st.integers(1, 6), shares, seeds)
def test_no_choice_in_a_row_loses_less_of_w_squared_times_c(columns, sparsity, seed):
    w, gram = rng(seed).standard_normal((3, columns)), moments(columns, seed)
    mask = wanda_mask(w, gram, sparsity)
    cost = w**2 * np.diagonal(gram)
    masks = list(every_mask(columns, round(sparsity * columns)))
    best = [min(row[~keep].sum() for keep in masks) for row in cost]
    np.testing.assert_allclose((cost * ~mask).sum(axis=1), best, rtol=1e-12, atol=1e-15)


def test_wanda_is_magnitude_in_each_row_if_all_features_are_alike():
    w = rng().standard_normal((5, 8))
    by_row = np.stack([magnitude_mask(row, 0.5) for row in w])
    np.testing.assert_array_equal(wanda_mask(w, 3 * np.eye(8), 0.5), by_row)
    assert (wanda_mask(w, moments(8), 0.5) != by_row).any()


@pytest.mark.parametrize("sparsity", [-0.1, 1, np.nan, True])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    model = small()
    before = state(model)
    for call in (
        lambda: magnitude_mask(np.ones(3), sparsity),
        lambda: wanda_mask(np.ones((2, 3)), np.eye(3), sparsity),
        lambda: sparsify(model, sparsity),
    ):
        with pytest.raises(ValueError, match="sparsity"):
            call()
    assert state(model) == before


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 6)])
@pytest.mark.parametrize("size", [0.0, 1e-310, 1e30])
def test_hard_weights_and_grams_have_masks_of_the_right_size_too(shape, size):
    w, zeros = size * rng().standard_normal(shape), round(0.5 * shape[1])
    assert np.count_nonzero(~magnitude_mask(w, 0.5)) == round(0.5 * w.size)
    for gram in (np.zeros((shape[1],) * 2), np.ones((shape[1],) * 2), 1e-300 * moments(shape[1])):
        assert (np.count_nonzero(~wanda_mask(w, gram, 0.5), axis=1) == zeros).all()


# ------------------------------------------------------------------ one masked layer


def masked(dtype=np.float64, bias=True):
    base = Linear(6, 5, rng=rng(), bias=bias, dtype=dtype)
    return Masked(base, magnitude_mask(base.weight.data, 0.5))


@both
@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_layer_and_its_merged_one_are_the_zeroed_weight(dtype, bias):
    layer, x = masked(dtype, bias), rng(2).standard_normal((3, 4, 6)).astype(dtype)
    w = np.where(layer.mask, layer.base.weight.data, 0)
    np.testing.assert_array_equal(layer.dense(), w)
    layer.base.weight.requires_grad = False
    plain = layer.merged()
    assert type(plain) is Linear and not plain.weight.requires_grad
    assert not np.shares_memory(plain.weight.data, layer.base.weight.data)
    np.testing.assert_array_equal(plain.weight.data, w)
    for y in (layer(Tensor(x)), plain(Tensor(x))):
        assert y.dtype == dtype
        np.testing.assert_array_equal(
            y.data, Linear.of(w, getattr(layer.base.bias, "data", None))(Tensor(x)).data
        )
    assert (layer.d_in, layer.d_out, layer.sparsity) == (6, 5, 0.5)
    assert repr(layer).startswith("Masked(sparsity=0.5, base=Linear(6 -> 5")


def test_masked_gradients_agree_with_differences_and_are_zero_where_masked():
    layer, x = masked(), rng(2).standard_normal((3, 6))

    def f(x, w, b):
        layer.base.weight, layer.base.bias = w, b
        return layer(x)

    check_vjp(f, x, layer.base.weight.data, layer.base.bias.data)
    layer = masked()
    (layer(Tensor(x)) ** 2).sum().backward()
    np.testing.assert_array_equal(layer.base.weight.grad != 0, layer.mask)


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="shape"):
        Masked(Linear(3, 2, rng=rng()), np.ones((3, 2), bool))


def test_a_mask_is_a_copy_of_its_own():
    mask = np.ones((2, 3), bool)
    layer = Masked(Linear(3, 2, rng=rng()), mask)
    mask[...] = False
    assert layer.mask.all()


def test_a_merged_weight_that_is_not_finite_is_refused():
    model = sparsify(small(), 0.5)
    model.blocks[0].attn.q.base.weight.data[...] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="nan"):
        merge(model)


# ------------------------------------------------------------------ sparsify


def masks(model):
    return {name: w.mask for name, w in wrappers(model).items()}


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9])
def test_each_layer_gets_its_share_and_what_trains_stays(sparsity):
    model = freeze(small(), "blocks.0.*")
    trains, total = list(model.trainable().values()), count(model, quiet=True)
    assert sparsify(model, sparsity) is model
    assert len(masks(model)) == 6 * LAYERS
    for name, wrapper in wrappers(model).items():
        np.testing.assert_array_equal(
            wrapper.mask, magnitude_mask(wrapper.base.weight.data, sparsity), err_msg=name
        )
    assert [id(p) for p in model.trainable().values()] == [id(p) for p in trains]
    assert count(model, quiet=True) == total
    before = logits(model)
    merge(model)
    assert not wrappers(model) and count(model, quiet=True) == total
    assert len(model.trainable()) == len(trains)
    np.testing.assert_array_equal(logits(model), before)
    zeros = sum(
        np.count_nonzero(p.data == 0)
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.startswith("blocks")
    )
    assert zeros == LAYERS * (4 * round(sparsity * D * D) + 2 * round(sparsity * 4 * D * D))


def test_no_sparsity_is_the_model_itself_and_detach_lifts_the_mask():
    model = small()
    before, plain = logits(model), state(model)
    np.testing.assert_array_equal(logits(sparsify(model, 0)), before)
    detach(sparsify(model, 0.9))
    assert state(model) == plain


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_global_has_one_threshold_over_all_layers(sparsity):
    model = small()
    for i, block in enumerate(model.blocks):
        block.attn.q.weight.data *= 10.0**i  # so that layers differ
    sparsify(model, sparsity, scope="global")
    found = [(np.abs(w.base.weight.data), w.mask) for w in wrappers(model).values()]
    size = sum(mask.size for _, mask in found)
    assert sum(np.count_nonzero(~mask) for _, mask in found) == round(sparsity * size)
    lost = max(w[~mask].max() for w, mask in found if not mask.all())
    kept = min(w[mask].min() for w, mask in found if mask.any())
    assert lost <= kept
    assert len({w.sparsity for w in wrappers(model).values()}) > 1


def test_grams_make_it_wanda():
    model = small()
    grams, plain = observe(model, IDS), snapshot(model)
    sparsify(model, 0.5, grams=grams)
    for name, wrapper in wrappers(model).items():
        w = plain[f"{name}.weight"]
        np.testing.assert_array_equal(wrapper.mask, wanda_mask(w, grams[name], 0.5))


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"grams": True}])
def test_pruned_again_after_training_a_mask_only_loses_entries(settings):
    model = small()
    settings = {"grams": observe(model, IDS)} if "grams" in settings else settings
    last = None
    for sparsity in (0.2, 0.5, 0.4, 0.8):
        sparsify(model, sparsity, **settings)
        now = masks(model)
        if last is not None:
            assert not any((now[name] & ~last[name]).any() for name in now)
        if sparsity == 0.4:  # less than there is: nothing changes
            assert all((now[name] == last[name]).all() for name in now)
        last = now
        fit(model, draw, steps=2, lr=0.05, progress=False)
    sizes = [m.size for m in last.values()]
    zeros = [np.count_nonzero(~m) for m in last.values()]
    if settings:
        rows = sum(len(m) * round(0.8 * m.shape[1]) for m in last.values())
        assert sum(zeros) == (rows if "grams" in settings else round(0.8 * sum(sizes)))
    else:
        assert zeros == [round(0.8 * n) for n in sizes]


def test_after_a_merge_the_zeros_go_first_so_grams_can_be_observed_afresh():
    model = small()
    sparsify(model, 0.5, grams=observe(model, IDS))
    before = masks(model)
    merge(model)
    sparsify(model, 0.75, grams=observe(model, IDS))
    assert not any((mask & ~before[name]).any() for name, mask in masks(model).items())


def test_layers_out_of_target_keep_the_mask_they_have():
    model = sparsify(small(), 0.5, "*.q")
    before = masks(model)
    sparsify(model, 0.75, "*.[qv]*")
    assert all(w.sparsity == 0.75 for w in wrappers(model).values())
    sparsify(model, 0.9, "blocks.1.attn.q")
    assert (masks(model)["blocks.0.attn.q"] & ~before["blocks.0.attn.q"]).sum() == 0
    assert model.blocks[0].attn.q.sparsity == 0.75


@pytest.mark.parametrize("grams", [None, GRAMS], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["row", "layer", "global", 4])
def test_a_scope_is_what_holds_the_share(scope, grams):
    found, model, every = masks(sparsify(small(), 0.5, scope=scope, grams=grams)), small(), []
    for name, layer in model.named_modules():
        if name in found:
            w = np.abs(layer.weight.data)
            score = w if grams is None else w * np.sqrt(np.diagonal(grams[name]))
            size = {"row": layer.d_in, "layer": w.size, "global": w.size, 4: 4}[scope]
            every.append([a.reshape(-1, size) for a in (score, found[name])])
    if scope == "global":
        every = [[np.concatenate([a.ravel() for a in part])[None] for part in zip(*every)]]  # noqa: B905
    for score, mask in every:  # (groups, in each)
        assert (np.count_nonzero(mask, axis=1) * 2 == mask.shape[1]).all()
        least = np.where(mask, score, np.inf).min(axis=1)
        assert (np.where(mask, 0, score).max(axis=1) <= least).all()


# ------------------------------------------------------------------ making up for what goes


def correlated(d, seed=0):
    x = rng(seed).standard_normal((300, d)) @ rng(seed + 1).standard_normal((d, d))
    return x.T @ x / 300


def by_the_book(w, gram, sparsity, width, by_group):
    """The Optimal Brain Surgeon column by column, the inverse made afresh each time."""
    c, w = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)), w.copy()
    inverses = [np.linalg.inv(c[j:, j:]) for j in range(len(c))]
    for j in range(len(c)):
        if j % width == 0:
            at = slice(j, min(j + width, len(c)))
            cost = w[:, at] ** 2 / [inverses[k][0, 0] for k in range(at.start, at.stop)]
            rows = cost if by_group else cost.reshape(1, -1)
            worst = np.argsort(rows, axis=1)[:, : round(sparsity * rows.shape[1])]
            gone = np.zeros(rows.shape, bool)
            np.put_along_axis(gone, worst, True, axis=1)
            gone = gone.reshape(cost.shape)
        for i in np.flatnonzero(gone[:, j - at.start]):
            w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]
            w[i, j] = 0
    return w


@both
@pytest.mark.parametrize(
    "scope, sparsity", [("layer", 0.3), ("layer", 0.6), (4, 0.5), ("row", 0.4)]
)
def test_sparse_gpt_is_the_brain_surgeon_in_a_fixed_order(scope, sparsity, dtype):
    for seed in range(5):
        w, gram = rng(seed).standard_normal((6, 20)).astype(dtype), correlated(20, seed)
        got, mask = sparse_gpt(w, gram, sparsity, scope=scope)
        assert got.dtype == dtype and (got[~mask] == 0).all()
        width = {"layer": 8, "row": 20}.get(scope, scope)
        wanted = by_the_book(w.astype(np.float64), gram, sparsity, width, scope != "layer")
        np.testing.assert_array_equal(mask, wanted != 0)
        np.testing.assert_allclose(got, wanted, atol=1e-6 if dtype == np.float32 else 1e-11)


def test_groups_that_do_not_divide_the_chunks_of_128_columns_see_every_error():
    w, gram = rng().standard_normal((3, 135)), correlated(135)
    np.testing.assert_allclose(
        sparse_gpt(w, gram, 0.4, scope=5)[0], by_the_book(w, gram, 0.4, 5, True), atol=1e-9
    )


@pytest.mark.parametrize("width, scope", [(64, "layer"), (4, 4)])
def test_making_up_harms_the_outputs_less_than_wanda_and_not_less_than_can_be(width, scope):
    for seed in range(5):
        w, gram = rng(seed).standard_normal((8, 64)), correlated(64, seed)
        got, mask = sparse_gpt(w, gram, 0.5, scope=scope)
        groups = (np.abs(w) * np.sqrt(np.diag(gram))).reshape(-1, width)
        wanda = w * (groups > np.median(groups, axis=1, keepdims=True)).reshape(w.shape)
        harms = [np.einsum("oi,ij,oj->", w - near, gram, w - near) for near in (got, wanda)]
        assert harms[0] < 0.75 * harms[1]
        for row, near, keep in zip(w, got, mask, strict=True):  # the best there is for this mask
            best = np.zeros(64)
            best[keep] = np.linalg.solve(gram[np.ix_(keep, keep)], gram[keep] @ row)
            assert (row - near) @ gram @ (row - near) >= (row - best) @ gram @ (row - best) - 1e-9


def test_of_four_the_best_two_stay_if_features_are_not_correlated():
    w, gram = rng().standard_normal((50, 4)), np.diag([1.0, 4, 9, 2])
    got, mask = sparse_gpt(w, gram, 0.5, scope=4, damping=0)
    np.testing.assert_array_equal(got, w * mask)
    cost = [[(row**2 * np.diag(gram))[~keep].sum() for keep in every_mask(4, 2)] for row in w]
    np.testing.assert_allclose((w**2 * ~mask) @ np.diag(gram), np.min(cost, axis=1))


@pytest.mark.parametrize("scope", [None, 2])
def test_a_compensated_model_has_its_share_keeps_its_masks_and_leaves_the_old_layers(scope):
    model = freeze(small(), "blocks.0.*")
    old, start = dict(model.named_modules()), snapshot(model)
    settings = {"scope": scope, "grams": GRAMS, "compensate": True}
    sparsify(model, 0.5, **settings)
    first = masks(model)
    assert all(w.sparsity == 0.5 for w in wrappers(model).values())
    for name, w in wrappers(model).items():
        assert not w.dense()[~w.mask].any()
        np.testing.assert_array_equal(old[name].weight.data, start[f"{name}.weight"])
        assert w.base.weight.requires_grad == (not name.startswith("blocks.0"))
        np.testing.assert_array_equal(w.base.bias.data, start[f"{name}.bias"])
    before = logits(model)
    sparsify(model, 0.25, **settings)  # less than there is: nothing changes
    np.testing.assert_array_equal(logits(model), before)
    if scope is None:
        sparsify(model, 0.75, **settings)
        assert all(w.sparsity == 0.75 for w in wrappers(model).values())
        assert not any((mask & ~first[name]).any() for name, mask in masks(model).items())


@pytest.mark.parametrize("settings", [{"compensate": True}, {"compensate": True, "scope": 2}, {}])
def test_blocks_in_turn_are_each_pruned_for_what_the_pruned_ones_before_make(settings):
    model, loop = (sparsify(small(), 0.25, "blocks.[02].*") for _ in "ab")
    sparsify(model, 0.5, in_turn=IDS, **settings)
    for i in range(LAYERS):  # by hand: the mean over what the layers before the block really give
        block, grams = loop.blocks[i], {}
        with no_grad():
            x = loop.tokens(IDS) + loop.positions(np.arange(5))
            for before in loop.blocks[:i]:
                x = before(x)
            h = block.norm1(x)
            a = attend(block.attn.q(h), block.attn.k(h), block.attn.v(h), HEADS)
            m = block.norm2(x + block.attn.o(a))
            inner = ops.gelu(block.mlp.up(m))
        given = {"attn.q": h, "attn.k": h, "attn.v": h, "attn.o": a, "mlp.up": m, "mlp.down": inner}
        for name, tensor in given.items():
            flat = tensor.data.reshape(-1, tensor.shape[-1])
            grams[f"blocks.{i}.{name}"] = flat.T @ flat / len(flat)
        sparsify(loop, 0.5, f"blocks.{i}.*", grams=grams, **settings)
    for (name, got), wanted in zip(wrappers(model).items(), wrappers(loop).values(), strict=True):
        np.testing.assert_array_equal(got.mask, wanted.mask, err_msg=name)
        np.testing.assert_allclose(got.dense(), wanted.dense(), rtol=1e-9, atol=1e-12)


def test_on_the_base_sparse_gpt_is_no_worse_than_wanda():
    tests = np.concatenate([load_eval(skill)[:12] for skill in tasks.SKILLS])
    for seed in range(3):
        seen = tasks.sample(list(tasks.SKILLS), 128, rng(seed))[:, :-1]
        grams = observe(load_base(), seen)
        for sparsity, scope in ((0.5, None), (0.5, 4))[: 2 if seed == 0 else 1]:
            wanda, gpt = (
                evaluate(
                    sparsify(load_base(), sparsity, scope=scope, grams=grams, compensate=c), tests
                ).token_accuracy
                for c in (False, True)
            )
            assert gpt >= wanda


def test_masked_weights_stay_bit_identical_through_training_and_the_others_move():
    model = sparsify(small(), 0.5)
    before = {name: w.base.weight.data.copy() for name, w in wrappers(model).items()}
    fit(model, draw, steps=5, lr=1e-2, progress=False)
    for name, w in wrappers(model).items():
        same = w.base.weight.data == before[name]
        assert same[~w.mask].all()
        assert not same[w.mask].any()


def test_rewinding_keeps_the_masks_and_gives_the_first_weights_back():
    model = small()
    start = snapshot(model)
    fit(model, draw, steps=5, lr=1e-2, progress=False)
    kept = {n: m.copy() for n, m in masks(sparsify(model, 0.5)).items()}
    assert rewind(model, start) is model
    fresh = small()
    for name, mask in kept.items():
        np.testing.assert_array_equal(masks(model)[name], mask)
        replace(fresh, name, lambda layer, mask=mask: Masked(layer, mask))
    np.testing.assert_array_equal(logits(model), logits(fresh))


def test_a_state_that_does_not_fit_is_not_rewound_to():
    model, start = sparsify(small(), 0.5), snapshot(small())
    for i, (weights, error) in enumerate(
        [
            ({n: a for n, a in start.items() if n != "norm.bias"}, KeyError),
            (start | {"norm.bias": np.ones(1)}, ValueError),
            (start | {"norm.bias": model.norm.bias.data}, ValueError),
        ]
    ):
        before = state(model)
        with pytest.raises(error, match="norm.bias"):
            rewind(model, weights)
        assert state(model) == before, i


LACKING = {name: gram for name, gram in GRAMS.items() if not name.endswith(("down", "o"))}


@pytest.mark.parametrize(
    "settings, error, word",
    [
        ({"scope": "column"}, ValueError, "scope"),
        ({"scope": 3}, ValueError, "scope 3; .* divisor"),
        ({"compensate": True}, ValueError, "scope"),
        ({"compensate": True, "grams": GRAMS, "scope": "global"}, ValueError, "scope"),
        ({"grams": LACKING}, KeyError, "blocks.0.attn.o"),
        ({"in_turn": IDS, "scope": "global"}, ValueError, "scope"),
        ({"in_turn": IDS[0]}, ValueError, "ids"),
        ({"targets": "norm"}, LookupError, "right kind"),
        ({"targets": "head"}, ValueError, "tied"),
    ],
)
def test_what_sparsify_refuses_leaves_the_model_as_it_was(settings, error, word):
    for model in (small(tied=True), sparsify(small(tied=True), 0.2)):
        before = state(model)
        with pytest.raises(error, match=word):
            sparsify(model, 0.5, **settings)
        assert state(model) == before


def test_lora_goes_beside_a_masked_layer():
    layer = masked()
    both_ways = LoRA(layer, 2, rng=rng(1))
    both_ways.B.data[...] = 1
    np.testing.assert_allclose(both_ways.dense(), layer.dense() + both_ways.delta(), rtol=1e-14)


# ------------------------------------------------------------------ neurons


@both
@pytest.mark.parametrize("with_grams", [False, True])
def test_neurons_that_reach_nothing_go_first_and_the_model_is_the_same(dtype, with_grams):
    model = small(dtype)
    for i, block in enumerate(model.blocks):
        block.mlp.down.weight.data[:, i % 2 :: 2] = 0
    before, old = logits(model), [snapshot(block.mlp) for block in model.blocks]
    freeze(model, "*.up.weight")
    grams = observe(model, IDS) if with_grams else None
    assert prune_neurons(model, 2 * D, grams=grams) is model  # half of 4 D
    assert logits(model).dtype == dtype
    assert_same(logits(model), before)
    for i, block in enumerate(model.blocks):
        stay = np.setdiff1d(np.arange(4 * D), np.arange(i % 2, 4 * D, 2))  # in their order
        up, down = block.mlp.up, block.mlp.down
        np.testing.assert_array_equal(up.weight.data, old[i]["up.weight"][stay])
        np.testing.assert_array_equal(up.bias.data, old[i]["up.bias"][stay])
        np.testing.assert_array_equal(down.weight.data, old[i]["down.weight"][:, stay])
        assert down.weight.data.flags.c_contiguous
        assert not up.weight.requires_grad and up.bias.requires_grad and down.weight.requires_grad


@law
@given(st.integers(1, 4 * D) | st.floats(0.02, 1))
def test_neurons_cost_two_d_and_one_parameters_each(keep):
    model = small()
    before = count(model, quiet=True)
    kept = keep if isinstance(keep, int) else round(keep * 4 * D)
    prune_neurons(model, keep)
    gone = LAYERS * (4 * D - kept) * (2 * D + 1)
    assert count(model, quiet=True) == (before.trainable - gone, before.total - gone)
    assert (model.blocks[0].mlp.up.d_out, model.blocks[0].mlp.down.d_in) == (kept, kept)


@pytest.mark.parametrize("with_grams", [False, True])
def test_the_neurons_kept_have_the_largest_scores(with_grams):
    model = small()
    grams = observe(model, IDS) if with_grams else None
    mlp = model.blocks[1].mlp
    up, down = mlp.up.weight.data, mlp.down.weight.data
    size = np.linalg.norm(up, axis=1)
    if with_grams:
        size = np.sqrt(np.diagonal(grams["blocks.1.mlp.down"]))
    best = np.sort(np.argsort(size * np.linalg.norm(down, axis=0))[-5:])
    prune_neurons(model, 5, "blocks.1.mlp", grams=grams)
    np.testing.assert_array_equal(mlp.up.weight.data, up[best])
    assert model.blocks[0].mlp.up.d_out == 4 * D


def test_without_biases_and_without_a_transformer():
    class Holder(MLP):
        def __init__(self):
            self.inner = MLP(4, rng=rng(), dtype=np.float64)
            self.inner.up = Linear(4, 16, rng=rng(), bias=False)
            self.inner.down = Linear(16, 4, rng=rng(), bias=False)

    model = Holder()
    prune_neurons(model, 3, "inner")
    assert [p.shape for p in model.parameters()] == [(3, 4), (4, 3)]


# ------------------------------------------------------------------ heads


@both
@pytest.mark.parametrize("with_grams", [False, True])
def test_heads_that_reach_nothing_go_first_and_the_model_is_the_same(dtype, with_grams):
    model, size = small(dtype), D // HEADS
    for block in model.blocks:
        block.attn.o.weight.data[:, size : 2 * size] = 0
    before, q = logits(model), model.blocks[0].attn.q.weight.data.copy()
    freeze(model, "*.q.*")
    assert prune_heads(model, 3, grams=observe(model, IDS) if with_grams else None) is model
    attn = model.blocks[0].attn
    assert attn.n_head == 3 and attn.q.d_out < D  # narrower than the stream, and it runs
    assert logits(model).dtype == dtype
    assert_same(logits(model), before)
    np.testing.assert_array_equal(attn.q.weight.data, np.delete(q, [2, 3], axis=0))
    assert not attn.q.weight.requires_grad and attn.k.weight.requires_grad
    assert (model.config["n_head"], model.config["d_head"]) == (3, size)


@pytest.mark.parametrize("keep, kept", [(1, 1), (0.25, 1), (0.5, 2), (3, 3), (1.0, 4), (4, 4)])
def test_heads_cost_four_d_and_three_parameters_a_feature(keep, kept):
    model = small()
    before, out = count(model, quiet=True).total, logits(model)
    prune_heads(model, keep)
    gone = LAYERS * (HEADS - kept) * (D // HEADS) * (4 * D + 3)
    assert before - count(model, quiet=True).total == gone
    assert [a.n_head for a in attentions(model)] == [kept] * LAYERS
    if kept == HEADS:
        np.testing.assert_array_equal(logits(model), out)


@pytest.mark.parametrize("with_grams", [False, True])
def test_the_heads_kept_have_the_largest_scores(with_grams):
    model, size = small(), D // HEADS
    attn, name = model.blocks[1].attn, "blocks.1.attn.o"
    v, o = attn.v.weight.data, attn.o.weight.data
    o[:, :size] *= 0.1 if with_grams else 5
    gram = observe(model, IDS)[name]
    scores = []
    for head in range(HEADS):
        at = slice(head * size, head * size + size)
        plain = np.linalg.norm(o[:, at]) * np.linalg.norm(v[at])
        scores.append(np.trace(o[:, at] @ gram[at, at] @ o[:, at].T) if with_grams else plain)
    best = np.sort(np.argsort(scores)[-2:])
    prune_heads(model, 2, "blocks.1.attn", grams={name: gram} if with_grams else None)
    wanted = np.concatenate([v[h * size : h * size + size] for h in best])
    np.testing.assert_array_equal(attn.v.weight.data, wanted)


def test_pruned_again_and_trained_a_smaller_model_still_runs():
    model = prune_heads(prune_neurons(small(), 0.5), 0.75)
    prune_heads(prune_neurons(model, 3), 1)
    history = fit(model, draw, steps=30, lr=3e-2, progress=False)
    assert history.loss[-1] < history.loss[0] - 0.2
    check_vjp(lambda x: model.blocks[0](x), rng().standard_normal((2, 5, D)))


PRUNE = [(prune_neurons, 4 * D, "neurons"), (prune_heads, HEADS, "heads")]
prunes = pytest.mark.parametrize("prune, n, what", PRUNE)


@prunes
@pytest.mark.parametrize("keep", [0, 0.001, -0.5, 1.5, 33, True, None, "half", np.nan])
def test_a_keep_out_of_range_is_refused(prune, n, what, keep):
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match="keep|NaN"):
        prune(model, keep)
    assert state(model) == before


@prunes
def test_models_that_cannot_be_cut_are_refused_and_left_as_they_were(prune, n, what):
    kind, part = ("mlp", "down") if prune is prune_neurons else ("attn", "o")

    def refused(model, word, error=ValueError, **settings):
        before = state(model)
        with pytest.raises(error, match=word):
            prune(model, 1, **settings)
        assert state(model) == before

    refused(lora(small(), rng=rng()), "adapter")
    refused(sparsify(small(), 0.5), "adapter")
    refused(quantise_model(small()), "plain Linear", TypeError)
    refused(low_rank(small(), 2), "plain Linear", TypeError)
    refused(small(), f"blocks.0.{kind}.{part}", KeyError, grams=LACKING)
    refused(small(), "right kind", LookupError, targets="blocks.*.norm1")
    model = small()  # the last block is at fault, and the first is left alone all the same
    getattr(getattr(model.blocks[2], kind), part).weight.data[0, 0] = np.nan
    refused(model, f"blocks.2.{kind}.{part}")
    model = small()
    setattr(model.blocks[2], kind, getattr(model.blocks[1], kind))
    refused(model, "tied")


class Gated(Module):
    """A Llama's MLP, and its attention's shapes: several heads of q share one of k and v."""

    def __init__(self, d=8, inner=12):
        self.gate, self.up, self.k, self.v = (
            Linear(d, n, rng=rng(n), bias=False, dtype=np.float64) for n in (inner, inner, 4, 4)
        )
        self.down = Linear(inner, d, rng=rng(5), bias=False, dtype=np.float64)
        self.q, self.o = (Linear(d, d, rng=rng(6), bias=False) for _ in "qo")
        self.n_head = 4

    def forward(self, x):
        return self.down(ops.gelu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("with_grams", [False, True])
def test_a_gate_is_cut_like_the_layer_beside_it(with_grams):
    model, x = Module(), Tensor(rng().standard_normal((3, 8)))
    model.mlp = mlp = Gated()
    for dead, layer in enumerate((mlp.gate, mlp.up)):
        layer.weight.data[dead] = 0
    mlp.down.weight.data[:, 2] = 0
    before = mlp(x).data
    model.forward = mlp.forward
    grams = observe(model, x, "mlp.down") if with_grams else None
    prune_neurons(model, 9, "mlp", grams=grams)
    assert [p.shape for p in (mlp.gate.weight, mlp.up.weight)] == [(9, 8)] * 2
    np.testing.assert_allclose(mlp(x).data, before, atol=1e-14)


def test_heads_that_share_keys_are_refused():
    model = Module()
    model.attn = Gated()
    with pytest.raises(ValueError, match="share"):
        prune_heads(model, 2, "attn")


@prunes
def test_what_is_put_in_takes_the_training_mode_and_the_config_tells_the_sizes(prune, n, what):
    model = prune(small().train(), 1, f"blocks.1.{'mlp' if n > HEADS else 'attn'}")
    assert all(module.training for _, module in model.named_modules())
    again = Transformer(**model.config, rng=rng(), dtype=np.float64)
    shapes = [p.shape for p in model.parameters()]
    assert [p.shape for p in again.parameters()] == shapes


# ------------------------------------------------------------------ blocks


def test_similarity_is_the_cosine_between_what_enters_and_what_leaves():
    model = small()
    before = state(model)
    got = block_similarity(model, IDS)
    assert state(model) == before
    assert got.shape == (LAYERS,) and got.dtype == np.float64
    with no_grad():
        x = model.tokens(IDS).data + model.positions(np.arange(5)).data
        for block, found in zip(model.blocks, got, strict=True):
            y = block(Tensor(x)).data
            cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            assert found == pytest.approx(cosines.mean(), rel=1e-12)
            x = y


def silence(block):
    for layer in (block.attn.o, block.mlp.down):
        layer.weight.data[...] = layer.bias.data[...] = 0


@both
def test_a_block_that_adds_nothing_has_similarity_one_and_can_go(dtype, tmp_path):
    model = small(dtype)
    silence(model.blocks[1])
    before, similar = logits(model), block_similarity(model, IDS)
    assert similar[1] == pytest.approx(1, abs=1e-6) and similar.argmax() == 1
    size = count(model, quiet=True).total
    assert drop_blocks(model, [1]) is model
    np.testing.assert_array_equal(logits(model), before)
    assert size - count(model, quiet=True).total == 12 * D**2 + 13 * D
    assert model.config["n_layer"] == len(model.blocks) == LAYERS - 1
    save_model(model, tmp_path / "model")
    np.testing.assert_array_equal(logits(load_model(tmp_path / "model")), before)


def test_a_stream_of_zeros_has_similarity_zero_and_an_error_leaves_the_model_alone():
    model = small()
    for p in (model.tokens.weight, model.positions.weight):
        p.data[...] = 0
    silence(model.blocks[0])
    assert block_similarity(model, IDS)[0] == 0
    before = state(model)
    with pytest.raises(ValueError, match="ids have shape"):
        block_similarity(model, IDS[0])
    assert state(model) == before
    with pytest.raises(LookupError, match="matches no layer"):
        block_similarity(MLP(4, rng=rng()), IDS)


def test_several_blocks_or_one_can_be_dropped():
    model = small()
    last = model.blocks[1]
    drop_blocks(model, (np.int64(2), 0))
    assert model.blocks == [last]
    assert drop_blocks(small(), 2).config["n_layer"] == 2
    assert drop_blocks(small(), []).config["n_layer"] == LAYERS


@pytest.mark.parametrize("which", [[0, 1, 2], [3], -1, [True, "1"], 7])
def test_a_bad_choice_of_blocks_is_refused(which):
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match="which"):
        drop_blocks(model, which)
    assert state(model) == before
    with pytest.raises(ValueError, match="adapter"):
        drop_blocks(lora(model, rng=rng()), [0])


# ------------------------------------------------------------------ what looks on


@pytest.mark.parametrize("look", [observe, block_similarity])
def test_looking_on_puts_everything_back_and_leaves_the_training_flags(look):
    model = small()
    model.blocks[1].train()
    before, modes = state(model), {n: m.training for n, m in model.named_modules()}
    found = {name: vars(m).keys() for name, m in model.named_modules()}
    look(model, IDS)
    with pytest.raises(ValueError, match="ids"):
        look(model, IDS[0])
    assert state(model) == before and modes == {n: m.training for n, m in model.named_modules()}
    assert found == {name: vars(m).keys() for name, m in model.named_modules()}


def test_a_gram_is_the_mean_of_x_xt_over_every_call():
    model = small()
    model.blocks = [model.blocks[0]] * 2  # one block, called twice
    grams, x = observe(model, IDS, "blocks.0.attn.q"), []
    with no_grad():
        h = model.tokens(IDS) + model.positions(np.arange(5))
        for block in model.blocks:
            x.append(block.norm1(h).data.reshape(-1, D))
            h = block(h)
    x = np.concatenate(x)
    np.testing.assert_allclose(grams["blocks.0.attn.q"], x.T @ x / len(x), rtol=1e-12)


# ------------------------------------------------------------------ sparse forms

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.int8]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    elements=st.sampled_from([0, 0, 0, 1, -2, 3]),
)


@law
@given(arrays)
def test_sparse_forms_come_back_exactly_and_have_the_size_of_their_formula(w):
    nnz = np.count_nonzero(w)
    bits, values = to_bitmap(w)
    assert bits.nbytes + values.nbytes == -(-w.size // 8) + nnz * w.itemsize
    again = from_bitmap(bits, values, w.shape)
    assert again.dtype == w.dtype
    np.testing.assert_array_equal(again, w, strict=True)
    indices, values = to_indices(w)
    wide = 1 if w.size <= 256 else 2
    assert indices.nbytes + values.nbytes == nnz * (wide + w.itemsize)
    np.testing.assert_array_equal(from_indices(indices, values, w.shape), w, strict=True)


@pytest.mark.parametrize("n, dtype", [(256, "u1"), (257, "u2"), (2**16, "u2"), (2**16 + 1, "u4")])
def test_indices_take_the_smallest_type_that_holds_the_last_place(n, dtype):
    w = np.zeros(n, np.float32)
    w[-1] = 2
    indices, values = to_indices(w)
    assert indices.dtype == dtype and indices[0] == n - 1
    np.testing.assert_array_equal(from_indices(indices, values, n), w)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8])
def test_a_bitmap_breaks_even_at_one_over_the_bits(dtype):
    n, at = 4096, break_even_sparsity(8 * np.dtype(dtype).itemsize)
    sizes = []
    for zeros in (round(at * n) - 8, round(at * n), round(at * n) + 8):
        w = np.ones(n, dtype)
        w[:zeros] = 0
        sizes.append(sum(a.nbytes for a in to_bitmap(w)) - w.nbytes)
    assert sizes[0] > 0 == sizes[1] > sizes[2]
    assert break_even_sparsity(1) == 1


def test_indices_of_16_bits_beat_a_bitmap_below_one_in_16():
    size = lambda pair: pair[0].nbytes + pair[1].nbytes  # noqa: E731
    w = np.zeros(2**14, np.float32)
    w[: 2**10] = 1
    assert size(to_indices(w)) == size(to_bitmap(w))
    w[0] = 0
    assert size(to_indices(w)) < size(to_bitmap(w))


def test_a_bitmap_that_does_not_fit_is_refused():
    bits, values = to_bitmap(np.arange(10.0))
    spare = bits | np.array([0, 1], np.uint8)  # a bit past the end
    for bad, some, shape in (
        (bits[:1], values, (10,)),
        (bits, values[:1], (10,)),
        (spare, np.append(values, 1.0), (10,)),
        (bits, values, (10**6, 10**6)),  # refused before anything of that size is made
    ):
        with pytest.raises(ValueError, match="fit"):
            from_bitmap(bad, some, shape)
