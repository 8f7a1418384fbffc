"""Approximation: the theorems to rounding, layers that stand for others, what is refused."""

import tracemalloc
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import (
    Linear,
    Tensor,
    Transformer,
    check_vjp,
    count,
    fit,
    freeze,
    lora,
    merge,
    no_grad,
    unfreeze,
)
from minilora.compress import (
    LowRankLinear,
    TuckerLinear,
    hosvd,
    low_rank,
    observe,
    rank_for_budget,
    rank_for_energy,
    tensor_train,
    truncated_svd,
    tt_dense,
    tucker,
    tucker_layers,
    weighted_svd,
)

law = settings(max_examples=30)
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])
floats = st.sampled_from([np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)
shapes = st.tuples(sides, sides)
tensors = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)

IDS = np.random.default_rng(9).integers(7, size=(4, 5))
ATTENTION = [f"blocks.{i}.attn.{part}" for i in (0, 1) for part in "qkvo"]


def rng(seed=0):
    return np.random.default_rng(seed)


def matrix(shape, seed=0, dtype=np.float64):
    return rng(seed).standard_normal(shape).astype(dtype)


def moments(d, seed=0, rows=20):
    """What `observe` gives; fewer rows than d make it singular, as little data does."""
    x = rng(seed).standard_normal((rows, d)) * np.geomspace(0.1, 10, d)
    return x.T @ x / rows


def harm(w, near, gram):
    """tr(E C Eᵀ)"""
    return np.einsum("oi,ij,oj->", w - near, gram, w - near)


def small(dtype=np.float64, **changes):
    """A model in which nothing is zero by chance: biases too."""
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    model = Transformer(**sizes | changes, rng=rng(), dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data[...] = 0.3 * rng(p.size).standard_normal(p.shape)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


def untouched(model):
    modules = {name: id(m) for name, m in model.named_modules()}
    return modules, {
        n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()
    }


def close(dtype):
    return {"rtol": 0, "atol": 2e-5 if dtype == np.float32 else 1e-12}


# ------------------------------------------------------------------ matrices


@law
@given(shapes, floats, seeds, st.data())
def test_truncation_is_as_good_as_eckart_and_young_say(shape, dtype, seed, data):
    w = matrix(shape, seed, dtype)
    r = data.draw(st.integers(1, min(shape)))
    left, right = truncated_svd(w, r)
    assert left.shape == (shape[0], r) and right.shape == (r, shape[1])
    assert left.dtype == right.dtype == dtype
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    error = w.astype(np.float64) - left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(error), np.linalg.norm(s[r:]), **close(dtype))
    np.testing.assert_allclose(np.linalg.norm(error, 2), s[r] if r < len(s) else 0, **close(dtype))
    # split evenly: σ is the squared length of each column and each row
    np.testing.assert_allclose(left.T @ left, np.diag(s[:r]), **close(dtype))
    np.testing.assert_allclose(right @ right.T, np.diag(s[:r]), **close(dtype))


@law
@given(shapes, floats, seeds)
def test_a_higher_rank_is_never_worse_and_full_rank_is_exact(shape, dtype, seed):
    w, gram = matrix(shape, seed, dtype), moments(shape[1], seed)
    ranks = range(1, min(shape) + 1)
    for factors, c in (
        (truncated_svd, np.eye(shape[1])),
        (lambda w, r: weighted_svd(w, gram, r), gram),
    ):
        errors = [harm(w, np.matmul(*factors(w, r)), c) for r in ranks]
        assert (np.diff(errors) <= 1e-5 * (1 + errors[0])).all()
        np.testing.assert_allclose(np.matmul(*factors(w, ranks[-1])), w, **close(dtype))


@law
@given(shapes, seeds, st.integers(1, 20), st.data())
def test_weighting_by_data_is_at_least_as_good_on_the_data(shape, seed, rows, data):
    w, gram = matrix(shape, seed), moments(shape[1], seed, rows)
    r = data.draw(st.integers(1, min(shape)))
    left, right = weighted_svd(w, gram, r)
    assert left.shape == (shape[0], r) and right.shape == (r, shape[1])
    weighted, plain = harm(w, left @ right, gram), harm(w, np.matmul(*truncated_svd(w, r)), gram)
    scale = harm(w, 0, gram)
    assert weighted <= plain + 1e-12 * scale
    # no rank-r matrix does better than the tail of W C^(1/2), and the damping costs a millionth
    values, vectors = np.linalg.eigh(gram)
    s = np.linalg.svd(w @ vectors * np.sqrt(np.maximum(values, 0)), compute_uv=False)
    damping = 1e-6 * np.trace(gram) / shape[1] * np.sum(w * w)
    assert np.sum(s[r:] ** 2) - 1e-12 * scale <= weighted
    assert weighted <= np.sum(s[r:] ** 2) + damping + 1e-12 * scale
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-12)  # split evenly


def test_weighting_is_much_better_where_the_data_is_lopsided():
    w, gram = matrix((20, 30)), moments(30, rows=60)
    weighted, plain = (
        harm(w, np.matmul(*f), gram) for f in (weighted_svd(w, gram, 5), truncated_svd(w, 5))
    )
    assert weighted < 0.5 * plain


@law
@given(shapes, floats, seeds, st.floats(0.1, 100), st.data())
def test_white_data_changes_nothing(shape, dtype, seed, scale, data):
    w = matrix(shape, seed, dtype)
    r = data.draw(st.integers(1, min(shape)))
    wanted = np.matmul(*truncated_svd(w, r))
    for gram in (scale * np.eye(shape[1]), np.zeros((shape[1], shape[1]))):
        left, right = weighted_svd(w, gram, r)
        assert left.dtype == right.dtype == dtype
        np.testing.assert_allclose(left @ right, wanted, **close(dtype))


@law
@given(shapes, seeds, st.floats(0, 1, exclude_min=True))
def test_rank_for_energy_is_the_smallest_that_keeps_it(shape, seed, energy):
    w = matrix(shape, seed)
    r = rank_for_energy(w, energy)
    kept = np.cumsum(np.linalg.svd(w, compute_uv=False) ** 2)
    kept /= kept[-1]
    assert kept[r - 1] >= energy - 1e-12
    assert r == 1 or kept[r - 2] < energy + 1e-12


@pytest.mark.parametrize(
    "energy, r", [(0.01, 1), (0.78, 1), (0.79, 2), (0.97, 2), (0.99, 3), (1, 3)]
)
def test_rank_for_energy_on_a_known_spectrum(energy, r):
    w = np.diag([6.0, 3.0, 1.0, 0.0])  # 36, 45 and 46 of 46: .783, .978 and 1
    assert rank_for_energy(w, energy) == r
    assert rank_for_energy(1e200 * w, energy) == r  # no square overflows


def test_a_weight_of_zeros_has_rank_one_and_stays_zero():
    w = np.zeros((3, 4))
    assert rank_for_energy(w, 1.0) == 1
    assert not np.matmul(*truncated_svd(w, 2)).any()
    assert not np.matmul(*weighted_svd(w, moments(4), 2)).any()


@law
@given(shapes, st.integers(2, 200))
def test_rank_for_budget_is_the_largest_that_fits(shape, numbers):
    r = rank_for_budget(shape, numbers)
    assert (r == 0) == (numbers < sum(shape))
    if r:
        left, right = truncated_svd(matrix(shape), r)
        assert left.size + right.size <= numbers
        assert r == min(shape) or (r + 1) * sum(shape) > numbers


# ------------------------------------------------------------------ tensors


def tails(t, ranks):
    """The squared singular values that each axis's unfolding has beyond its rank, summed."""
    unfolded = [np.moveaxis(t, k, 0).reshape(n, -1) for k, n in enumerate(t.shape)]
    return [
        np.sum(np.linalg.svd(u, compute_uv=False)[r:] ** 2)
        for u, r in zip(unfolded, ranks, strict=True)
    ]


@law
@given(tensors, floats, seeds, st.data())
def test_hosvd_keeps_its_bound_and_hooi_is_never_worse(shape, dtype, seed, data):
    t = matrix(shape, seed, dtype)
    ranks = [data.draw(st.integers(1, n)) for n in shape]
    first, better = hosvd(t, ranks), tucker(t, ranks, iterations=3)
    cut = tails(t.astype(np.float64), ranks)
    slack = 1e-4 if dtype == np.float32 else 1e-11
    errors = [np.sum((t - found.dense().astype(np.float64)) ** 2) for found in (first, better)]
    assert errors[1] <= errors[0] + slack
    # each tail alone is below any error there is, so the sum is at most N times the least
    assert max(cut) - slack <= errors[1] and errors[0] <= sum(cut) + slack
    for found in (first, better):
        assert found.core.shape == tuple(ranks) and found.core.dtype == dtype
        assert found.size == prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
        assert found.dense().shape == shape and found.dense().dtype == dtype
        for u, n, r in zip(found.factors, shape, ranks, strict=True):
            assert u.shape == (n, r) and u.dtype == dtype
            np.testing.assert_allclose(u.T @ u, np.eye(r), **close(dtype))


@law
@given(tensors, floats, seeds)
def test_tucker_at_full_ranks_is_exact(shape, dtype, seed):
    t = matrix(shape, seed, dtype)
    for found in (hosvd(t, shape), tucker(t, shape, iterations=1)):
        np.testing.assert_allclose(found.dense(), t, **close(dtype))


def test_a_planted_tucker_is_found_and_hooi_gains_where_hosvd_is_not_the_best():
    planted = np.einsum(
        "abc,ia,jb,kc->ijk",
        *(matrix(s, i) for i, s in enumerate([(2, 3, 2), (6, 2), (7, 3), (8, 2)])),
    )
    found = tucker(planted, (2, 3, 2))
    np.testing.assert_allclose(found.dense(), planted, atol=1e-12)
    assert found.size == 12 + 12 + 21 + 16 < planted.size
    noise = matrix((6, 7, 8))
    errors = [np.linalg.norm(noise - f(noise, (2, 2, 2)).dense()) for f in (hosvd, tucker)]
    assert errors[1] < 0.99 * errors[0]


def test_at_the_end_of_hooi_no_axis_can_gain_alone():
    found = tucker(noise := matrix((6, 7, 8)), (2, 3, 2), iterations=200)
    u, v, w = found.factors
    for left in (
        np.einsum("ijk,jb,kc->ibc", noise, v, w).reshape(6, -1),
        np.einsum("ijk,ia,kc->jac", noise, u, w).reshape(7, -1),
        np.einsum("ijk,ia,jb->kab", noise, u, v).reshape(8, -1),
    ):
        r = 3 if len(left) == 7 else 2
        best = np.linalg.norm(np.linalg.svd(left, compute_uv=False)[:r])
        np.testing.assert_allclose(np.linalg.norm(found.core), best, rtol=1e-9)


def test_tucker_of_a_matrix_is_its_truncated_svd():
    w = matrix((6, 5))
    np.testing.assert_allclose(
        tucker(w, (2, 2)).dense(), np.matmul(*truncated_svd(w, 2)), atol=1e-12
    )


def full_tt(shape):
    return [min(prod(shape[: k + 1]), prod(shape[k + 1 :])) for k in range(len(shape) - 1)]


@law
@given(tensors, floats, seeds, st.data())
def test_a_tensor_train_keeps_its_bound(shape, dtype, seed, data):
    t, ranks, left = matrix(shape, seed, dtype), [], 1
    for k, n in enumerate(shape[:-1]):
        left = data.draw(st.integers(1, min(left * n, prod(shape[k + 1 :]))))
        ranks.append(left)
    cores = tensor_train(t, ranks)
    ends = [1, *ranks, 1]
    assert [c.shape for c in cores] == [(ends[k], n, ends[k + 1]) for k, n in enumerate(shape)]
    assert {c.dtype for c in cores} == {np.dtype(dtype)}
    near = tt_dense(cores)
    assert near.shape == shape and near.dtype == dtype
    wide = t.astype(np.float64)
    unfolded = [wide.reshape(prod(shape[: k + 1]), -1) for k in range(len(ranks))]
    cut = [
        np.sum(np.linalg.svd(u, compute_uv=False)[r:] ** 2)
        for u, r in zip(unfolded, ranks, strict=True)
    ]
    error, slack = np.sum((wide - near) ** 2), 1e-4 if dtype == np.float32 else 1e-11
    assert max(cut) - slack <= error <= sum(cut) + slack
    for core in cores[:-1]:
        g = core.reshape(-1, core.shape[2])
        np.testing.assert_allclose(g.T @ g, np.eye(core.shape[2]), **close(dtype))


@law
@given(tensors, floats, seeds)
def test_a_tensor_train_at_full_ranks_is_exact(shape, dtype, seed):
    t = matrix(shape, seed, dtype)
    np.testing.assert_allclose(tt_dense(tensor_train(t, full_tt(shape))), t, **close(dtype))


def test_a_planted_tensor_train_is_found():
    planted = tt_dense([matrix(s, i) for i, s in enumerate([(1, 4, 2), (2, 5, 3), (3, 6, 1)])])
    np.testing.assert_allclose(tt_dense(tensor_train(planted, (2, 3))), planted, atol=1e-12)


# ------------------------------------------------------------------ what arrays are refused


W, T = np.ones((7, 5)), np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    "f, arguments, word",
    [
        (truncated_svd, (W, 6), "from 1 to 5"),
        (weighted_svd, (W, np.eye(5), 0), "from 1 to 5"),
        (rank_for_energy, (W, 1.1), "energy"),
        (rank_for_energy, (W, 0), "energy"),
        (tucker, (T, (1, 2)), "ranks"),
        (hosvd, (T, (1, 2, 5)), "ranks"),
        (LowRankLinear, (W, W), "left, right, bias"),
        (LowRankLinear, (W, W.T, np.ones(5)), "left, right, bias"),
    ],
)
def test_what_does_not_fit_is_refused(f, arguments, word):
    with pytest.raises(ValueError, match=word):
        f(*arguments)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 6)])
@pytest.mark.parametrize("size", [0.0, 1e-310, 1e-30, 1e150])
def test_everything_is_finite_for_tiny_matrices_and_numbers_of_any_size(shape, size):
    w = size * matrix(shape)
    d = shape[1]
    for gram in (np.zeros((d, d)), np.ones((d, d)), moments(d, rows=1), 1e-200 * moments(d)):
        np.testing.assert_allclose(
            np.matmul(*weighted_svd(w, gram, min(shape))), w, rtol=1e-9, atol=1e-12 * size
        )
    np.testing.assert_allclose(np.matmul(*truncated_svd(w, min(shape))), w, rtol=1e-9)
    assert 1 <= rank_for_energy(w, 0.9) <= min(shape)
    assert np.isfinite(tucker(w, (1, 1)).dense()).all()
    assert np.isfinite(tt_dense(tensor_train(w, (1,)))).all()


def test_sizes_near_32_bits_do_not_overflow():
    shape = np.array([2**30, 2**30], np.int32)
    assert rank_for_budget(shape, 2**40) == 2**9


# ------------------------------------------------------------------ two thin layers for one


@both
def test_a_low_rank_layer_is_its_product(dtype):
    left, right = truncated_svd(matrix((6, 5), dtype=dtype), 2)
    bias = matrix(6, 1, dtype)
    layer = LowRankLinear(left, right, bias)
    x = matrix((3, 4, 5), 2, dtype)
    y = layer(Tensor(x))
    assert y.dtype == layer.dense().dtype == dtype
    np.testing.assert_allclose(y.data, x @ (left @ right).T + bias, **close(dtype))
    assert (layer.d_in, layer.d_out, count(layer, quiet=True).total) == (5, 6, 2 * (5 + 6) + 6)
    assert repr(layer) == "LowRankLinear(5 -> 2 -> 6)"
    assert repr(LowRankLinear(left, right)) == "LowRankLinear(5 -> 2 -> 6, no bias)"


def test_gradients_of_a_low_rank_layer_agree_with_differences():
    layer = LowRankLinear(*truncated_svd(matrix((6, 5)), 2), matrix(6, 1))

    def f(x, left, right, bias):
        layer.left, layer.right, layer.bias = left, right, bias
        return layer(x)

    check_vjp(f, matrix((3, 5), 2), layer.left.data, layer.right.data, layer.bias.data)


@pytest.mark.parametrize(
    "recipe", [lambda m: low_rank(m, 2), lambda m: tucker_layers(m, (3, 3, 3))]
)
def test_a_bypass_goes_on_top_and_merges_into_a_plain_layer(recipe):
    model = lora(recipe(small()), r=1, rng=rng())
    for name, p in model.trainable().items():
        assert name.endswith((".A", ".B"))
        p.data[...] = matrix(p.shape)
    wanted = logits(model)
    merge(model)
    assert type(model.blocks[0].attn.q) is Linear
    assert isinstance(model.blocks[0].attn.k, (LowRankLinear, TuckerLinear))
    np.testing.assert_allclose(logits(model), wanted, atol=1e-12)


def test_to_observe_takes_little_more_memory_than_what_it_returns():
    model = small(n_embd=64)
    observe(model, IDS)  # whatever is allocated once is allocated now
    tracemalloc.start()
    try:
        returned = sum(gram.nbytes for gram in observe(model, IDS).values())
        assert tracemalloc.get_traced_memory()[1] < 1.5 * returned  # two sets would be 2
    finally:
        tracemalloc.stop()


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_at_full_rank_the_model_is_the_base(dtype, weighted):
    model = small(dtype)
    wanted, grams = logits(model), observe(model, IDS)
    assert low_rank(model, 8, grams=grams if weighted else None) is model
    found = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert len(found) == 12 and {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    np.testing.assert_allclose(logits(model), wanted, **close(dtype))


@law
@given(st.integers(1, 8))
def test_parameters_are_counted(r):
    model = small()
    before = count(model, quiet=True).total
    low_rank(model, r, "blocks.*.attn.[qv]")
    assert count(model, quiet=True).total == before - 4 * (64 - r * 16)


def test_low_rank_takes_each_layer_at_its_own_rank():
    model, base = small(), small()
    low_rank(model, {"blocks.0.attn.q": 3, "blocks.*.attn.q": 0.6, "blocks.1.mlp.up": 1.0})
    ranks = {n: m.left.shape[1] for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    q = base.blocks[1].attn.q.weight.data
    wanted = {"blocks.0.attn.q": 3, "blocks.1.attn.q": rank_for_energy(q, 0.6)}
    assert ranks == wanted | {"blocks.1.mlp.up": 8}


def test_blocks_in_turn_are_each_cut_for_what_the_cut_ones_before_make():
    model, loop = low_rank(small(), 2, in_turn=IDS), small()
    for name in ("blocks.0.*", "blocks.1.*"):
        low_rank(loop, 2, name, grams=observe(loop, IDS, name))
    at_once = low_rank(small(), 2, grams=observe(small(), IDS))
    for i in (0, 1):
        got, wanted, other = (m.blocks[i].mlp.up.dense() for m in (model, loop, at_once))
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
        assert (i == 0) == np.allclose(got, other, rtol=1e-9, atol=1e-12)


def test_with_grams_the_outputs_decide():
    name, grams = "blocks.0.mlp.down", observe(small(), IDS)
    gram, w = grams[name], small().blocks[0].mlp.down.dense()
    by_rank = low_rank(small(), 3, name, grams=grams).blocks[0].mlp.down
    np.testing.assert_array_equal(by_rank.dense(), np.matmul(*weighted_svd(w, gram, 3)))
    by_energy = low_rank(small(), 0.99, name, grams=grams).blocks[0].mlp.down
    r, one_percent = by_energy.left.shape[1], 0.01 * harm(w, 0, gram)
    assert 1 < r < rank_for_energy(w, 0.99)
    assert harm(w, by_energy.dense(), gram) < 1.001 * one_percent
    assert harm(w, np.matmul(*weighted_svd(w, gram, r - 1)), gram) > 0.999 * one_percent


def test_what_trained_goes_on_training_and_nothing_is_shared_with_the_old_layer():
    model = small()
    freeze(model, ["blocks.0.*", "blocks.1.attn.k.weight"])
    old = model.blocks[1].attn.k.bias
    low_rank(model, 2, "blocks.*.attn.k")
    own = [n for n in model.trainable() if "attn.k" in n]
    assert own == ["blocks.1.attn.k.bias"]
    assert not np.shares_memory(model.blocks[1].attn.k.bias.data, old.data)
    low_rank(model, 2, "blocks.1.attn.q")
    assert {f"blocks.1.attn.q.{p}" for p in ("left", "right", "bias")} <= model.trainable().keys()


def test_a_layer_without_a_bias_gets_none():
    model = low_rank(small(), 3, "head")
    assert model.head.bias is None and model.head.left.shape == (7, 3)


@pytest.mark.parametrize(
    "recipe", [lambda m: low_rank(m, 2), lambda m: tucker_layers(m, (3, 3, 3))]
)
def test_fine_tuning_lowers_the_loss(recipe):
    model = recipe(small())
    model.head.weight.data *= 20  # it starts near zero, and then the blocks hardly matter
    factors = [n for n in model.trainable() if n.endswith(("left", "right", "mix", "core"))]
    unfreeze(freeze(model), factors)
    before = {n: p.data.copy() for n, p in model.named_parameters()}
    history = fit(model, lambda g: (IDS, IDS), steps=30, lr=2e-2, progress=False)
    assert history.loss[-1] < 0.7 * history.loss[0]
    for name, p in model.named_parameters():
        assert (p.data != before[name]).any() == (name in factors)


# ------------------------------------------------------------------ many layers, one core


def shared(n=3, d_out=6, d_in=5, ranks=(2, 3, 4)):
    """n layers by way of a list that is a model of its own."""
    model = small()
    model.blocks = [Linear(d_in, d_out, rng=rng(i), dtype=np.float64) for i in range(n)]
    for i, layer in enumerate(model.blocks):
        layer.bias.data[...] = matrix(d_out, i)
    stack = np.stack([layer.weight.data for layer in model.blocks])
    return tucker_layers(model, ranks, "blocks.*").blocks, stack


def test_the_layers_are_the_slices_of_the_tucker_form():
    layers, stack = shared()
    wanted = tucker(stack, (2, 3, 4)).dense()
    x = matrix((2, 4, 5), 7)
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(layer.dense(), wanted[i], atol=1e-12)
        y = layer(Tensor(x)).data
        np.testing.assert_allclose(y, x @ wanted[i].T + matrix(6, i), atol=1e-12)
        assert (layer.d_in, layer.d_out) == (5, 6)
    assert repr(layers[1]) == "TuckerLinear(5 -> 4 -> 3 -> 6, 1 of 3 that share)"


def test_gradients_of_a_tucker_layer_agree_with_differences():
    layer = shared()[0][1]
    names = ("mix", "core", "left", "right", "bias")

    def f(x, *parts):
        vars(layer).update(zip(names, parts, strict=True))
        return layer(x)

    check_vjp(f, matrix((3, 5), 2), *(getattr(layer, name).data for name in names))


def test_every_layer_that_shares_adds_to_the_gradient():
    layers, _ = shared()
    x = Tensor(matrix((4, 5)))
    alone = []
    for layer in layers:
        layers[0].core.grad = None
        layer(x).sum().backward()
        alone.append(layers[0].core.grad)
    layers[0].core.grad = None
    (layers[0](x) + layers[1](x) + layers[2](x)).sum().backward()
    np.testing.assert_allclose(layers[2].core.grad, alone[0] + alone[1] + alone[2], atol=1e-12)


@both
def test_at_full_ranks_tucker_layers_are_the_base(dtype):
    model = small(dtype)
    wanted = logits(model)
    assert tucker_layers(model, (8, 8, 8)) is model
    names = [n for n, m in model.named_modules() if isinstance(m, TuckerLinear)]
    assert names == ATTENTION and {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    np.testing.assert_allclose(logits(model), wanted, **close(dtype))


@law
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_what_is_shared_counts_once(r1, r2, r3):
    model = small()
    before = count(model, quiet=True).total
    tucker_layers(model, (r1, r2, r3))
    factors = 8 * r1 + r1 * r2 * r3 + 8 * r2 + 8 * r3
    assert count(model, quiet=True).total == before - 8 * 64 + factors
    shared = [
        n for n, _ in model.named_parameters() if n.endswith(("mix", "core", "left", "right"))
    ]
    assert shared == [f"blocks.0.attn.q.{part}" for part in ("mix", "core", "left", "right")]


def test_frozen_weights_stay_frozen_and_biases_go_on_as_they_were():
    model = freeze(small(), "blocks.*.weight")
    before = {n for n in model.trainable() if "attn" in n}
    tucker_layers(model, (2, 2, 2))
    assert {n for n in model.trainable() if "attn" in n} == before
    assert {n.rpartition(".")[2] for n in before} == {"bias"}


# ------------------------------------------------------------------ refusals leave the model alone


def broken(model):
    model.blocks[1].mlp.down.weight.data[2, 3] = np.nan


def twice(model):
    model.blocks[1].attn.q = model.blocks[0].attn.q


def lowered(model):
    low_rank(model, 2, "blocks.1.attn.v")


def half_frozen(model):
    freeze(model, "blocks.0.*")


def adapted(model):
    lora(model, rng=rng())


rank, three = {"r": 2}, {"ranks": (2, 2, 2)}
BAD_MODELS = [
    (None, {"r": 9}, ValueError, "from 1 to 8"),
    (None, {"r": "4"}, ValueError, "'4'"),
    (None, {"r": 2.0}, ValueError, "energy"),
    (None, {"r": {"blocks.*": 2, "head": 8}}, ValueError, "from 1 to 7"),
    (None, rank | {"targets": "tokens"}, LookupError, "right kind"),
    (None, rank | {"grams": {}}, KeyError, "blocks.0.attn.q"),
    (broken, rank, ValueError, "blocks.1.mlp.down"),
    (twice, rank, ValueError, "tied"),
    (lowered, rank, TypeError, "blocks.1.attn.v"),
    (adapted, rank, ValueError, "adapter"),
    (None, {"ranks": (9, 2, 2)}, ValueError, "ranks"),
    (None, three | {"targets": "blocks.0.*"}, ValueError, "shape"),
    (half_frozen, three, ValueError, "frozen"),
    (adapted, three, ValueError, "adapter"),
]


@pytest.mark.parametrize("harmed, settings, error, word", BAD_MODELS)
def test_a_bad_recipe_is_refused_and_the_model_left_as_it_was(harmed, settings, error, word):
    model = small()
    if harmed:
        harmed(model)
    before = untouched(model)
    with pytest.raises(error, match=word):
        (low_rank if "r" in settings else tucker_layers)(model, **settings)
    assert untouched(model) == before


def test_what_is_put_in_takes_the_training_mode():
    model = tucker_layers(low_rank(small().train(), 2, "*.mlp.*"), (2, 2, 2))
    assert all(module.training for _, module in model.named_modules())
