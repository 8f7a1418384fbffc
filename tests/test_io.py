"""Models and adapters on disk: they come back the same, and bad files change nothing."""

import json
import os
import pickle

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from minilora import (
    Transformer,
    compress,
    detach,
    freeze,
    full,
    generate,
    load_adapter,
    load_base,
    load_eval,
    load_model,
    lora,
    merge,
    safetensors,
    save_adapter,
    save_model,
    tasks,
    unfreeze,
)
from minilora.io import ADAPTER, MODEL
from minilora.surgery import wrappers

IDS = np.random.default_rng(9).integers(7, size=(2, 5))
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def small(seed=0, dtype=np.float32, **changes):
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return Transformer(**sizes | changes, rng=np.random.default_rng(seed), dtype=dtype)


def shake(model, seed=5):
    """Move whatever trains, as training would."""
    rng = np.random.default_rng(seed)
    for p in model.trainable().values():
        p.data += (0.5 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def bitfit(model):
    return unfreeze(freeze(model), "*.bias")


def lora_and_bias(model):
    return unfreeze(lora(model, r=2, rng=np.random.default_rng(1)), "blocks.*.bias")


RECIPES = {
    "lora": lambda m: lora(m, r=2, alpha=3, rng=np.random.default_rng(1)),
    "lora everywhere": lambda m: lora(
        m, r=1, targets="*", rslora=True, rng=np.random.default_rng(1)
    ),
    "lora with dropout": lambda m: lora(
        m, targets="head", dropout=0.5, rng=np.random.default_rng(1)
    ),
    "full": full,
    "bitfit": bitfit,
    "lora and bias": lora_and_bias,
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def untouched(model):
    """What a refused file may not change."""
    modules = {name: id(m) for name, m in model.named_modules()}
    return modules, {
        n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()
    }


def assert_equal_models(got, wanted):
    theirs = dict(wanted.named_parameters())
    assert [n for n, _ in got.named_parameters()] == list(theirs)
    for name, p in got.named_parameters():
        assert (p.dtype, p.requires_grad) == (theirs[name].dtype, theirs[name].requires_grad)
        np.testing.assert_array_equal(p.data, theirs[name].data)


# ------------------------------------------------------------------ whole models


@both
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_the_same(tmp_path, dtype, tied):
    model = shake(small(dtype=dtype, tied=tied))
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    again = load_model(path)
    assert_equal_models(again, model)
    assert again.config == model.config
    assert (again.head.weight is again.tokens.weight) == tied
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    first = path.read_bytes()
    save_model(again, path)
    assert path.read_bytes() == first


@both
@pytest.mark.parametrize("wanted", [np.float32, np.float64])
def test_a_model_can_be_read_in_another_dtype(tmp_path, dtype, wanted):
    model = small(dtype=dtype)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m", wanted)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert p.dtype == wanted
        np.testing.assert_array_equal(p.data, q.data.astype(wanted))


def test_the_official_package_reads_our_files(tmp_path):
    model = lora(small(), r=2, rng=np.random.default_rng(1))
    save_adapter(model, tmp_path / "a")
    arrays = load_file(tmp_path / "a")
    assert arrays.keys() == model.trainable().keys()
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(arrays[name], p.data)
    with safe_open(tmp_path / "a", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == ADAPTER
    wanted = {"kind": "LoRA", "r": 2, "alpha": 8.0, "dropout": 0.0, "rslora": False}
    assert json.loads(metadata["wrappers"])["blocks.0.attn.q"] == wanted

    plain = small()
    save_model(plain, tmp_path / "m")
    assert load_file(tmp_path / "m").keys() == dict(plain.named_parameters()).keys()
    with safe_open(tmp_path / "m", "np") as file:
        assert file.metadata() == {"format": MODEL, "config": json.dumps(plain.config)}


def test_a_model_with_an_adapter_is_not_saved_whole(tmp_path):
    model = lora(small(), r=2, rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match="save_model: this model carries an adapter; merge or"):
        save_model(model, tmp_path / "m")
    assert not os.listdir(tmp_path)
    save_model(merge(model), tmp_path / "m")
    np.testing.assert_array_equal(load_model(tmp_path / "m")(IDS).data, model(IDS).data)


# ------------------------------------------------------------------ adapters


@both
@recipes
def test_an_adapter_comes_back_the_same(tmp_path, recipe, dtype):
    tuned = shake(recipe(small(dtype=dtype)))
    path = tmp_path / "adapter.safetensors"
    save_adapter(tuned, path)
    model = small(dtype=dtype)
    assert load_adapter(model, path) is model
    assert_equal_models(model, tuned)
    np.testing.assert_array_equal(model(IDS).data, tuned(IDS).data)
    configs = [{n: w.config() for n, w in wrappers(m).items()} for m in (model, tuned)]
    assert configs[0] == configs[1]
    first = path.read_bytes()
    save_adapter(model, path)
    assert path.read_bytes() == first


@recipes
def test_an_adapter_file_holds_only_what_trains(tmp_path, recipe):
    tuned = recipe(small())
    save_adapter(tuned, tmp_path / "a")
    arrays, _ = safetensors.read(tmp_path / "a")
    assert {n: a.shape for n, a in arrays.items()} == {
        n.replace(".base.", "."): p.shape for n, p in tuned.trainable().items()
    }


def test_an_adapter_in_float32_goes_onto_a_float64_copy_of_its_base(tmp_path):
    base = small()
    save_model(base, tmp_path / "base")
    tuned = shake(lora(base, r=2, rng=np.random.default_rng(1)))
    save_adapter(tuned, tmp_path / "a")
    model = load_adapter(load_model(tmp_path / "base", np.float64), tmp_path / "a")
    for name, p in model.named_parameters():
        assert p.dtype == np.float64
        np.testing.assert_array_equal(p.data, dict(tuned.named_parameters())[name].data)
    np.testing.assert_allclose(model(IDS).data, tuned(IDS).data, rtol=1e-4, atol=1e-5)


def test_an_adapter_trains_on_where_it_stopped(tmp_path):
    save_adapter(shake(lora(small(), r=2, rng=np.random.default_rng(1))), tmp_path / "a")
    model = load_adapter(small(), tmp_path / "a")
    model(IDS).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"blocks.{i}.attn.{n}.{p}" for i in (0, 1) for n in "qv" for p in "AB"}


def test_a_loaded_adapter_can_be_detached_and_merged(tmp_path):
    tuned = shake(lora(small(), r=2, rng=np.random.default_rng(1)))
    save_adapter(tuned, tmp_path / "a")
    model = small()
    bare = model(IDS).data
    load_adapter(model, tmp_path / "a")
    adapter = detach(model)
    np.testing.assert_array_equal(model(IDS).data, bare)
    assert len(adapter) == 4
    load_adapter(model, tmp_path / "a")
    np.testing.assert_array_equal(merge(model)(IDS).data, merge(tuned)(IDS).data)


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="save_adapter: nothing trains in this model"):
        save_adapter(freeze(small()), tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_a_second_adapter_is_not_loaded_over_the_first(tmp_path):
    model = lora(small(), r=2, rng=np.random.default_rng(1))
    save_adapter(model, tmp_path / "a")
    before = untouched(model)
    with pytest.raises(ValueError, match="load_adapter: this model carries an adapter; detach or"):
        load_adapter(model, tmp_path / "a")
    assert untouched(model) == before


# ------------------------------------------------------------------ bad files change nothing


@pytest.fixture
def good(tmp_path):
    """The file of an adapter for `small()`."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(shake(lora(small(), r=2, rng=np.random.default_rng(1))), path)
    return path


def refuse_adapter(path, message, model=None):
    model = model or small()
    freeze(model, "norm.*")  # so that requires_grad is not all one way
    before = untouched(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, path)
    assert str(path) in str(error.value)
    assert untouched(model) == before


def tamper(path, change):
    """Rewrite a file with its arrays, metadata and wrappers as `change` leaves them."""
    arrays, metadata = safetensors.read(path)
    config = json.loads(metadata["wrappers"])
    change(arrays, metadata, config)
    if "wrappers" in metadata:
        metadata["wrappers"] = json.dumps(config)
    safetensors.write(path, arrays, metadata)


Q = "blocks.0.attn.q"


def set_array(name, make):
    return lambda arrays, metadata, config: arrays.update({name: make(arrays[f"{Q}.A"])})


def set_config(**settings):
    return lambda arrays, metadata, config: config[Q].update(settings)


def set_metadata(**texts):
    return lambda arrays, metadata, config: metadata.update(texts)


def move(config, name):
    config[name] = config.pop(Q)


TAMPERED = {
    "wrong shape": (
        set_array(f"{Q}.A", lambda a: a[:, :-1]),
        r"blocks.0.attn.q.A is \(2, 7\) in the file, \(2, 8\) here",
    ),
    "transposed": (set_array(f"{Q}.A", lambda a: a.T), r"A is \(8, 2\) in the file"),
    "wrong rank in the arrays": (
        set_array(f"{Q}.A", lambda a: a[:1]),
        r"A is \(1, 8\) in the file, \(2, 8\) here",
    ),
    "wrong rank in the settings": (
        set_config(r=3),
        r"A is \(2, 8\) in the file, \(3, 8\) here",
    ),
    "impossible rank": (
        set_config(r=99),
        "r is 99; expected a whole",
    ),
    "rank that is no number": (set_config(r="two"), "r is 'two'"),
    "impossible alpha": (set_config(alpha=float("nan")), "alpha is nan"),
    "unknown setting": (set_config(beta=1), "beta"),
    "unknown kind": (set_config(kind="Rola"), "Rola"),
    "kind of another layer": (set_config(kind="LoRAEmbedding"), "which no LoRAEmbedding wraps"),
    "kind missing": (lambda a, m, config: config[Q].pop("kind"), "kind"),
    "rank missing": (lambda a, m, config: config[Q].pop("r"), "'r'"),
    "settings that are no table": (
        lambda a, m, config: config.update({Q: "LoRA"}),
        "string indices",
    ),
    "whole numbers": (
        set_array(f"{Q}.A", lambda a: a.astype(np.int32)),
        "blocks.0.attn.q.A has dtype int32; expected floats",
    ),
    "tensor missing": (
        lambda arrays, m, c: arrays.pop(f"{Q}.B"),
        r"another model: blocks.0.attn.q.B is missing in the file",
    ),
    "tensor too many": (
        set_array("blocks.7.attn.q.A", lambda a: a),
        r"another model: blocks.7.attn.q.A is .* missing here",
    ),
    "no wrappers at all": (lambda a, m, config: config.clear(), "another model"),
    "a layer that is not there": (
        lambda a, m, config: move(config, "blocks.0.attn.x"),
        "another model: this one has no layer blocks.0.attn.x",
    ),
    "a block in place of a layer": (
        lambda a, m, config: move(config, "blocks.0"),
        "Block.*dense",
    ),
    "wrappers missing": (
        lambda a, m, c: m.pop("wrappers"),
        r"another model: blocks.0.attn.q.A is .* missing here",
    ),
    "wrong format": (
        set_metadata(format="minilora adapter 9"),
        "format is 'minilora adapter 9'; exp",
    ),
    "no format": (lambda a, m, c: m.pop("format"), f"its format is None; expected '{ADAPTER}'"),
    "no fingerprint": (
        lambda a, m, c: m.pop("frozen"),
        "the set of frozen weights differs",
    ),
    "wrong fingerprint": (
        set_metadata(frozen="x" * 64),
        "another model: blocks.0.attn.k.bias differs",
    ),
}


@pytest.mark.parametrize("change, message", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_adapter_is_refused(good, change, message):
    tamper(good, change)
    refuse_adapter(good, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LoRA"', "3"])
def test_wrappers_that_are_no_object_are_refused(good, text):
    arrays, metadata = safetensors.read(good)
    safetensors.write(good, arrays, metadata | {"wrappers": text})
    refuse_adapter(good, "its metadata has no valid 'wrappers'")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_adapter_is_refused(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    refuse_adapter(good, "the header claims to end|the tensors end|buffer size")


@pytest.mark.parametrize(
    "junk",
    [b"\0" * 64, b"PK\x03\x04" + bytes(100), pickle.dumps({"A": 1}), b"{}", bytes(range(256)) * 9],
    ids=["zeros", "zip", "pickle", "json", "bytes"],
)
def test_garbage_is_refused(good, junk):
    good.write_bytes(junk)
    refuse_adapter(good, "header|format|at least 8")
    with pytest.raises(ValueError, match="header|format|at least 8"):
        load_model(good)


def test_an_adapter_of_other_weights_in_the_same_shapes_is_refused(good):
    refuse_adapter(good, "another model: blocks.0.attn.k.weight differs", small(seed=1))
    almost = small()
    almost.head.weight.data[3, 3] += 1e-4
    refuse_adapter(good, "another model: .* differs", almost)


@pytest.mark.parametrize(
    "changes, message",
    [({"n_layer": 1}, "no layer blocks.1.attn.q"), ({"n_embd": 4}, "another model")],
    ids=["fewer layers", "narrower"],
)
def test_an_adapter_of_another_architecture_is_refused(good, changes, message):
    refuse_adapter(good, message, small(**changes))


def test_a_full_adapter_that_fits_only_in_part_changes_nothing(tmp_path):
    save_adapter(full(small(seed=1)), tmp_path / "a")
    arrays, metadata = safetensors.read(tmp_path / "a")
    arrays["norm.weight"] = arrays["norm.weight"][:-1]  # the last but one in order
    safetensors.write(tmp_path / "a", arrays, metadata)
    refuse_adapter(tmp_path / "a", r"norm.weight is \(7,\) in the file, \(8,\) here")


def test_a_model_file_is_not_an_adapter_nor_the_other_way_round(tmp_path, good):
    with pytest.raises(ValueError, match=f"its format is '{ADAPTER}'; expected '{MODEL}'"):
        load_model(good)
    save_model(small(), tmp_path / "m")
    refuse_adapter(tmp_path / "m", f"its format is '{MODEL}'; expected '{ADAPTER}'")


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path):
    for load in (load_model, lambda path: load_adapter(small(), path)):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(tmp_path / "nowhere")


CONFIGS = {
    "no config": (None, "n_layer"),
    "no JSON": ("{", "its metadata has no valid 'config'"),
    "no table": ("[1]", "its metadata has no valid 'config'"),
    "unknown setting": ({"colour": 1}, "colour"),
    "no divisor": (
        {"n_head": 3},
        "n_head is 3; expected a divisor",
    ),
    "no layers": ({"n_layer": 0}, "n_layer is 0"),
    "text": ({"n_embd": "8"}, "TypeError"),
    "far too many layers": ({"n_layer": 10**9}, "n_layer is 1000000000"),
    "fewer layers": ({"n_layer": 1}, r"blocks.1.attn.k.bias is .* missing here"),
    "more layers": ({"n_layer": 3}, "blocks.2.attn.k.bias is missing in the file"),
    "another width": ({"n_embd": 4}, r"is \(8,\) in the file, \(4,\) here"),
    "tied": ({"tied": True}, "head.weight is .* missing here"),
}


@pytest.mark.parametrize("config, message", CONFIGS.values(), ids=CONFIGS)
def test_a_model_with_a_wrong_configuration_is_refused(tmp_path, config, message):
    path = tmp_path / "m"
    save_model(small(), path)
    arrays, metadata = safetensors.read(path)
    if config is None:
        del metadata["config"]
    else:
        wrong = isinstance(config, dict)
        metadata["config"] = json.dumps(small().config | config) if wrong else config
    safetensors.write(path, arrays, metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_a_model_of_whole_numbers_or_of_nothing_is_refused(tmp_path):
    save_model(small(), tmp_path / "m")
    arrays, metadata = safetensors.read(tmp_path / "m")
    whole = {name: a.astype(np.int64) for name, a in arrays.items()}
    for bad, message in ((whole, "int64|float"), ({}, "n_layer")):
        safetensors.write(tmp_path / "m", bad, metadata)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "m")


# ------------------------------------------------------------------ a crash while saving


@pytest.mark.parametrize("breaks", ["fsync", "replace"])
@pytest.mark.parametrize("save", [save_model, save_adapter])
def test_a_crash_in_the_middle_of_saving_leaves_the_old_file_whole(
    tmp_path, monkeypatch, save, breaks
):
    path = tmp_path / "file"
    save(small(), path)
    before = path.read_bytes()

    def crash(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors.os, breaks, crash)
    with pytest.raises(OSError, match="the disk is full"):
        save(shake(small()), path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == before
    save(shake(small()), path)
    assert path.read_bytes() != before


# ------------------------------------------------------------------ what comes with the project


def test_the_base_is_read_in_float64_and_knows_how_to_sort():
    model = load_base()
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert {p.dtype for p in load_base(np.float32).parameters()} == {np.dtype(np.float32)}
    prompt = tasks.encode("sort hgfedcba >")[None]
    assert tasks.decode(generate(model, prompt, 8)[0]) == "sort hgfedcba > abcdefgh"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_each_task_has_its_evaluation_set(task):
    ids = load_eval(task)
    assert (ids.shape, ids.dtype) == ((500, 18), np.int64)
    assert (ids[:, 0] == tasks.TOKENS.index(task if task in tasks.SKILLS else "?")).all()


def test_an_unknown_evaluation_set_is_refused_with_the_list():
    with pytest.raises(ValueError, match="task is 'srot'; expected one of copy, "):
        load_eval("srot")


# ------------------------------------------------------------------ compressed models


def pruned(model):
    compress.prune_neurons(model, 0.5)
    return compress.prune_heads(model, 1, "blocks.1.attn")


def sparse(model):
    return merge(compress.sparsify(model, 0.7))


def both_ways(model):
    return compress.quantise_model(pruned(model), 3, block=8, kind="affine")


COMPRESSED = {
    "pruned": pruned,
    "fewer blocks": lambda m: compress.drop_blocks(m, 0),
    "sparse": sparse,
    "low rank": lambda m: compress.low_rank(m, 2),
    "4 bits": lambda m: compress.quantise_model(m, 4),
    "nf4, double": lambda m: compress.quantise_model(m, 4, kind="nf4", double=True, block=8),
    "pruned, then 3 bits": both_ways,
    "only some layers": lambda m: compress.quantise_model(m, 2, "blocks.*.attn.[qk]", block="row"),
}
compressed = pytest.mark.parametrize("recipe", COMPRESSED.values(), ids=COMPRESSED)


@both
@compressed
def test_a_compressed_model_comes_back_the_same(tmp_path, dtype, recipe):
    model, path = recipe(small(dtype=dtype)), tmp_path / "m"
    save_model(model, path)
    again = load_model(path)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert again(IDS).dtype == dtype
    assert [n for n, _ in again.named_modules()] == [n for n, _ in model.named_modules()]
    other = np.float64 if dtype == np.float32 else np.float32
    converted = load_model(path, other)(IDS)
    assert converted.dtype == other
    np.testing.assert_allclose(converted.data, model(IDS).data, atol=1e-5)
    first = path.read_bytes()
    save_model(again, path)
    assert path.read_bytes() == first


@compressed
def test_a_compressed_file_is_smaller_by_what_was_taken_away(tmp_path, recipe):
    def data_bytes(model):
        save_model(model, tmp_path / "m")
        return sum(a.nbytes for a in load_file(tmp_path / "m").values())

    model = small(n_embd=32, n_head=4)
    before = data_bytes(model)
    recipe(model)
    if recipe is sparse:  # a bit for each weight, and what is not zero
        weights = [m.weight.data for n, m in model.named_modules() if ".attn." in n or ".mlp." in n]
        saved = sum(w.nbytes - 4 * np.count_nonzero(w) - w.size // 8 for w in weights)
    else:
        old = sum(p.data.nbytes for p in small(n_embd=32, n_head=4).parameters())
        new = sum(p.data.nbytes for p in model.parameters())
        new += sum(
            m.quantised.nbytes
            for _, m in model.named_modules()
            if isinstance(m, compress.QuantLinear)
        )
        saved = old - new
    assert saved > 0 and before - data_bytes(model) == saved


def test_a_layer_without_a_form_for_a_file_is_refused(tmp_path):
    model = compress.tucker_layers(small(), (4, 8, 8))
    with pytest.raises(TypeError, match=r"blocks.0.*no form for a file"):
        save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match="carries an adapter"):
        save_model(compress.sparsify(small(), 0.5), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "recipe", [lambda m: compress.sparsify(m, 0.5), lambda m: compress.quantise_aware(m, 4)]
)
def test_what_could_not_be_loaded_is_not_saved_as_an_adapter(tmp_path, recipe):
    with pytest.raises(TypeError, match=r"blocks.0.attn.q is \w+, which is no adapter; merge"):
        save_adapter(recipe(small()), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def change_json(key, change):
    def apply(arrays, metadata):
        value = json.loads(metadata[key])
        change(value)
        metadata[key] = json.dumps(value)

    return apply


BROKEN = {
    "an inner size above the model's": (
        pruned,
        change_json("config", lambda v: v.update(d_ff=10**9)),
        r"1000000000",
    ),
    "a size that is no number": (
        pruned,
        change_json("config", lambda v: v.update(d_ff="4")),
        "TypeError",
    ),
    "heads that do not divide": (
        pruned,
        change_json("config", lambda v: v.update(n_head=[1])),
        "zip",
    ),
    "a size that does not fit the arrays": (
        pruned,
        change_json("config", lambda v: v.update(d_ff=5)),
        r"in the file, .*5.* here",
    ),
    "a size missing": (
        pruned,
        change_json("config", lambda v: v.pop("d_ff")),
        r"in the file, .*32.* here",
    ),
    "a block that is not there": (
        pruned,
        change_json("config", lambda v: v.update(n_layer=3)),
        "zip",
    ),
    "a layer that is not there": (
        COMPRESSED["4 bits"],
        change_json("layers", lambda v: v.update(x=v["blocks.0.attn.q"])),
        "KeyError: 'x'",
    ),
    "an unknown kind": (
        COMPRESSED["4 bits"],
        change_json("layers", lambda v: v["blocks.0.attn.q"].update(kind="Linear8")),
        "Linear8",
    ),
    "another size": (
        COMPRESSED["4 bits"],
        change_json("layers", lambda v: v["blocks.0.attn.q"].update(shape=[4, 16])),
        r"expected .*'bias': \('float32', 4\)",
    ),
    "a huge size": (
        COMPRESSED["4 bits"],
        change_json("layers", lambda v: v["blocks.0.attn.q"].update(shape=[10**7, 10**7])),
        "100000000000000 weights",
    ),
    "codes missing": (
        COMPRESSED["4 bits"],
        lambda arrays, metadata: arrays.pop("blocks.0.attn.q.codes"),
        "codes",
    ),
    "factors that do not fit": (
        COMPRESSED["low rank"],
        lambda arrays, m: arrays.update({"blocks.0.attn.q.left": np.zeros((8, 3), np.float32)}),
        r"left, right, bias are \(\(8, 3\)",
    ),
    "factors of another layer": (
        COMPRESSED["low rank"],
        lambda arrays, m: arrays.update({"blocks.0.attn.q.left": np.zeros((9, 2), np.float32)}),
        r"left, right, bias are \(\(9, 2\)",
    ),
    "values missing": (
        sparse,
        lambda arrays, metadata: arrays.pop("blocks.0.attn.q.weight.values"),
        "blocks.0.attn.q.weight.values",
    ),
    "too few values": (
        sparse,
        lambda arrays, m: arrays.update({"blocks.0.attn.q.weight.values": np.zeros(1, "f4")}),
        r"do not fit shape \[8, 8\]",
    ),
    "a shape that does not fit the bits": (
        sparse,
        change_json("sparse", lambda v: v.update({"blocks.0.attn.q.weight": [10**9, 10**9]})),
        "do not fit shape .*1000000000",
    ),
    "another shape of as many": (
        sparse,
        change_json("sparse", lambda v: v.update({"blocks.0.attn.q.weight": [4, 16]})),
        r"weight is \(4, 16\) in the file, \(8, 8\) here",
    ),
}


@pytest.mark.parametrize("recipe, change, message", BROKEN.values(), ids=BROKEN)
def test_a_damaged_compressed_model_is_refused(tmp_path, recipe, change, message):
    path = tmp_path / "m"
    save_model(recipe(small()), path)
    arrays, metadata = safetensors.read(path)
    change(arrays, metadata)
    safetensors.write(path, arrays, metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)
