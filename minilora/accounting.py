"""Parameters, bytes and FLOPs of real models, by formula: the numbers of the LoRA paper by hand.

Nothing here needs a weight: a `config.json` in the manner of Hugging Face is enough.
"""

import functools
import json
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

GB, GIB, MB, MIB = 10**9, 2**30, 10**6, 2**20  # decimal, as disks are sold, and binary


def own(x):
    """A whole number as Python's own, which never overflows: NumPy's may have 32 bits."""
    return int(x) if isinstance(x, Integral) and not isinstance(x, bool) else x


def exact(count):
    """The function `count`, given Python's own whole numbers."""

    @functools.wraps(count)
    def call(*args, **kwargs):
        return count(*map(own, args), **{name: own(x) for name, x in kwargs.items()})

    return call


@dataclass(frozen=True)
class Shape:
    """What decides the number of parameters of a decoder-only Transformer.

    `n_kv_head` below `n_head` is grouped-query attention: several query heads share a key head,
    so k and v are smaller. `gated` MLPs have three matrices, plain ones two; with `experts` there
    are so many of them in a block, and a router that sends each token to `chosen` ones.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    n_kv_head: int
    d_head: int
    d_ff: int
    n_positions: int = 0  # learned positions; 0 for rotary ones
    gated: bool = False
    tied: bool = True
    biased: tuple = ()  # the linear layers that have a bias
    norm_bias: bool = False
    qk_norm: bool = False
    norms: int = 2  # a block
    fused: bool = False  # q, k and v are one layer, and so are gate and up
    experts: int = 0
    chosen: int = 0

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, own(getattr(self, field.name)))

    def layers(self):
        """The linear layers of one block: name to (d_out, d_in)."""
        d, q, kv = self.d_model, self.n_head * self.d_head, self.n_kv_head * self.d_head
        up, down = (self.d_ff, d), (d, self.d_ff)
        if self.fused:
            return {"qkv": (q + 2 * kv, d), "o": (d, q), "gate_up": (2 * up[0], d), "down": down}
        found = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        return found | ({"gate": up} if self.gated else {}) | {"up": up, "down": down}

    def times(self, name, active=False):
        """How often a block has this layer: one for each expert, or for each that a token sees."""
        return (self.chosen if active else self.experts) or 1 if name in GATED else 1

    def biases(self):
        """Numbers in the biases of the linear layers and the norms, in the whole model."""
        block = sum(d_out for name, (d_out, _) in self.layers().items() if name in self.biased)
        return self.n_layer * block + (2 * self.n_layer + 1) * self.d_model * self.norm_bias

    def parameters(self, active=False):
        """Parameters of the whole model; a tied head counts once. Active: those a token meets."""
        matrices = sum(self.times(n, active) * a * b for n, (a, b) in self.layers().items())
        matrices += self.experts * self.d_model  # the router
        norms = self.norms * self.d_model + 2 * self.d_head * self.qk_norm
        tables = self.vocab_size * self.d_model * (1 if self.tied else 2)
        tables += self.n_positions * self.d_model
        return self.n_layer * (matrices + norms) + self.d_model + tables + self.biases()


QKV, GATED = ("q", "k", "v"), ("gate", "up", "down")
PLAIN = (*QKV, "o", "up", "down")
SIZES = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
GPT2_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
GPT2_NAMES |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
# kind -> what counts beside the sizes, and what it is in transformers if it is not said
ROTARY = {"num_key_value_heads": 32, "head_dim": None, "tie_word_embeddings": False}
GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
EIGHT, BIASED = {"num_key_value_heads": 8}, {"attention_bias": False}
USUAL = {
    "gpt2": {"n_inner": None, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "llama": ROTARY | BIASED | {"num_key_value_heads": None, "mlp_bias": False},
    "mistral": ROTARY | EIGHT,
    "mixtral": ROTARY | EIGHT | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": ROTARY,
    "qwen3": ROTARY | BIASED | {"head_dim": 128},
    "phi3": ROTARY | {"num_key_value_heads": None},
    "gemma": GEMMA | BIASED | {"num_key_value_heads": 16},
    "gemma2": GEMMA | BIASED,
    "gemma3_text": GEMMA | BIASED,
}
# kind -> what is so in all of its models
ALWAYS = {"qwen3": {"qk_norm": True}, "phi3": {"fused": True}, "gemma2": {"norms": 4}}
ALWAYS |= {"qwen2": {"biased": QKV}, "gemma3_text": {"norms": 4, "qk_norm": True}}
UNCOUNTED = "add_cross_attention", "num_local_experts", "num_experts", "n_routed_experts"


def shape_of(config):
    """The `Shape` of a model from its `config.json`.

    GPT-2, Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi-3, Gemma, Gemma 2, and Gemma 3 for text.
    Another `model_type` is refused, and so is a field that asks for parameters not counted here.

    Args:
        config: a path, or the dictionary itself. A field that is missing stands for what it is
            in transformers, but sizes must be there.
    """
    if not isinstance(config, dict):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    kind, tops = config.get("model_type"), config.get("architectures") or ()
    if kind not in USUAL:
        raise ValueError(f"model_type is {kind!r}; expected one of {', '.join(USUAL)}")
    if kind == "gpt2":
        config = {GPT2_NAMES[n]: x for n, x in config.items() if n in GPT2_NAMES} | config
    odd = [field for field in UNCOUNTED if config.get(field) and field not in USUAL[kind]]
    wrong = [f"has {field}, which is not counted here" for field in odd]
    wrong += [f"is a {top}" for top in tops if not top.endswith(("ForCausalLM", "LMHeadModel"))]
    wrong += [f"has no {name}" for name in SIZES[: 4 + (kind != "gpt2")] if not config.get(name)]
    if wrong:
        raise ValueError(f"this {kind} {wrong[0]}")
    _, d, _, n_head = sizes = [config[name] for name in SIZES[:4]]
    more = {name: config.get(name, usual) for name, usual in USUAL[kind].items()}
    tied, experts = more["tie_word_embeddings"], more.get("num_local_experts", 0)
    if kind == "gpt2":
        sizes += n_head, d // n_head, more["n_inner"] or 4 * d, more["max_position_embeddings"]
        return Shape(*sizes, tied=tied, biased=PLAIN, norm_bias=True)
    sizes += more["num_key_value_heads"] or n_head, more["head_dim"] or d // n_head
    biased = PLAIN[:4] * bool(more.get("attention_bias")) + GATED * bool(more.get("mlp_bias"))
    always = {"gated": True, "biased": biased} | ALWAYS.get(kind, {})
    always |= {"experts": experts, "chosen": more.get("num_experts_per_tok", 0)}
    return Shape(*sizes, config["intermediate_size"], tied=tied, **always)


GPT2 = Shape(50257, 768, 12, 12, 12, 64, 3072, 1024, biased=PLAIN, norm_bias=True)
GPT3 = Shape(50257, 12288, 96, 96, 96, 128, 49152, 2048, biased=PLAIN, norm_bias=True)
GPT3_REPORTED = 175_255_800_000  # "175,255.8M", Hu et al. 2021, table 4


@exact
def lora_parameters(shape, r, targets="qv"):
    """A and B of every target in every block, and for every expert: r (d_in + d_out) each.

    Args:
        shape: a `Shape`. r: the rank.
        targets: names of layers, or a string of their initials: `"qv"`, `("up", "down")`.

    Source: Hu et al. 2021, arXiv 2106.09685, section 5.1.
    """
    layers = shape.layers()
    unknown = [name for name in targets if name not in layers]
    if unknown:
        raise ValueError(f"targets has {unknown[0]!r}; expected names out of {', '.join(layers)}")
    return shape.n_layer * sum(r * shape.times(name) * sum(layers[name]) for name in targets)


@exact
def adapter_parameters(d, r, n_adapters, n_norms=0):
    """Bottlenecks with their biases, and the LayerNorms that train: n (2dr + r + d) + 2 n_ln d.

    Source: Hu et al. 2021, arXiv 2106.09685, section 5.1.
    """
    return n_adapters * (2 * d * r + r + d) + 2 * n_norms * d


@exact
def prefix_parameters(d, l_p, l_i=0, n_layer=1):
    """PreEmbed d (l_p + l_i) for one layer, PreLayer L d (l_p + l_i) for `n_layer` of them.

    Source: Hu et al. 2021, arXiv 2106.09685, section 5.1.
    """
    return n_layer * d * (l_p + l_i)


class Memory(NamedTuple):
    """Bytes held while training, without the activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self):
        """All three together."""
        return sum(self)


# Bytes a number, as `training_memory` takes them. Adam has two means; the usual recipe of mixed
# precision keeps a 32-bit copy of the weights beside them. NF4 has double scales, blocks of 64.
RECIPES = {
    "mixed precision": {"weight": 2, "gradient": 2, "state": 12},
    "8-bit Adam": {"weight": 2, "gradient": 2, "state": 6},
    "bf16 only": {"weight": 2, "gradient": 2, "state": 4},
    "QLoRA": {"weight": 2, "gradient": 2, "state": 8, "frozen": (4 + 8 / 64 + 32 / 64 / 256) / 8},
}


@exact
def training_memory(total, trainable, weight=2, gradient=2, state=8, frozen=None):
    """Weights for all, gradients and the optimiser's numbers for what trains.

    Args:
        total, trainable: parameters.
        weight, gradient, state: bytes for each: by default 16-bit weights and gradients, and two
            32-bit means with no 32-bit copy of the weight; `RECIPES` has others by name, for
            `**RECIPES["mixed precision"]`.
        frozen: bytes for each weight that does not train; `weight` if not given.

    Source: Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1, for 2 + 2 + 12; Dettmers et
    al. 2021, arXiv 2110.02861, for 8-bit means; 2023, arXiv 2305.14314, for QLoRA.
    """
    weights = trainable * weight + (total - trainable) * (weight if frozen is None else frozen)
    return Memory(weights, trainable * gradient, trainable * state)


@exact
def kv_cache(shape, batch, length, width=2):
    """Bytes of the keys and values of so many sequences of so many tokens, `width` for a number.

    No window is taken into account: layers that look back no further keep no more.

    Source: Pope et al. 2022, arXiv 2211.05102, section 3.3; Ainslie et al. 2023, arXiv 2305.13245.
    """
    return 2 * shape.n_layer * shape.n_kv_head * shape.d_head * batch * length * width


@exact
def storage(tasks, base, per_task, shared):
    """Bytes for so many tasks: `shared`: one base and a file each; otherwise a base for each."""
    return base + tasks * per_task if shared else tasks * base


@exact
def linear_flops(n, r=None):
    """Multiplications of one training step of a square n × n layer, for one token.

    Full: the forward pass and two backward products, 3n². LoRA drops the gradient of the weight
    and adds six products with A or B: 2n² + 6nr.
    """
    return 3 * n * n if r is None else 2 * n * n + 6 * n * r


@exact
def break_even_rank(m, n):
    """The rank at which a factored m × n matrix holds as many numbers as the matrix: mn/(m+n)."""
    return m * n / (m + n)
