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
    so k and v are smaller. `gated` MLPs have three matrices, plain ones two.
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

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, own(getattr(self, field.name)))

    def layers(self):
        """The linear layers of one block: name to (d_out, d_in)."""
        d, q, kv = self.d_model, self.n_head * self.d_head, self.n_kv_head * self.d_head
        found = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        if self.gated:
            found["gate"] = (self.d_ff, d)
        return found | {"up": (self.d_ff, d), "down": (d, self.d_ff)}

    def biases(self):
        """Numbers in the biases of the linear layers and the norms, in the whole model."""
        block = sum(d_out for name, (d_out, _) in self.layers().items() if name in self.biased)
        return self.n_layer * block + (2 * self.n_layer + 1) * self.d_model * self.norm_bias

    def parameters(self):
        """Parameters of the whole model; a tied head counts once."""
        matrices = sum(a * b for a, b in self.layers().values())
        norms = 2 * self.d_model + 2 * self.d_head * self.qk_norm
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
USUAL = {
    "gpt2": {"n_inner": None, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "llama": ROTARY | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "mistral": ROTARY | {"num_key_value_heads": 8},
    "qwen2": ROTARY,
    "qwen3": ROTARY | {"head_dim": 128, "attention_bias": False},
}
UNCOUNTED = "add_cross_attention", "num_local_experts", "num_experts", "n_routed_experts"


def shape_of(config):
    """The `Shape` of a model from its `config.json`: GPT-2, Llama, Mistral, Qwen2 or Qwen3.

    Args:
        config: a path, or the dictionary itself. A field that is missing stands for what it is
            in transformers, but sizes must be there.

    Raises:
        ValueError: for another `model_type`, a size that is missing, or a field that asks for
            parameters which are not counted here, such as those of experts.
    """
    if not isinstance(config, dict):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    kind, tops = config.get("model_type"), config.get("architectures") or ()
    if kind not in USUAL:
        raise ValueError(f"model_type is {kind!r}; expected one of {', '.join(USUAL)}")
    if kind == "gpt2":
        config = {GPT2_NAMES[n]: x for n, x in config.items() if n in GPT2_NAMES} | config
    wrong = [f"has {field}, which is not counted here" for field in UNCOUNTED if config.get(field)]
    wrong += [f"is a {top}" for top in tops if not top.endswith(("ForCausalLM", "LMHeadModel"))]
    wrong += [f"has no {name}" for name in SIZES[: 4 + (kind != "gpt2")] if not config.get(name)]
    if wrong:
        raise ValueError(f"this {kind} {wrong[0]}")
    _, d, _, n_head = sizes = [config[name] for name in SIZES[:4]]
    more = {name: config.get(name, usual) for name, usual in USUAL[kind].items()}
    tied = more["tie_word_embeddings"]
    if kind == "gpt2":
        sizes += n_head, d // n_head, more["n_inner"] or 4 * d, more["max_position_embeddings"]
        return Shape(*sizes, tied=tied, biased=PLAIN, norm_bias=True)
    n_kv_head, d_head = more["num_key_value_heads"] or n_head, more["head_dim"] or d // n_head
    biased = QKV * (kind == "qwen2") + PLAIN[:4] * bool(more.get("attention_bias"))
    biased += GATED * bool(more.get("mlp_bias"))
    sizes += n_kv_head, d_head, config["intermediate_size"]
    return Shape(*sizes, gated=True, tied=tied, biased=biased, qk_norm=kind == "qwen3")


GPT2 = Shape(50257, 768, 12, 12, 12, 64, 3072, 1024, biased=PLAIN, norm_bias=True)
GPT3 = Shape(50257, 12288, 96, 96, 96, 128, 49152, 2048, biased=PLAIN, norm_bias=True)
GPT3_REPORTED = 175_255_800_000  # "175,255.8M", Hu et al. 2021, table 4


@exact
def lora_parameters(shape, r, targets="qv"):
    """A and B of every target in every block: r (d_in + d_out) each.

    Args:
        shape: a `Shape`. r: the rank.
        targets: names of layers, or a string of their initials: `"qv"`, `("up", "down")`.

    Source: Hu et al. 2021, arXiv 2106.09685, section 5.1.
    """
    layers = shape.layers()
    unknown = [name for name in targets if name not in layers]
    if unknown:
        raise ValueError(f"targets has {unknown[0]!r}; expected names out of {', '.join(layers)}")
    return shape.n_layer * sum(r * (a + b) for a, b in (layers[name] for name in targets))


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


@exact
def training_memory(total, trainable, weight=2, gradient=2, state=8):
    """Weights for all, gradients and Adam's two means for what trains.

    Args:
        total, trainable: parameters.
        weight, gradient, state: bytes for each: by default 16-bit weights and gradients, and two
            32-bit means.
    """
    return Memory(total * weight, trainable * gradient, trainable * state)


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
