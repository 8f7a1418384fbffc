"""Adapters in the folders of PEFT, out and back, and the toy base in a folder of transformers.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`, under the names that
the layers have in transformers, where OPT is the architecture in the shape of the toy. Where PEFT
sees one layer and the house three (GPT-2's `c_attn` is q, k and v), their bypasses are stacked on
the way out and parted on the way back.

PEFT's type      here
LORA             lora: LoRA, rsLoRA, DoRA, and PiSSA as an update of rank 2r; tables and the head
IA3              ia3
PREFIX_TUNING    prefix, where tokens move on by m positions, as after a past of m tokens
PROMPT_TUNING    prompt, where tokens move on by m positions
none             adapter, bitfit, token_rows, LoRA on OPT's positions, a mix of kinds

Our recipes leave the tokens where they are, behind a prefix or a prompt; PEFT moves them on by m.
With rotary positions that is the same, once the keys of a prefix are turned. With learned ones it
is not: such a prefix or prompt of ours is refused, and one that comes from PEFT moves the tokens
here too.
"""

import json
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np

from .. import ops, safetensors
from ..io import fill
from ..nn import Embedding, Linear
from ..peft import IA3, DoRA, LoRA, LoRAEmbedding, PiSSA, Prefix, Prompt, TokensFirst, WithoutPrompt
from ..surgery import plain, wear, wrappers
from ..tensor import Tensor
from ..transformer import Transformer
from .files import NAMES, read_json, said_of, widened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model."  # PEFT holds the model twice wrapped
VIRTUAL = "prompt_embeddings"  # PEFT's name of a prompt, and of a prefix
MARK = "minilora"  # in the file's metadata: the kind, where PEFT's form does not tell
LEAVES = {"lora_A.weight": "A", "lora_B.weight": "B"}
LEAVES |= {"lora_embedding_A": "A", "lora_embedding_B": "B"}
LEAVES |= dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude")
LEAVES |= dict.fromkeys(("base_layer.weight", "weight"), "table")
KNOWN = """
peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out bias
r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern init_lora_weights
megatron_core qalora_group_size eva_config feedforward_modules init_ia3_weights
num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers
encoder_hidden_size prefix_projection init_weights prompt_tuning_init prompt_tuning_init_text
tokenizer_name_or_path tokenizer_kwargs
""".split()  # fields that are used here, or that change nothing for an adapter that is trained
OFFSET = 2  # OPT's table of positions begins with two rows that no token uses

_OPT = {  # our names to OPT's, as in `files.NAMES`
    "tokens": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}
_OPT |= {
    f"blocks.{{}}.{ours}": f"model.decoder.layers.{{}}.{theirs}"
    for ours, theirs in {
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
        **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn.o": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }.items()
}
THEIRS, OURS = {}, {}  # PEFT's BERT has no head, and its `c_attn` is our q, k and v, in this order
for _family, _table in (NAMES | {"opt": _OPT}).items():
    THEIRS[_family] = {a: [re.sub(r"^bert\.|\.[qkv]$", "", b)] for a, b in _table.items()}
    for _our, (_their,) in THEIRS[_family].items():
        OURS[_their] = list(dict.fromkeys([*OURS.get(_their, []), _our]))


def _looked_up(name, table):
    """What a table has for a name with the number of a block in it: names, or nothing."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    key = name[: number.start()] + "{}" + name[number.end() :] if number else name
    return [found.format(number and number[0]) for found in table.get(key, ())]


def theirs(name, family):
    """The name of a layer in transformers: `blocks.0.attn.q` to `….layers.0.self_attn.q_proj`.

    Raises:
        ValueError: if the family is unknown, or has no such layer.
    """
    if family not in THEIRS:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(THEIRS)}")
    if not (found := _looked_up(name, THEIRS[family])):
        raise ValueError(f"{name}: {family} has no such layer")
    return found[0]


def family_of(model):
    """The `model_type` that a model has in transformers; a toy's is opt."""
    return getattr(model, "family", None) or model.config.get("model_type", "opt")


def ours(name):
    """Our names of a layer in transformers: one, or those of q, k and v for a `c_attn`.

    Raises:
        ValueError: if no family has such a layer.
    """
    if not (found := _looked_up(name.removeprefix("bert."), OURS)):
        raise ValueError(f"{name}: minilora has no such layer")
    return found


# ------------------------------------------------------------------ the toy base

OPT = {  # what an OPT must be to have the shape of the toy
    "model_type": "opt",
    "activation_function": "gelu_new",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


def save_pretrained(model, folder):
    """Write a toy `Transformer` as an OPT: `config.json` and `model.safetensors` in a folder.

    Compressed layers are written as plain ones.

    Raises:
        ValueError: if the model carries an adapter, or was pruned to a shape that OPT cannot have.
    """
    if wrappers(model):
        raise ValueError("save_pretrained: this model carries an adapter; merge or detach it first")
    c, arrays = model.config, {}
    if "d_head" in c or isinstance(c.get("d_ff"), list) or family_of(model) != "opt":
        raise ValueError(f"save_pretrained: an OPT cannot have the shape {c}")
    for name, module in model.named_modules():
        if hasattr(module, "weight") or hasattr(module, "dense"):
            weight = module.dense() if hasattr(module, "dense") else module.weight.data
            if name == "positions":
                weight = np.pad(weight, ((OFFSET, 0), (0, 0)))  # (n, d) -> (2 + n, d)
            arrays[f"{theirs(name, 'opt')}.weight"] = weight
            if getattr(module, "bias", None) is not None:
                arrays[f"{theirs(name, 'opt')}.bias"] = module.bias.data
    if c["tied"]:
        del arrays["lm_head.weight"]
    config = OPT | {"architectures": ["OPTForCausalLM"], "dtype": str(model.norm.weight.dtype)}
    config |= {"vocab_size": c["vocab_size"], "max_position_embeddings": c["n_positions"]}
    config |= dict.fromkeys(("hidden_size", "word_embed_proj_dim"), c["n_embd"])
    config |= {"num_hidden_layers": c["n_layer"], "num_attention_heads": c["n_head"]}
    config |= {"ffn_dim": c.get("d_ff", 4 * c["n_embd"]), "tie_word_embeddings": bool(c["tied"])}
    config |= dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), 0.0)
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    _write(folder, "config.json", config, "model.safetensors", arrays, {"format": "pt"})


def open_opt(folder, dtype=None):
    """Read a `Transformer` from the folder of an OPT, such as `save_pretrained` writes.

    Args:
        folder: it holds `config.json` and `model.safetensors`.
        dtype: float32 or float64; as stored if not given.

    Raises:
        ValueError: if a file is damaged, or the OPT has not the shape of the toy.
        OSError: if a file cannot be read.
    """
    c, arrays, _ = _read(folder, "config.json", "model.safetensors")
    with said_of(folder):
        c = {"activation_function": "relu", "tie_word_embeddings": True} | c  # if not said
        for name, wanted in (OPT | {"word_embed_proj_dim": c["hidden_size"]}).items():
            if c.get(name) not in (wanted, None):
                raise ValueError(f"{name} is {c[name]!r}; expected {wanted!r}")
        if not 1 <= c["num_hidden_layers"] <= len(arrays):
            raise ValueError(f"{c['num_hidden_layers']} layers, for {len(arrays)} tensors")
        wide = any(a.dtype == np.float64 for a in arrays.values())
        sizes = {"n_positions": c["max_position_embeddings"], "n_embd": c["hidden_size"]}
        sizes |= {"n_head": c["num_attention_heads"], "n_layer": c["num_hidden_layers"]}
        sizes |= {"vocab_size": c["vocab_size"], "d_ff": c["ffn_dim"]}
        sizes |= {"tied": bool(c["tie_word_embeddings"])}
        sizes |= {"dtype": dtype or (np.float64 if wide else np.float32)}
        model, found = Transformer(**sizes, rng=None), {}  # no memory is taken yet
        for key, a in arrays.items():
            layer, _, leaf = key.rpartition(".")
            (name,) = ours(layer)
            found[f"{name}.{leaf}"] = a[OFFSET:] if name == "positions" else a
        if sizes["tied"]:
            found.pop("head.weight", None)
        fill(dict(model.named_parameters()), found)
    return model


# ------------------------------------------------------------------ adapters out


def export_peft(model, folder, family=None, base=None):
    """Write the adapter that a model carries as a folder that PEFT opens on the same base.

    Args:
        model: with one kind of adapter. PiSSA goes out as the update that it stands for, a LoRA
            of rank 2r on the whole base, and `import_peft` makes PiSSA of it again.
        folder: made if it is not there.
        family: whose names the layers get: opt, gpt2, llama, mistral, qwen2, qwen3 or bert; if
            not given, the `model_type` in the model's configuration, or opt, for the toy.
        base: the name or folder of the base, for PEFT's record.

    Raises:
        TypeError, ValueError: if PEFT has no form for what trains here; nothing is written.

    Example::

        with detached(model):
            save_pretrained(model, "base")
        export_peft(model, "adapter", base="base")
        # PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    """
    found, family = wrappers(model), family or family_of(model)
    kinds = {type(w).__name__ for w in found.values()}
    inside = {id(p) for w in found.values() for p in w.learned().values()}
    beside = [name for name, p in model.trainable().items() if id(p) not in inside]
    if beside or not found:
        what = f"{beside[0]} trains outside of an adapter" if beside else "it carries no adapter"
        raise ValueError(f"export_peft: {what}; PEFT has no form for this model")
    if kinds <= {"LoRA", "LoRAEmbedding"} or kinds in ({"DoRA"}, {"PiSSA"}):
        config, arrays, metadata = _lora_out(model, found, family)
    elif kinds == {"IA3"}:
        config, arrays, metadata = _ia3_out(model, found, family)
    elif kinds - {"TokensFirst"} in ({"Prefix"}, {"Prompt", "WithoutPrompt"}) and family != "bert":
        config, arrays, metadata = _virtual_out(model, found)
    else:
        raise TypeError(f"export_peft: PEFT has no form for {' with '.join(sorted(kinds))}")
    config |= {"base_model_name_or_path": base and str(base), "inference_mode": True}
    config |= {"task_type": "FEATURE_EXTRACTION" if family == "bert" else "CAUSAL_LM"}
    _write(folder, CONFIG, config, WEIGHTS, arrays, {"format": "pt"} | metadata)


def _stacked(model, found, family):
    """(their name, our layers, what each of them wears or None) for each layer of theirs."""
    layers = dict(model.named_modules())
    for target in dict.fromkeys(theirs(name, family) for name in found):
        names = ours(target)
        if "positions" in names and family == "opt":
            raise ValueError("export_peft: positions: PEFT cannot adapt an OPT's positions")
        yield target, [layers[n] for n in names], [found.get(n) for n in names]


def _ratio(new, old, rslora):
    """By how much alpha grows with a rank so that scaling stays."""
    return (new / old) ** (0.5 if rslora else 1)


def _factors(w):
    """A and B of the update on the whole base: PiSSA's is what it has less what it began with."""
    if not isinstance(w, PiSSA):
        return w.A.data, w.B.data
    u, s, vt = np.linalg.svd(w.base.dense() - w.residual.data, full_matrices=False)
    root = np.sqrt(s[: w.r] / w.scaling)
    a, b = root[:, None] * vt[: w.r], u[:, : w.r] * root  # (r, d_in), (d_out, r)
    return np.concatenate([w.A.data, a]), np.concatenate([w.B.data, -b], axis=1)


def _lora_out(model, found, family):
    first = next(iter(found.values()))
    dropouts = {w.dropout for w in found.values() if not isinstance(w, LoRAEmbedding)} or {0.0}
    if len(dropouts) > 1 or any(w.rslora != first.rslora for w in found.values()):
        raise ValueError("export_peft: layers differ in dropout or rslora; PEFT has one for all")
    dora, whole = isinstance(first, DoRA), True
    arrays, ranks, alphas = {}, {}, {}
    for target, layers, worn in _stacked(model, found, family):
        pairs = {w: _factors(w) for w in worn if w is not None}
        lead, a = next(iter(pairs)), np.concatenate([a for a, _ in pairs.values()])  # (Σ r, d_in)
        rows, at = [], 0  # B has a block for each of ours, down its diagonal
        for layer, w in zip(layers, worn, strict=True):
            b = (
                np.zeros((layer.d_out, 0))
                if w is None
                else pairs[w][1] * (w.scaling / lead.scaling)
            )
            rows.append(np.pad(b, ((0, 0), (at, len(a) - at - b.shape[1]))))  # (d_out, Σ r)
            at += b.shape[1]
        name = f"{BASE}{target}.lora_"
        form = "embedding_{}" if isinstance(lead, LoRAEmbedding) else "{}.weight"
        arrays[name + form.format("A")] = a
        arrays[name + form.format("B")] = np.concatenate(rows).astype(a.dtype)
        if dora:
            arrays[f"{name}magnitude_vector"] = np.concatenate(list(map(_lengths, layers, worn)))
        ranks[target] = len(a)
        alphas[target] = lead.alpha * _ratio(len(a), lead.r, lead.rslora)
        whole = whole and len(layers) == 1
    r, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted(ranks)}
    config |= {"rank_pattern": {n: x for n, x in ranks.items() if x != r}}
    config |= {"alpha_pattern": {n: x for n, x in alphas.items() if x != alpha}}
    config |= {"use_rslora": first.rslora, "use_dora": dora, "lora_dropout": dropouts.pop()}
    config |= {"fan_in_fan_out": family == "gpt2", "bias": "none", "init_lora_weights": True}
    return config, arrays, {MARK: "PiSSA"} if isinstance(first, PiSSA) and whole else {}


def _lengths(layer, w):
    """DoRA's magnitude of each row: learned, or as they are in a layer that has no adapter."""
    if w is not None and w.nowhere.any():
        raise ValueError("export_peft: a weight has rows of zeros, of which PEFT's DoRA makes nan")
    return np.linalg.norm(layer.dense(), axis=1) if w is None else w.magnitude.data


def _ia3_out(model, found, family):
    arrays, into = {}, []
    for target, layers, worn in _stacked(model, found, family):
        sides = {w.side for w in worn if w is not None}
        if "in" in sides and len(layers) > 1:
            raise ValueError(f"export_peft: {target} holds three layers; its inputs have one scale")
        ones = [np.ones(layer.d_out, layer.dense().dtype) for layer in layers]
        scales = [one if w is None else w.scale.data for one, w in zip(ones, worn, strict=True)]
        scale = np.concatenate(scales)[:, None]  # (d, 1)
        arrays[f"{BASE}{target}.ia3_l"] = scale.T if "in" in sides else scale
        into += [target] if "in" in sides else []
    targets = [key.removeprefix(BASE).removesuffix(".ia3_l") for key in arrays]
    config = {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": into}
    return config | {"fan_in_fan_out": family == "gpt2", "init_ia3_weights": True}, arrays, {}


def _virtual_out(model, found):
    own = [w for w in found.values() if isinstance(w, (Prefix, Prompt))]
    w, moved = own[0], found.get("positions")
    moves = (w.m if isinstance(w, Prompt) else 0) - (0 if moved is None else moved.m)
    if getattr(model, "positions", None) is not None and moves != w.m:
        raise ValueError(
            f"export_peft: in PEFT the tokens move on by {w.m} positions; here they stay, and "
            f"were trained so; only what `import_peft` read moves them and can go out"
        )
    attn = getattr(model.blocks[0].attn, "base", model.blocks[0].attn)
    config = {"num_virtual_tokens": w.m, "num_layers": len(model.blocks)}
    config |= {"num_transformer_submodules": 1, "num_attention_heads": attn.n_head}
    if isinstance(w, Prompt):
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        return config | {"token_dim": w.prompt.shape[1]}, {VIRTUAL: w.prompt.data}, {}
    if len(own) != len(model.blocks) or any(other.m != w.m for other in own):
        raise ValueError("export_peft: PEFT has a prefix of one length in every block")
    pairs = [[p.data for p in other.pair()] for other in own]
    rows = [x for w, (k, v) in zip(own, pairs, strict=True) for x in (_turned(w.base, k, w.m), v)]
    wide = attn.k.d_out  # narrower where heads share their keys
    config |= {"peft_type": "PREFIX_TUNING", "token_dim": wide, "encoder_hidden_size": wide}
    config |= {
        "num_attention_heads": attn.n_head * wide // attn.q.d_out,
        "prefix_projection": False,
    }
    return config, {VIRTUAL: np.concatenate(rows, axis=1)}, {}  # (m, 2 · n_layer · wide)


def _turned(attn, keys, by):
    """Keys (m, d) for queries that stand `by` positions further on; they turn where queries do."""
    if not hasattr(attn, "rotary"):
        return keys
    cos, sin = attn.rotary(abs(by), abs(by) + 1, keys.dtype)  # (1, d_head / 2)
    return ops.rotary(Tensor(keys[None]), cos, np.sign(by) * sin).data[0]


# ------------------------------------------------------------------ adapters in


def import_peft(model, folder):
    """Put the adapter of a PEFT folder on a plain model; all of it trains. Returns the model.

    Which family the names are of is read off them. A LoRA on GPT-2's `c_attn` becomes one each on
    q, k and v, which then train apart. Of a table that PEFT saved beside its adapter nothing is
    taken: it must be the base's.

    Raises:
        ValueError: if a file is damaged, if it holds what minilora has not, if it is for a model
            of other names or shapes, or if the model carries an adapter. The model is then left
            as it was.
        OSError: if a file cannot be read.
    """
    if wrappers(model):
        raise ValueError("import_peft: this model carries an adapter; detach or merge it first")
    config, arrays, metadata = _read(folder, CONFIG, WEIGHTS)
    with said_of(folder):
        for key, value in config.items():
            if key not in KNOWN and value not in (None, False, {}, []):
                raise ValueError(f"{key} is {value!r}, which minilora has no form for")
        for key, usual in {"bias": "none", "num_transformer_submodules": 1}.items():
            if config.get(key) not in (usual, None):
                raise ValueError(f"{key} is {config[key]!r}; expected {usual!r}")
        kind = config.get("peft_type")
        if not arrays or kind not in READERS:
            raise ValueError(
                f"peft_type is {kind!r}, of {len(arrays)} arrays; expected one of "
                f"{', '.join(READERS)}, and some"
            )
        arrays = {key.removeprefix(BASE): a for key, a in arrays.items()}
        fresh, found = READERS[kind](model, config | {MARK: metadata.get(MARK)}, arrays)
        blank = {f"{n}.{key}": p for n, w in fresh.items() for key, p in w.learned().items()}
        fill(blank, found)
    return wear(model, fresh)


def _picked(config, key, target, usual):
    """What the first pattern of `rank_pattern` or `alpha_pattern` that matches gives a layer."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r}: {error}") from None
    return usual


def _lora_in(model, config, arrays):
    start, marked = config.get("init_lora_weights", True), config[MARK] == "PiSSA"
    if start not in (True, False, "gaussian", "eva", "pissa"):  # others change the base, or may
        raise ValueError(f"init_lora_weights is {start!r}; expected true, false, or 'pissa'")
    parts = {}
    for key, a in arrays.items():
        known = re.fullmatch(rf"(.+?)\.({'|'.join(map(re.escape, LEAVES))})", key)
        if not known:
            raise ValueError(f"{key}: minilora has no form for it")
        parts.setdefault(known[1], {})[LEAVES[known[2]]] = a
    layers = dict(model.named_modules())
    for target in [target for target in parts if "table" in parts[target]]:
        table, (name,) = parts[target].pop("table"), ours(target)
        here = layers[name].dense()
        if np.linalg.norm(table - here) > 0.01 * np.linalg.norm(here):  # or shapes that differ
            raise ValueError(f"{target}: the file has its own table, and not that of this base")
    parts = {target: own for target, own in parts.items() if own}
    layers = plain(model, [name for target in parts for name in ours(target)], (Linear, Embedding))
    fresh, found, rng = {}, {}, np.random.default_rng(0)
    for target, own in parts.items():
        a, b, magnitude = own["A"], own["B"], own.get("magnitude")
        names, r, rslora = ours(target), len(a), bool(config.get("use_rslora"))
        if _picked(config, "rank_pattern", target, config["r"]) != r:
            raise ValueError(f"{target}: A has {r} rows, another rank than the configuration has")
        if start == "pissa" and len(names) > 1:
            raise ValueError(f"{target}: one PiSSA for {', '.join(names)}, which are three here")
        alpha = _picked(config, "alpha_pattern", target, config["lora_alpha"])
        for name, (b_part, lengths) in zip(
            names, _parted(layers, names, b, magnitude), strict=True
        ):
            table = isinstance(layers[name], Embedding)
            kind = DoRA if config.get("use_dora") else PiSSA if marked or start == "pissa" else LoRA
            kind, dropout = (LoRAEmbedding, 0) if table else (kind, config.get("lora_dropout") or 0)
            # What was stacked is parted again: a direction belongs to those that it reaches.
            keep = b_part.any(axis=0) | ~b.any(axis=0) | (magnitude is not None)  # (r,)
            if not keep.any():
                continue
            own_a, own_b = a[keep], b_part[:, keep]
            rank = len(own_a) // 2 if marked and kind is PiSSA else len(own_a)
            settings = {"dropout": dropout, "rslora": rslora, "rng": rng}
            w = fresh[name] = kind(layers[name], rank, alpha * _ratio(rank, r, rslora), **settings)
            if rank < len(own_a):  # the second half is what PiSSA began with, taken away
                began = w.scaling * (own_b[:, rank:] @ own_a[rank:])
                w.residual = Tensor((layers[name].dense() + began).astype(w.A.dtype))
            found |= {f"{name}.A": own_a[:rank], f"{name}.B": own_b[:, :rank]}
            found |= {} if lengths is None else {f"{name}.magnitude": lengths}
    return fresh, found


def _parted(layers, names, *arrays):
    """Arrays whose rows are the features of several layers, parted: a list for each layer."""
    ends = list(accumulate(len(layers[name].dense()) for name in names))[:-1]
    return list(
        zip(*([None] * len(names) if a is None else np.split(a, ends) for a in arrays), strict=True)
    )


def _ia3_in(model, config, arrays):
    fresh, found = {}, {}
    for key, a in arrays.items():
        names = ours(key.removesuffix(".ia3_l"))
        layers, side = plain(model, names, (Linear,)), "in" if a.shape[0] == 1 else "out"
        parts = _parted(layers, names, a[:, 0]) if side == "out" else [(a[0],)] * len(names)
        for name, (scale,) in zip(names, parts, strict=True):
            fresh[name], found[f"{name}.scale"] = IA3(layers[name], side), scale
    return fresh, found


def _prefix_in(model, config, arrays):
    e, rng = arrays[VIRTUAL], np.random.default_rng(0)
    attns, m = plain(model, "blocks.*.attn", "q k v o n_head"), len(e)
    room, parts = model.config["n_positions"] - m, np.split(e, 2 * len(attns), axis=1)
    fresh, found = {name: Prefix(attn, m, room, rng=rng) for name, attn in attns.items()}, {}
    for name, keys, values in zip(attns, parts[::2], parts[1::2], strict=True):
        found |= {f"{name}.keys": _turned(attns[name], keys, -m), f"{name}.values": values}
    if getattr(model, "positions", None) is not None:  # as after a past of m tokens
        fresh["positions"] = TokensFirst(model.positions, -m)
    return fresh, found


def _prompt_in(model, config, arrays):
    e, n = arrays[VIRTUAL], model.config["n_positions"]
    (tokens,) = plain(model, "tokens", Embedding, ties=True).values()
    fresh = {"tokens": Prompt(tokens, len(e), n, rng=np.random.default_rng(0))}
    return fresh | {"norm": WithoutPrompt(model.norm, len(e))}, {"tokens.prompt": e}


READERS = {"LORA": _lora_in, "IA3": _ia3_in}
READERS |= {"PREFIX_TUNING": _prefix_in, "PROMPT_TUNING": _prompt_in}


# ------------------------------------------------------------------ files


def _read(folder, config, weights):
    """A JSON object, and arrays and metadata, from two files in a folder."""
    with said_of(folder):
        found = read_json(Path(folder, config))
        arrays, metadata = safetensors.mapped(Path(folder, weights))
        return found, {name: widened(a) for name, a in arrays.items()}, metadata


def _write(folder, config_name, config, weights_name, arrays, metadata):
    """Two files in a folder: what does not change the arrays' meaning is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / weights_name, arrays, metadata)
    text = json.dumps(config, indent=2) + "\n"
    safetensors.write_whole(folder / config_name, [text.encode()])
