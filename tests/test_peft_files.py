"""Adapters in PEFT's folders and the toy in OPT's, without PEFT: `peft_oracle.sh` has that."""

import json

import numpy as np
import pytest

import minilora as ml
from helpers import adapted, biased, both, logits, refused, rng, same_arrays, shake, small, weights
from minilora import safetensors
from minilora.compress import quantise_model
from minilora.real import Bert, Llama, export_peft, gpt2, import_peft, open_model, save_pretrained
from minilora.real.peft_files import CONFIG, WEIGHTS
from minilora.surgery import put, wrappers
from minilora.transformer import cached

LLAMA = {"model_type": "llama", "vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12}
LLAMA |= {"max_position_embeddings": 12}
GPT2 = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 16, "n_head": 2, "n_layer": 2}
BERT = LLAMA | {"model_type": "bert"}
IDS = rng(9).integers(1, 7, size=(4, 5))
LINEAR = "blocks.*.attn.[qkvo]", "blocks.*.mlp.*"


def toy(dtype=np.float64):
    return biased(small(dtype, n_positions=12))


def llama(dtype=np.float64, **changes):
    return Llama(LLAMA | changes, rng=rng(3), dtype=dtype)


def a_gpt2(dtype=np.float64):
    return biased(gpt2(GPT2 | {"n_positions": 12}, rng=rng(3), dtype=dtype))


def bert(dtype=np.float64):
    return Bert(BERT, rng=rng(3), dtype=dtype)


models = pytest.mark.parametrize("make", [toy, llama, a_gpt2, bert])
RECIPES = {
    "lora": lambda m: ml.lora(m, 2, rng=rng(1)),
    "rslora": lambda m: ml.lora(m, 3, alpha=5, targets=LINEAR, rslora=True, rng=rng(1)),
    "ranks": lambda m: ml.lora(m, {"*.q": 3, "*.0.mlp.up": 1, "*.v": 3}, rng=rng(1)),
    "dropout": lambda m: ml.lora(m, 2, dropout=0.25, rng=rng(1)),
    "dora": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.DoRA, rng=rng(1)),
    "pissa": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.PiSSA, rng=rng(1)),
    "ia3": ml.ia3,
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def files(folder):
    """The configuration and the arrays of a folder."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    return config, *safetensors.read(folder / WEIGHTS)


def change(folder, **fields):
    """Write the configuration again with other fields."""
    config = json.loads((folder / CONFIG).read_text("utf-8")) | fields
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


# ------------------------------------------------------------------ out and back


@models
@recipes
def test_an_adapter_comes_back_the_same(tmp_path, make, recipe):
    model = shake(recipe(make()), size=0.2)
    export_peft(model, tmp_path)
    again = import_peft(make(), tmp_path)
    np.testing.assert_allclose(logits(again, IDS), logits(model, IDS), rtol=1e-9, atol=1e-12)
    assert abs(logits(model, IDS) - logits(make(), IDS)).max() > 1e-3


@both
@recipes
def test_a_toy_s_adapter_comes_back_to_the_bit(tmp_path, dtype, recipe):
    model = shake(recipe(toy(dtype)), size=0.2)
    export_peft(model, tmp_path)
    again = import_peft(toy(dtype), tmp_path)
    same_arrays(weights(again), weights(model))
    assert list(again.trainable()) == list(model.trainable())
    settings = [{n: w.config() for n, w in wrappers(m).items()} for m in (model, again)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_goes_out_as_twice_the_rank_and_comes_back_as_itself(tmp_path, rslora):
    model = ml.lora(toy(), 2, rslora=rslora, variant=ml.PiSSA, rng=rng(1))
    shake(model, size=0.2)
    delta = wrappers(model)["blocks.0.attn.q"].delta()
    export_peft(model, tmp_path)
    config, arrays, _ = files(tmp_path)
    name = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_{}.weight"
    update = arrays[name.format("B")] @ arrays[name.format("A")]
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    scaling = config["lora_alpha"] / (2 if rslora else 4)
    np.testing.assert_allclose(update * scaling, delta, atol=1e-12)
    assert type(wrappers(import_peft(toy(), tmp_path))["blocks.0.attn.q"]) is ml.PiSSA
    safetensors.write(tmp_path / WEIGHTS, arrays, {"format": "pt"})  # as PEFT would save it
    plain = wrappers(import_peft(toy(), tmp_path))["blocks.0.attn.q"]
    assert type(plain) is ml.LoRA and plain.r == 4


def test_pissa_of_peft_s_own_start_stands_on_what_is_left_of_the_base(tmp_path):
    export_peft(adapted(toy()), tmp_path)
    change(tmp_path, init_lora_weights="pissa")
    w = wrappers(import_peft(toy(), tmp_path))["blocks.0.attn.v"]
    start = ml.PiSSA(w.base, 2, rng=rng())
    np.testing.assert_allclose(w.residual.data, start.residual.data, atol=1e-12)


@pytest.mark.parametrize("make", [toy, a_gpt2, llama, bert])
def test_tables_and_the_head(tmp_path, make):
    tables = {toy: ["tokens", "head"], a_gpt2: ["positions"], llama: ["tokens", "head"]}
    tables = tables.get(make, ["tokens", "positions", "types"])
    model = shake(ml.lora(make(), 2, targets=[*tables, "*.q"], rng=rng(1)), size=0.2)
    export_peft(model, tmp_path)
    same_arrays(weights(import_peft(make(), tmp_path)), weights(model))


def test_dropout_is_for_layers_and_not_for_tables(tmp_path):
    export_peft(adapted(toy(), targets=("tokens", "*.q")), tmp_path / "a")
    change(tmp_path / "a", lora_dropout=0.25)
    model = import_peft(toy(), tmp_path / "a")
    found = {type(w): w.dropout for w in wrappers(model).values()}
    assert found == {ml.LoRA: 0.25, ml.LoRAEmbedding: 0}
    export_peft(model, tmp_path / "b")
    assert files(tmp_path / "b")[0]["lora_dropout"] == 0.25


def test_gpt2_s_pissa_comes_back_as_itself(tmp_path):
    model = shake(RECIPES["pissa"](a_gpt2()), size=0.2)
    export_peft(model, tmp_path)
    found = wrappers(import_peft(a_gpt2(), tmp_path))
    assert {(type(w), w.r) for w in found.values()} == {(ml.PiSSA, 2)}


def test_what_peft_saves_beside_an_adapter_of_tables_must_be_the_base_s(tmp_path):
    model = adapted(toy(), targets=("tokens", "*.q"))
    export_peft(model, tmp_path)
    _, arrays, metadata = files(tmp_path)
    table, head = toy().tokens.dense(), toy().head.dense()
    beside = {"model.decoder.embed_tokens.base_layer.weight": table, "lm_head.weight": head}
    beside = {f"base_model.model.{name}": a for name, a in beside.items()}
    safetensors.write(tmp_path / WEIGHTS, arrays | beside, metadata)
    same_arrays(weights(import_peft(toy(), tmp_path)), weights(model))
    beside["base_model.model.lm_head.weight"] = head + 0.1
    safetensors.write(tmp_path / WEIGHTS, arrays | beside, metadata)
    model = toy()
    with refused(model, ValueError, "lm_head: the file has its own table"):
        import_peft(model, tmp_path)


def test_quantised_layers_keep_their_adapter(tmp_path):
    model = adapted(quantise_model(toy(), 4))
    export_peft(model, tmp_path)
    same_arrays(weights(import_peft(quantise_model(toy(), 4), tmp_path)), weights(model))


def test_gpt2_s_one_layer_for_three(tmp_path):
    model = adapted(a_gpt2(), r={"*.q": 2, "*.v": 3}, targets=())
    export_peft(model, tmp_path)
    config, arrays, _ = files(tmp_path)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    a, b = arrays[name.format("A")], arrays[name.format("B")]
    assert (a.shape, b.shape, config["r"], config["fan_in_fan_out"]) == ((5, 16), (48, 5), 5, True)
    q, v = (wrappers(model)[f"blocks.1.attn.{x}"].delta() for x in "qv")
    update = b @ a * config["lora_alpha"] / config["r"]
    np.testing.assert_allclose(update, np.concatenate([q, 0 * q, v]), atol=1e-12)
    found = wrappers(import_peft(a_gpt2(), tmp_path))
    assert {n[-4:]: w.r for n, w in found.items()} == {"tn.q": 2, "tn.v": 3}


@pytest.mark.parametrize("make, ranks", [(toy, {2}), (a_gpt2, {4})])
def test_an_adapter_that_is_still_at_its_start_goes_too(tmp_path, make, ranks):
    export_peft(ml.lora(make(), 2, rng=rng(1)), tmp_path)  # B is zero: it could be anyone's
    model = import_peft(make(), tmp_path)
    assert {w.r for w in wrappers(model).values()} == ranks
    assert (logits(model, IDS) == logits(make(), IDS)).all()


def test_llama_s_prefix_turns_as_far_as_peft_moves_the_tokens(tmp_path):
    model = shake(ml.prefix(llama(), 3, rng=rng(1)))
    export_peft(model, tmp_path)
    config, arrays, _ = files(tmp_path)
    assert arrays["prompt_embeddings"].shape == (3, 2 * 2 * 8)  # keys that heads share
    assert (config["token_dim"], config["num_attention_heads"]) == (8, 2)
    ours = wrappers(model)["blocks.0.attn"]
    stored = arrays["prompt_embeddings"][:, :8]
    assert abs(stored - ours.keys.data).max() > 0.1
    same = [np.linalg.norm(a.reshape(3, 2, 2, 2), axis=2) for a in (stored, ours.keys.data)]
    np.testing.assert_allclose(*same)  # turned, and no longer
    again = import_peft(llama(), tmp_path)
    np.testing.assert_allclose(logits(again, IDS), logits(model, IDS), atol=1e-12)


def test_a_prompt_of_llama(tmp_path):
    model = shake(ml.prompt(llama(), 3, rng=rng(1)))
    export_peft(model, tmp_path)
    same_arrays(weights(import_peft(llama(), tmp_path)), weights(model))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_behind_learned_positions_what_peft_made_moves_the_tokens(tmp_path, kind):
    recipe = getattr(ml, kind)
    plain = recipe(toy(), 3, rng=rng(1))
    with refused(plain, ValueError, "in PEFT the tokens move on by 3 positions"):
        export_peft(plain, tmp_path)
    assert list(tmp_path.iterdir()) == []
    export_peft(recipe(llama(), 3, rng=rng(1)), tmp_path)  # for its configuration
    virtual = 0.5 * rng(4).standard_normal((3, 2 * 2 * 8 if kind == "prefix" else 8))
    safetensors.write(tmp_path / WEIGHTS, {"prompt_embeddings": virtual})
    model = import_peft(toy(), tmp_path)
    found = logits(model, IDS)
    # token t stands at m + t, as if the table began m rows later
    for name, p in plain.trainable().items():
        p.data[...] = dict(model.named_parameters())[name].data
    table = plain.positions if kind == "prefix" else plain.positions.base
    table.weight.data[...] = np.roll(table.weight.data, -3, axis=0)
    np.testing.assert_allclose(found, logits(plain, IDS), atol=1e-12)
    export_peft(model, tmp_path / "again")
    same_arrays(files(tmp_path / "again")[1], {"prompt_embeddings": virtual})
    ids = ml.generate(model, IDS, 3)  # by its cache
    assert (ids[:, -1] == logits(model, ids[:, :-1])[:, -1].argmax(-1)).all()


@pytest.mark.parametrize("make", [toy, llama, a_gpt2])
def test_a_prefix_is_a_past_as_in_peft(tmp_path, make):
    width = {toy: 8, llama: 8, a_gpt2: 16}[make]
    virtual = rng(4).standard_normal((3, 4 * width))
    export_peft(ml.prefix(llama(), 3, rng=rng(1)), tmp_path)  # for its configuration
    safetensors.write(tmp_path / WEIGHTS, {"prompt_embeddings": virtual})
    base, past = make(), np.repeat(virtual[None], len(IDS), axis=0)  # (B, m, 2 · n_layer · d)
    with ml.no_grad(), cached() as cache:
        for i, block in enumerate(base.blocks):
            at = 2 * i * width
            cache[block.attn] = past[..., at : at + width], past[..., at + width : at + 2 * width]
        cache.past = 3
        wanted = base(IDS).data
    np.testing.assert_allclose(logits(import_peft(make(), tmp_path), IDS), wanted, atol=1e-12)


def test_bfloat16_is_widened(tmp_path):
    export_peft(adapted(toy()), tmp_path)
    _, arrays, _ = files(tmp_path)
    wanted = {}
    for name, a in arrays.items():
        high = a.astype("<f4").view("<u4") >> 16
        arrays[name], wanted[name] = high.astype("<u2"), (high << 16).view("<f4")
    safetensors.write(tmp_path / WEIGHTS, arrays)
    raw = (tmp_path / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"U16"', b'"BF16"')
    raw = len(header).to_bytes(8, "little") + header + raw[end:]
    (tmp_path / WEIGHTS).write_bytes(raw)
    found = {n: p.data for n, p in import_peft(toy(), tmp_path).trainable().items()}
    assert found["blocks.0.attn.q.A"].tolist() == wanted[f"{Q}lora_A.weight"].tolist()


def test_all_that_came_trains_and_the_base_does_not(tmp_path):
    export_peft(adapted(toy()), tmp_path)
    model = import_peft(toy().train(), tmp_path)
    assert {name.rpartition(".")[2] for name in model.trainable()} == {"A", "B"}
    assert all(w.training for w in wrappers(model).values())
    ml.detach(model)
    same_arrays(weights(model), weights(toy()))


# ------------------------------------------------------------------ what the files hold


@pytest.mark.parametrize(
    "make, names",
    [
        (toy, {"model.decoder.layers.1.self_attn.q_proj", "model.decoder.layers.0.fc2"}),
        (llama, {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"}),
        (a_gpt2, {"transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj"}),
        (bert, {"encoder.layer.1.attention.self.query", "encoder.layer.0.output.dense"}),
    ],
)
def test_names_and_the_configuration(tmp_path, make, names):
    recipe = {"blocks.1.attn.q": 3, "blocks.0.mlp.down": 2, "blocks.1.mlp.down": 2}
    model = ml.lora(make(), recipe, alpha=6, dropout=0.25, rng=rng(1))
    export_peft(model, tmp_path / "a" / "new folder", base="a/base")
    config, arrays, metadata = files(tmp_path / "a" / "new folder")
    assert metadata == {"format": "pt"}
    targets = set(config["target_modules"])
    assert names < targets and len(targets) == 3
    leaves = "lora_A.weight", "lora_B.weight"
    assert set(arrays) == {f"base_model.model.{t}.{leaf}" for t in targets for leaf in leaves}
    (q,) = [t for t in targets if "attn" in t or "attention" in t]
    task = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    wanted = {"peft_type": "LORA", "task_type": task, "inference_mode": True}
    wanted |= {"base_model_name_or_path": "a/base", "r": 2, "lora_alpha": 6, "lora_dropout": 0.25}
    wanted |= {"rank_pattern": {q: 3}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False}
    wanted |= {"bias": "none", "fan_in_fan_out": make is a_gpt2, "init_lora_weights": True}
    assert config == wanted | {"target_modules": config["target_modules"]}


def test_ia3_s_shapes_say_the_side(tmp_path):
    export_peft(shake(ml.ia3(toy())), tmp_path)
    config, arrays, _ = files(tmp_path)
    at = "base_model.model.model.decoder.layers.0."
    assert arrays[f"{at}self_attn.k_proj.ia3_l"].shape == (8, 1)
    assert arrays[f"{at}fc2.ia3_l"].shape == (1, 32)
    assert set(config["feedforward_modules"]) == {f"model.decoder.layers.{i}.fc2" for i in (0, 1)}


@both
@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"d_ff": 5}])
def test_the_toy_comes_back_from_opt_s_folder(tmp_path, dtype, changes):
    model = biased(small(dtype, **changes))
    save_pretrained(model, tmp_path)
    again, _ = open_model(tmp_path, dtype)
    assert again.config == model.config
    same_arrays(weights(again), weights(model))
    other, _ = open_model(tmp_path)
    assert other.norm.weight.dtype == np.float32
    arrays, metadata = safetensors.read(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert ("lm_head.weight" in arrays) == ("tied" not in changes)
    positions = arrays["model.decoder.embed_positions.weight"]
    assert positions.shape == (7, 8) and not positions[:2].any()
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["activation_function"]) == ("opt", "gelu_new")
    assert (config["max_position_embeddings"], config["dtype"]) == (5, np.dtype(dtype).name)


def test_compressed_layers_are_written_as_what_they_are(tmp_path):
    model = quantise_model(toy(), 4)
    save_pretrained(model, tmp_path)
    np.testing.assert_allclose(
        logits(open_model(tmp_path, np.float64)[0], IDS), logits(model, IDS), atol=1e-12
    )


# ------------------------------------------------------------------ what has no form


def unfrozen(model):
    model.norm.bias.requires_grad = True
    return model


def mixed(model):
    ml.lora(model, 2, targets=("blocks.0.attn.q", "blocks.1.attn.q"), rng=rng(1))
    put(model, "blocks.1.attn.q", ml.IA3(model.blocks[1].attn.q.base))
    return ml.freeze(model)


def nowhere(model):
    model.blocks[0].attn.q.weight.data[3] = 0
    return RECIPES["dora"](model)


def two_dropouts(model):
    ml.lora(model, 2, rng=rng(1)).blocks[0].attn.q.dropout = 0.5
    return model


@pytest.mark.parametrize(
    "make, recipe, error, message",
    [
        (toy, lambda m: ml.adapter(m, 2, norms=False, rng=rng()), TypeError, "no form for Adapter"),
        (toy, ml.bitfit, ValueError, r"blocks.0.norm1.bias trains outside of an adapter"),
        (toy, ml.full, ValueError, "trains outside of an adapter"),
        (toy, lambda m: ml.freeze(m), ValueError, "it carries no adapter"),
        (toy, lambda m: ml.token_rows(m, [1]), TypeError, "no form for TokenRows"),
        (toy, lambda m: unfrozen(adapted(m)), ValueError, "norm.bias trains outside"),
        (toy, mixed, TypeError, "no form for IA3 with LoRA"),
        (toy, nowhere, ValueError, "rows of zeros"),
        (toy, two_dropouts, ValueError, "differ in dropout or rslora"),
        (
            toy,
            lambda m: adapted(m, targets="positions"),
            ValueError,
            "cannot adapt a layer positions of opt",
        ),
        (a_gpt2, lambda m: ml.ia3(m, out="*.k", into="*.q"), ValueError, "c_attn holds three"),
    ],
)
def test_what_peft_cannot_hold_is_refused(tmp_path, make, recipe, error, message):
    with pytest.raises(error, match=message) as told:
        export_peft(recipe(make()), tmp_path)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_or_a_layer_that_it_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"family is 'bloom'; expected one of .*opt"):
        export_peft(adapted(toy()), tmp_path, family="bloom")
    with pytest.raises(ValueError, match="a layer blocks.0.mlp.gate of gpt2"):
        export_peft(adapted(llama(), targets="*.gate"), tmp_path, family="gpt2")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: adapted(toy()), "carries an adapter"),
        (llama, "cannot have the shape"),
        (a_gpt2, "cannot have the shape"),
        (lambda: small(n_head=[1, 2], d_head=4), "cannot have the shape"),
        (lambda: small(d_ff=[3, 4]), "cannot have the shape"),
    ],
)
def test_what_is_no_opt_is_not_saved_as_one(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ a hostile folder


@pytest.fixture
def folder(tmp_path):
    """A good folder, to be spoiled."""
    export_peft(adapted(toy()), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which minilora has"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; expected 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA', 8 arrays; expected LORA, IA3"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": ["LORA"]}, "TypeError: unhashable"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; expected 1"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 3}, "A has 2 rows; the configuration has another rank"),
        ({"rank_pattern": {"q_proj": 1}}, "A has 2 rows; the configuration has another rank"),
        ({"rank_pattern": {"(": 1}}, "unterminated subpattern"),
        ({"rank_pattern": 5}, "int"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"lora_alpha": "big"}, "TypeError"),
        ({"lora_dropout": 2}, "dropout 2"),
        ({"use_dora": True}, "magnitude is missing in the file"),
        ({"peft_type": "IA3"}, "KeyError: 'scale'"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt_embeddings"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(folder, fields, message):
    change(folder, **fields)
    model = toy()
    with refused(model, ValueError, message):
        import_peft(model, folder)


def test_fields_that_change_nothing_are_let_through(folder):
    usual = {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16}
    usual |= {"modules_to_save": None, "loftq_config": {}, "layers_pattern": None, "revision": None}
    change(folder, **usual, lora_bias=False, layers_to_transform=[0, 1])
    assert len(wrappers(import_peft(toy(), folder))) == 4


def spoiled(arrays, name, array=None):
    """The arrays with one more, or one that is gone."""
    return {k: a for k, a in arrays.items() if k != name} | ({} if array is None else {name: array})


Q = "base_model.model.model.decoder.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    "name, array, message",
    [
        (f"{Q}lora_A.weight", None, "KeyError"),
        (f"{Q}lora_A.weight", np.ones((2, 9)), r"blocks.0.attn.q.A is \(2, 9\) in the file"),
        (f"{Q}lora_A.weight", np.ones(2), "blocks.0.attn.q.A"),
        (f"{Q}lora_A.weight", np.ones((2, 8), int), "expected floats"),
        (f"{Q}lora_A.weight", np.ones(()), "TypeError"),
        (f"{Q}lora_B.weight", np.ones((9, 2)), "blocks.0.attn.q.B"),
        (f"{Q}lora_B.weight", np.ones((8, 3)), "blocks.0.attn.q|IndexError"),
        (f"{Q}lora_B.bias", np.ones(8), "no layer here has a place for it"),
        (f"{Q}lora_magnitude_vector", np.ones(8), "magnitude"),
        (Q.replace(".0.", ".7.") + "lora_A.weight", np.ones((2, 8)), "no layer here"),
        (Q.replace("q_proj", "rotary") + "lora_A.weight", np.ones((2, 8)), "no layer here"),
        ("lora_A.weight", np.ones((2, 8)), "no layer here"),
        ("base_model.model.model.decoder.layers.{}.fc1.lora_A.weight", np.ones((2, 8)), "no layer"),
        ("base_model.model.lm_head.weight", np.ones((3, 8)), "own table"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(folder, name, array, message):
    _, arrays, _ = files(folder)
    safetensors.write(folder / WEIGHTS, spoiled(arrays, name, array))
    model = toy()
    with refused(model, ValueError, message) as error:
        import_peft(model, folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(folder))


def test_another_base_is_refused(folder):
    for model, message in (
        (small(n_embd=4), "made for another model"),
        (small(n_layer=1), "no layer here"),
        (llama(), "made for another model"),
    ):
        with refused(model, ValueError, message):
            import_peft(model, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, '{"peft_type": '])
def test_damaged_json_is_refused(folder, text):
    (folder / CONFIG).write_text(text, encoding="utf-8")
    model = toy()
    with refused(model, ValueError, CONFIG):
        import_peft(model, folder)


def test_a_damaged_or_missing_file_is_refused(folder, tmp_path):
    model, good = toy(), (folder / WEIGHTS).read_bytes()
    for junk in (b"", good[:100], good[:-1], b"\x80\x04" * 50):
        (folder / WEIGHTS).write_bytes(junk)
        with refused(model, ValueError, WEIGHTS):
            import_peft(model, folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle, which is not opened")
    with refused(model, OSError, WEIGHTS):
        import_peft(model, folder)
    with refused(model, ValueError, "No such file"):
        import_peft(model, tmp_path / "nowhere")


def test_an_empty_adapter_is_refused(folder):
    safetensors.write(folder / WEIGHTS, {})
    model = toy()
    with refused(model, ValueError, "peft_type is 'LORA', 0 arrays"):
        import_peft(model, folder)


def test_a_second_adapter_is_not_put_over_the_first(folder):
    model = adapted(toy())
    with refused(model, ValueError, "carries an adapter"):
        import_peft(model, folder)


def test_a_prompt_that_leaves_no_room_is_refused(folder):
    change(folder, peft_type="PREFIX_TUNING")
    for shape, message in (((12, 32), "leaves 0 positions"), ((2, 30), "."), ((0, 32), "m is 0")):
        safetensors.write(folder / WEIGHTS, {"prompt_embeddings": np.ones(shape)})
        model = toy()
        with refused(model, ValueError, message):
            import_peft(model, folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'; expected 'gelu_new'"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before is False; expected True"),
        ({"word_embed_proj_dim": 4}, "word_embed_proj_dim is 4; expected 8"),
        ({"model_type": "bloom"}, "its architecture is 'bloom'"),
        ({"num_hidden_layers": 10**9}, "1000000000 blocks are claimed"),
        ({"num_hidden_layers": "2"}, "TypeError|blocks are claimed"),
        ({"ffn_dim": 31}, "by the configuration"),
        ({"num_attention_heads": 3}, "n_head is 3"),
        ({"max_position_embeddings": 4}, "positions.weight"),
    ],
)
def test_an_opt_that_is_no_toy_is_refused(tmp_path, fields, message):
    save_pretrained(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | fields
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        open_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_fields_that_are_not_there_are_as_transformers_has_them(tmp_path):
    save_pretrained(small(tied=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for name in ("tie_word_embeddings", "do_layer_norm_before", "enable_bias"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_model(tmp_path)[0].config["tied"]
    del config["activation_function"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="activation_function is 'relu'"):
        open_model(tmp_path)
