"""The invariants that the lessons rest on, for all shapes where a law holds for all shapes."""

import tracemalloc
import weakref

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import (
    AdamW,
    Linear,
    LoRA,
    Tensor,
    Transformer,
    check_vjp,
    count,
    detached,
    evaluate,
    fit,
    freeze,
    full,
    load_base,
    load_eval,
    lora,
    merge,
    ops,
    tasks,
    unfreeze,
)
from minilora.peft import LoRAEmbedding
from minilora.surgery import wrappers

law = settings(max_examples=40)  # the rest of the profile is in plugin.py
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)

IDS = tasks.sample(list(tasks.TASKS), 8, np.random.default_rng(9))
TARGETS = ["blocks.*.attn.[qv]", "blocks.*", "*"]
targets = pytest.mark.parametrize("targets", TARGETS)


def small(dtype=np.float64, **changes):
    sizes = {"vocab_size": tasks.VOCAB_SIZE, "n_positions": 17, "n_embd": 16, "n_head": 2}
    return Transformer(**sizes | changes, rng=np.random.default_rng(0), dtype=dtype)


def low_rank(model, targets="blocks.*", r=2, **settings):
    return lora(model, r=r, targets=targets, rng=np.random.default_rng(1), **settings)


def loss_of(model):
    inputs, targets = tasks.inputs_and_targets(IDS)
    return ops.cross_entropy(model(inputs), targets)


def train(model, steps=5, **settings):
    return fit(model, "sort", steps=steps, lr=1e-2, progress=False, **settings)


# ------------------------------------------------------------------ the start of LoRA


@both
@targets
@pytest.mark.parametrize("rslora", [False, True])
def test_a_fresh_lora_is_the_base_bit_for_bit(targets, dtype, rslora):
    model = small(dtype)
    wanted = model(IDS[:, :-1]).data
    low_rank(model, targets, rslora=rslora)
    np.testing.assert_array_equal(model(IDS[:, :-1]).data, wanted)
    np.testing.assert_array_equal(merge(model)(IDS[:, :-1]).data, wanted)


@targets
def test_at_step_0_the_side_that_is_zero_learns_and_the_other_waits(targets):
    model = low_rank(small(), targets)
    loss_of(model).backward()
    for wrapper in wrappers(model).values():
        zero, other = wrapper.B, wrapper.A
        if isinstance(wrapper, LoRAEmbedding):
            zero, other = other, zero
        assert not zero.data.any() and other.data.all()
        assert zero.grad.any() and not other.grad.any()


def test_from_step_1_both_sides_learn():
    model = low_rank(small())
    train(model, steps=1)
    loss_of(model).backward()
    for wrapper in wrappers(model).values():
        assert wrapper.A.grad.any() and wrapper.B.grad.any()


def test_with_both_sides_zero_there_is_never_a_gradient():
    model = low_rank(small())
    for wrapper in wrappers(model).values():
        wrapper.A.data[:] = 0
    train(model)
    loss_of(model).backward()
    for wrapper in wrappers(model).values():
        for p in (wrapper.A, wrapper.B):
            assert not p.data.any() and not p.grad.any()


# ------------------------------------------------------------------ merging


@law
@given(d_in=sizes, d_out=sizes, n=sizes, alpha=st.floats(0.1, 64), data=st.data(), seed=seeds)
@both
def test_merged_equals_bypassed(d_in, d_out, n, alpha, data, seed, dtype):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    rng = np.random.default_rng(seed)
    layer = LoRA(Linear(d_in, d_out, rng=rng, dtype=dtype), r, alpha, rng=rng)
    layer.B.data[...] = rng.standard_normal((d_out, r))
    x = rng.standard_normal((n, d_in)).astype(dtype)
    merged, bypassed = layer.merged()(Tensor(x)).data, layer(Tensor(x)).data
    assert merged.dtype == bypassed.dtype == dtype
    w, a, b = (np.abs(m) for m in (layer.base.weight.data, layer.A.data, layer.B.data))
    most = (np.abs(x) @ (w + layer.scaling * b @ a).T).max()  # of the sums of absolute terms
    rounding = 1e-12 if dtype == np.float64 else 2 * (d_in + r + 4) * np.finfo(dtype).eps
    assert np.abs(merged - bypassed).max() <= rounding * max(1, most)


@targets
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_a_merged_model_equals_the_trained_one(targets, dtype, tol):
    model = low_rank(small(dtype), targets)
    bare = model(IDS[:, :-1]).data
    train(model, steps=10)
    trained = model(IDS[:, :-1]).data
    merged = merge(model)(IDS[:, :-1]).data
    np.testing.assert_allclose(merged, trained, rtol=tol, atol=tol)
    assert np.abs(trained - bare).max() > 1e-2  # the bypass does something


@law
@given(d_in=sizes, d_out=sizes, data=st.data(), seed=seeds)
def test_the_rank_of_an_update_is_at_most_r(d_in, d_out, data, seed):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    rng = np.random.default_rng(seed)
    layer = LoRA(Linear(d_in, d_out, rng=rng, dtype=np.float64), r, rng=rng)
    layer.B.data[...] = rng.standard_normal((d_out, r))
    assert np.linalg.matrix_rank(layer.delta()) <= r


def test_the_rank_of_a_trained_update_is_r():
    model = low_rank(small(), r=3)
    train(model)
    for name, wrapper in wrappers(model).items():
        s = np.linalg.svd(wrapper.merged().dense() - wrapper.base.dense(), compute_uv=False)
        assert s[3] < 1e-10 * s[0] < 1e-4 * s[2], name


# ------------------------------------------------------------------ freezing


@targets
def test_frozen_weights_are_bit_identical_after_training(targets):
    model = small()
    base = {id(p): p.data.copy() for p in model.parameters()}
    low_rank(model, targets)
    start = {name: p.data.copy() for name, p in model.trainable().items()}
    train(model, weight_decay=0.5)
    for p in model.parameters():
        if id(p) in base:
            np.testing.assert_array_equal(p.data, base.pop(id(p)))
    assert base == {}
    for name, p in model.trainable().items():
        assert (p.data != start[name]).any()
    with detached(model):
        np.testing.assert_array_equal(model(IDS[:, :-1]).data, small()(IDS[:, :-1]).data)


def test_a_frozen_model_makes_no_node():
    model = freeze(small())
    assert model(IDS[:, :-1]).node is None and loss_of(model).node is None


def graph(root):
    """Every node below a tensor."""
    seen, stack = set(), [root.node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.edges]
    return seen


def test_a_frozen_start_makes_no_node():
    model = small(n_layer=3)
    sizes = []
    for frozen in ([], ["tokens*", "positions*"], ["blocks.0.*"], ["blocks.1.*", "blocks.2.*"]):
        for pattern in frozen:
            freeze(model, pattern)
        sizes.append(len(graph(loss_of(model))))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sizes[-1] < 10  # the last norm, the head and the loss


def test_a_frozen_weight_keeps_no_activation():
    w = Tensor(np.ones((3, 2)))
    for trains in (False, True):
        w.requires_grad = trains
        x = Tensor(np.ones((4, 2)), requires_grad=True) * 1
        gone = weakref.ref(x.data)
        y = ops.linear(x, w)
        del x
        assert (gone() is None) == (not trains) and y.requires_grad


def test_the_optimiser_keeps_state_only_for_what_trains():
    model = small()
    assert AdamW(model.parameters()).state_size == 2 * count(model, quiet=True).total
    low_rank(model, "blocks.*.attn.[qv]", r=1)
    assert AdamW(model.parameters()).state_size == 2 * count(model, quiet=True).trainable == 2 * 128


def test_only_what_trains_has_a_gradient():
    model = low_rank(small(), TARGETS[0])
    loss_of(model).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.trainable())


def retained(model):
    """Bytes that the graph of a loss keeps until `backward`, and bytes that are left after it."""
    loss_of(model)  # whatever is allocated once is allocated now
    tracemalloc.start()
    try:
        loss = loss_of(model)
        held = tracemalloc.get_traced_memory()[0]
        loss.backward()
        model.zero_grad()
        return held, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_lora_retains_a_smaller_graph_than_full_fine_tuning_and_backward_frees_it():
    held_full, left_full = retained(full(small(n_embd=32)))
    held_lora, left_lora = retained(low_rank(small(n_embd=32), TARGETS[0]))
    assert held_lora < 0.9 * held_full
    assert left_full < 0.05 * held_full and left_lora < 0.05 * held_lora
    held_none, _ = retained(unfreeze(freeze(small(n_embd=32)), "head.weight"))
    assert held_none < 0.1 * held_full


# ------------------------------------------------------------------ matrix products


def gemms(model):
    """How many matrix products forward and backward take, and their FLOPs."""
    with ops.count_gemms() as ahead:
        loss = loss_of(model)
    with ops.count_gemms() as back:
        if loss.requires_grad:
            loss.backward()
    flops = [sum(2 * b * m * k * n for b, m, k, n in log) for log in (ahead, back)]
    return len(ahead), len(back), *flops


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gemms_are_counted(layers):
    # Forward: q, k, v, o, up, down and two for attention in each block, and the head.
    # Backward: two for each of them.
    plain = 8 * layers + 1
    model = small(n_layer=layers)
    n, back, flops, back_flops = gemms(model)
    assert (n, back) == (plain, 2 * plain)
    assert back_flops == 2 * flops

    assert gemms(freeze(model)) == (plain, 0, flops, 0)

    # LoRA on q and v: two more forward a layer. Backward, in the first block: A's own gradient
    # and two for B, on q and v; three in attention, where k is frozen; one each to pass o, up
    # and down. In a later block two more each on q and v, to pass A and W; one to pass k; one
    # more in attention. One to pass the head.
    low_rank(model, TARGETS[0])
    n, back, _, _ = gemms(model)
    assert n == plain + 2 * 2 * layers
    assert back == (2 * 3 + 3 + 3) + (layers - 1) * (2 * 5 + 1 + 4 + 3) + 1

    merge(model)
    assert gemms(model) == (plain, 0, flops, 0)


@targets
def test_lora_adds_two_products_a_layer_and_one_a_table(targets):
    plain, *_ = gemms(small())
    model = low_rank(small(), targets)
    kinds = [isinstance(w, LoRAEmbedding) for w in wrappers(model).values()]
    assert gemms(model)[0] == plain + sum(1 if table else 2 for table in kinds)
    assert gemms(merge(model))[0] == plain


def test_depth_decides_what_backward_costs_and_not_the_count_of_parameters():
    first, last = (low_rank(small(n_layer=4), f"blocks.{i}.*") for i in (0, 3))
    assert count(first, quiet=True).trainable == count(last, quiet=True).trainable
    assert gemms(first)[3] > 3 * gemms(last)[3]


# ------------------------------------------------------------------ the engine


def test_fan_out_adds_up():
    x = Tensor([3.0], requires_grad=True)
    (x * x).backward()
    assert x.grad == 6
    x.grad = None
    y = x * x
    (y * y + y * x + x).backward()  # 4x³ + 3x² + 1
    assert x.grad == 4 * 27 + 3 * 9 + 1


def test_a_chain_of_5000_operations():
    x = Tensor([1.0], requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.0001 + x
    y.backward()
    assert x.grad == pytest.approx(1.0001**5000 + sum(1.0001**i for i in range(5000)), rel=1e-10)


def test_a_second_backward_is_a_clear_error():
    x = Tensor([3.0], requires_grad=True)
    y = x * x
    y.backward()
    with pytest.raises(RuntimeError, match="freed by an earlier backward; run the forward pass"):
        y.backward()
    assert x.grad == 6


def test_a_vjp_that_returns_a_view_corrupts_nothing():
    a, b = (Tensor(np.ones((2, 3)), requires_grad=True) for _ in "ab")
    for times in (1, 2):  # the gradient of a + b is one array for both, and again for both
        (a + b + 2 * a).sum().backward()
        assert (a.grad == 3 * times).all() and (b.grad == times).all()
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    y = x * 1
    flat, turned = y.reshape(6), y.T
    (flat.sum() + (turned * 10).sum() + (y + y).sum() + y[0].sum()).backward()
    np.testing.assert_array_equal(x.grad, [[14] * 3, [13] * 3])


@law
@given(shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3), seed=seeds)
@pytest.mark.parametrize("op", [ops.add, ops.mul, lambda a, b: a - b], ids=["add", "mul", "sub"])
def test_gradients_of_whatever_broadcasts(op, shapes, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in shapes.input_shapes]
    check_vjp(op, *arrays, trials=1, tol=1e-5)
    assert op(*map(Tensor, arrays)).shape == shapes.result_shape


@law
@given(batch=hnp.array_shapes(min_dims=0, max_dims=2, max_side=3), d_in=sizes, d_out=sizes)
def test_linear_is_a_matmul_and_a_sum(batch, d_in, d_out):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in [(*batch, 1, d_in), (d_out, d_in), (d_out,)]]
    x, w, b = (Tensor(a, requires_grad=True) for a in arrays)
    y = ops.linear(x, w, b)
    y.backward(np.ones(y.shape))
    x2, w2, b2 = (Tensor(a, requires_grad=True) for a in arrays)
    y2 = x2 @ w2.T + b2
    y2.backward(np.ones(y2.shape))
    for got, wanted in [(y.data, y2.data), (x.grad, x2.grad), (w.grad, w2.grad), (b.grad, b2.grad)]:
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@law
@given(shape=hnp.array_shapes(max_dims=3, max_side=6), shift=st.floats(-1e3, 1e3), seed=seeds)
@both
def test_softmax_sums_to_one_and_takes_no_notice_of_a_shift(shape, shift, seed, dtype):
    z = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    p = ops.softmax(Tensor(z)).data
    tol = 1e-10 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(ops.softmax(Tensor(z + dtype(shift))).data, p, rtol=tol)


@law
@given(
    n=sizes, d=st.integers(2, 9), scale=st.floats(0.5, 100), shift=st.floats(-10, 10), seed=seeds
)
def test_layer_norm_takes_no_notice_of_shift_and_scale(n, d, scale, shift, seed):
    x = np.random.default_rng(seed).standard_normal((n, d))
    one, zero = Tensor(np.ones(d)), Tensor(np.zeros(d))
    y = ops.layer_norm(Tensor(x), one, zero, eps=0.0).data
    moved = ops.layer_norm(Tensor(x * scale + shift), one, zero, eps=0.0).data
    np.testing.assert_allclose(moved, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((y * y).mean(-1), 1, rtol=1e-9)


@law
@given(t=st.integers(1, 5), extra=st.integers(0, 3), d=sizes, data=st.data(), seed=seeds)
def test_attention_looks_at_no_key_that_comes_later(t, extra, d, data, seed):
    rng = np.random.default_rng(seed)
    s = t + extra
    q, k, v = (rng.standard_normal((n, d)) for n in (t, s, s))
    before = ops.attention(Tensor(q), Tensor(k), Tensor(v)).data
    later = data.draw(st.integers(0, s - 1))
    k[later], v[later] = rng.standard_normal((2, d))
    after = ops.attention(Tensor(q), Tensor(k), Tensor(v)).data
    blind = max(0, later - extra)  # query i sees key j if j ≤ i + s - t
    np.testing.assert_array_equal(after[:blind], before[:blind])
    assert (after[blind:] != before[blind:]).any(axis=1).all()


@law
@given(n=sizes, v=st.integers(2, 9), ignored=st.integers(1, 9), seed=seeds)
def test_targets_that_are_ignored_change_nothing(n, v, ignored, seed):
    rng = np.random.default_rng(seed)
    z, targets = rng.standard_normal((n + ignored, v)), rng.integers(v, size=n + ignored)
    targets[n:] = -100
    order = rng.permutation(n + ignored)
    some = ops.cross_entropy(Tensor(z[order]), targets[order]).item()
    assert some == pytest.approx(ops.cross_entropy(Tensor(z[:n]), targets[:n]).item(), rel=1e-12)


# ------------------------------------------------------------------ and it learns

HARD = "sort_descending"


def tuned(recipe, lr, seed):
    """The share of trainable parameters, and the exact match after 400 steps."""
    model = load_base(np.float32)
    frozen = {name: p.data.copy() for name, p in model.named_parameters()}
    recipe(model)
    share = count(model, quiet=True).trainable / sum(a.size for a in frozen.values())
    fit(model, HARD, steps=400, lr=lr, seed=seed, progress=False)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            np.testing.assert_array_equal(p.data, frozen[name.replace(".base.", ".")])
    return share, evaluate(model, load_eval(HARD)).exact_match


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=pytest.mark.slow),
        *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2)),
    ],
)
def test_lora_comes_within_ten_points_of_full_fine_tuning_with_a_tenth_of_its_parameters(seed):
    assert evaluate(load_base(), load_eval(HARD)).exact_match == 0  # new to the base
    share, whole = tuned(full, 2e-3, seed)
    assert share == 1 and whole > 0.8
    rng = np.random.default_rng(seed)
    share, low = tuned(lambda m: lora(m, r=4, targets="blocks.*", rng=rng), 2e-2, seed)
    assert share < 0.1
    assert low > whole - 0.10, f"seed {seed}: full {whole:.1%}, LoRA {low:.1%}"
