"""Llama and BERT out of the parts of the book; a GPT-2 is `Transformer` itself.

The layers have the names of the toy (`blocks.*.attn.[qkvo]`, `mlp.up`, `mlp.down`, and `mlp.gate`
beside them), so that every recipe finds them.
"""

from contextvars import ContextVar

import numpy as np

from .. import ops
from ..accounting import shape_of
from ..nn import MLP, Embedding, LayerNorm, Linear, Module, Parameter
from ..tensor import Tensor, within
from ..transformer import Attention, Block, Transformer, attend, past, recall


class RMSNorm(Module):
    """Rows over their root mean square, then a learned scale `weight` (d,)."""

    def __init__(self, d, eps, *, dtype=np.float32):
        self.weight, self.eps = Parameter(np.ones(d, dtype)), eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, self.eps)  # (…, d) -> (…, d)


def expect(config, wanted):
    """A ValueError names a field that is there, and not as wanted."""
    for name, value in wanted.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{name} is {config[name]!r}; expected {value!r}")


# ------------------------------------------------------------------ Llama


def frequencies(config, d_head):
    """The angle that each pair of features turns by from one position to the next, (d_head / 2,).

    Source: Su et al. 2021, arXiv 2104.09864, equation 15; Llama 3's scaling: the `rope_scaling` of
    its configuration, which slows the pairs that turn less than once in the old context.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise ValueError("partial_rotary_factor is not 1; expected heads that turn as a whole")
    turn = float(theta) ** (-np.arange(0, d_head, 2) / d_head)  # (d_head / 2,)
    if kind == "linear":
        return turn / rope["factor"]
    if kind == "factors":  # as GGUF files have it: worked out
        return turn / np.asarray(rope["factors"], np.float64)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * turn / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return turn * (kept + (1 - kept) / rope["factor"])
    if kind != "default":
        raise ValueError(f"rope type is {kind!r}; expected default, linear or llama3")
    return turn


class Rotary:
    """The cosines and sines of all positions up to the last one asked for, worked out once."""

    def __init__(self, turn):
        self.turn, self.tables = turn, {}

    def __call__(self, start, stop, dtype):
        """Two arrays (stop - start, d_head / 2)."""
        if len(self.tables.get(dtype, ((),))[0]) < stop:
            angles = np.arange(2 * stop)[:, None] * self.turn
            self.tables[dtype] = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        return [table[start:stop] for table in self.tables[dtype]]


class RotaryAttention(Attention):
    """Causal attention whose queries and keys turn with their positions; heads may share keys.

    `q_norm` and `k_norm` are an `RMSNorm` of d_head features, as in Qwen3, or None.
    """

    def __init__(self, shape, rotary, norm, *, rng, dtype):
        self.n_head, self.rotary = shape.n_head, rotary
        for name in "qkvo":
            setattr(self, name, projection(shape, name, rng, dtype))
        self.q_norm, self.k_norm = (norm(shape.d_head) if shape.qk_norm else None for _ in "qk")

    def qkv(self, x):
        """The queries (B, T, H · d_head), and keys and values (B, past + T, narrower or so)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rotary(past(), past() + x.shape[1], x.dtype)
        return ops.rotary(q, cos, sin), *recall(self, ops.rotary(k, cos, sin), v)


class SwiGLU(Module):
    """silu(gate(x)) · up(x), then down: (…, d) to (…, d)."""

    def __init__(self, shape, *, rng, dtype):
        for name in ("gate", "up", "down"):
            setattr(self, name, projection(shape, name, rng, dtype))

    d_out = property(lambda self: self.down.d_out, doc="Features that go out.")

    def forward(self, x):
        return self.down(ops.swiglu(self.gate(x), self.up(x)))  # (…, d) -> (…, d_ff) -> (…, d)


class LlamaBlock(Block):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), with RMSNorm: (B, T, d) to (B, T, d)."""

    def __init__(self, shape, rotary, norm, *, rng, dtype):
        self.norm1 = norm(shape.d_model)
        self.attn = RotaryAttention(shape, rotary, norm, rng=rng, dtype=dtype)
        self.norm2 = norm(shape.d_model)
        self.mlp = SwiGLU(shape, rng=rng, dtype=dtype)


def projection(shape, name, rng, dtype):
    """The linear layer of that name in a block of an `accounting.Shape`."""
    d_out, d_in = shape.layers()[name]
    return Linear(d_in, d_out, bias=name in shape.biased, rng=rng, dtype=dtype)


class Llama(Transformer):
    """Token ids (B, T) to logits (B, T, vocab_size): Llama, Mistral, Qwen2, Qwen3.

    Args:
        config: the dictionary of a `config.json`, as `accounting.shape_of` takes it.
        rng: a `numpy.random.Generator` for the start; None for what a file will fill.
        dtype: float32 or float64.

    Source: Touvron et al. 2023, arXiv 2302.13971, section 2.2.
    """

    positions = config = None  # keys and queries turn instead; and a field, not read off the layers

    def __init__(self, config, *, rng, dtype=np.float32):
        shape, eps = shape_of(config), config.get("rms_norm_eps", 1e-6)
        expect(config, {"hidden_act": "silu"})
        if shape.n_head % shape.n_kv_head or shape.d_head % 2:
            raise ValueError(f"heads do not fit: {shape}")
        longest = config.get("max_position_embeddings", 2048)
        window = config.get("use_sliding_window", config["model_type"] == "mistral")
        if window and config.get("sliding_window"):  # beyond it, each query would see less
            longest = min(longest, config["sliding_window"])
        self.config = config | {"n_positions": longest}

        def norm(d):
            return RMSNorm(d, eps, dtype=dtype)

        rotary, more = Rotary(frequencies(config, shape.d_head)), {"rng": rng, "dtype": dtype}
        d, n = shape.d_model, shape.vocab_size
        self.tokens = Embedding(n, d, std=0.02, **more)
        self.blocks = [LlamaBlock(shape, rotary, norm, **more) for _ in range(shape.n_layer)]
        self.norm = norm(d)
        self.head = Linear(d, n, bias=False, std=0.02, **more)
        if shape.tied:
            self.head.weight = self.tokens.weight

    longest = property(lambda self: self.config["n_positions"], doc="Positions that it can read.")


# ------------------------------------------------------------------ GPT-2


def gpt2(config, *, rng, dtype=np.float32):
    """The `Transformer` of a GPT-2's `config.json`.

    Source: Radford et al. 2019.
    """
    shape, act = shape_of(config), config.get("activation_function", "gelu_new")
    expect(config, {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False})
    if act not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"{act} is asked for; expected plain 'gelu_new'")
    alike = "vocab_size", "n_positions", "n_head", "n_layer", "d_ff", "tied"
    sizes = {name: getattr(shape, name) for name in alike}
    model = Transformer(**sizes, n_embd=shape.d_model, rng=rng, dtype=dtype)
    model.family = "gpt2"  # whose names its layers have in files: the toy's are OPT's
    return set_eps(model, config.get("layer_norm_epsilon", 1e-5))


OPT = {  # what an OPT must be to have the shape of the toy
    "model_type": "opt",
    "activation_function": "gelu_new",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
OPT_SIZES = {  # of the toy, by their names in an OPT's configuration
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "ffn_dim": "d_ff",
    "tie_word_embeddings": "tied",
}


def opt(config, *, rng, dtype=np.float32):
    """The `Transformer` of an OPT's `config.json`, if that OPT is a toy: with GPT-2's GELU.

    Source: Zhang et al. 2022, arXiv 2205.01068.
    """
    c = {"activation_function": "relu", "tie_word_embeddings": True} | config  # if not said
    expect(c, OPT | {"word_embed_proj_dim": c["hidden_size"]})
    return Transformer(**{b: c[a] for a, b in OPT_SIZES.items()}, rng=rng, dtype=dtype)


def set_eps(model, eps):
    """Give every LayerNorm of a model this epsilon. Returns the model."""
    for _, module in model.named_modules():
        if isinstance(module, LayerNorm):
            module.eps = eps
    return model


# ------------------------------------------------------------------ BERT

# what attention must not see: a mode, as the cache is
_unseen = ContextVar("unseen", default=False)


class FullAttention(Attention):
    """Self-attention that sees all that is not padding: (B, T, d) to (B, T, d)."""

    def forward(self, x):
        return self.o(attend(*self.qkv(x), self.n_head, _unseen.get()))


class ErfMLP(MLP):
    """up, the exact GELU, down: (…, d) to (…, d)."""

    def forward(self, x):
        return self.down(ops.gelu_erf(self.up(x)))  # (…, d) -> (…, d_ff) -> (…, d)


class BertBlock(Module):
    """norm1(x + attn(x)), then norm2(x + mlp(x)): (B, T, d) to (B, T, d)."""

    def __init__(self, d, n_head, d_ff, *, rng, dtype):
        self.attn = FullAttention(d, n_head, rng=rng, dtype=dtype)
        self.norm1 = LayerNorm(d, dtype=dtype)
        self.mlp = ErfMLP(d, d_ff=d_ff, rng=rng, dtype=dtype)
        self.norm2 = LayerNorm(d, dtype=dtype)

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Bert(Module):
    """Token ids (B, T), padded at the end, to one vector a text (B, d): the mean of its tokens'.

    Args:
        config: the dictionary of a `config.json` with `"model_type": "bert"`.
        rng, dtype: as for `Llama`.

    Source: Devlin et al. 2018, arXiv 1810.04805; the mean: Reimers & Gurevych 2019,
    arXiv 1908.10084, section 3.
    """

    def __init__(self, config, *, rng, dtype=np.float32):
        expect(config, {"hidden_act": "gelu", "position_embedding_type": "absolute"})
        n, d, self.config = config["vocab_size"], config["hidden_size"], config
        more = {"rng": rng, "dtype": dtype}
        self.tokens = Embedding(n, d, **more)
        self.positions = Embedding(config["max_position_embeddings"], d, **more)
        self.types = Embedding(config.get("type_vocab_size", 2), d, **more)
        self.norm0 = LayerNorm(d, dtype=dtype)
        sizes = d, config["num_attention_heads"], config["intermediate_size"]
        self.blocks = [BertBlock(*sizes, **more) for _ in range(config["num_hidden_layers"])]
        set_eps(self, config.get("layer_norm_eps", 1e-12))

    longest = property(lambda self: len(self.positions.dense()), doc="Positions it can read.")

    def forward(self, ids):
        ids = np.asarray(ids)
        on = ids != self.config.get("pad_token_id", 0)  # (B, T)
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.longest or not on.any(axis=1).all():
            most = f"(B, T) with T up to {self.longest}, and a token that is no padding in each row"
            raise ValueError(f"ids have shape {ids.shape}; expected {most}")
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1])) + self.types(0)
        x = self.norm0(x)  # (B, T, d)
        mask = np.where(on, 0, -np.inf)[:, None, None].astype(x.dtype)  # (B, 1, 1, T)
        with within(_unseen, mask):
            for block in self.blocks:
                x = block(x)
        share = (on / on.sum(axis=1, keepdims=True)).astype(x.dtype)[:, None]  # (B, 1, T)
        return ops.reshape(Tensor(share) @ x, len(ids), -1)  # (B, 1, d) -> (B, d)
