"""The Transformer against a plain NumPy one, its count, its causality, its greedy generation."""

import numpy as np
import pytest

from minilora import (
    Attention,
    Block,
    Tensor,
    Transformer,
    attend,
    check_vjp,
    count,
    generate,
    no_grad,
    ops,
)

SMALL = {"vocab_size": 11, "n_positions": 7, "n_embd": 12, "n_head": 3, "n_layer": 2}
IDS = np.random.default_rng(9).integers(11, size=(4, 7))


def small(dtype=np.float64, seed=0, noise=True, **changes):
    """A small model; `noise` moves all weights off their start, so that each one matters."""
    rng = np.random.default_rng(seed)
    model = Transformer(**SMALL | changes, rng=rng, dtype=dtype)
    if noise:
        for p in model.parameters():
            p.data += (0.3 * rng.standard_normal(p.shape)).astype(dtype)
    return model


def plain(model, ids):
    """The same computation in NumPy, one head at a time."""
    w = {name: p.data for name, p in model.named_parameters()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    t = ids.shape[1]
    x = w["tokens.weight"][ids] + w["positions.weight"][:t]
    for i in range(model.config["n_layer"]):
        h, heads = norm(x, f"blocks.{i}.norm1"), []
        q, k, v = (linear(h, f"blocks.{i}.attn.{n}") for n in "qkv")
        size = q.shape[-1] // model.config["n_head"]
        for a in range(0, q.shape[-1], size):
            head = slice(a, a + size)
            scores = q[..., head] @ k[..., head].swapaxes(1, 2) / np.sqrt(size)
            p = np.exp(scores) * np.tril(np.ones((t, t)))
            heads.append(p / p.sum(-1, keepdims=True) @ v[..., head])
        x = x + linear(np.concatenate(heads, -1), f"blocks.{i}.attn.o")
        u = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up")
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"blocks.{i}.mlp.down")
    head = w.get("head.weight", w["tokens.weight"])
    return norm(x, "norm") @ head.T


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_formula(tied):
    model = small(tied=tied)
    for t in (1, 4, 7):
        np.testing.assert_allclose(model(IDS[:, :t]).data, plain(model, IDS[:, :t]), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_shape(dtype):
    logits = small(dtype)(IDS)
    assert (logits.shape, logits.dtype) == ((4, 7, 11), dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers, d", [(1, 12), (3, 24)])
def test_parameters_are_12dd_plus_13d_a_layer_and_the_rest(layers, d, tied):
    model = small(n_layer=layers, n_embd=d, tied=tied)
    tables = 11 * d + 7 * d
    norm = 2 * d
    head = 0 if tied else 11 * d  # a tied head is counted once
    wanted = layers * (12 * d**2 + 13 * d) + tables + norm + head
    assert count(model, quiet=True).total == wanted


def test_a_tied_head_is_the_token_table_itself():
    model = small(tied=True)
    assert model.head.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tokens.weight" in names and "head.weight" not in names
    before = model(IDS).data
    model.tokens.weight.data *= 2
    assert (model(IDS).data != before).all()


def test_a_tied_weight_gets_both_gradients():
    model = small(tied=True)
    ops.cross_entropy(model(IDS), IDS).backward()
    both = model.tokens.weight.grad
    untied = small()
    for name, p in untied.named_parameters():
        source = (
            model.tokens.weight if name == "head.weight" else dict(model.named_parameters())[name]
        )
        p.data[...] = source.data
    ops.cross_entropy(untied(IDS), IDS).backward()
    wanted = untied.tokens.weight.grad + untied.head.weight.grad
    np.testing.assert_allclose(both, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_later_token_leaves_earlier_logits_bit_identical(dtype):
    model = small(dtype)
    before = model(IDS).data
    for t in range(1, 7):
        changed = IDS.copy()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed).data
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_rows_of_a_batch_do_not_mix():
    model = small()
    changed = IDS.copy()
    changed[1] = (changed[1] + 1) % 11
    keep = [0, 2, 3]
    np.testing.assert_array_equal(model(changed).data[keep], model(IDS).data[keep])


def test_generate_is_the_argmax_step_by_step():
    model = small(seed=1)
    prompt = IDS[:, :3]
    got = generate(model, prompt, 4)
    wanted = prompt
    for _ in range(4):
        last = plain(model, wanted)[:, -1]
        gaps = np.diff(np.sort(last)[:, -2:])
        assert gaps.min() > 1e-6  # no tie, so the argmax is safe
        wanted = np.column_stack([wanted, last.argmax(-1)])
    np.testing.assert_array_equal(got, wanted)
    assert np.unique(got[:, 3:]).size > 3  # not one token over and over


def test_generate_leaves_the_prompt_and_records_nothing():
    model = small()
    prompt = IDS[:, :3].copy()
    seen = []
    head = model.head.forward
    model.head.forward = lambda x: seen.append(head(x)) or seen[-1]
    generate(model, prompt.tolist(), 2)
    assert [out.node for out in seen] == [None, None]
    np.testing.assert_array_equal(generate(model, prompt, 0), prompt)


def test_generate_past_the_last_position_is_an_error():
    with pytest.raises(ValueError, match="reads 7"):
        generate(small(), IDS, 4)


def test_the_start_is_seeded_and_tells_all_tokens_alike():
    one, two = small(noise=False), small(noise=False)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
    loss = ops.cross_entropy(one(IDS), IDS).item()
    assert loss == pytest.approx(np.log(11), abs=0.05)


def test_config_rebuilds_the_model():
    model = small(tied=True)
    again = Transformer(**model.config, rng=np.random.default_rng(1))
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    assert [(name, p.shape) for name, p in again.named_parameters()] == shapes


# ------------------------------------------------------------------ the parts


def test_attend_splits_the_width_among_the_heads():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in [(2, 3, 6), (2, 5, 6), (2, 5, 6)])
    got = attend(Tensor(q), Tensor(k), Tensor(v), 2).data
    for head in (slice(0, 3), slice(3, 6)):
        alone = ops.attention(*(Tensor(a[..., head]) for a in (q, k, v))).data
        np.testing.assert_allclose(got[..., head], alone, rtol=1e-13)
    check_vjp(lambda *qkv: attend(*qkv, 2), q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_heads_may_share_keys(causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in [(2, 3, 12), (2, 5, 6), (2, 5, 6)])
    got = attend(Tensor(q), Tensor(k), Tensor(v), 4, causal).data  # 4 heads of 3 over 2
    twice = [np.repeat(a.reshape(2, 5, 2, 3), 2, axis=2).reshape(2, 5, 12) for a in (k, v)]
    wanted = attend(Tensor(q), *map(Tensor, twice), 4, causal).data
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    check_vjp(lambda *qkv: attend(*qkv, 4, causal), q, k, v)


def test_generation_stops_when_every_row_has_had_a_stop():
    model = small()
    ids = np.array([[1, 2], [3, 4]])
    full = generate(model, ids, 5)
    ends = [int(row[3]) for row in full]  # the second new token of each
    got = generate(model, ids, 5, stop=ends)
    assert 3 <= got.shape[1] <= 4 and np.array_equal(got, full[:, : got.shape[1]])
    assert generate(model, ids, 5, stop=[99]).shape == full.shape


def test_attend_without_the_mask_sees_every_key():
    v = np.random.default_rng(0).standard_normal((1, 4, 2))
    zero = Tensor(np.zeros((1, 4, 2)))  # equal scores: the mean of all the values
    got = attend(zero, zero, Tensor(v), 1, causal=False).data
    np.testing.assert_allclose(got, np.broadcast_to(v.mean(1), (1, 4, 2)), rtol=1e-13)


def test_a_block_of_zero_projections_is_the_identity():
    block = Block(12, 3, rng=np.random.default_rng(0), dtype=np.float64)
    block.attn.o.weight.data[:] = block.mlp.down.weight.data[:] = 0
    x = np.random.default_rng(1).standard_normal((2, 5, 12))
    np.testing.assert_array_equal(block(Tensor(x)).data, x)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*1 or more"):
        small(**{name: 0})


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_head is 5; expected a divisor of the width 12"):
        Attention(12, 5, rng=np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(3,), (2, 8), (2, 0), (1, 2, 3)])
def test_ids_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="ids have shape") as error:
        small()(np.zeros(shape, int))
    assert str(shape) in str(error.value)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(IndexError, match="ids run from 0 to 11; expected 0 to 10"):
        small()([[0, 11]])


def test_what_was_read_is_remembered_and_the_tokens_are_those_of_reading_all_again():
    model, ids = small(), IDS[:, :3]
    with no_grad():
        for _ in range(4):
            best = model(ids).data[:, -1].argmax(axis=-1)
            ids = np.concatenate([ids, best[:, None]], axis=1)
    with ops.count_gemms() as log:
        np.testing.assert_array_equal(generate(model, IDS[:, :3], 4), ids)
    assert {rows for batch, rows, _, _ in log if batch == 1} == {3 * len(IDS), len(IDS)}


def test_a_drawn_token_follows_the_softmax_and_top_1_is_greedy():
    model, ids = small(), np.repeat(IDS[:1, :3], 4000, axis=0)
    drawn = generate(model, ids, 1, temperature=0.5, rng=np.random.default_rng(0))[:, -1]
    with no_grad():
        z = model(ids[:1]).data[0, -1] / 0.5
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    share = np.bincount(drawn, minlength=len(p)) / len(ids)
    assert np.abs(share - p).max() < 4 * np.sqrt(0.25 / len(ids))
    first = generate(model, IDS[:, :3], 2)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(
        generate(model, IDS[:, :3], 2, temperature=1.0, top_k=1, rng=rng), first
    )
