"""Adapters in the folders of PEFT, out and back, and the toy base in a folder of transformers.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`, under the names that
the layers have in transformers. The toy has OPT's, which is the architecture there of its shape.
GPT-2's `c_attn` is our q, k and v: their bypasses are stacked on the way out, and parted on the
way back.

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
from itertools import accumulate
from pathlib import Path
from statistics import mode

import numpy as np

from .. import ops, safetensors
from ..compress.factor import truncated_svd
from ..io import fill, said_of
from ..nn import Embedding, Linear
from ..peft import IA3, DoRA, LoRA, LoRAEmbedding, PiSSA, Prefix, Prompt, TokensFirst, WithoutPrompt
from ..surgery import plain, wear, wrappers
from ..tensor import Tensor
from .files import MODELS, OFFSET, names, read_json, widened
from .models import OPT, OPT_SIZES, expect

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model."  # PEFT holds the model twice wrapped
TABLE = "model.decoder.embed_positions.weight"
VIRTUAL = "prompt_embeddings"  # PEFT's name of a prompt, and of a prefix
MARK = "minilora"  # in the file's metadata: the kind, where PEFT's form does not tell
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "ia3_l": "scale"}
PARTS |= {"lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude"}
PARTS |= {"base_layer.weight": "table", "weight": "table"}  # which PEFT saves beside an adapter
KNOWN = """
peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode bias
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out init_lora_weights
r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern megatron_core eva_config
qalora_group_size feedforward_modules init_ia3_weights num_virtual_tokens token_dim num_layers
num_transformer_submodules num_attention_heads encoder_hidden_size prefix_projection init_weights
prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs
""".split()  # fields that are used here, or that change nothing for an adapter that is trained


def family_of(model):
    """The `model_type` that a model has in transformers; a toy's is opt."""
    return getattr(model, "family", None) or model.config.get("model_type", "opt")


def _places(model, families):
    """The layers of some families by their names, each to a list of ours: q, k, v for `c_attn`."""
    found = {}
    for family in families:
        for our, their in names(family, len(model.blocks)).items():
            their = re.sub(r"^bert\.|\.[qkv]$", "", their)  # PEFT's BERT has no name in front
            found[their] = list(dict.fromkeys([*found.get(their, []), our]))
    return found


def _write(folder, names, config, arrays, metadata):
    """A JSON object and arrays, in two files of these names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / names[1], arrays, {"format": "pt"} | metadata)
    text = json.dumps(config, indent=2) + "\n"
    safetensors.write_whole(folder / names[0], [text.encode()])


def save_pretrained(model, folder):
    """Write a toy `Transformer` as an OPT: `config.json` and `model.safetensors` in a folder.

    `open_model` reads it. Compressed layers are written as plain ones.

    Raises:
        ValueError: if the model carries an adapter, or was pruned to a shape that OPT cannot have.
    """
    c, arrays = model.config, {}
    if wrappers(model):
        raise ValueError("save_pretrained: this model carries an adapter; merge or detach it first")
    if family_of(model) != "opt" or "d_head" in c or isinstance(c.get("d_ff"), list):
        raise ValueError(f"save_pretrained: an OPT cannot have the shape {c}")
    modules = dict(model.named_modules())
    for their, (name,) in _places(model, ["opt"]).items():
        layer = modules[name]
        arrays[f"{their}.weight"] = layer.dense() if hasattr(layer, "dense") else layer.weight.data
        if getattr(layer, "bias", None) is not None:
            arrays[f"{their}.bias"] = layer.bias.data
    arrays[TABLE] = np.pad(arrays[TABLE], ((OFFSET, 0), (0, 0)))  # (n, d) -> (2 + n, d)
    if c["tied"]:
        del arrays["lm_head.weight"]
    config = OPT | {"architectures": ["OPTForCausalLM"], "dtype": str(model.norm.weight.dtype)}
    sizes = {"d_ff": 4 * c["n_embd"]} | c
    config |= {"word_embed_proj_dim": c["n_embd"]} | {a: sizes[b] for a, b in OPT_SIZES.items()}
    config |= dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), 0.0)
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    _write(folder, ("config.json", "model.safetensors"), config, arrays, {})


# ------------------------------------------------------------------ out


def export_peft(model, folder, family=None, base=None):
    """Write the adapter that a model carries as a folder that PEFT opens on the same base.

    Args:
        model: with one kind of adapter. PiSSA goes out as the update that it stands for, a LoRA
            of rank 2r on the whole base; `import_peft` makes PiSSA of it again.
        folder: made if it is not there.
        family: whose names the layers get: opt, gpt2, llama, mistral, qwen2, qwen3 or bert; the
            model's own if not given, and opt for the toy.
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
    if family not in MODELS:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(MODELS)}")
    if beside or not found:
        what = f"{beside[0]} trains outside of an adapter" if beside else "it carries no adapter"
        raise ValueError(f"export_peft: {what}; PEFT has no form for this model")
    if kinds <= {"LoRA", "LoRAEmbedding"} or kinds in ({"DoRA"}, {"PiSSA"}):
        config, arrays = _lora_out(model, found, family)
    elif kinds == {"IA3"}:
        config, arrays = _ia3_out(model, found, family)
    elif kinds - {"TokensFirst"} in ({"Prefix"}, {"Prompt", "WithoutPrompt"}) and family != "bert":
        config, arrays = _virtual_out(model, found)
    else:
        raise TypeError(f"export_peft: PEFT has no form for {' with '.join(sorted(kinds))}")
    config |= {"base_model_name_or_path": base and str(base), "inference_mode": True}
    config |= {"task_type": "FEATURE_EXTRACTION" if family == "bert" else "CAUSAL_LM"}
    mark = {MARK: "PiSSA"} if kinds == {"PiSSA"} else {}
    _write(folder, (CONFIG, WEIGHTS), config, arrays, mark)


def _stacked(model, found, family):
    """(their name, a wrapper on it, [(our layer, its own wrapper or None), …]) for each adapted."""
    layers, left = dict(model.named_modules()), set(found)
    for their, ours in _places(model, [family]).items():
        worn = [found[name] for name in ours if name in found]
        if worn and their != "model.decoder.embed_positions":
            left -= set(ours)
            yield their, worn[0], [(layers[name], found.get(name)) for name in ours]
    if left:
        raise ValueError(f"export_peft: PEFT cannot adapt a layer {min(left)} of {family}")


def _ratio(new, old, rslora):
    """By how much alpha grows with a rank so that scaling stays."""
    return (new / old) ** (0.5 if rslora else 1)


def _factors(layer, w, lead):
    """A and B, for the scaling of `lead`, of the update on the whole base.

    PiSSA's is what it has less what it began with.
    """
    if w is None:
        return np.zeros((0, layer.d_in)), np.zeros((layer.d_out, 0))
    a, b = w.A.data, w.B.data
    if isinstance(w, PiSSA):
        left, right = truncated_svd(w.base.dense() - w.residual.data, w.r)  # (d_out, r), (r, d_in)
        a, b = np.concatenate([a, right]), np.concatenate([b, left / -w.scaling], axis=1)
    return a, b * (w.scaling / lead.scaling)


def _lora_out(model, found, family):
    dropouts = {w.dropout for w in found.values() if not isinstance(w, LoRAEmbedding)} or {0.0}
    kinds, rslora = {w.rslora for w in found.values()}, next(iter(found.values())).rslora
    if len(dropouts) > 1 or len(kinds) > 1:
        raise ValueError("export_peft: layers differ in dropout or rslora; PEFT has one for all")
    arrays, ranks, alphas = {}, {}, {}
    for their, lead, layers in _stacked(model, found, family):
        pairs = [_factors(layer, w, lead) for layer, w in layers]
        stacked, name = np.concatenate([a for a, _ in pairs]), f"{BASE}{their}.lora_"  # (Σ r, d_in)
        r, dtype, end, rows = len(stacked), lead.A.dtype, 0, []
        for _, b in pairs:  # (Σ d_out, Σ r): a block for each of ours, down the diagonal
            rows += [np.pad(b, ((0, 0), (end, r - end - b.shape[1])))]
            end += b.shape[1]
        own = {"A": stacked, "B": np.concatenate(rows)}
        form = "embedding_{}" if isinstance(lead, LoRAEmbedding) else "{}.weight"
        arrays |= {name + form.format(x): own[x].astype(dtype) for x in own}
        if isinstance(lead, DoRA):
            arrays[f"{name}magnitude_vector"] = np.concatenate([_lengths(*each) for each in layers])
        ranks[their], alphas[their] = r, lead.alpha * _ratio(r, lead.r, rslora)
    r, alpha = mode(ranks.values()), mode(alphas.values())
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted(ranks)}
    config |= {"rank_pattern": {n: x for n, x in ranks.items() if x != r}}
    config |= {"alpha_pattern": {n: x for n, x in alphas.items() if x != alpha}}
    config |= {"use_rslora": rslora, "use_dora": isinstance(lead, DoRA), "bias": "none"}
    config |= {"lora_dropout": dropouts.pop(), "init_lora_weights": True}
    return config | {"fan_in_fan_out": family == "gpt2"}, arrays


def _lengths(layer, w):
    """DoRA's magnitude of each row: learned, or as they are in a layer that has no adapter."""
    if w is not None and w.nowhere.any():
        raise ValueError("export_peft: a weight has rows of zeros, of which PEFT's DoRA makes nan")
    return np.linalg.norm(layer.dense(), axis=1) if w is None else w.magnitude.data


def _ia3_out(model, found, family):
    arrays, targets = {}, {"out": [], "in": []}
    for their, lead, layers in _stacked(model, found, family):
        sides = {getattr(w, "side", "out") for _, w in layers}
        if sides != {"out"} and len(layers) > 1:
            raise ValueError(f"export_peft: {their} holds three layers; its inputs have one scale")
        scales = [np.ones(layer.d_out) if w is None else w.scale.data for layer, w in layers]
        scale = np.concatenate(scales).astype(lead.scale.dtype)[:, None]  # (d, 1)
        arrays[f"{BASE}{their}.ia3_l"] = scale.T if lead.side == "in" else scale
        targets[lead.side].append(their)
    config = {"peft_type": "IA3", "target_modules": targets["out"] + targets["in"]}
    config |= {"feedforward_modules": targets["in"], "init_ia3_weights": True}
    return config | {"fan_in_fan_out": family == "gpt2"}, arrays


def _virtual_out(model, found):
    own = [w for w in found.values() if isinstance(w, (Prefix, Prompt))]
    w, attn = own[0], getattr(model.blocks[0].attn, "base", model.blocks[0].attn)
    moves = (w.m if isinstance(w, Prompt) else 0) - getattr(found.get("positions"), "m", 0)
    if model.positions is not None and moves != w.m:
        why = "here they stay, unless `import_peft` moved them"
        raise ValueError(f"export_peft: in PEFT the tokens move on by {w.m} positions; {why}")
    wide = attn.k.d_out  # narrower where heads share their keys
    config = {"num_virtual_tokens": w.m, "num_layers": len(model.blocks)}
    config |= {"num_transformer_submodules": 1, "num_attention_heads": attn.n_head}
    if isinstance(w, Prompt):
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        return config | {"token_dim": w.prompt.shape[1]}, {VIRTUAL: w.prompt.data}
    if len(own) != len(model.blocks) or any(other.m != w.m for other in own):
        raise ValueError("export_peft: PEFT has a prefix of one length in every block")
    parts = []
    for w in own:
        keys, values = (p.data for p in w.pair())
        parts += [_turned(w.base, keys, w.m), values]
    config |= {"peft_type": "PREFIX_TUNING", "token_dim": wide, "encoder_hidden_size": wide}
    config |= {"num_attention_heads": attn.n_head * wide // attn.q.d_out}
    return config, {VIRTUAL: np.concatenate(parts, axis=1)}  # (m, 2 · n_layer · wide)


def _turned(attn, keys, by):
    """Keys (m, d) for queries that stand `by` positions further on; they turn where queries do."""
    if not hasattr(attn, "rotary"):
        return keys
    cos, sin = attn.rotary(abs(by), abs(by) + 1, keys.dtype)  # (1, d_head / 2)
    return ops.rotary(Tensor(keys[None]), cos, np.sign(by) * sin).data[0]


# ------------------------------------------------------------------ back


def import_peft(model, folder):
    """Put the adapter of a PEFT folder on a plain model; all of it trains. Returns the model.

    Which family the names are of is read off them. A LoRA on GPT-2's `c_attn` becomes one each on
    q, k and v, which then train apart. Of a table that PEFT saved beside its adapter nothing is
    taken: it must be the base's.

    Raises:
        ValueError: if a file is damaged, if it holds what minilora has not, if it is for a model
            of other names or shapes, or if the model carries an adapter. The model is then left
            as it was.
        OSError: if the arrays cannot be read.
    """
    if wrappers(model):
        raise ValueError("import_peft: this model carries an adapter; detach or merge it first")
    with said_of(folder):
        config = read_json(Path(folder, CONFIG))
        arrays, metadata = safetensors.mapped(Path(folder, WEIGHTS))
        for key, value in config.items():
            if key not in KNOWN and value not in (None, False, {}, []):
                raise ValueError(f"{key} is {value!r}, which minilora has no form for")
        expect(config, {"bias": "none", "num_transformer_submodules": 1})
        kind = config.get("peft_type")
        if kind not in READERS or not arrays:
            known = ", ".join(READERS)
            raise ValueError(f"peft_type is {kind!r}, {len(arrays)} arrays; expected {known}")
        arrays = {key.removeprefix(BASE): widened(a) for key, a in arrays.items()}
        fresh, found = READERS[kind](model, config | {MARK: metadata.get(MARK)}, arrays)
        fill({f"{n}.{key}": p for n, w in fresh.items() for key, p in w.learned().items()}, found)
    return wear(model, fresh)


def _read(model, arrays):
    """[(their name, our layers by name, arrays by what they are)] for each layer in a file."""
    places, modules, found = _places(model, MODELS), dict(model.named_modules()), {}
    for key, a in arrays.items():
        known = re.fullmatch(rf"(?:bert\.)?(.+?)\.({'|'.join(PARTS)})(?:\.weight)?", key)
        if not known or known[1] not in places:
            raise ValueError(f"{key}: no layer here has a place for it")
        their, part = known[1], PARTS[known[2]]
        if part == "table":
            here = modules[places[their][0]].dense()
            if a.shape != here.shape or not np.linalg.norm(a - here) <= 0.01 * np.linalg.norm(here):
                raise ValueError(f"{their}: the file has its own table, and not that of this base")
        else:
            found.setdefault(their, {})[part] = a
    layers = plain(model, [n for their in found for n in places[their]], (Linear, Embedding))
    return [(their, {n: layers[n] for n in places[their]}, own) for their, own in found.items()]


def _parted(a, layers):
    """An array whose rows are the features of several layers, a part for each."""
    return np.split(a, list(accumulate(len(x.dense()) for x in layers.values()))[:-1])


def _lora_in(model, config, arrays):
    start, marked = config.get("init_lora_weights", True), config[MARK] == "PiSSA"
    if start not in (True, False, "gaussian", "eva", "pissa"):  # others change the base, or may
        raise ValueError(f"init_lora_weights is {start!r}; expected true, false, or 'pissa'")
    kind = DoRA if config.get("use_dora") else PiSSA if marked or start == "pissa" else LoRA
    fresh, found, rng = {}, {}, np.random.default_rng(0)
    for their, layers, own in _read(model, arrays):

        def picked(key, usual, their=their):
            patterns = (config.get(key) or {}).items()
            return next((x for p, x in patterns if re.match(rf"(.*\.)?({p})$", their)), usual)

        (a, b), r, rslora = (own["A"], own["B"]), len(own["A"]), bool(config.get("use_rslora"))
        if picked("rank_pattern", config["r"]) != r:
            raise ValueError(f"{their}: A has {r} rows; the configuration has another rank")
        if start == "pissa" and len(layers) > 1:
            raise ValueError(f"{their}: one PiSSA over what are {len(layers)} layers here")
        for i, (name, layer) in enumerate(layers.items()):
            table, part = isinstance(layer, Embedding), _parted(b, layers)[i]
            # What was stacked is parted again: a direction belongs to those that it reaches.
            keep = part.any(axis=0) | ~b.any(axis=0) | ("magnitude" in own)  # (r,)
            if not keep.any():
                continue
            part_a, part_b = a[keep], part[:, keep]
            rank = len(part_a) // (2 if marked and kind is PiSSA and not table else 1)
            dropout = 0 if table else config.get("lora_dropout") or 0
            alpha = picked("alpha_pattern", config["lora_alpha"]) * _ratio(rank, r, rslora)
            wrap = LoRAEmbedding if table else kind
            w = fresh[name] = wrap(layer, rank, alpha, dropout=dropout, rslora=rslora, rng=rng)
            if rank < len(part_a):  # the second half is what PiSSA began with, taken away
                began = w.scaling * (part_b[:, rank:] @ part_a[rank:])
                w.residual = Tensor((layer.dense() + began).astype(w.A.dtype))
            found |= {f"{name}.A": part_a[:rank], f"{name}.B": part_b[:, :rank]}
            if "magnitude" in own:
                found[f"{name}.magnitude"] = _parted(own["magnitude"], layers)[i]
    return fresh, found


def _ia3_in(model, config, arrays):
    fresh, found = {}, {}
    for _, layers, own in _read(model, arrays):
        scale, side = own["scale"], "out" if len(own["scale"]) > 1 else "in"
        parts = _parted(scale[:, 0], layers) if side == "out" else [scale[0]] * len(layers)
        for (name, layer), part in zip(layers.items(), parts, strict=True):
            fresh[name], found[f"{name}.scale"] = IA3(layer, side), part
    return fresh, found


def _prefix_in(model, config, arrays):
    e, rng = arrays[VIRTUAL], np.random.default_rng(0)
    attns, m = plain(model, "blocks.*.attn", "q k v o n_head"), len(e)
    room, parts = model.config["n_positions"] - m, np.split(e, 2 * len(attns), axis=1)
    fresh, found = {name: Prefix(attn, m, room, rng=rng) for name, attn in attns.items()}, {}
    for name, keys, values in zip(attns, parts[::2], parts[1::2], strict=True):
        found |= {f"{name}.keys": _turned(attns[name], keys, -m), f"{name}.values": values}
    if model.positions is not None:  # as after a past of m tokens
        fresh["positions"] = TokensFirst(model.positions, -m)
    return fresh, found


def _prompt_in(model, config, arrays):
    e, n = arrays[VIRTUAL], model.config["n_positions"]
    (tokens,) = plain(model, "tokens", Embedding, ties=True).values()
    fresh = {"tokens": Prompt(tokens, len(e), n, rng=np.random.default_rng(0))}
    return fresh | {"norm": WithoutPrompt(model.norm, len(e))}, {"tokens.prompt": e}


READERS = {"LORA": _lora_in, "IA3": _ia3_in}
READERS |= {"PREFIX_TUNING": _prefix_in, "PROMPT_TUNING": _prompt_in}
