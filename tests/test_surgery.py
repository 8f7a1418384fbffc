"""Operations on a model from outside: find by name, replace, freeze, merge, detach, count."""

import numpy as np
import pytest

from minilora import (
    Embedding,
    Linear,
    Module,
    Parameter,
    Transformer,
    Wrapper,
    attach,
    count,
    detach,
    detached,
    freeze,
    lora,
    merge,
    replace,
    unfreeze,
)
from minilora.peft import LoRA
from minilora.surgery import find, plain, put, wear, wrappers

IDS = np.random.default_rng(9).integers(7, size=(2, 5))
RNG = np.random.default_rng(0)


def small(seed=0, **changes):
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return Transformer(**sizes | changes, rng=np.random.default_rng(seed), dtype=np.float64)


def adapted(model, seed=1, **settings):
    """A model with a LoRA that does something: B off its zero."""
    rng = np.random.default_rng(seed)
    lora(model, **{"r": 2, "rng": rng} | settings)
    for wrapper in wrappers(model).values():
        for p in (wrapper.A, wrapper.B):
            p.data[...] = rng.standard_normal(p.shape)
    return model


def state(model):
    """Everything that an operation may change: which module stands where, weights, gradients."""
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, {
        n: (id(p), p.requires_grad, p.data.copy()) for n, p in model.named_parameters()
    }


def assert_unchanged(model, before):
    modules, weights = state(model)
    assert modules == before[0] and weights.keys() == before[1].keys()
    for name, (identity, requires_grad, data) in weights.items():
        assert (identity, requires_grad) == before[1][name][:2]
        np.testing.assert_array_equal(data, before[1][name][2])


class Cushion(Wrapper):
    """Holds its base and can not be merged."""

    why_not_merged = "it is a cushion"

    def __init__(self, base):
        self.base = base

    def forward(self, x):
        return self.base(x)


# ------------------------------------------------------------------ replace


@pytest.mark.parametrize(
    "patterns, wanted",
    [
        ("blocks.0.attn.q", ["blocks.0.attn.q"]),
        ("blocks.*.attn.[qv]", [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in "qv"]),
        ("blocks.1.mlp.*", ["blocks.1.mlp.up", "blocks.1.mlp.down"]),
        (["*.up", "*.0.*.down"], ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.1.mlp.up"]),
        (("head", "*head", "h?ad"), ["head"]),
    ],
)
def test_replace_matches_names_by_patterns(patterns, wanted):
    model = small()
    old = dict(model.named_modules())
    assert replace(model, patterns, Cushion, kind=Linear) == wanted
    new = dict(model.named_modules())
    for name in wanted:
        assert type(new[name]) is Cushion and new[name].base is old[name]
    assert sum(type(m) is Cushion for m in new.values()) == len(wanted)


def test_a_star_crosses_dots_and_kind_filters():
    model = small()
    assert len(replace(model, "blocks.*", lambda m: m, kind=Linear)) == 2 * 6
    assert replace(model, "*", lambda m: m, kind=Embedding) == ["tokens", "positions"]
    assert len(replace(model, "*", lambda m: m, kind=(Linear, Embedding))) == 2 * 6 + 1 + 2
    assert replace(model, "blocks.0.mlp", lambda m: m) == ["blocks.0.mlp"]


def test_the_model_itself_is_never_replaced():
    assert "" not in replace(small(), "*", lambda m: m)


def test_names_match_by_case():
    with pytest.raises(LookupError):
        replace(small(), "HEAD", Cushion)


@pytest.mark.parametrize(
    "pattern, near", [("blocks.0.attn.w", "blocks.0.attn.v"), ("heads", "head"), ("zzz", "tokens")]
)
def test_a_pattern_that_hits_nothing_lists_near_names(pattern, near):
    model = small()
    before = state(model)
    with pytest.raises(LookupError) as error:
        replace(model, ["head", pattern], Cushion)
    assert pattern in str(error.value) and near in str(error.value)
    assert_unchanged(model, before)


def test_a_module_of_the_wrong_kind_is_no_hit():
    with pytest.raises(LookupError, match="right kind"):
        replace(small(), "head", Cushion, kind=Embedding)


@pytest.mark.parametrize("none", [[], (), {}])
def test_no_pattern_at_all_hits_nothing(none):
    for door in (find, freeze, unfreeze, lambda m, p: lora(m, targets=p, rng=RNG)):
        model = small()
        before = state(model)
        with pytest.raises(LookupError, match="''"):
            door(model, none)
        assert_unchanged(model, before)


def test_a_kind_may_be_the_names_that_a_module_must_have():
    model = small(n_layer=1)
    assert list(find(model, "*", "q k v o n_head")) == ["blocks.0.attn"]
    assert list(find(model, "*", "up down")) == ["blocks.0.mlp"]
    assert list(find(model, "*", "up down|q")) == ["blocks.0.attn", "blocks.0.mlp"]
    assert list(find(model, "*", "attn mlp")) == ["blocks.0"]
    with pytest.raises(LookupError, match="right kind"):
        find(model, "*", "gate up down")


def test_an_error_in_wrap_leaves_the_model_as_it_was():
    model = small()
    before = state(model)
    made = []

    def wrap(module):
        if len(made) == 3:
            raise OSError("no more")
        made.append(module)
        return Cushion(module)

    with pytest.raises(OSError, match="no more"):
        replace(model, "blocks.*", wrap, kind=Linear)
    assert_unchanged(model, before)


def test_a_module_and_what_is_inside_it_may_both_be_replaced():
    model, called = small(), []

    class Seen(Cushion):
        def forward(self, x):
            called.append(self.base)
            return super().forward(x)

    names = replace(model, "blocks.0.attn*", Seen)  # attn, and its q, k, v and o
    model(IDS)
    assert len(names) == len(called) == 5


@pytest.mark.parametrize("name", ["head", "blocks.1", "blocks.0.attn.q"])
def test_put_sets_the_module_at_a_name(name):
    model, new = small(), Module()
    put(model, name, new)
    assert dict(model.named_modules())[name] is new
    assert len(model.blocks) == 2


def test_put_finds_its_way_through_lists_and_dictionaries():
    model = Module()
    model.parts = {"a": [Module(), Module()], 3: {"b": Module()}}
    for name in ("parts.a.1", "parts.3.b"):
        new = Module()
        put(model, name, new)
        assert dict(model.named_modules())[name] is new


@pytest.mark.parametrize("training", [True, False])
def test_what_is_put_in_takes_the_mode_of_the_model(training):
    model = adapted(small()).train(not training)
    adapter = detach(model)
    for change in (
        lambda m: attach(m, adapter),
        detach,
        lambda m: adapted(m, dropout=0.5),
        merge,
        lambda m: replace(m, "blocks.*", Cushion, Linear),
    ):
        change(model.train(training))
        assert {m.training for _, m in model.named_modules()} == {training}


# ------------------------------------------------------------------ the one guard


def test_a_weight_under_two_names_is_refused_unless_ties_do_not_matter():
    model = small(tied=True)
    with pytest.raises(ValueError, match="tokens.weight and head.weight"):
        plain(model, "*", (Linear, Embedding))
    assert len(plain(model, "blocks.*")) == 12
    assert list(plain(model, "tokens", Embedding, ties=True)) == ["tokens"]
    model.blocks[1].attn.q = model.blocks[0].attn.q
    with pytest.raises(ValueError, match="blocks.0.attn.q.weight and blocks.1.attn.q.weight"):
        plain(model, "*.q")


def test_only_compression_asks_for_plain_layers_with_finite_numbers():
    model = small()
    model.blocks[0].attn.q.weight.data[0, 0] = np.nan
    model.head = type("Other", (Linear,), {}).of(model.head.weight.data)
    assert len(plain(model, "*", (Linear,))) == 13
    with pytest.raises(ValueError, match="finite"):
        plain(model, "*.q")
    with pytest.raises(TypeError, match="plain Linear"):
        plain(model, "head")


def test_a_model_that_carries_an_adapter_is_refused_whatever_the_kind():
    model = adapted(small())
    for kind in (Linear, Module, "up down"):
        with pytest.raises(ValueError, match="carries an adapter"):
            plain(model, "*", kind)


# ------------------------------------------------------------------ freeze, unfreeze, count


def test_freeze_and_unfreeze_by_pattern():
    model = small()
    assert freeze(model) is model and model.trainable() == {}
    assert unfreeze(model, ["*.bias", "head.*"]) is model
    biases = [n for n, _ in model.named_parameters() if n.endswith(".bias")]
    assert sorted(model.trainable()) == sorted([*biases, "head.weight"])
    freeze(model, "blocks.*")
    assert list(model.trainable()) == ["norm.bias", "head.weight"]
    unfreeze(model)
    assert len(model.trainable()) == len(model.parameters())


def test_freezing_twice_keeps_what_trains_as_it_is():
    model = small()
    node = model.head.weight.node
    unfreeze(model)
    assert model.head.weight.node is node


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_a_pattern_that_hits_no_parameter_changes_nothing(change):
    model = small()
    freeze(model, "blocks.*")
    before = state(model)
    with pytest.raises(LookupError, match=r"\*.bais"):
        change(model, ["*", "*.bais"])
    assert_unchanged(model, before)


def test_count_prints_the_line_that_peft_users_know(capsys):
    model = lora(small(), r=1, rng=np.random.default_rng(0))
    counted = count(model)
    total = 2 * (12 * 64 + 13 * 8) + 12 * 8 + 2 * 8 + 7 * 8 + 4 * 16
    assert counted == (64, total)
    assert counted.share == 64 / total
    line = f"trainable params: 64 || all params: 1,976 || trainable%: {6400 / 1976:.4f}\n"
    assert capsys.readouterr().out == line == f"{counted}\n"
    assert count(model, quiet=True) == counted
    assert capsys.readouterr().out == ""


def test_the_line_of_the_roberta_example():
    class Sizes(Module):
        def __init__(self):
            self.a = Parameter(np.broadcast_to(0.0, 294912))
            self.b = Parameter(np.broadcast_to(0.0, 124734720 - 294912), requires_grad=False)

    line = "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    assert str(count(Sizes(), quiet=True)) == line


def test_a_wrapper_that_is_put_on_trains_what_it_adds_and_nothing_else():
    model = small()
    wear(model, {"head": LoRA(model.head, 2, rng=RNG)})
    assert list(model.trainable()) == ["head.A", "head.B"]
    assert list(model.head.learned()) == ["A", "B"]


def test_counts_are_whole_numbers_of_python():
    assert {type(n) for n in count(small(), quiet=True)} == {int}


def test_tied_weights_count_once():
    assert count(small(tied=True), quiet=True).total == count(small(), quiet=True).total - 7 * 8


# ------------------------------------------------------------------ wrappers and merge


def test_wrappers_are_found_and_only_the_outermost():
    model = small()
    assert wrappers(model) == {}
    replace(model, ["head", "blocks.0.attn"], lambda m: Cushion(Cushion(m)))
    replace(model, "blocks.0.attn.base.base.q", Cushion)
    found = wrappers(model)
    assert list(found) == ["blocks.0.attn", "head"]
    assert all(type(w.base) is Cushion for w in found.values())


def test_a_wrapper_is_known_by_its_class():
    model = small()
    model.norm.base = model.head  # a name that any module may use
    assert wrappers(model) == {}


def test_a_name_that_begins_alike_is_not_inside():
    model = Module()
    model.up, model.up2 = Cushion(Module()), Cushion(Module())
    assert list(wrappers(model)) == ["up", "up2"]


def test_merge_gives_plain_layers_that_compute_the_same():
    model = adapted(small(), targets=["blocks.*", "head", "tokens"])
    wanted = model(IDS).data
    names = [name for name, _ in small().named_modules()]
    assert merge(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert {type(model.head), type(model.blocks[1].attn.q)} == {Linear}
    assert type(model.tokens) is Embedding
    np.testing.assert_allclose(model(IDS).data, wanted, rtol=1e-12, atol=1e-12)


def test_merge_does_not_write_to_the_base():
    model = small()
    layer = model.blocks[0].attn.q
    weight, bias = layer.weight.data.copy(), layer.bias.data.copy()
    merge(adapted(model))
    np.testing.assert_array_equal(layer.weight.data, weight)
    fused = model.blocks[0].attn.q
    assert (fused.weight.data != weight).all()
    fused.bias.data += 1  # nor does a later change reach it
    np.testing.assert_array_equal(layer.bias.data, bias)


@pytest.mark.parametrize("trains", [False, True])
def test_merged_layers_are_frozen_where_their_base_was(trains):
    model = adapted(small())
    if trains:
        unfreeze(model, "*.base.bias")
    merge(model)
    fused = model.blocks[0].attn.q
    assert (fused.weight.requires_grad, fused.bias.requires_grad) == (False, trains)


def test_merging_twice_is_refused():
    model = merge(adapted(small()))
    before = state(model)
    with pytest.raises(ValueError, match="no wrapper"):
        merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("why", ["it is a cushion", None])
def test_what_cannot_be_merged_is_named_and_nothing_is_merged(why, monkeypatch):
    monkeypatch.setattr(Cushion, "why_not_merged", why)
    model = adapted(small())
    replace(model, "head", Cushion)
    before = state(model)
    with pytest.raises(TypeError, match=rf"head \(Cushion\).*{why or 'no dense'}"):
        merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_merged(bad):
    model = adapted(small())
    model.blocks[1].attn.v.B.data[3, 1] = bad
    before = state(model)
    with pytest.raises(ValueError, match="blocks.1.attn.v .*diverged"):
        merge(model)
    assert_unchanged(model, before)


# ------------------------------------------------------------------ detach, attach, detached


def test_detach_gives_the_base_back_and_attach_the_adapter():
    model = small()
    bare, before = model(IDS).data, state(model)[0]
    adapted(model)
    tuned = model(IDS).data
    adapter = detach(model)
    assert list(adapter) == [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in "qv"]
    assert state(model)[0] == before
    np.testing.assert_array_equal(model(IDS).data, bare)
    assert attach(model, adapter) is model
    np.testing.assert_array_equal(model(IDS).data, tuned)


def test_several_adapters_on_one_base_are_swapped_by_name():
    model = small()
    shelf, wanted = {}, {}
    for seed, (name, targets) in enumerate([("one", "*.q"), ("two", "*.[kv]"), ("three", "*.q")]):
        adapted(model, seed=seed, targets=targets)
        wanted[name] = model(IDS).data
        shelf[name] = detach(model)
    shelf["none"], wanted["none"] = {}, model(IDS).data
    assert len({a.tobytes() for a in wanted.values()}) == 4
    for name in ("one", "three", "two", "none", "two", "one", "one"):
        attach(model, shelf[name])  # in place of the one that is on
        assert wrappers(model) == shelf[name]
        np.testing.assert_array_equal(model(IDS).data, wanted[name])
    bases = {name: [id(w.base) for w in adapter.values()] for name, adapter in shelf.items()}
    assert bases["one"] == bases["three"]  # shared, not copied


def test_an_adapter_of_another_model_is_refused():
    adapter = detach(adapted(small()))
    for other in (small(), adapted(small()), small(n_layer=1)):
        before = state(other)
        with pytest.raises(LookupError, match="blocks.0.attn.q"):
            attach(other, adapter)
        assert_unchanged(other, before)


def test_an_adapter_for_a_layer_that_is_missing_is_refused():
    model = small()
    adapter = detach(adapted(model))
    del model.blocks[1]
    before = state(model)
    with pytest.raises(LookupError, match="blocks.1.attn.q"):
        attach(model, adapter)
    assert_unchanged(model, before)


def test_an_adapter_from_before_a_merge_is_refused():
    model = small()
    adapter = detach(adapted(model))
    merge(adapted(model, seed=2))
    before = state(model)
    with pytest.raises(LookupError, match="not the one"):
        attach(model, adapter)
    assert_unchanged(model, before)


def test_detached_is_the_bare_base_inside_and_the_adapter_after():
    model = small()
    bare = model(IDS).data
    adapted(model)
    tuned = model(IDS).data
    with detached(model) as inside:
        assert inside is model
        np.testing.assert_array_equal(model(IDS).data, bare)
    np.testing.assert_array_equal(model(IDS).data, tuned)


def test_detached_puts_the_adapter_back_when_the_block_raises():
    model = adapted(small())
    before = state(model)
    with pytest.raises(KeyError), detached(model):
        raise KeyError
    assert_unchanged(model, before)


def test_blocks_of_detached_nest():
    model = adapted(small())
    before = state(model)
    with detached(model):
        bare = state(model)
        with detached(model):
            assert_unchanged(model, bare)
        assert_unchanged(model, bare)
    assert_unchanged(model, before)


def test_detached_puts_its_own_adapter_back_and_drops_none_in_silence():
    model = small()
    other = detach(adapted(model, seed=2))
    adapted(model)
    before = state(model)
    with pytest.raises(ValueError, match="left an adapter on"), detached(model):
        attach(model, other)
    assert_unchanged(model, before)
    with detached(model):
        attach(model, other)
        assert detach(model) == other
    assert_unchanged(model, before)
