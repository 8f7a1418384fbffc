"""Parameters, bytes and FLOPs of real models, by formula: the numbers of the LoRA paper by hand.

Nothing here needs a weight: a `config.json` in the manner of Hugging Face is enough.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GB, GIB, MB, MIB = 10**9, 2**30, 10**6, 2**20  # decimal, as disks are sold, and binary


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
    qkv_bias: bool = False
    other_bias: bool = False  # of o and of the MLP
    norm_bias: bool = False
    qk_norm: bool = False

    def layers(self):
        """The linear layers of one block: name to (d_out, d_in)."""
        d, q, kv = self.d_model, self.n_head * self.d_head, self.n_kv_head * self.d_head
        found = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        if self.gated:
            found["gate"] = (self.d_ff, d)
        return found | {"up": (self.d_ff, d), "down": (d, self.d_ff)}

    def biases(self):
        """Numbers in the biases of the linear layers and the norms, in the whole model."""
        out = {name: shape[0] for name, shape in self.layers().items()}
        block = sum(n for name, n in out.items() if name in "qkv") * self.qkv_bias
        block += sum(n for name, n in out.items() if name not in "qkv") * self.other_bias
        return self.n_layer * block + (2 * self.n_layer + 1) * self.d_model * self.norm_bias

    def parameters(self):
        """Parameters of the whole model; a tied head counts once."""
        matrices = sum(a * b for a, b in self.layers().values())
        norms = 2 * self.d_model + 2 * self.d_head * self.qk_norm
        tables = self.vocab_size * self.d_model * (1 if self.tied else 2)
        tables += self.n_positions * self.d_model
        return self.n_layer * (matrices + norms) + self.d_model + tables + self.biases()


def shape_of(config):
    """The `Shape` of a model from its `config.json`: GPT-2, Llama, Mistral, Qwen2 or Qwen3.

    Args:
        config: a path, or the dictionary itself.

    Raises:
        ValueError: for another `model_type`, or a field that is missing.
    """
    if not isinstance(config, dict):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    kind = config.get("model_type")
    try:
        if kind == "gpt2":
            d, heads = config["n_embd"], config["n_head"]
            return Shape(
                config["vocab_size"],
                d,
                config["n_layer"],
                heads,
                heads,
                d // heads,
                config.get("n_inner") or 4 * d,
                n_positions=config["n_positions"],
                tied=config.get("tie_word_embeddings", True),
                qkv_bias=True,
                other_bias=True,
                norm_bias=True,
            )
        if kind in ("llama", "mistral", "qwen2", "qwen3"):
            d, heads = config["hidden_size"], config["num_attention_heads"]
            return Shape(
                config["vocab_size"],
                d,
                config["num_hidden_layers"],
                heads,
                config.get("num_key_value_heads") or heads,
                config.get("head_dim") or d // heads,
                config["intermediate_size"],
                gated=True,
                tied=config.get("tie_word_embeddings", False),
                qkv_bias=kind == "qwen2" or config.get("attention_bias", False),
                qk_norm=kind == "qwen3",
            )
    except KeyError as error:
        raise ValueError(f"config has no {error}, which a {kind} needs") from None
    raise ValueError(
        f"model_type is {kind!r}; expected 'gpt2', 'llama', 'mistral', 'qwen2' or 'qwen3'"
    )


GPT2 = Shape(50257, 768, 12, 12, 12, 64, 3072, 1024, qkv_bias=True, other_bias=True, norm_bias=True)
GPT3 = Shape(
    50257, 12288, 96, 96, 96, 128, 49152, 2048, qkv_bias=True, other_bias=True, norm_bias=True
)
GPT3_REPORTED = 175_255_800_000  # "175,255.8M", Hu et al. 2021, table 4


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


def adapter_parameters(d, r, n_adapters, n_norms=0):
    """Bottlenecks with their biases, and the LayerNorms that train: n (2dr + r + d) + 2 n_ln d.

    Source: Hu et al. 2021, arXiv 2106.09685, section 5.1.
    """
    return n_adapters * (2 * d * r + r + d) + 2 * n_norms * d


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


def training_memory(total, trainable, weight=2, gradient=2, state=8):
    """Weights for all, gradients and Adam's two means for what trains.

    Args:
        total, trainable: parameters.
        weight, gradient, state: bytes for each: by default 16-bit weights and gradients, and two
            32-bit means.
    """
    return Memory(total * weight, trainable * gradient, trainable * state)


def storage(tasks, base, per_task, shared):
    """Bytes for so many tasks: `shared`: one base and a file each; otherwise a base for each."""
    return base + tasks * per_task if shared else tasks * base


def linear_flops(n, r=None):
    """Multiplications of one training step of a square n × n layer, for one token.

    Full: the forward pass and two backward products, 3n². LoRA drops the gradient of the weight
    and adds six products with A or B: 2n² + 6nr.
    """
    return 3 * n * n if r is None else 2 * n * n + 6 * n * r


def break_even_rank(m, n):
    """The rank at which a factored m × n matrix holds as many numbers as the matrix: mn/(m+n)."""
    return m * n / (m + n)
