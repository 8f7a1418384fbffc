"""The exact rows: every number is the paper's formula, or the count of a published model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minilora import accounting as acc
from minilora.compress import quantise
from minilora.surgery import Count
from minilora.tensor import no_grad
from minilora.transformer import Transformer, cached

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}
MIXTRAL = MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
PHI3 = LLAMA | {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072}
PHI3 |= {"intermediate_size": 8192}
GEMMA = LLAMA | {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072}
GEMMA |= {"num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 24576}
GEMMA2 = GEMMA | {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26}
GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152}
GEMMA3 |= {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912}


@pytest.mark.parametrize(
    "config, parameters",
    [
        (GPT2, 124_439_808),
        (LLAMA, 6_738_415_616),
        (MISTRAL, 7_241_732_096),
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
        (MIXTRAL, 46_702_792_704),
        (PHI3, 3_821_079_552),
        (GEMMA, 8_537_680_896),
        (GEMMA2, 2_614_341_888),
        (GEMMA3, 999_885_952),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_models_are_counted_to_the_last_parameter(config, parameters):
    assert acc.shape_of(config).parameters() == parameters


def test_mixtral_holds_46_7_billion_and_a_token_meets_12_9():
    shape = acc.shape_of(MIXTRAL)
    assert round(shape.parameters() / 1e9, 1) == 46.7
    assert round(shape.parameters(active=True) / 1e9, 1) == 12.9
    expert = 3 * 4096 * 14336
    assert shape.parameters() - shape.parameters(active=True) == 32 * 6 * expert
    assert acc.shape_of(MISTRAL).parameters(active=True) == acc.shape_of(MISTRAL).parameters()


def test_a_config_is_read_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2), encoding="utf-8")
    assert acc.shape_of(path) == acc.GPT2


def test_gpt3_tied_and_untied():
    assert acc.GPT3.parameters() == 174_604_259_328
    assert replace(acc.GPT3, tied=False).parameters() == 175_221_817_344
    assert acc.GPT3.biases() == 12_988_416


def test_our_own_transformer_has_the_shape_of_gpt2():
    rng = np.random.default_rng(0)
    model = Transformer(vocab_size=24, n_positions=17, n_embd=64, n_head=4, n_layer=2, rng=rng)
    ours = {"model_type": "gpt2", "vocab_size": 24, "n_embd": 64, "n_layer": 2, "n_head": 4}
    shape = acc.shape_of(ours | {"n_positions": 17, "tie_word_embeddings": False})
    assert shape.parameters() == sum(p.size for p in model.parameters())
    assert shape.biases() == sum(
        p.size for name, p in model.named_parameters() if name.endswith(".bias")
    )


TINY_GPT2 = {"vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 2}
TINY = {"vocab_size": 11, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}
TINY |= {"intermediate_size": 10}


@pytest.mark.parametrize(
    "kind, fields, parameters, biases",
    [  # counted by transformers 5.24; accounting_oracle.py compares many more
        ("gpt2", {}, 16_212, 276),
        ("gpt2", {"n_inner": 7, "tie_word_embeddings": False}, 14_294, 194),
        ("gpt2", {"hidden_size": 8, "n_positions": 3}, 1_872, 184),
        ("llama", {}, 38_336, 0),
        ("llama", {"attention_bias": True}, 38_848, 512),
        ("llama", {"mlp_bias": True, "num_key_value_heads": 4}, 24_168, 168),
        ("llama", {"head_dim": 6, "tie_word_embeddings": True}, 103_168, 0),
        ("mistral", {}, 26_048, 0),
        ("mistral", {"attention_bias": True, "num_key_value_heads": 1}, 22_464, 0),
        ("mistral", {"sliding_window": 3}, 26_048, 0),
        ("qwen2", {}, 38_720, 384),
        ("qwen2", {"attention_bias": False, "num_key_value_heads": None}, 38_720, 384),
        ("qwen2", {"num_key_value_heads": 2, "head_dim": 6}, 58_224, 432),
        ("qwen3", {}, 2_103_232, 0),
        ("qwen3", {"num_key_value_heads": 8, "head_dim": 4, "attention_bias": True}, 47_056, 512),
        ("phi3", {}, 38_336, 0),
        ("phi3", {"num_key_value_heads": 8, "tie_word_embeddings": True}, 25_344, 0),
        ("gemma", {}, 3_150_592, 0),
        ("gemma", {"head_dim": 4, "num_key_value_heads": 2, "attention_bias": True}, 40_096, 416),
        ("gemma2", {}, 2_364_416, 0),
        ("gemma2", {"head_dim": 4, "tie_word_embeddings": False}, 42_688, 0),
        ("gemma3_text", {}, 2_365_440, 0),
        ("gemma3_text", {"head_dim": 6, "attention_bias": True}, 61_048, 608),
        ("mixtral", {}, 53_952, 0),
        ("mixtral", {"num_local_experts": 3, "num_key_value_heads": 2}, 31_040, 0),
        ("qwen3", {"layer_types": ["full_attention"] * 2, "mlp_bias": True}, 2_103_232, 0),
    ],
)
def test_every_field_that_changes_the_count_is_counted(kind, fields, parameters, biases):
    tiny = TINY_GPT2 if kind == "gpt2" else TINY
    shape = acc.shape_of({"model_type": kind} | tiny | fields)
    assert (shape.parameters(), shape.biases()) == (parameters, biases)


@pytest.mark.parametrize(
    "r, count", [(1, 4_718_592), (2, 9_437_184), (4, 18_874_368), (8, 37_748_736)]
)
def test_lora_on_gpt3(r, count):
    assert acc.lora_parameters(acc.GPT3, r, "qv") == count


def test_lora_counts_grouped_heads_and_named_layers():
    shape = acc.shape_of(MISTRAL)
    assert shape.layers()["v"] == (1024, 4096)
    assert acc.lora_parameters(shape, 8, "qv") == 32 * 8 * (8192 + 5120)
    assert acc.lora_parameters(shape, 2, ("up", "down")) == 32 * 2 * 2 * (4096 + 14336)
    with pytest.raises(ValueError, match="'z'"):
        acc.lora_parameters(shape, 8, "qz")


def test_lora_counts_layers_that_are_one_and_every_expert():
    phi3, mixtral = acc.shape_of(PHI3), acc.shape_of(MIXTRAL)
    assert phi3.layers()["qkv"] == (3 * 3072, 3072)
    assert acc.lora_parameters(phi3, 8, ("qkv",)) == 32 * 8 * 4 * 3072
    with pytest.raises(ValueError, match="'q'.* qkv"):
        acc.lora_parameters(phi3, 8)  # it has no q of its own
    assert acc.lora_parameters(mixtral, 2, ("q", "up")) == 32 * 2 * (8192 + 8 * (4096 + 14336))


@pytest.mark.parametrize(
    "r, count",
    [(1, 7_078_080), (4, 21_234_432), (8, 40_109_568), (16, 77_859_840), (64, 304_361_472)],
)
def test_adapters_on_gpt3(r, count):
    assert acc.adapter_parameters(12288, r, 192) == count


@pytest.mark.parametrize("r, count", [(6, 368_784), (224, 11_089_152)])
def test_adapters_on_gpt2_medium(r, count):
    assert acc.adapter_parameters(1024, r, 24, n_norms=24) == count


def test_prefixes_on_gpt3():
    assert acc.prefix_parameters(12288, 256, 8) == 3_244_032
    assert acc.prefix_parameters(12288, 8, 8, n_layer=96) == 18_874_368


def test_roberta_and_two_blocks_of_gpt2_medium():
    base = replace(acc.GPT2, n_layer=12, d_model=768)
    large = replace(acc.GPT2, n_layer=24, d_model=1024, n_head=16, n_kv_head=16)
    assert acc.lora_parameters(base, 8) == 294_912
    assert acc.lora_parameters(large, 8) == 786_432
    d = 1024
    assert 2 * (12 * d * d + 13 * d) == 25_192_448


def test_the_line_that_peft_prints_for_gpt2():
    added = 12 * 8 * (768 + 3 * 768)
    assert str(Count(added, acc.GPT2.parameters() + added)) == (
        "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    )


def test_memory_storage_flops_and_the_break_even_rank():
    memory = acc.training_memory(1000, 10)
    assert memory == (2000, 20, 80)
    assert memory.total == 2100
    assert acc.storage(100, 350, 0.035, shared=True) == pytest.approx(353.5)
    assert acc.storage(100, 350, 350, shared=False) == 35_000
    assert acc.linear_flops(768, 8) / acc.linear_flops(768) == 0.6875
    assert acc.break_even_rank(64, 256) == 51.2


@pytest.mark.parametrize(
    "recipe, a_parameter",  # published: 16 in mixed precision; two means of 1 byte each, not 4
    [("mixed precision", 16), ("8-bit Adam", 10), ("bf16 only", 8), ("QLoRA", 12)],
)
def test_bytes_of_training_by_name(recipe, a_parameter):
    settings = acc.RECIPES[recipe]
    assert acc.training_memory(1000, 1000, **settings).total == 1000 * a_parameter
    memory = acc.training_memory(6400, 0, **settings)
    bits = 4 + 0.126953125 if recipe == "QLoRA" else 16
    assert memory == (6400 * bits / 8, 0, 0)
    if recipe == "QLoRA":  # as our own layers store it
        q = quantise(np.ones((256, 64 * 256), np.float32), kind="nf4", double=True)
        per_weight = (q.nbytes - q.mean.nbytes) / (256 * 64 * 256)
        assert acc.RECIPES["QLoRA"]["frozen"] == per_weight


def test_the_cache_of_keys_and_values():
    llama, mistral, gemma = map(acc.shape_of, (LLAMA, MISTRAL, GEMMA2))
    assert acc.kv_cache(llama, 1, 4096) == 2 * acc.GIB  # half a MiB for each token
    assert acc.kv_cache(mistral, 8, 4096) == 4 * acc.GIB  # a quarter of the heads
    assert acc.kv_cache(gemma, 2, 10, width=4) == 2 * 26 * 4 * 256 * 2 * 10 * 4
    assert acc.kv_cache(acc.GPT3, np.int32(1000), np.int32(2048)) == 4 * 96 * 12288 * 2048_000
    rng = np.random.default_rng(0)
    model = Transformer(vocab_size=5, n_positions=9, n_embd=8, n_head=2, n_layer=3, rng=rng)
    with no_grad(), cached() as kept:
        model(np.zeros((4, 9), int))
    ours = acc.shape_of(
        {"model_type": "gpt2", "vocab_size": 5, "n_embd": 8, "n_layer": 3, "n_head": 2}
    )
    held = sum(k.nbytes + v.nbytes for k, v in kept.values())
    assert acc.kv_cache(ours, 4, 9, width=4) == held


def test_whole_numbers_of_32_bits_do_not_overflow():
    thousand, large = np.int32(1000), np.int32(2**31 - 1)
    assert acc.storage(thousand, 350 * acc.GB, 35 * acc.MB, shared=False) == 350_000 * acc.GB
    assert acc.storage(tasks=large, base=large, per_task=large, shared=True) == 2**62 - 2**31
    assert acc.training_memory(large, large).total == 12 * (2**31 - 1)
    assert acc.linear_flops(large, np.int32(4)) == 2 * (2**31 - 1) ** 2 + 24 * (2**31 - 1)
    assert acc.adapter_parameters(large, large, 1) == 2 * (2**31 - 1) ** 2 + 2 * (2**31 - 1)
    assert acc.prefix_parameters(large, large, 0, large) == (2**31 - 1) ** 3
    assert acc.break_even_rank(large, large) == (2**31 - 1) / 2
    sizes = 50257, 12288, 96, 96, 96, 128, 49152, 2048
    shape = acc.Shape(*map(np.int32, sizes), biased=acc.PLAIN, norm_bias=True)
    assert shape == acc.GPT3 and shape.parameters() == 174_604_259_328
    assert all(type(n) is int for pair in shape.layers().values() for n in pair)
    assert acc.lora_parameters(shape, large) == 96 * 4 * 12288 * (2**31 - 1)


@pytest.mark.parametrize(
    "config, word",
    [
        ({"model_type": "bert"}, "'bert'"),
        ({}, "gpt2, llama"),
        ({"model_type": "llama"}, "vocab_size"),
        (LLAMA | {"intermediate_size": None}, "intermediate_size"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts"),
        (GEMMA3 | {"model_type": "gemma3"}, "'gemma3'"),
        (MIXTRAL | {"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        (QWEN3 | {"num_experts": 128}, "num_experts"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2 | {"architectures": ["GPT2ForSequenceClassification"]}, "Classification"),
    ],
)
def test_what_it_cannot_count_it_says(config, word):
    with pytest.raises(ValueError, match=word):
        acc.shape_of(config)


def test_a_language_model_may_say_that_it_is_one():
    assert acc.shape_of(GPT2 | {"architectures": ["GPT2LMHeadModel"]}) == acc.GPT2
