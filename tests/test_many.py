"""Many adapters on one base: sums that are right, and a batch in which each sample has its own."""

import numpy as np
import pytest

from minilora import (
    DoRA,
    Transformer,
    attach,
    count,
    detach,
    lora,
    merge,
    no_grad,
    save_adapter,
)
from minilora.peft import Many, choose, combine, many
from minilora.surgery import wrappers

IDS = np.random.default_rng(9).integers(7, size=(6, 5))
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def small(dtype=np.float64):
    return Transformer(
        vocab_size=7,
        n_positions=5,
        n_embd=8,
        n_head=2,
        n_layer=2,
        rng=np.random.default_rng(0),
        dtype=dtype,
    )


def made(model, r, seed, targets="blocks.*", **settings):
    """An adapter that does something, taken off its model."""
    rng = np.random.default_rng(seed)
    lora(model, r, targets=targets, rng=rng, **settings)
    for p in model.trainable().values():
        p.data[...] = 0.3 * rng.standard_normal(p.shape)
    return detach(model)


def three(model):
    return {
        "a": made(model, 2, 1, alpha=3.0),
        "b": made(model, 3, 2, rslora=True),
        "c": made(model, 1, 3, targets="blocks.1.attn.[qv]"),
    }


def logits(model, ids=IDS):
    with no_grad():
        return model(ids).data


def through(model, adapter, ids):
    attach(model, adapter)
    out = logits(model, ids)
    detach(model)
    return out


# ------------------------------------------------------------------ sums


@both
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.0)])
def test_a_sum_of_adapters_is_the_sum_of_their_updates(dtype, weights):
    model = small(dtype)
    parts = three(model).values()
    summed = combine(parts, weights)
    assert summed.keys() == {name for part in parts for name in part}
    for name, wrapper in summed.items():
        wanted = sum(w * p[name].delta() for w, p in zip(weights, parts, strict=True) if name in p)
        assert wrapper.delta().dtype == dtype and wrapper.scaling == 1
        tolerance = 1e-12 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(wrapper.delta(), wanted, atol=tolerance)


def test_adding_the_factors_instead_is_wrong():
    model = small()
    a, b = made(model, 2, 1), made(model, 2, 2)
    name = "blocks.0.attn.q"
    wrong = a[name].scaling * (a[name].B.data + b[name].B.data) @ (a[name].A.data + b[name].A.data)
    right = combine([a, b], [1, 1])[name].delta()
    assert np.linalg.norm(wrong - right) > 0.5 * np.linalg.norm(right)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_a_sum_is_cut_to_a_rank_as_well_as_can_be(r):
    model = small()
    parts = [made(model, 2, 1), made(model, 3, 2)]
    for name, wrapper in combine(parts, [1, 0.5], r=r).items():
        whole = parts[0][name].delta() + 0.5 * parts[1][name].delta()
        tail = np.linalg.svd(whole, compute_uv=False)[r:]
        assert wrapper.r == r
        error = np.linalg.norm(wrapper.delta() - whole)
        assert error == pytest.approx(np.sqrt((tail**2).sum()), abs=1e-12)


def test_ranks_that_add_up_to_more_than_the_layer_has_are_cut_without_loss():
    model = small()
    parts = [made(model, 8, 1), made(model, 8, 2)]
    for name, wrapper in combine(parts, [1, 1]).items():
        assert wrapper.r == 8
        np.testing.assert_allclose(
            wrapper.delta(), parts[0][name].delta() + parts[1][name].delta(), atol=1e-11
        )


def test_a_sum_is_an_adapter_like_any_other(tmp_path):
    model = small()
    parts = [made(model, 1, 1), made(model, 2, 2)]
    attach(model, combine(parts, [1, 1]))
    before = logits(model)
    assert count(model, quiet=True).trainable == 3 * 2 * (4 * 16 + 2 * 40)
    save_adapter(model, tmp_path / "sum.safetensors")
    np.testing.assert_allclose(logits(merge(model)), before, atol=1e-12)


@pytest.mark.parametrize(
    "weights, r, message",
    [
        ([1], None, "argument 2"),
        ([1, 1], 0, "r is 0"),
    ],
)
def test_sums_that_make_no_sense_are_refused(weights, r, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        combine([made(model, 1, 1), made(model, 2, 2)], weights, r)


def test_adapters_of_other_bases_or_kinds_are_refused():
    model, other = small(), small()
    with pytest.raises(ValueError, match="two different layers"):
        combine([made(model, 1, 1), made(other, 1, 2)], [1, 1])
    with pytest.raises(LookupError):
        many(model, {})
    with pytest.raises(TypeError, match="is a DoRA"):
        combine([made(model, 1, 1, variant=DoRA)], [1])


# ------------------------------------------------------------------ one batch


@both
def test_each_sample_goes_through_its_own_adapter(dtype):
    model = small(dtype)
    adapters = three(model)
    names = ["b", None, "a", "c", "a", "b"]
    alone = {None: logits(model)} | {n: through(model, a, IDS) for n, a in adapters.items()}
    wanted = np.stack([alone[name][i] for i, name in enumerate(names)])
    many(model, adapters)
    with choose(model, names):
        got = logits(model)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, atol=1e-12 if dtype == np.float64 else 1e-5)
    assert np.abs(wanted - alone[None]).max() > 0.01
    np.testing.assert_array_equal(logits_after_detach(model), alone[None])


def logits_after_detach(model):
    detach(model)
    return logits(model)


def test_a_batch_needs_a_name_for_each_sample():
    model = small()
    many(model, three(model))
    with pytest.raises(ValueError, match="a batch of 6"):
        model(IDS)
    with choose(model, ["a"]), pytest.raises(ValueError, match="a batch of 6"):
        model(IDS)
    with pytest.raises(ValueError, match="'d'"):
        choose(model, ["d"]).__enter__()
    with pytest.raises(ValueError, match="a batch of 6"):  # the choice has ended
        model(IDS)


def test_choices_nest():
    model = small()
    many(model, three(model))
    with choose(model, ["a"] * 6):
        outer = logits(model)
        with choose(model, [None] * 6):
            inner = logits(model)
            with pytest.raises(KeyError), choose(model, ["b"] * 6):
                raise KeyError
            np.testing.assert_array_equal(logits(model), inner)
        np.testing.assert_array_equal(logits(model), outer)
    assert np.abs(inner - outer).max() > 0.01


def test_a_sum_can_learn_in_every_direction():
    model = small()
    total = combine([made(model, 2, 1), made(model, 2, 2)], [1, 0])
    for wrapper in total.values():  # rank 2, in factors of rank 4
        assert wrapper.r == 4
        assert np.count_nonzero(np.linalg.norm(wrapper.B.data, axis=0) > 1e-6) == 2
        assert (np.linalg.norm(wrapper.A.data, axis=1) > 1e-2).all()


def test_what_cannot_be_done_with_many_is_refused_and_changes_nothing():
    model, other = small(), small()
    adapters = three(model)
    with pytest.raises(LookupError, match="not the one"):
        many(other, adapters)
    assert not wrappers(other)
    with pytest.raises(ValueError, match="does not carry several"):
        choose(model, ["a"]).__enter__()
    many(model, adapters)
    assert all(type(w) is Many for w in wrappers(model).values())
    with pytest.raises(ValueError, match="carries an adapter"):
        many(model, adapters)
    with pytest.raises(TypeError, match="attach one of them"):
        merge(model)
