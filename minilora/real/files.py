"""From files to models: `open_model` reads a GGUF file, or a folder as Hugging Face's libraries do.

A file is mapped into memory and checked against its configuration before anything is built; then
one tensor at a time is brought over. Blocks of 4 or 8 bits stay packed, as a `QuantLinear`.
"""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import safetensors
from ..compress.quantise import Quantised, pack
from ..compress.quantlinear import QuantLinear
from ..io import said_of
from ..surgery import put
from .models import Bert, Llama, gpt2, opt
from .text import from_folder, from_gguf

MODELS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama)
MODELS |= {"gpt2": gpt2, "opt": opt, "bert": Bert}


# Our names=theirs, by the architectures that have them; after `blocks`, those within a block.
_NAMES = """
llama mistral qwen2 qwen3 tokens=model.embed_tokens norm=model.norm head=lm_head
blocks=model.layers norm1=input_layernorm norm2=post_attention_layernorm attn.q=self_attn.q_proj
attn.k=self_attn.k_proj attn.v=self_attn.v_proj attn.o=self_attn.o_proj attn.q_norm=self_attn.q_norm
attn.k_norm=self_attn.k_norm mlp.gate=mlp.gate_proj mlp.up=mlp.up_proj mlp.down=mlp.down_proj

gpt2 tokens=transformer.wte positions=transformer.wpe norm=transformer.ln_f head=lm_head
blocks=transformer.h norm1=ln_1 norm2=ln_2 attn.q=attn.c_attn.q attn.k=attn.c_attn.k
attn.v=attn.c_attn.v attn.o=attn.c_proj mlp.up=mlp.c_fc mlp.down=mlp.c_proj

opt tokens=model.decoder.embed_tokens positions=model.decoder.embed_positions
norm=model.decoder.final_layer_norm head=lm_head blocks=model.decoder.layers
norm1=self_attn_layer_norm norm2=final_layer_norm attn.q=self_attn.q_proj attn.k=self_attn.k_proj
attn.v=self_attn.v_proj attn.o=self_attn.out_proj mlp.up=fc1 mlp.down=fc2

bert tokens=bert.embeddings.word_embeddings positions=bert.embeddings.position_embeddings
types=bert.embeddings.token_type_embeddings norm0=bert.embeddings.LayerNorm
blocks=bert.encoder.layer attn.q=attention.self.query attn.k=attention.self.key
attn.v=attention.self.value attn.o=attention.output.dense norm1=attention.output.LayerNorm
mlp.up=intermediate.dense mlp.down=output.dense norm2=output.LayerNorm

gguf tokens=token_embd norm=output_norm head=output
blocks=blk norm1=attn_norm norm2=ffn_norm attn.q=attn_q attn.k=attn_k attn.v=attn_v
attn.o=attn_output attn.q_norm=attn_q_norm attn.k_norm=attn_k_norm mlp.gate=ffn_gate mlp.up=ffn_up
mlp.down=ffn_down
"""
OFFSET = 2  # OPT's table of positions begins with two rows that no token uses
# In files of transformers, and no part of the model: masks, tables, heads of other tasks.
_IGNORED = (
    r"cls\..*|.*(rotary_emb\.inv_freq|position_ids|\.attn\.(masked_)?bias|pooler\.dense\.\w+)"
)


def names(kind, n_layer):
    """The layers of a model by our names, to their names in transformers, or in a GGUF file.

    GPT-2's q, k and v, which are one layer there, have names of their own: `c_attn.q`.

    Args:
        kind: the `model_type` of a configuration, or "gguf". n_layer: how many blocks.
    """
    (table,) = (t.split() for t in _NAMES.split("\n\n") if kind in t.split())
    found, at = {}, None
    for ours, theirs in (word.split("=") for word in table if "=" in word):
        if ours == "blocks":
            at = theirs
        elif at is None:
            found[ours] = theirs
        else:
            found |= {f"blocks.{i}.{ours}": f"{at}.{i}.{theirs}" for i in range(n_layer)}
    return found


class Stored(NamedTuple):
    """A tensor in a file: its shape, the bytes it will take, and a function that reads it."""

    shape: tuple
    nbytes: int
    read: Any  # () -> an array of floats, or a Quantised


def open_model(path, dtype=np.float32, packed=True):
    """Read a pre-trained model and its tokenizer.

    Args:
        path: a `.gguf` file of Llama's family (Llama, Mistral, Qwen2, Qwen3), or a folder with
            `config.json`, `model.safetensors` or its shards, and `tokenizer.json`: one of those,
            a GPT-2, or a BERT; or a toy that `save_pretrained` wrote, which needs no tokenizer.
        dtype: float32 or float64.
        packed: whether the blocks of a file's Q4_0, Q4_1 and Q8_0 layers stay packed, which
            takes a fraction of the memory; a step must then make each weight afresh. If not,
            all becomes plain layers.

    Returns:
        (model, tokenizer): a `Llama`, a `Transformer` or a `Bert`, and a `Tokenizer`, or None for
        a toy.

    Raises:
        ValueError: in one line, and before a weight is read: if the file is damaged, of another
            architecture, or does not fit its configuration, or if the model is larger than the
            memory that is free.
        ImportError: if `gguf` or `tokenizers` is not installed: `pip install "minilora[real]"`.
    """
    path = Path(path)
    with said_of(path):
        if path.is_dir():
            config, stored = _folder(path)
        elif path.suffix == ".gguf":
            config, stored, fields = _gguf(path, packed)
        else:
            raise ValueError("expected a .gguf file, or a folder with config.json")
        model = _blank(config, stored, dtype)
        tokenizer = None  # a toy reads no text
        if config["model_type"] != "opt" or (path / "tokenizer.json").exists():
            tokenizer = from_folder(path) if path.is_dir() else from_gguf(fields)
        for name, p in list(model.named_parameters()):
            a = stored[name].read()
            if not all(np.isfinite(x).all() for x in (a if isinstance(a, np.ndarray) else a[1:2])):
                raise ValueError(f"{name} holds a nan or an infinity; is the file damaged?")
            if isinstance(a, Quantised):
                layer, bias = name.rpartition(".")[0], stored.get(name[:-6] + "bias")
                put(model, layer, QuantLinear.of(a, bias and bias.read().astype(dtype), dtype))
            else:
                p.data = np.array(a, dtype)
    return model, tokenizer


def _blank(config, stored, dtype):
    """A model for this configuration that takes no memory yet, if what is stored fits it."""
    n = config.get("num_hidden_layers", config.get("n_layer"))
    if type(n) is not int or not 0 < n <= len(stored):
        raise ValueError(f"{n!r} blocks are claimed, for {len(stored)} tensors")
    model = MODELS[config["model_type"]](config, rng=None, dtype=dtype)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    if "head.weight" not in wanted:
        stored.pop("head.weight", None)  # tied, and stored all the same
    found = {name: each.shape for name, each in stored.items()}
    if wanted != found:
        name = min(dict(wanted.items() ^ found.items()))
        there, here = found.get(name, "missing"), wanted.get(name, "not there")
        raise ValueError(f"{name} is {there} in the file, and {here} by the configuration")
    size = np.dtype(dtype).itemsize
    needed = sum(each.nbytes or size * math.prod(each.shape) for each in stored.values())
    if needed > free_memory():
        raise ValueError(f"it needs {needed / 1e9:.1f} GB; {free_memory() / 1e9:.1f} GB are free")
    return model


def free_memory():
    """Bytes that this machine can still give, where it says so (Linux), else no limit."""
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", told.read_text("ascii") if told.exists() else "")
    return 1024 * int(found[1]) if found else math.inf


# ------------------------------------------------------------------ a folder


def _folder(path):
    """The configuration and the stored tensors of a folder, by our names."""
    config, stored = read_json(path / "config.json"), {}
    kind, n = config.get("model_type"), config.get("num_hidden_layers", config.get("n_layer"))
    if kind not in MODELS:
        raise ValueError(f"its architecture is {kind!r}; expected one of {', '.join(MODELS)}")
    files = [path / "model.safetensors"]
    if not files[0].exists():
        shards = read_json(path / "model.safetensors.index.json")["weight_map"].values()
        files = [path / name for name in sorted(set(shards))]
        if any(file.parent != path for file in files):
            raise ValueError("the index of its shards leads out of the folder")
    arrays = {name: a for file in files for name, a in safetensors.mapped(file)[0].items()}
    arrays = dict(_conv1d(arrays)) if kind == "gpt2" else arrays
    ours = {_bare(b): a for a, b in names(kind, min(n, len(arrays))).items()}
    for name, a in arrays.items():
        layer, _, part = _bare(name).rpartition(".")
        layer = ours.get(layer, layer)
        a = a[OFFSET:] if kind == "opt" and layer == "positions" else a
        if not re.fullmatch(_IGNORED, name):
            stored[f"{layer}.{part}"] = Stored(a.shape, 0, lambda a=a: widened(a))
    return config, stored


def read_json(path):
    """The object in a JSON file; an error of one line if it is not there, or is none."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _bare(name):
    """A name without the name of the whole, which some files have and others have not."""
    return re.sub(r"^(model|transformer|bert)\.", "", name)


def _conv1d(arrays):
    """GPT-2's weights lie on their side, and those of q, k and v in one: as linear layers."""
    for name, a in arrays.items():
        a = a.T if a.ndim == 2 and ".c_" in f".{name}" else a  # (d_in, d_out) -> (d_out, d_in)
        layer, _, part = name.rpartition(".")
        if layer.endswith("c_attn"):
            for letter, each in zip("qkv", np.split(a, 3), strict=True):
                yield f"{layer}.{letter}.{part}", each
        else:
            yield name, a


def widened(a):
    """An array as floats that NumPy can work with: BF16 is the upper half of a float32."""
    if a.dtype.names:
        return (a["bf16"].astype(np.uint32) << 16).view(np.float32)
    if a.dtype.kind != "f":
        raise ValueError(f"a weight has dtype {a.dtype}; expected floats")
    return a


# ------------------------------------------------------------------ GGUF


# Our configuration=their field, without which there is no model.
_FIELDS = (
    "hidden_size=embedding_length num_hidden_layers=block_count num_attention_heads="
    "attention.head_count intermediate_size=feed_forward_length max_position_embeddings="
    "context_length rms_norm_eps=attention.layer_norm_rms_epsilon"
)


def _gguf(path, packed):
    """The configuration and the stored tensors of a GGUF file, and its fields."""
    import gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name, value):  # it cuts `data` in a hundred thousand pieces, and a
            plain = np.asarray(value) if name == "data" else value  # piece of a memmap is slow
            super().__setattr__(name, plain)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OSError, OverflowError, struct.error) as error:
        raise ValueError(f"it is damaged, or no GGUF file: {error}") from None
    kind, tensors = fields.get("general.architecture"), {t.name: t for t in reader.tensors}
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"its architecture is {kind!r}; expected llama, qwen2 or qwen3")
    own = {x.removeprefix(f"{kind}."): value for x, value in fields.items() if x.startswith(kind)}
    config = {ours: own[theirs] for ours, theirs in (x.split("=") for x in _FIELDS.split())}
    n_head, n = config["num_attention_heads"], config["num_hidden_layers"]
    n_kv = own.get("attention.head_count_kv", n_head)
    d_head = own.get("attention.key_length", config["hidden_size"] // n_head)
    config |= {"model_type": kind, "vocab_size": len(fields["tokenizer.ggml.tokens"])}
    config |= {"num_key_value_heads": n_kv, "head_dim": d_head}
    config |= {"rope_theta": own.get("rope.freq_base", 10000.0)}
    config |= {"tie_word_embeddings": "output.weight" not in tensors}
    # a Llama has biases on all four of its attention's layers, or on none
    config |= {"attention_bias": kind == "llama" and "blk.0.attn_output.bias" in tensors}
    if own.get("rope.dimension_count", d_head) != d_head or own.get("expert_count"):
        raise ValueError("it has experts, or heads of which a part turns; expected neither")
    scaling = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if scaling[0] != "none":  # but for linear, the model will refuse
        config["rope_scaling"] = dict(zip(("type", "factor"), scaling, strict=True))
    if "rope_freqs.weight" in tensors:
        factors = tensors.pop("rope_freqs.weight").data.tolist()
        config["rope_scaling"] = {"type": "factors", "factors": factors}
    ours, stored = {b: a for a, b in names("gguf", min(n, len(tensors))).items()}, {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        layer, rows = ours.get(layer, layer), slice(None)
        if kind == "llama" and layer.endswith(("attn.q", "attn.k")):
            # Here feature 2i turns against 2i + 1; ours, i against i + d_head / 2: rows move.
            rows = np.arange((n_head if layer[-1] == "q" else n_kv) * d_head)
            rows = rows.reshape(-1, d_head // 2, 2).swapaxes(1, 2).reshape(-1)
        keep = packed and layer.startswith("blocks.") and part == "weight"
        stored[f"{layer}.{part}"] = _tensor(gguf, tensor, rows, keep)
    return config, stored, fields


_BLOCK = {"Q4_0": (4, 2), "Q4_1": (4, 4), "Q8_0": (8, 2)}  # bits, and the bytes before the codes


def _tensor(gguf, tensor, rows, keep):
    """A tensor of a GGUF file as `Stored`. rows: which to take, in which order."""
    kind, shape = tensor.tensor_type, tuple(int(n) for n in tensor.shape[::-1])
    bits = _BLOCK[kind.name][0] if keep and kind.name in _BLOCK else 0

    def read():
        data = np.asarray(tensor.data)[rows]
        if bits:
            return packed_blocks(data, kind.name, shape)
        return gguf.quants.dequantize(data, kind).reshape(shape)

    return Stored(shape, bits and math.prod(shape) * (bits + 2) // 8, read)


def packed_blocks(data, kind, shape):
    """A `Quantised` out of a file's blocks of 32 weights, bit for bit the same codes and scales.

    Q4_1 is w = zero + scale · q, with q from 0 to 15; Q4_0 and Q8_0 have no zero of their own,
    but q − 8 and a signed byte.

    Args:
        data: bytes. kind: Q4_0, Q4_1 or Q8_0. shape: (d_out, d_in).

    Source: the layout is that of ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`.
    """
    bits, head = _BLOCK[kind]
    blocks = data.reshape(-1, head + 4 * bits)  # (N, bytes of a block)
    halves = np.ascontiguousarray(blocks[:, :head]).view("<f2").astype(np.float32)  # (N, 1 or 2)
    scale, codes = halves[:, 0], blocks[:, head:]
    if bits == 8:  # a signed byte, and 128 more
        return Quantised((codes ^ 128).reshape(-1), scale, shape, 8, 32, "affine", scale * -128)
    codes = np.concatenate([codes & 15, codes >> 4], axis=1)  # lower halves first: (N, 32)
    zero = halves[:, 1] if kind == "Q4_1" else scale * -8
    return Quantised(pack(codes, 4), scale, shape, 4, 32, "affine", zero)
